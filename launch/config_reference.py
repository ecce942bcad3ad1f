"""The reference table of every configuration key, made from the models themselves.

``python -m launch.config_reference`` rewrites the table in docs/configuration.md; a test compares them.
May import: pydantic, launch.config, launch.config_keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from launch.config import RunConfig
from launch.config_keys import Slot, expected, slot_at

PAGE = "docs/configuration.md"
BEGIN = "<!-- begin of the table written by `python -m launch.config_reference` -->"
END = "<!-- end of the table -->"


@dataclass(frozen=True, slots=True)
class Entry:
    """One key that holds a value; items of lists appear under index 0."""

    key: str  # "learner.optimizer.lr"
    accepts: str  # in words
    default: str  # JSON, or "required"
    description: str


def entries(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Entry]:
    """Every key of ``model`` and of the models below it, in the order of their fields."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        section = section_of(info.annotation)
        if section is not None:
            yield from entries(section, f"{key}.0." if info.annotation not in _plain(section) else f"{key}.")
            continue
        slot = slot_at(RunConfig, _parts(key)) or Slot()
        default = "required" if info.is_required() else json.dumps(info.get_default(call_default_factory=True))
        yield Entry(key, expected(slot), default, slot.description)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in ``annotation``: itself, the one of ``Model | None``, or that of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(section_of, get_args(annotation)) if found is not None), None)


def _plain(section: type[BaseModel]) -> tuple[Any, ...]:
    """The annotations under which ``section`` is one section and not a list of them."""
    return section, section | None


def _parts(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def markdown() -> str:
    """The table: a heading for each top-level section, a row for each key."""
    lines: list[str] = []
    heading = ""
    for entry in entries():
        section = entry.key.split(".")[0]
        if section != heading:
            heading = section
            found = section_of(RunConfig.model_fields[section].annotation)
            summary = " ".join(((found.__doc__ if found else "") or "").split("\n\n")[0].split()).replace("``", "`")
            lines += ["", f"### {section}", "", summary, ""]
            lines += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        default = entry.default if entry.default == "required" else f"`{entry.default}`"
        cells = (f"`{entry.key}`", entry.accepts, default, entry.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"


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
    print(f"wrote {PAGE}: {sum(1 for _ in entries())} keys")
