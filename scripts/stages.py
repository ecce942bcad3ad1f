"""Stages of a longer experiment: each one a ``burnish`` command, skipped when its result is there already.

May import: rich, launch.journal.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

STAGE_DEADLINE_S = 3600.0


class StageError(Exception):
    """A stage that failed or did not end; the message says which and where its output is."""


class Stages:
    """Runs ``burnish`` commands one after the other and remembers how long each took."""

    def __init__(self, directory: Path, console: Console) -> None:
        self.directory, self.console = directory, console
        self._log = directory / "stages.json"
        self.seconds: dict[str, float] = json.loads(self._log.read_text()) if self._log.exists() else {}

    def run(self, name: str, arguments: Sequence[str], result: str) -> Path:
        """The one path that matches ``result`` (a glob below the directory) once ``burnish *arguments`` has ended.

        Raises:
            StageError: the command failed, took too long, or left no such path.
        """
        if name not in self.seconds:
            self.console.rule(f"{name}: burnish {' '.join(arguments[:2])}")
            started = time.perf_counter()
            command = [sys.executable, "-m", "launch.cli", *arguments]
            try:
                subprocess.run(command, check=True, timeout=STAGE_DEADLINE_S)
            except subprocess.CalledProcessError as error:
                raise StageError(f"{name} failed with exit code {error.returncode}: {' '.join(command)}") from error
            except subprocess.TimeoutExpired as error:
                raise StageError(f"{name} did not end in {STAGE_DEADLINE_S:g} s: {' '.join(command)}") from error
            self.seconds[name] = time.perf_counter() - started
            self._log.write_text(json.dumps(self.seconds, indent=2) + "\n")
        found = sorted(self.directory.glob(result))
        if not found:
            raise StageError(f"{name} left no {self.directory / result}; remove {self.directory} and start again")
        return found[-1]

    def cleared(self, name: str, folder: Path) -> None:
        """Remove what a stage began in its own run folder and did not end, so that it starts afresh."""
        if name not in self.seconds and folder.exists():
            self.console.print(f"{name} did not finish the last time: removing {folder}", markup=False)
            shutil.rmtree(folder)

    def fresh(self, name: str, folder: Path) -> None:
        """Say no to a folder that a stage began and did not end."""
        if name not in self.seconds and folder.exists():
            raise StageError(f"{folder} is there and {name} did not finish; remove it and run this again")
