"""What iterated DPO and iterated RLHF share: a plan of stages, its check before anything runs, a table of rounds.

May import: rich, launch.overrides, trainers.errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from launch.overrides import expect_command, load_config, read_sections
from trainers.errors import InputError

COMMANDS = {"label": "label", "held-out": "label", "train": "train", "reward": "train", "policy": "train",
            "eval": "eval"}  # fmt: skip
# What the next stage looks for is written, and where it looks.
ALWAYS: Mapping[str, Sequence[str]] = {
    "label": ("output.path=null", "output.format=parquet"),
    "train": ("checkpoint.export=true", "checkpoint.export_merged=true"),
    "eval": (),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What every round does.  ``keys``: further key=value of each stage, which have the last word."""

    model: str  # where every training begins, or the first one
    recipes: Mapping[str, str]  # of each stage
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Runner(Protocol):
    """launch.stages.Stages, or a stand-in."""

    directory: Path

    def run(self, name: str, arguments: Sequence[str], result: str) -> Path:
        """See launch.stages.Stages.run."""


class Checked:
    """Stands in for the stages: checks the configuration of each and runs nothing.  ``configs``: by stage name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configs: dict[str, Any] = {}

    def run(self, name: str, arguments: Sequence[str], result: str) -> Path:
        """Where the result would be.  InputError that names the stage and what is wrong with its configuration."""
        command, recipe, *overrides = arguments
        try:
            expect_command(read_sections(recipe)[2], command, recipe)
            config = load_config(recipe, overrides).config
        except InputError as error:
            raise InputError(f"stage {name}: {error.field}", error.value, error.reason, error.remedy) from error
        self.configs[name] = config
        return self.directory / result.replace("*", "000000")


def run_stage(
    stages: Runner, plan: Plan, name: str, stage: str, model: str, arguments: Sequence[str], result: str
) -> Path:
    """What the stage of a round left; ``name``: its run folder's."""
    command = COMMANDS[stage]
    own = [command, plan.recipes[stage], f"run.directory={stages.directory}", f"run.name={name}", f"model.path={model}"]
    return stages.run(name, [*own, *ALWAYS[command], *arguments, *plan.keys.get(stage, ())], f"{name}/{result}")


# --- what is said of a round ------------------------------------------------------------------


def report_of(file: Path | None) -> dict[str, Any]:
    """``eval.json``; empty where nothing was judged."""
    return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))


def deciding(report: Mapping[str, Any]) -> str:
    """Name of the reward that stands for the truth in a report, else of the one that says who wins."""
    return str(report.get("gold") or report.get("win_by"))


def estimate_at(report: Mapping[str, Any], *keys: str) -> dict[str, float] | None:
    """The estimate below ``keys``; None where it is not there."""
    found: Any = report
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) and "value" in found else None


def shown_estimate(value: Any) -> str:
    """A cell: an estimate with its interval, a number, or nothing."""
    if not isinstance(value, dict):
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    numbers = (value.get(key) for key in ("value", "low", "high"))
    shown = ["?" if number is None else f"{number:.3g}" for number in numbers]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def write_rows(
    rows: Sequence[Mapping[str, Any]], target: Path, title: str, columns: Sequence[str], console: Console
) -> None:
    """``rows`` as JSON into ``target`` and as a table on the console."""
    target.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(shown_estimate(value) for value in row.values()))
    console.print(table)
    console.print(f"numbers: {target}", markup=False, soft_wrap=True)
