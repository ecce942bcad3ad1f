"""trace.json: the run on a time line, in the Trace Event Format that Perfetto and chrome://tracing open.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format)

The array form, whose closing bracket may be missing: events are appended by whole lines, so what a killed run leaves
opens as it is.  Size is bounded: a full file becomes trace.1.json, in the place of an earlier one, and a new file
goes on; the one that a start of the run finds goes the same way.
May import: trainers.{accounting, time_ledger}.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainers.accounting import Cause
from trainers.time_ledger import Count, Entry

LOGGER = logging.getLogger("burnish.launch")
NAME, EARLIER = "trace.json", "trace.1.json"
LIMIT_BYTES = 64 * 2**20  # about 400,000 events; Perfetto takes more, people do not
COUNTERS = 0  # the process of the counters; roles come after it


class TraceFile:
    """Appends entries and counts.  A full disk costs events, never the run.

    ``begun``: ns, the time that the trace calls 0.
    """

    def __init__(self, folder: Path, begun: int, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder, self._begun, self._limit = folder, begun, limit_bytes
        self._tracks: dict[str, tuple[int, int]] = {}  # worker -> (process, thread)
        self._roles: dict[str, int] = {}
        self._named: list[dict[str, Any]] = [_name("process_name", COUNTERS, 0, "run")]
        self._fd, self._size = -1, 0
        self._open()

    def write(self, entries: Iterable[Entry], counts: Iterable[Count], roles: Mapping[str, str]) -> None:
        """One slice an entry on its worker's track; time in which nothing was waited for stays empty."""
        new = [name for worker, role in roles.items() for name in self._track(worker, role)]
        if self._size > self._limit:
            self.close()
            self._open()
        self._append([*new, *(self._slice(e) for e in entries if e.cause != Cause.IDLE), *map(self._counter, counts)])

    def close(self) -> None:
        """With its bracket the file is JSON for everybody."""
        if self._fd >= 0:
            self._write(b"\n]\n")
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        path = self._folder / NAME
        if path.exists():
            os.replace(path, self._folder / EARLIER)
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self._size = 0
        self._append(self._named)

    def _track(self, worker: str, role: str) -> list[dict[str, Any]]:
        if worker in self._tracks:
            return []
        new = []
        if role not in self._roles:
            self._roles[role] = len(self._roles) + COUNTERS + 1
            new.append(_name("process_name", self._roles[role], 0, role))
        process, thread = self._roles[role], len(self._tracks) + 1
        self._tracks[worker] = process, thread
        new.append(_name("thread_name", process, thread, worker))
        self._named += new
        return new

    def _slice(self, entry: Entry) -> dict[str, Any]:
        process, thread = self._tracks[entry.worker]
        name = f"wait: {entry.whom}" if entry.cause == Cause.WAIT else str(entry.cause)
        return {
            "ph": "X", "name": name, "cat": str(entry.cause), "pid": process, "tid": thread,
            "ts": self._us(entry.start), "dur": (entry.end - entry.start) / 1e3, "args": dict(entry.attributes),
        }  # fmt: skip

    def _counter(self, count: Count) -> dict[str, Any]:
        return {
            "ph": "C", "name": count.name, "pid": COUNTERS, "ts": self._us(count.time),
            "args": {count.series: count.value},
        }  # fmt: skip

    def _us(self, time: int) -> float:
        return (time - self._begun) / 1e3

    def _append(self, events: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(event, separators=(",", ":")) for event in events]
        if lines:
            self._write((("[\n" if self._size == 0 else ",\n") + ",\n".join(lines)).encode())

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            return
        try:
            written = os.write(self._fd, data)
            if written < len(data):  # the rest of a torn event would make the file unreadable
                os.ftruncate(self._fd, self._size)
            else:
                self._size += written
        except OSError as error:
            LOGGER.error("events of %s are lost: %s", self._folder / NAME, error)


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
