"""The accounting of a run: its time ledger, its trace file, its accounting.json and the table at its end.

May import: rich, trainers.{accounting, bubbles, time_ledger}, launch.trace_file.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.trace_file import TraceFile
from trainers.accounting import Cause
from trainers.bubbles import SHOWN_LOSSES, RoleTime, Setting, advice, by_role, metrics
from trainers.time_ledger import TimeLedger

LOGGER = logging.getLogger("burnish.launch")
NAME = "accounting.json"


class Accountant:
    """One start of a run, from its first worker to :meth:`close`."""

    def __init__(self, folder: Path, setting: Setting, clock: Callable[[], int] = time.monotonic_ns) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._setting = folder / NAME, setting
        self.ledger = TimeLedger(clock)
        self._trace = TraceFile(folder, self.ledger.begun)

    def settle(self, *, final: bool = False) -> dict[str, float]:
        """Metrics of the time since the last call, which is in the trace and the totals now."""
        entries, counts = self.ledger.settle(final=final)
        self._trace.write(entries, counts, self.ledger.roles)
        found = metrics(entries, self.ledger.roles)
        self._save()
        return found

    def close(self) -> None:
        """Everything up to now is written down, the trace is closed."""
        self.settle(final=True)
        self._trace.close()

    def report(self) -> dict[str, Any]:
        """The contents of accounting.json, see docs/accounting.md."""
        totals, roles = self.ledger.totals, self.ledger.roles
        return {
            "roles": [_row(role, self._setting) for role in by_role(totals, roles)],
            "workers": {
                worker: {
                    "role": role,
                    "wall_ns": sum(totals[worker].values()),
                    "causes_ns": {
                        str(cause) + (f": {whom}" if whom else ""): duration
                        for (cause, whom), duration in sorted(totals[worker].items())
                    },
                }
                for worker, role in roles.items()
            },
        }

    def _save(self) -> None:
        fresh = self._path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(self.report(), indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, self._path)
        except OSError as error:
            LOGGER.error("%s was not written: %s", self._path, error)


def _row(role: RoleTime, setting: Setting) -> dict[str, Any]:
    running = role.running
    return {
        "role": role.role,
        "num_workers": role.num_workers,
        "wall_s": role.wall / 1e9,
        "start_s": (role.wall - running.wall) / 1e9,
        "useful_fraction": running.useful_fraction,
        "losses": [
            {"cause": f"wait for {whom}" if cause == Cause.WAIT else str(cause), "fraction": share}
            for cause, whom, share in running.losses
        ],
        "help": advice(role, setting),
    }


BUBBLE_COLUMNS = ("role", "workers", "start", "useful", "the rest", "what would help")


def bubble_rows(folder: Path) -> list[tuple[str, ...]] | None:
    """Where the time of the run's last start went, as cells under BUBBLE_COLUMNS; None without accounting.json."""
    path = folder / NAME
    if not path.is_file():
        return None
    rows: list[tuple[str, ...]] = []
    for row in json.loads(path.read_text(encoding="utf-8"))["roles"]:
        rest = [f"{loss['cause']} {loss['fraction']:.0%}" for loss in row["losses"] if loss["fraction"] >= 0.005]
        rows.append((
            str(row["role"]), str(row["num_workers"]), f"{row['start_s'] / row['num_workers']:.0f} s",
            f"{row['useful_fraction']:.0%}", ", ".join(rest[:SHOWN_LOSSES]), str(row["help"]),
        ))  # fmt: skip
    return rows


def bubble_table(folder: Path) -> Table | None:
    """The same for the terminal."""
    rows = bubble_rows(folder)
    if rows is None:
        return None
    table = Table(title="where the time went")
    for title in BUBBLE_COLUMNS:
        # Folded, not cut: on a narrow terminal the names of settings are what the reader needs whole.
        table.add_column(title, justify="right" if title in ("workers", "start", "useful") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
