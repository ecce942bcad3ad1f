"""A run's folder: one process at a time works in it, and a resumed run replaces only what it wrote itself.

So does a stage of an experiment (launch/stages.py), whose folder comes and goes: its lock lies beside it.

The lock is the kernel's: it goes with the process that holds it, however that ends.  What a run wrote is known by its
digest, which stands in the folder before the file is in its place, so no kill comes between the two.
May import: trainers.errors, launch.run_identity.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from launch.run_identity import RunIdentity
from trainers.errors import InputError

LOCK, WRITTEN = ".lock", "written.json"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of a file system that has none
BLOCK = 2**22  # bytes read at a time


class Prepared(Protocol):
    """Checked inputs of a run."""

    @property
    def identity(self) -> RunIdentity: ...


P = TypeVar("P", bound=Prepared)


@contextlib.contextmanager
def entered(
    folder: Path, resume: bool, check: Callable[[], object], prepare: Callable[[], P], manifest: str
) -> Iterator[P]:
    """What ``prepare`` checked, in a folder that is the run's and nobody else's.

    Args:
        check: refuses a folder that the run cannot have; called again once it is ours.
        manifest: name of the file that a resumed run has to agree with.

    Raises:
        InputError: whatever these refuse, or another process works there.
    """
    with contextlib.ExitStack() as stack:
        check()
        if resume:
            stack.enter_context(only_process_in(folder))
        prepared = prepare()
        if resume:
            prepared.identity.check(folder / manifest)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_process_in(folder))
            check()  # another run may have come meanwhile
        yield prepared


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
def held(file: Path, refused: Callable[[str], InputError]) -> Iterator[None]:
    """Hold the lock ``file``, which is made where there is none and stays.

    Args:
        refused: the error where another process holds it, from who that is.
    """
    lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            raise refused(who) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:  # where no lock is to be had, a run is as safe as it was without
                raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def is_taken(folder: Path) -> bool:
    """Whether a run left something in ``folder``, which may be absent."""
    return folder.exists() and any(entry.name != LOCK for entry in folder.iterdir())


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
