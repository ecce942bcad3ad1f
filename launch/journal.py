"""JSON lines of a run folder: written so that a kill loses at most one row, read whatever a kill left.

May import: numpy.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LOGGER = logging.getLogger("burnish.launch")

MAX_HELD = 10_000  # rows, a few kB each


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, oldest first; none when it is missing.  Torn lines (a kill mid-write) are dropped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def strict(value: Any) -> Any:
    """``value`` as strict JSON: NaN and infinities become null, arrays lists, the unknown its ``str``."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(v) for v in value]
    return str(value)


class Journal:
    """An append-only JSONL file; every row is one write, so a kill loses at most the row being written.

    Rows that a full disk refuses are held, the last ``MAX_HELD`` of them, and written before the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._held: deque[bytes] = deque()
        self._is_refused = False

    def append(self, row: Mapping[str, Any]) -> bool:
        """Write one row and those held; False (and a line in the log for the first) when the disk refuses it."""
        self._held.append(json.dumps(strict(row), allow_nan=False).encode() + b"\n")
        if len(self._held) > MAX_HELD:
            self._held.popleft()
            LOGGER.error("a row of %s is lost: the disk has refused the last %d", self._path, MAX_HELD)
        return self._write()

    def _write(self) -> bool:
        while self._held:
            prefix = b"\n" if self._torn else b""  # a torn line before it must not swallow this one
            data = prefix + self._held[0]
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                self._say_once(str(error))
                return False
            if written:
                self._torn = written not in (len(prefix), len(data))
            if written < len(data) - 1:  # a row that lacks its end of line only is whole, and must not come twice
                self._say_once(f"{written} of {len(data)} bytes fitted")
                return False
            self._held.popleft()
        self._is_refused = False
        return True

    def _say_once(self, reason: str) -> None:
        """Until all rows are written again."""
        if not self._is_refused:
            LOGGER.error("rows of %s wait for room on the disk: %s", self._path, reason)
        self._is_refused = True

    def close(self) -> None:
        """Write what is held, if there is room now."""
        if self._fd >= 0:
            if not self._write():
                LOGGER.error("%d rows of %s are lost: the disk is still full", len(self._held), self._path)
            os.close(self._fd)
            self._fd = -1


def cut_after(folder: Path, step: int) -> int:
    """Move what was recorded after ``step`` out of the way; returns the number of metric rows moved.

    Metric rows go to metrics.superseded.jsonl (copied there before they leave, so a kill in between repeats
    rows in that file and loses none); later trajectory files get the suffix ``.superseded``.
    """
    path = folder / "metrics.jsonl"
    rows = list(read_rows(path))
    late = [row for row in rows if row["step"] > step]
    if late:
        with (folder / "metrics.superseded.jsonl").open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in late)
    if path.exists():  # rewritten even without late rows: a torn last line goes
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step), encoding="utf-8")
        os.replace(fresh, path)
    for file in (folder / "trajectories").glob("step-*.parquet"):
        if int(file.stem.removeprefix("step-")) > step:
            os.replace(file, file.with_name(file.name + ".superseded"))
    return len(late)
