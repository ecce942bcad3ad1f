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
from launch.config_keys import Slot, expected, models_of, slot_at
from launch.tuning_config import TuningConfig

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


def entries() -> list[Entry]:
    """Every key of a run that samples, then those that only a run of SFT or of a reward model has."""
    found = list(_entries(RunConfig, RunConfig))
    known = {entry.key for entry in found}
    return found + [entry for entry in _entries(TuningConfig, TuningConfig) if entry.key not in known]


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
    sampled = {entry.key for entry in _entries(RunConfig, RunConfig)}
    heading = ""
    for entry in entries():
        section = entry.key.split(".")[0]
        model, title = (RunConfig, section) if entry.key in sampled else (TuningConfig, f"{section} (sft, reward)")
        if title != heading:
            heading = title
            text = " ".join(found.__doc__ or "" for found in sections_of(model.model_fields[section].annotation)[:1])
            summary = " ".join(text.split("\n\n")[0].split()).replace("``", "`")
            lines += ["", f"### {title}", "", summary, ""]
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
    print(f"wrote {PAGE}: {len(entries())} keys")
