"""A `burnish train` in a process of its own that is looked at, and hurt, while it goes on.

It is ended when enough was seen: no run has to save and export for a measurement.
May import: psutil, benchmarks.*, launch.journal.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.process import MeasurementError, end, environment, last_lines, start
from launch.journal import read_rows

DRIVER = "launch.cli"
PREFIX = "ray::burnish-"  # of the processes of workers: cluster/workers.py
LOOK_S = 0.25  # between two looks at a file
ENDLESS = 1000  # steps: generators have work until the run is ended
Row = dict[str, Any]  # of metrics.jsonl or events.jsonl


@dataclass(frozen=True)
class LiveRun:
    """A run that goes on, and its folder."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def rows(self, name: str) -> list[Row]:
        """Of ``metrics.jsonl`` or ``events.jsonl``, so far."""
        return list(read_rows(self.folder / name))

    def until(self, name: str, found: Callable[[Row], bool], what: str, deadline_s: float) -> Row:
        """The first row of a file that ``found`` accepts.

        Raises:
            MeasurementError: the run ended before, or ``deadline_s`` seconds passed.
        """
        ends = time.monotonic() + deadline_s
        while True:
            ended = self.process.poll() is not None  # before the look: what it wrote last counts
            for row in self.rows(name):
                if found(row):
                    return row
            if ended:
                raise MeasurementError(f"the run ended with {self.process.returncode} before {what}: {self.said()}")
            left = ends - time.monotonic()
            if left <= 0:
                raise MeasurementError(f"waited {deadline_s:g} s for {what} of a run: {self.said()}")
            try:
                self.process.wait(min(LOOK_S, left))
            except subprocess.TimeoutExpired:
                continue

    def step(self, step: int, deadline_s: float) -> Row:
        """The row of metrics of ``step``, once it is there."""
        return self.until("metrics.jsonl", lambda row: row["step"] == step, f"step {step}", deadline_s)

    def kill_worker(self, role: str, index: int) -> None:
        """SIGKILL for the process of one worker.

        Raises:
            MeasurementError: there is none of that name.
        """
        wanted = f"{role}-{index}"
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # helpers of Ray's come and go
                if worker_of(process.cmdline()) == wanted:
                    process.kill()
                    return
        raise MeasurementError(f"no process of the run is {wanted}")

    def said(self) -> str:
        return last_lines(self.log)


def worker_of(command: Sequence[str]) -> str | None:
    """``generator-0`` of the process that Ray calls ``ray::burnish-generator-0.generate``; None of any other."""
    title = " ".join(command).strip()
    return title.removeprefix(PREFIX).partition(".")[0] if title.startswith(PREFIX) else None


@contextmanager
def live_run(
    recipe: str, overrides: Sequence[str], *, driver: str = DRIVER, num_cores: int | None = None
) -> Iterator[LiveRun]:
    """A run that is ended, with all of its workers, when the block is left.

    Args:
        driver: the module that takes the arguments of `burnish`.
        num_cores: how many cores the whole run may use.
    """
    directory = Path(tempfile.mkdtemp(prefix="burnish-bench-live-"))
    arguments = ["train", recipe, *overrides, f"run.directory={directory}", "run.name=run"]
    log = directory / "log"
    try:
        # The system sets its workers' environment itself.
        process = start(driver, arguments, log, variables=environment(preload=False), num_cores=num_cores)
        try:
            yield LiveRun(directory / "run", process, log)
        finally:
            end(process)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
