"""Faults on real processes and a real full disk, and a whole supervised run whose driver is a stand-in."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from scripts.chaos_run import ChaosRun, RunOutcome
from scripts.disk import FILE_BYTES, LEFT_BYTES, FileLimit, SmallDisk, open_disk
from scripts.faults import KINDS, Fault, Phase
from scripts.injector import Frozen, NobodyThereError, Slowed, inject, processes_of

DEADLINE_S = 30.0
MORE_STEPS = 60  # more than a paced worker takes to be suspect: a fault that came to nothing gets another chance
REPOSITORY = Path(__file__).resolve().parent.parent


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:g} s for {what}"
        time.sleep(0.005)


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process with the title of an actor."""
    started = subprocess.Popen(["ray::burnish-generator-3.generate", "600"], executable=shutil.which("sleep"))
    yield psutil.Process(started.pid)
    started.kill()
    started.wait(DEADLINE_S)


def fault(kind: str, number: int = 0, phase: Phase | None = None, gap: int = 1) -> Fault:
    return Fault(number, kind, phase or KINDS[kind].phases[0], 0.5, gap)


# --- processes ----------------------------------------------------------------------------------


def test_workers_are_found_among_the_children_and_killed(sleeper: psutil.Process, tmp_path: Path) -> None:
    there = processes_of(os.getpid())
    assert there.workers["generator-3"].pid == sleeper.pid
    here, disk = psutil.Process(), FileLimit(tmp_path)
    with pytest.raises(NobodyThereError, match="no learner"):
        inject(fault("kill_learner"), here, there, disk)
    with pytest.raises(NobodyThereError, match="no engine process of its own"):
        inject(fault("kill_engine"), here, there, disk)
    victims, effect = inject(fault("kill_generator"), here, there, disk)
    assert victims == ("generator-3",)
    wait_for(lambda: sleeper.status() == psutil.STATUS_ZOMBIE, "the end of the worker")
    effect.end()


def test_a_worker_that_has_just_ended_is_not_hit(tmp_path: Path) -> None:
    started = subprocess.Popen(["ray::burnish-generator-4", "600"], executable=shutil.which("sleep"))
    there = processes_of(os.getpid())
    started.kill()
    started.wait(DEADLINE_S)
    with pytest.raises(NobodyThereError, match="generator-4 has just ended"):
        inject(fault("kill_generator"), psutil.Process(), there, FileLimit(tmp_path))


def test_a_frozen_process_stands_still_until_it_is_let_go(sleeper: psutil.Process) -> None:
    frozen = Frozen(sleeper)
    wait_for(lambda: is_stopped(sleeper), "SIGSTOP")
    frozen.end()
    wait_for(lambda: not is_stopped(sleeper), "SIGCONT")
    frozen.end()


def test_a_slow_process_stops_and_goes_and_is_left_going(sleeper: psutil.Process) -> None:
    slowed = Slowed(sleeper)
    for _ in range(2):
        wait_for(lambda: is_stopped(sleeper), "a stop")
        wait_for(lambda: not is_stopped(sleeper), "a go")
    slowed.end()
    assert not is_stopped(sleeper)
    short = Slowed(sleeper, limit_s=0.4)
    short._thread.join(DEADLINE_S)
    assert not short._thread.is_alive() and not is_stopped(sleeper), "it has a limit of its own"


# --- disks --------------------------------------------------------------------------------------


WRITER = """
    import sys
    for line in sys.stdin:
        left = int(line)
        try:
            with open(sys.argv[1], "wb", buffering=0) as file:
                while left:
                    left -= file.write(bytes(left))
            print(0, flush=True)
        except OSError as error:
            print(error.errno, flush=True)
"""


class Writer:
    """Writes files of a given size in a process of its own; each time the errno, or 0."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, num_bytes: int) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(num_bytes, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def test_without_privilege_the_ranks_files_are_limited_and_the_writer_gets_an_error(tmp_path: Path) -> None:
    disk, writer = FileLimit(tmp_path), Writer(tmp_path / "shard")
    there = [psutil.Process(writer.process.pid)]
    big = 4 * FILE_BYTES
    assert writer.write(big) == 0
    disk.fill(there)
    assert writer.write(FILE_BYTES // 2) == 0, "small files are none of its business"
    assert writer.write(big) == errno.EFBIG
    disk.free()
    assert writer.write(big) == 0 and os.path.getsize(tmp_path / "shard") == big
    disk.fill(there)
    writer.process.kill()
    writer.process.wait(DEADLINE_S)
    disk.free()
    disk.close()


def test_a_small_disk_is_full_until_it_is_freed_and_leaves_nothing(tmp_path: Path) -> None:
    disk = open_disk(tmp_path / "disk")
    if not isinstance(disk, SmallDisk):
        pytest.skip("this user may not mount; make chaos says so too and limits the ranks' files instead")
    try:
        disk.fill([])
        with pytest.raises(OSError) as refused:
            (disk.folder / "shard").write_bytes(bytes(2 * LEFT_BYTES))
        assert refused.value.errno == errno.ENOSPC
        (disk.folder / "shard").unlink()
        (disk.folder / "row").write_bytes(bytes(LEFT_BYTES // 2))
        disk.free()
        (disk.folder / "shard").write_bytes(bytes(2 * LEFT_BYTES))
    finally:
        disk.close()
    assert not (tmp_path / "disk").exists()


def test_a_disk_on_which_somebody_writes_meanwhile_is_filled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk(tmp_path / "disk")
    if not isinstance(disk, SmallDisk):
        pytest.skip("this user may not mount; make chaos says so too and limits the ranks' files instead")
    looks, look = iter(range(100)), os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        found = look(path)
        if next(looks) == 0:
            (disk.folder / "written").write_bytes(bytes(LEFT_BYTES * 3))
        return found

    try:
        monkeypatch.setattr(os, "statvfs", statvfs)
        disk.fill([])
        with pytest.raises(OSError) as refused:
            (disk.folder / "shard").write_bytes(bytes(2 * LEFT_BYTES))
        assert refused.value.errno == errno.ENOSPC and next(looks) > 1
    finally:
        disk.close()


# --- a supervised run -----------------------------------------------------------------------------

DRIVER = '''
"""Stands in for `burnish train`: rows, events, three workers."""
import ctypes, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil
from launch.journal import Journal, cut_after

folder, num_steps, resume, behaviour = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
folder.mkdir(exist_ok=True)
saved = folder / "saved"
first = int(saved.read_text()) if resume and saved.exists() else 0
if resume:
    cut_after(folder, first)
metrics, events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")
step, stopping = first, []

def event(kind, **fields):
    events.append({"time_unix": time.time(), "kind": kind, "step": step, **fields})

def on_term(*_):
    stopping.append(1)
    event("stopping", signal="SIGTERM")

def hire(name):  # ends with this process, as Ray's do
    die = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    return subprocess.Popen(["ray::burnish-" + name, "600"], executable=shutil.which("sleep"), preexec_fn=die)

def save():
    if (folder.parent / "full").exists():
        event("checkpoint_failed", reason="no space")
    elif behaviour != "careless":
        fresh = saved.with_suffix(".new")
        fresh.write_text(str(step))
        fresh.replace(saved)  # it may be killed in between
        event("checkpoint")

def gone(name):
    if name == "learner-0":
        if behaviour != "silent":
            event("failed", error="WorkerDiedError: learner[0] died in update")
        sys.exit(1)
    workers[name].kill()
    workers[name].wait()
    suspected.discard(name)  # its successor, of the same name here, was never suspect
    event("worker_died", role="generator", worker=name, reason="gone")
    workers[name] = hire(name)
    if behaviour != "unreplaced":
        event("worker_replaced", role="generator", worker=name)

signal.signal(signal.SIGTERM, on_term)
workers = {name: hire(name) for name in ("generator-0", "generator-1", "learner-0")}
still, suspected = dict.fromkeys(workers, 0), set()
try:
    event("ready", version="0.0")
    while step < num_steps and not stopping:
        for name in workers:
            ended = workers[name].poll() is not None
            stands = not ended and psutil.Process(workers[name].pid).status() == psutil.STATUS_STOPPED
            still[name] = still[name] + 1 if stands else 0
            if ended or still[name] == 40:
                gone(name)
            elif still[name] == 25:
                suspected.add(name)
                event("worker_suspect", worker=name)
            elif name in suspected and not stands:
                suspected.discard(name)
                event("worker_recovered", worker=name)
        step += 1
        event("pushing", version=str(step))
        time.sleep(0.015)
        metrics.append({"step": step, "time_unix": time.time(), "reward": 1.0})
        time.sleep(0.005)
        if step % 4 == 0:
            save()
    if stopping:
        save()
    event("stopped" if stopping else "finished")
finally:
    for process in workers.values():
        process.kill()
'''


def supervised(folder: Path, faults: list[Fault], num_steps: int, behaviour: str = "good") -> RunOutcome:
    script = folder / "driver.py"
    script.write_text(DRIVER)

    class Disk(FileLimit):
        def fill(self, writers: object) -> None:
            (self.folder / "full").touch()

        def free(self) -> None:
            (self.folder / "full").unlink(missing_ok=True)

    def command(steps: int, resume: bool) -> list[str]:
        return [sys.executable, str(script), str(folder / "run"), str(steps), str(int(resume)), behaviour]

    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return ChaosRun(
        "run", folder / "run", command, faults, num_steps, MORE_STEPS, 4, Disk(folder), folder / "log", environment,
        print,
    ).go()  # fmt: skip


def test_a_run_is_hit_by_every_kind_in_turn_resumed_where_it_must_be_and_ends_by_itself(tmp_path: Path) -> None:
    kinds = [
        "kill_generator", "freeze_generator", "stall_push", "pause_generator", "slow_generator", "kill_learner",
        "kill_driver", "kill_everything", "terminate_driver", "fill_disk",
    ]  # fmt: skip
    faults = [fault(kind, number, KINDS[kind].phases[-1], 1 + number % 3) for number, kind in enumerate(kinds)]
    before = set(psutil.Process().children(recursive=True))  # another test's fork server, say
    found = supervised(tmp_path, faults, 300)
    assert found.problem is None, found.problem
    assert [outcome.kind for outcome in found.faults] == kinds
    assert [outcome.number for outcome in found.faults] == list(range(len(kinds)))
    resumed = {outcome.kind for outcome in found.faults if outcome.resumed}
    assert resumed == {"kill_learner", "kill_driver", "kill_everything", "terminate_driver"}
    unseen = {outcome.kind for outcome in found.faults if outcome.detected_s is None}
    assert unseen == {"slow_generator", "kill_driver", "kill_everything"}
    assert all(0 <= (outcome.detected_s or 0) <= outcome.recovered_s < DEADLINE_S for outcome in found.faults)
    assert found.num_unexplained == 0
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]


def test_a_run_that_ends_before_its_faults_are_through_is_made_longer(tmp_path: Path) -> None:
    found = supervised(tmp_path, [fault("kill_generator", gap=6)], num_steps=3)
    assert found.problem is None and len(found.faults) == 1
    assert found.num_steps == 3 + MORE_STEPS and found.num_starts == 2


@pytest.mark.parametrize(
    ("kind", "behaviour", "said"),
    [
        ("kill_learner", "silent", "kill_learner of .*exit code 1.*an event that names learner is missing"),
        ("terminate_driver", "careless", "after SIGTERM step"),
        ("kill_generator", "unreplaced", "made longer 2 times and kill_generator never came to its end"),
    ],
)
def test_a_run_that_does_not_survive_as_it_must_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, behaviour: str, said: str
) -> None:
    monkeypatch.setattr("scripts.chaos_run.MAX_LONGER", 2)
    found = supervised(tmp_path, [fault(kind, gap=5)], num_steps=8, behaviour=behaviour)
    assert found.problem is not None
    assert len(found.faults) == 0
    assert re.search(said, found.problem), found.problem
