"""Rows of results, their targets, and their place in docs/benchmarks.md.

A section of the page lies between two markers.  ``results`` is written as a whole; in ``asynchrony`` each row
replaces the one of the same name, so that benchmarks can be measured one at a time.
May import: benchmarks.process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.process import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"  # of the section ``results``
COLUMNS = ("what (baseline)", "Burnish", "baseline", "ratio", "target", "")
# name -> (which way is better, target ratio); without a target a ratio is reported and nothing is claimed.
TARGETS = {
    "generation": ("at least", 0.95),
    "learner": ("at least", 1.0),
    "memory": ("at most", 0.33),
    "push": ("at most", 1.5),
    "step": ("at most", 1.15),
    "scoring": ("at least", 0.9),
    "ppo": ("at most", 1.15),
    "trl shipped": ("at least", 2.5),
    "trl tuned": ("at least", 1.5),
    "asynchrony": ("at least", 1.6),
    "pipeline": ("at least", 0.9),
    "rollouts": ("at least", 1.8),
    "scaled 3": ("at least", 2.7),
    "scaled 2": ("at least", 1.8),
    "pause": ("at most", 1.5),
    "checkpoint": ("at most", 1.2),
    "replacement": ("at most", 1.0),
    "survivors": ("at least", 0.95),
}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    what: str
    ours: str
    baseline: str
    ratio: float | None = None
    target: str = ""  # a key of TARGETS
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """what, ours, baseline, ratio, target, met."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        if self.target not in TARGETS:
            return self.what, self.ours, self.baseline, ratio, "", self.note
        way, limit = TARGETS[self.target]
        met = "not measured"
        if self.ratio is not None:
            met = "met" if (self.ratio <= limit if way == "at most" else self.ratio >= limit) else "not met"
        verdict = ", ".join(x for x in (met, self.note) if x)
        return self.what, self.ours, self.baseline, ratio, f"{way} {limit:g}", verdict


def markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A whole table; a column named "ratio" stands to the right."""
    rule = "|" + "|".join("---:" if column == "ratio" else "---" for column in columns) + "|"
    return "\n".join([markdown_line(columns), rule, *(markdown_line(row) for row in rows)])


def section_of(page: str, name: str) -> str:
    """What stands between the markers of section ``name``.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = BEGIN.replace("results", name), END.replace("results", name)
    _, found, rest = page.partition(begin)
    inside, closed, _ = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"docs/benchmarks.md has no {begin} ... {end}")
    return inside.strip("\n")


def replace_section(page: str, text: str, name: str = "results") -> str:
    """``page`` with everything between the markers of section ``name`` replaced by ``text``."""
    section_of(page, name)
    begin, end = BEGIN.replace("results", name), END.replace("results", name)
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def renewed_rows(text: str, rows: Sequence[Row]) -> str:
    """A table with the lines of ``rows`` renewed, or added at its end, and every other line as it was."""
    fresh = {row.what: markdown_line(row.cells()) for row in rows}
    lines = []
    for line in text.splitlines():
        what = line.removeprefix("| ").partition(" | ")[0]
        lines.append(fresh.pop(what, line) if line.startswith("| ") else line)
    last = max((i for i, line in enumerate(lines) if line.startswith("|")), default=len(lines) - 1)
    return "\n".join([*lines[: last + 1], *fresh.values(), *lines[last + 1 :]])
