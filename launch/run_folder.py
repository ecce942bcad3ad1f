"""A run's folder: one process at a time works in it, and a resumed run replaces only what it wrote itself.

So does a stage of an experiment (launch/stages.py), whose folder comes and goes: its lock lies beside it.

The lock is the kernel's: it goes with the process that holds it, however that ends.  What a run wrote is known by its
digest, which stands in the folder before the file is in its place, so no kill comes between the two.
May import: trainers.errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from trainers.errors import InputError

LOCK, WRITTEN = ".lock", "written.json"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of a file system that has none
BLOCK = 2**22  # bytes read at a time
LEASE_S = 120.0  # longer than NFS servers keep the locks of a client that they do not hear of
RETRY_S, SHORT_S = 5.0, 0.05
P = TypeVar("P")
logger = logging.getLogger("burnish.launch")


@contextlib.contextmanager
def entered(folder: Path, resume: bool, check: Callable[[], object], prepare: Callable[[], P]) -> Iterator[P]:
    """What ``prepare`` returns, in a folder that is the run's and nobody else's.

    A new run's folder is made once everything was prepared, and goes again if the block leaves nothing in it.

    Args:
        check: refuses a folder that the run cannot have; called again once it is ours.

    Raises:
        InputError: whatever these refuse, or another process works there.
    """
    with contextlib.ExitStack() as stack:
        check()
        if resume:
            stack.enter_context(only_process_in(folder))
        prepared = prepare()
        if not resume:
            absent = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, absent)
            stack.enter_context(only_process_in(folder))
            stack.callback(_unlock_empty, folder)  # as long as the lock is ours
            check()  # another run may have come meanwhile
        yield prepared


def _unlock_empty(folder: Path) -> None:
    if not is_taken(folder):
        (folder / LOCK).unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # it holds something
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; two processes would interleave and cut each other's records.

    Raises:
        InputError: another process holds it.
    """
    remedy = "wait until it has ended, or end it, then --resume; or choose another run.name"
    with held(folder / LOCK, lambda who: InputError("run.name", folder.name, f"{who} works in {folder}", remedy)):
        yield


@contextlib.contextmanager
def held(
    file: Path, refused: Callable[[str], Exception], patience_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:  # fmt: skip
    """Hold the lock ``file``, which is made where there is none and stays.

    Who holds it on this machine is alive, and is waited for ``patience_s`` seconds.  On another machine it may have
    gone with the machine, whose locks a file server keeps for a while: that is waited for, up to LEASE_S seconds.

    Args:
        refused: the error where another process holds it, from who that is.
    """
    began = clock()
    while isinstance(found := _locked(file), str):
        is_here = found.endswith(f" on {os.uname().nodename}")
        left = began + (patience_s if is_here else LEASE_S) - clock()
        if left <= 0:
            raise refused(found)
        if not is_here:
            logger.warning("%s holds %s; waiting up to %g s, in case that machine is gone", found, file, left)
        sleep(min(left, RETRY_S if not is_here else SHORT_S))  # a lock that the kernel waits for has no deadline
    try:
        os.ftruncate(found, 0)
        os.pwrite(found, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(found)


def _locked(file: Path) -> int | str:
    """The open lock, or who has it."""
    lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(lock, 200, 0).decode(errors="replace").strip()
        os.close(lock)
        return who or f"another process on {os.uname().nodename}"
    except OSError as error:
        if error.errno not in NO_LOCKS:  # where no lock is to be had, a run is as safe as it was without
            os.close(lock)
            raise
    if not _is_there(file, lock):  # who had it removed it with the folder: there is, or will be, another one
        os.close(lock)
        return f"another process on {os.uname().nodename}"
    return lock


def _is_there(file: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


def is_taken(folder: Path, but: Sequence[str] = ()) -> bool:
    """Whether a run left something in ``folder``, which may be absent; what is called as in ``but`` does not count."""
    return folder.exists() and any(entry.name not in (LOCK, *but) for entry in folder.iterdir())


def check_replaceable(folder: Path, target: Path) -> None:
    """InputError where ``target`` is there and the run in ``folder`` did not write it as it is."""
    known = _written(folder)
    if target.exists() and not (known and target.is_file() and digest_of_file(target) in known):
        raise InputError("output.path", str(target), "exists already, and this run did not write it as it is now",
                         "name another file, or move it away")  # fmt: skip


def replace_with(fresh: Path, target: Path, folder: Path) -> None:
    """Rename ``fresh`` to ``target`` as something that the run in ``folder`` wrote.

    Raises:
        InputError: what is there is not the run's.
    """
    check_replaceable(folder, target)
    known = [*_written(folder), digest_of_file(fresh)]
    record = folder / f".{WRITTEN}.tmp"
    record.write_text(json.dumps(list(dict.fromkeys(known)), indent=2) + "\n")
    os.replace(record, folder / WRITTEN)
    os.replace(fresh, target)


def digest_of_file(file: Path) -> str:
    """32 hexadecimal digits of its content."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _written(folder: Path) -> list[str]:
    """Digests of what the run in ``folder`` wrote so far."""
    file = folder / WRITTEN
    return [str(digest) for digest in json.loads(file.read_text())] if file.exists() else []
