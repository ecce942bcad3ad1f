"""The folder of ``make chaos``: what was planned and what became of each run, so that one that was stopped can go on.

    chaos.json           the plan
    NAME.outcome.json    of a run that is over, whatever became of it; it is not run again
May import: scripts.{chaos_run, faults} (types).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.chaos_run import Outcome, RunOutcome
from scripts.faults import Fault

PLAN = "chaos.json"


class FolderError(Exception):
    """This folder cannot be used; one line with the remedy."""


@dataclass(frozen=True)
class Planned:
    """One run."""

    name: str
    family: str
    seed: int
    num_steps: int
    faults: tuple[Fault, ...] = ()


def open_folder(directory: Path, planned: Sequence[Planned]) -> None:
    """Make it, or go on with one of the same plan.

    Raises:
        FolderError: there is another plan in it, or something else.
    """
    plan = json.loads(json.dumps([asdict(p) for p in planned]))
    path = directory / PLAN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise FolderError(f"{directory} has the runs of another schedule; remove it or give another --directory")
        return
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        reason = f"{directory} exists already and is not of chaos"
        raise FolderError(f"{reason}; remove it or give another --directory") from None
    path.write_text(json.dumps(plan) + "\n", encoding="utf-8")


def write_outcome(directory: Path, outcome: RunOutcome) -> None:
    """Once a run is over and its folder lies in ``directory``."""
    part = directory / f"{outcome.name}.outcome.part"
    part.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    part.replace(_path(directory, outcome.name))


def read_outcome(directory: Path, name: str) -> RunOutcome | None:
    """None: the run was not begun, or not to its end."""
    try:
        found: dict[str, Any] = json.loads(_path(directory, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    faults = [Outcome(**(row | {"victims": tuple(row["victims"])})) for row in found.pop("faults")]
    return RunOutcome(**found, faults=faults)


def clear(directory: Path, name: str) -> None:
    """Take away what a run that was stopped in the middle has left."""
    for path in (directory / name, directory / f"{name}-ray"):
        shutil.rmtree(path, ignore_errors=True)
    (directory / f"{name}.log").unlink(missing_ok=True)


def _path(directory: Path, name: str) -> Path:
    return directory / f"{name}.outcome.json"
