"""The reference table of every configuration key, made from the models themselves.

``python -m launch.config_reference`` rewrites the table in docs/configuration.md; a test compares them.
May import: pydantic, launch.config_keys, and the six files of this room that define a configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from launch.compare_config import CompareConfig
from launch.config import RunConfig
from launch.config_keys import Slot, expected, models_of, slot_at
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.revise_config import ReviseConfig
from launch.select_config import SelectConfig
from launch.tuning_config import TuningConfig

PAGE = "docs/configuration.md"
BEGIN = "<!-- begin of the table written by `python -m launch.config_reference` -->"
END = "<!-- end of the table -->"
# Configuration -> what stands behind a section's name where a key is in none of those before.
KINDS: dict[type[BaseModel], str] = {
    RunConfig: "",
    TuningConfig: "sft, reward, dpo",
    LabelConfig: "label",
    EvalConfig: "eval",
    ReviseConfig: "revise",
    SelectConfig: "select",
    CompareConfig: "compare",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key that holds a value; items of lists appear under index 0."""

    key: str  # "learner.optimizer.lr"
    accepts: str  # in words
    default: str  # JSON, or "required"
    description: str


def entries() -> list[Entry]:
    """Every key of a run that samples, then those that only the other kinds of runs have."""
    return [entry for _, found in _by_kind() for entry in found]


def _by_kind() -> Iterator[tuple[type[BaseModel], list[Entry]]]:
    """Each configuration with the keys that none before it has."""
    known: set[str] = set()
    for kind in KINDS:
        of_kind = {entry.key: entry for entry in _entries(kind, kind)}  # one row for what several algorithms have
        found = [entry for key, entry in of_kind.items() if key not in known]
        known |= {entry.key for entry in found}
        yield kind, found


def _entries(root: type[BaseModel], model: type[BaseModel], prefix: str = "") -> Iterator[Entry]:
    """Every key of ``model`` and of the models below it, in the order of their fields."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        sections = sections_of(info.annotation)
        for section in sections:
            plain = section in models_of(info.annotation)
            yield from _entries(root, section, f"{key}." if plain else f"{key}.0.")
        if not sections:
            slot = slot_at(root, _parts(key)) or Slot()
            default = "required" if info.is_required() else json.dumps(info.get_default(call_default_factory=True))
            yield Entry(key, expected(slot), default, slot.description)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The models in ``annotation``: itself, those of a union, or those of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(found for part in get_args(annotation) for found in sections_of(part)))


def _parts(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def markdown() -> str:
    """The table: a heading for each top-level section, a row for each key."""
    lines: list[str] = []
    for kind, found in _by_kind():
        for section, rows in groupby(found, key=lambda entry: entry.key.split(".")[0]):
            title = f"{section} ({KINDS[kind]})" if KINDS[kind] else section
            text = " ".join(m.__doc__ or "" for m in sections_of(kind.model_fields[section].annotation)[:1])
            summary = " ".join(text.split("\n\n")[0].split()).replace("``", "`")
            lines += ["", f"### {title}", "", summary, ""]
            lines += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |", *map(_row, rows)]
    return "\n".join(lines).strip() + "\n"


def _row(entry: Entry) -> str:
    default = entry.default if entry.default == "required" else f"`{entry.default}`"
    cells = (f"`{entry.key}`", entry.accepts, default, entry.description)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def renewed(page: str) -> str:
    """``page`` with the table between its two markers written anew; ValueError when a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: needs the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    target = Path(__file__).parent.parent / PAGE
    target.write_text(renewed(target.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}: {len(entries())} keys")
