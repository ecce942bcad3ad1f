"""A run's folder has one process: whoever comes second is told who works there, and nothing is touched."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import pytest
from rich.console import Console

from launch.overrides import ResolvedConfig, load_config
from launch.run_folder import LEASE_S, LOCK, entered, held, only_process_in
from launch.train import train
from launch.tune import tune
from trainers.errors import InputError

TINY = ["model.path=builtin:tiny-llama", "run.name=one", "cluster.backend=in_process", "telemetry.wandb=disabled"]


def recipe(name: str, directory: Path) -> ResolvedConfig:
    return load_config(name, [*TINY, f"run.directory={directory}"])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["cpu-demo", "cpu-sft"])
def test_neither_a_resumed_training_run_nor_a_new_one_begins_beside_another(
    name: str, resume: bool, tmp_path: Path
) -> None:
    begin, folder = (train if name == "cpu-demo" else tune), tmp_path / "one"
    folder.mkdir()
    if resume:
        (folder / "config.yaml").write_text("kept")
    before = {LOCK, *(["config.yaml"] if resume else [])}
    with only_process_in(folder), pytest.raises(InputError, match=f"process {os.getpid()} on .* works in {folder}"):
        begin(recipe(name, tmp_path), resume, Console(quiet=True))
    assert {entry.name for entry in folder.iterdir()} == before


def test_a_new_run_that_leaves_nothing_leaves_no_folder_and_one_that_leaves_something_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    for _ in range(2):  # the first one leaves nothing in the way of the second
        with pytest.raises(ZeroDivisionError), entered(folder, False, lambda: None, lambda: 7) as found:
            assert found == 7 and [entry.name for entry in folder.iterdir()] == [LOCK]
            raise ZeroDivisionError
        assert not (tmp_path / "runs").exists()
    with entered(folder, False, lambda: None, lambda: None):
        (folder / "config.yaml").touch()
    assert {entry.name for entry in folder.iterdir()} == {LOCK, "config.yaml"}


def test_what_is_refused_while_it_is_prepared_makes_no_folder(tmp_path: Path) -> None:
    def refuse() -> None:
        raise InputError("model.path", "x", "is none", "give one")

    with pytest.raises(InputError), entered(tmp_path / "one", False, lambda: None, refuse):
        pytest.fail("it was refused")
    assert not (tmp_path / "one").exists()


def test_the_folder_is_looked_at_again_once_it_is_ours(tmp_path: Path) -> None:
    folder, looks = tmp_path / "one", list[bool]()

    def check() -> None:
        looks.append((folder / "theirs").exists())
        if looks[-1]:
            raise InputError("run.name", "one", "exists already", "choose another")

    def prepare() -> None:
        folder.mkdir()
        (folder / "theirs").touch()

    with pytest.raises(InputError, match="exists already"), entered(folder, False, check, prepare):
        pytest.fail("it is another one's")
    assert looks == [False, True] and (folder / "theirs").exists()


class Clock:
    """Seconds that pass when somebody sleeps; after ``ends_at`` of them the other machine's lock is gone."""

    def __init__(self, lock: int, ends_at: float) -> None:
        self.now, self._lock, self._ends_at = 0.0, lock, ends_at

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self._ends_at:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


@pytest.mark.parametrize("ends_at", [30.0, 10 * LEASE_S])
def test_the_lock_of_another_machine_is_waited_for_as_long_as_a_server_keeps_it(
    ends_at: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / LOCK
    file.write_text("process 7 on node-b\n")
    lock = os.open(file, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    clock = Clock(lock, ends_at)
    try:
        with caplog.at_level(logging.WARNING):
            if ends_at < LEASE_S:
                with held(file, RuntimeError, 0.0, clock, clock.sleep):
                    assert clock.now == ends_at and file.read_text().startswith(f"process {os.getpid()} on ")
            else:
                with pytest.raises(RuntimeError, match="7 on node-b"):
                    with held(file, RuntimeError, 0.0, clock, clock.sleep):
                        pytest.fail("two processes hold one lock")
                assert LEASE_S <= clock.now < LEASE_S + 10
        assert "process 7 on node-b holds" in caplog.text
    finally:
        os.close(lock)


def test_the_lock_of_a_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    def sleep(seconds: float) -> None:
        pytest.fail("who works here is alive")

    with held(tmp_path / LOCK, RuntimeError), pytest.raises(RuntimeError, match=f"process {os.getpid()} on "):
        with held(tmp_path / LOCK, RuntimeError, 0.0, lambda: 0.0, sleep):
            pytest.fail("two processes hold one lock")


def test_who_works_here_is_waited_for_as_long_as_is_asked(tmp_path: Path) -> None:
    file = tmp_path / LOCK
    with held(file, RuntimeError):
        pass
    lock = os.open(file, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    clock = Clock(lock, 1.0)
    try:
        with pytest.raises(RuntimeError), held(file, RuntimeError, 0.5, clock, clock.sleep):
            pytest.fail("two processes hold one lock")
        assert 0.5 <= clock.now < 0.6
        with held(file, RuntimeError, 5.0, clock, clock.sleep):
            assert 1.0 <= clock.now < 1.1
    finally:
        os.close(lock)


def test_a_lock_that_was_removed_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who removes a folder holds its lock; who had opened that file before must not take it for the folder's."""
    file, flock, calls = tmp_path / LOCK, fcntl.flock, list[int]()

    def after_it_was_removed(lock: int, operation: int) -> None:
        if not calls:
            file.unlink()
        calls.append(lock)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", after_it_was_removed)
    with held(file, RuntimeError, 5.0):
        assert len(calls) == 2 and file.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(RuntimeError), held(file, RuntimeError):
            pytest.fail("two processes hold one lock")
