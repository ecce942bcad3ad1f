"""One self-contained HTML page: tables, plots and samples, readable without a network, light and dark.

Nothing in the page is fetched or run: plots are data URIs, there is no script, and a content security policy
says so to the browser.  All text is escaped: completions are written by models.
May import: matplotlib (in the function that draws), trainers.calibration.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.calibration import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None | Estimate

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PROLOGUE = re.compile(r"<\?xml[^>]*\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", re.DOTALL)
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no HTML text, or no UTF-8
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5b6575; --paper: #fff; --card: #f4f6f9; --line: #d9dee6;
  --accent: #1f5fa8; --before: #b0603a; --after: #2f7d46; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa5b5; --paper: #14181f; --card: #1d232d;
  --line: #333c4a; --accent: #7fb2ee; --before: #e0996f; --after: #7cc793; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
nav a { color: var(--accent); margin-right: 1.1rem; white-space: nowrap; text-decoration: none; }
nav a:hover { text-decoration: underline; }
p { max-width: 46rem; margin: .6rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; color: var(--dim); padding-bottom: .4rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.interval { color: var(--dim); font-size: .88em; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.plots img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0;
  padding: .8rem 1rem; }
.sample h3 { margin: 0 0 .2rem; font-size: .8rem; font-weight: 600; color: var(--dim); }
.sample .before h3 { color: var(--before); }
.sample .after h3 { color: var(--after); }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .4rem 1.5rem; }
pre { margin: 0 0 .6rem; font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: var(--dim); font-size: .88rem; margin: 0; }
@media print { body { max-width: none; } .sample, .plots img, tr { break-inside: avoid; } nav { display: none; } }
""".strip()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under ``columns``; an Estimate shows its interval, None a dash.  ValueError for a ragged row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt answered before and after training."""

    prompt: str
    before: str
    after: str
    note: str = ""  # rewards, verdict


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what stands under it, in this order.  Paragraphs of ``text`` are parted by an empty line."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: tuple[str, ...] = ()  # SVG documents, see figure_svg
    samples: tuple[Sample, ...] = ()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    links = "".join(f'<a href="#s{n}">{_text(s.title)}</a>' for n, s in enumerate(sections, start=1))
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>\n{STYLE}\n</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            f"<nav>{links}</nav>",
            *(_section(number, section) for number, section in enumerate(sections, start=1)),
            "</body></html>\n",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def figure_svg(figure: Figure) -> str:
    """A matplotlib figure as an SVG document for :attr:`Section.plots`, letters as outlines."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": "burnish", "svg.fonttype": "path"}):  # the same figure gives the same bytes
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _section(number: int, section: Section) -> str:
    paragraphs = (p for p in re.split(r"\n\s*\n", section.text) if p.strip())
    parts = [f'<section id="s{number}"><h2>{_text(section.title)}</h2>', *(f"<p>{_text(p)}</p>" for p in paragraphs)]
    if section.table is not None:
        parts.append(_table(section.table))
    if section.plots:
        images = (_image(svg, f"{section.title}, plot {n}") for n, svg in enumerate(section.plots, start=1))
        parts.append(f'<div class="plots">{"".join(images)}</div>')
    parts.extend(_sample(sample) for sample in section.samples)
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    numeric = [any(isinstance(r[c], int | float | Estimate) for r in table.rows) for c in range(len(table.columns))]
    marks = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{mark}>{_text(name)}</th>" for name, mark in zip(table.columns, marks, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(cell: Cell) -> str:
    match cell:
        case None:
            return "–"
        case bool():
            return "yes" if cell else "no"
        case Estimate():
            interval = f"[{_number(cell.low)}, {_number(cell.high)}]"
            return f'{_number(cell.value)} <span class="interval">{interval} n={cell.n}</span>'
        case int() | float():
            return _number(cell)
        case _:
            return _text(cell)


def _number(value: float) -> str:
    if value != value:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _image(svg: str, description: str) -> str:
    """An SVG in an image of its own: its ids cannot meet those of the next plot, and scripts in it do not run."""
    if "<svg" not in svg:
        raise ValueError(f"{description} is no SVG document: {svg[:60]!r}")
    coded = base64.b64encode(PROLOGUE.sub("", svg).strip().encode()).decode()
    return f'<img alt="{_text(description)}" src="data:image/svg+xml;base64,{coded}">'


def _sample(sample: Sample) -> str:
    sides = "".join(
        f'<div class="{name}"><h3>{name}</h3><pre dir="auto">{_text(text) or "(empty)"}</pre></div>'
        for name, text in (("before", sample.before), ("after", sample.after))
    )
    note = f'<p class="note">{_text(sample.note)}</p>' if sample.note else ""
    prompt = f'<h3>prompt</h3><pre dir="auto">{_text(sample.prompt)}</pre>'
    return f'<div class="sample">{prompt}<div class="sides">{sides}</div>{note}</div>'


def _text(text: str) -> str:
    return html.escape(UNREADABLE.sub("\N{REPLACEMENT CHARACTER}", text))
