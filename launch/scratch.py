"""Scratch folders in shared memory that do not outlive their run, not even one that was killed.

The owner holds a lock on a file of its folder; the kernel lets go of it when the owner ends, however
that happens.  Whoever makes a folder removes those nobody owns any more.
May import: the standard library.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, OWNER = "burnish-", ".owner"


def make_scratch(parent: Path, name: str) -> Path:
    """A new folder below ``parent`` that belongs to this process for as long as it lives."""
    remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}-", dir=parent))
    lock = os.open(folder / OWNER, os.O_CREAT | os.O_RDWR, 0o600)  # stays open: it is the claim
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove scratch folders whose owner is gone; returns them."""
    removed = []
    for owner in parent.glob(f"{PREFIX}*/{OWNER}"):
        try:
            lock = os.open(owner, os.O_RDWR)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(owner.parent, ignore_errors=True)
            removed.append(owner.parent)
        finally:
            os.close(lock)
    return removed
