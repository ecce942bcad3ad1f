"""StateWriter: a rank's snapshot goes to the disk in a thread, while the rank trains on.

    begin(path, take) --> thread: write_shard --> outcome(): None ... None, SaveOutcome

A disk that refuses is an outcome and not an exception: it costs the checkpoint, not the rank.
May import: actors.shards, cluster.manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from actors.shards import Snapshot, write_shard
from cluster.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class SaveBegun:
    """A rank has a copy of its state."""

    stop_s: float  # seconds that the rank could not train
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    """A rank has ended writing."""

    files: dict[str, FileEntry]  # by name in the directory; synced and hashed
    write_s: float
    error: str | None = None  # why the disk refused; then there are no files


class StateWriter:
    """One write at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[SaveOutcome] | None = None

    def begin(
        self, path: Path, take: Callable[[], Snapshot], beside: Callable[[Path], dict[str, FileEntry]] | None = None
    ) -> Snapshot:
        """Take a snapshot, here and now, and write it to ``path`` in the thread.

        ``beside``: writes more into the folder of ``path``, in the thread too; returns its files by name.

        Raises:
            RuntimeError: the outcome of the one before has not been taken.
        """
        if self._writing is not None:
            raise RuntimeError(f"{path}: the save before it is not over, or nobody asked for its outcome")
        snapshot = take()
        self._writing = self._thread.submit(_write, path, snapshot, beside)
        return snapshot

    def outcome(self, wait_s: float = 0.0) -> SaveOutcome | None:
        """What became of the write, once; None while it goes on, after at most ``wait_s`` seconds.

        Raises:
            RuntimeError: there is none.
        """
        if self._writing is None:
            raise RuntimeError("no save was begun")
        if not wait([self._writing], wait_s).done:
            return None
        written, self._writing = self._writing, None
        return written.result()

    def close(self) -> None:
        """Begin nothing more; what is being written is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _write(
    path: Path, snapshot: Snapshot, beside: Callable[[Path], dict[str, FileEntry]] | None = None
) -> SaveOutcome:
    started = time.perf_counter()
    try:
        files = {path.name: write_shard(path, snapshot)}
        if beside is not None:
            files |= beside(path.parent)
    except OSError as error:
        return SaveOutcome({}, time.perf_counter() - started, str(error))
    return SaveOutcome(files, time.perf_counter() - started)
