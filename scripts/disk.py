"""A disk that can be filled under a live run without filling the machine's.

    may mount      a tmpfs of limited size holds the run folder; a filler file takes its room     ENOSPC
    may not        the ranks, which write the large files, get a limit on the size of a file      EFBIG
The second way needs no privilege.  It reaches the same code, an OSError in the middle of a write, with another number;
``how`` says which one it is.
May import: psutil.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil

SIZE_BYTES = 256 * 2**20
LEFT_BYTES = 512 * 2**10  # on a full disk: some steps' rows fit, the ranks' part of a checkpoint does not
FILE_BYTES = 64 * 2**10  # the largest file of a rank with a limit
MOUNT_DEADLINE_S = 20.0
FILLER = ".filler"
FILL_TRIES = 10


class Disk(Protocol):
    """Where run folders lie."""

    folder: Path
    how: str  # it is filled, in words

    def fill(self, writers: Sequence[psutil.Process]) -> None: ...

    def free(self) -> None: ...

    def close(self) -> None:
        """Nothing of it stays."""


class SmallDisk:
    """A tmpfs at ``folder``.  OSError, with what mount said, where this process may not mount."""

    how = f"a filler file on a tmpfs of {SIZE_BYTES >> 20} MiB (ENOSPC)"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_mount():  # of one that was killed
            _command("umount", "--lazy", str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        _command("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},mode=0700", "burnish-chaos", str(folder))

    def fill(self, writers: Sequence[psutil.Process]) -> None:
        descriptor = os.open(self.folder / FILLER, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            for _ in range(FILL_TRIES):
                room = self._room()
                if room <= LEFT_BYTES:
                    break
                with contextlib.suppress(OSError):  # the run has written meanwhile: there is less room to take now
                    os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, room - LEFT_BYTES)
        finally:
            os.close(descriptor)

    def _room(self) -> int:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    def free(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        # Lazily: a process that outlived its run may still have a file of it open.
        _command("umount", "--lazy", str(self.folder))
        self.folder.rmdir()


class FileLimit:
    """A plain folder; a full disk is a limit on the size of any file that the writers write."""

    how = f"a limit of {FILE_BYTES >> 10} KiB a file for the ranks (RLIMIT_FSIZE, EFBIG): this process may not mount"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._limits: list[tuple[psutil.Process, tuple[int, int]]] = []

    def fill(self, writers: Sequence[psutil.Process]) -> None:
        for process in writers:
            with contextlib.suppress(psutil.NoSuchProcess):
                before = process.rlimit(psutil.RLIMIT_FSIZE)
                process.rlimit(psutil.RLIMIT_FSIZE, (FILE_BYTES, before[1]))
                self._limits.append((process, before))

    def free(self) -> None:
        while self._limits:
            process, before = self._limits.pop()
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, before)

    def close(self) -> None:
        self.free()


def open_disk(folder: Path) -> Disk:
    """The first of the two ways that this process may go."""
    try:
        return SmallDisk(folder)
    except OSError:
        return FileLimit(folder)


def _command(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=MOUNT_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{words[0]} did not end in {MOUNT_DEADLINE_S:g} s") from error
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
