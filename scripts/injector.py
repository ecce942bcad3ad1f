"""What a fault does to the processes of a live run, which are found from outside by their titles.

    ray::burnish-<role>-<index>[.method]     one actor (cluster/workers.py)
May import: psutil, scripts.{disk, faults}.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from scripts.disk import Disk
from scripts.faults import KINDS, Act, Fault

TITLE = re.compile(r"ray::burnish-(.+?)-(\d+)(?![\d-])")
STOPPED_S, RUNNING_S = 0.15, 0.05  # of a slow process, by turns
SLOW_LIMIT_S = 120.0  # then it is let go, whatever is waited for
WRITERS = ("learner", "critic")  # roles that write the large files of a checkpoint


class NobodyThereError(LookupError):
    """The run has no process of that kind at this moment."""


class Effect(Protocol):
    """A cause that goes on."""

    def end(self) -> None:
        """Take it away; nothing when it has gone."""


def name_of(title: str) -> str | None:
    """``generator-1`` of a process title, as events call the worker; None for other processes."""
    found = TITLE.match(title)
    return None if found is None else f"{found[1].replace('-', '.')}-{found[2]}"


@dataclass(frozen=True)
class Processes:
    """Of a run at one moment; the look takes longer than a push of a tiny model."""

    all: tuple[psutil.Process, ...]  # what the driver has started, and what those have; the workers
    workers: Mapping[str, psutil.Process]  # the actors by name; one that is being replaced may be missing


def processes_of(driver: int) -> Processes:
    """None when it has ended."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = psutil.Process(driver).children(recursive=True)
    return Processes(tuple(processes), workers_among(processes))


def workers_among(processes: Iterable[psutil.Process]) -> dict[str, psutil.Process]:
    """The actors, by name."""
    found: dict[str, psutil.Process] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            name = name_of(" ".join(process.cmdline()))
            if name is not None:
                found[name] = process
    return found


def chosen(names: Iterable[str], role: str, choice: float) -> str:
    """One worker of a role; ``choice`` in [0, 1)."""
    able = sorted(name for name in names if name.rpartition("-")[0] == role)
    if not able:
        raise NobodyThereError(f"there is no {role}")
    return able[int(choice * len(able))]


class Gone:
    """Nothing to take away."""

    def end(self) -> None:
        return


class Frozen:
    """A process that stands still."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        process.suspend()

    def end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.resume()


class Slowed:
    """A process that gets a quarter of its time, for ``limit_s`` at most."""

    def __init__(self, process: psutil.Process, limit_s: float = SLOW_LIMIT_S) -> None:
        self._process, self._turns = process, int(limit_s / (STOPPED_S + RUNNING_S))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._alternate, name="slowed", daemon=True)
        self._thread.start()

    def _alternate(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for _ in range(self._turns):
                self._process.suspend()
                self._over.wait(STOPPED_S)
                self._process.resume()
                if self._over.wait(RUNNING_S):
                    return

    def end(self) -> None:
        self._over.set()
        self._thread.join()


class Full:
    """A disk without room."""

    def __init__(self, disk: Disk, writers: Sequence[psutil.Process]) -> None:
        self._disk = disk
        disk.fill(writers)

    def end(self) -> None:
        self._disk.free()


def inject(fault: Fault, driver: psutil.Process, there: Processes, disk: Disk) -> tuple[tuple[str, ...], Effect]:
    """Do it, whatever it is but to a host.  (Names of the workers that were hit, what has to be taken away later.)

    Raises:
        NobodyThereError: there is no such process now, and nothing was done.
    """
    act, target = KINDS[fault.kind].act, KINDS[fault.kind].target
    if target in ("driver", "everything"):
        _send(act, [driver, *there.all] if target == "everything" else [driver])
        return (), Gone()
    if act is Act.FILL:
        return (), Full(disk, [p for name, p in there.workers.items() if name.rpartition("-")[0] in WRITERS])
    name = chosen(there.workers, "generator" if target == "engine" else target, fault.choice)
    process = there.workers[name]
    if not process.is_running():
        raise NobodyThereError(f"{name} has just ended")
    return (name,), _hit(act, target, process)


def _hit(act: Act, target: str, process: psutil.Process) -> Effect:
    if act in (Act.FREEZE, Act.PAUSE):
        return Frozen(process)
    if act is Act.SLOW:
        return Slowed(process)
    victims = process.children(recursive=True) if target == "engine" else [process]
    if not victims:
        raise NobodyThereError("the generator has no engine process of its own")
    _send(act, victims)
    return Gone()


def _send(act: Act, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if act is Act.KILL:
                process.kill()
            else:
                process.terminate()


def end_all(processes: Mapping[int, psutil.Process], deadline_s: float) -> int:
    """Wait for processes to end by themselves, then kill them; how many had to be killed."""
    _, left = psutil.wait_procs(list(processes.values()), timeout=deadline_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=deadline_s)
    return len(left)
