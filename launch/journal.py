"""JSON lines of a run folder: written so that a kill loses at most one row, read whatever a kill left.

May import: numpy.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LOGGER = logging.getLogger("burnish.launch")


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
    """An append-only JSONL file; every row is one write, so a kill loses at most the row being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def append(self, row: Mapping[str, Any]) -> bool:
        """Write one row; False (and one line in the log) when the disk refuses it."""
        line = json.dumps(strict(row), allow_nan=False).encode() + b"\n"
        data = b"\n" + line if self._torn else line  # a torn line before it must not swallow this one
        try:
            self._torn = os.write(self._fd, data) < len(data)
        except OSError as error:
            LOGGER.error("a row of %s is lost: %s", self._path, error)
            return False
        return not self._torn

    def close(self) -> None:
        if self._fd >= 0:
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
