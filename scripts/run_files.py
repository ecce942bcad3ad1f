"""The journals of a run folder, read while they grow.

May import: the standard library.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

JOURNALS = ("events.jsonl", "metrics.jsonl")


class Tail:
    """New rows of one journal.  A resumed run writes metrics.jsonl anew; rows that were given before come once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self._newest = 0.0  # time_unix of the last row given

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines since the last call; a torn one waits for its rest or, followed by another, is left out."""
        try:
            found = self._path.stat()
            if (found.st_ino, found.st_size) == (self._inode, self._offset):
                return []
            with self._path.open("rb") as file:
                opened = os.fstat(file.fileno())
                if opened.st_ino != self._inode or opened.st_size < self._offset:
                    self._inode, self._offset = opened.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        fresh = []
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and float(row.get("time_unix", 0.0)) > self._newest:
                fresh.append(row)
        if fresh:
            self._newest = float(fresh[-1]["time_unix"])
        return fresh


class RunTail:
    """New rows of both journals, in the order of their time.  Events have a ``kind``, rows of metrics have none."""

    def __init__(self, folder: Path) -> None:
        self._tails = [Tail(folder / name) for name in JOURNALS]

    def rows(self) -> list[dict[str, Any]]:
        return sorted((row for tail in self._tails for row in tail.rows()), key=lambda row: float(row["time_unix"]))
