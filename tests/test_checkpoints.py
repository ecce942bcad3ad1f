"""Laws of the checkpoint store: complete or absent, verified or refused, and never without the newest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import MANIFEST, CheckpointStore
from cluster.errors import ClusterError, DamagedError


def write(store: CheckpointStore, step: int, text: str = "") -> None:
    folder = store.begin(step)
    (folder / "rank-0").mkdir()
    (folder / "rank-0" / "state.bin").write_bytes((text or f"state of {step} ").encode() * 1000)
    (folder / "ledger.json").write_text(json.dumps({"step": step}))
    store.commit(step, {"incarnation": 1, "step": step})


class Killed(BaseException):
    """Stands for the process dying: nothing may catch it."""


EFFECTS = ("rename", "fsync", "rmtree", "rmdir", "unlink", "mkdir")


def die_before_effect(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """From effect ``number`` on, every change to the disk raises Killed.  Returns the effects asked for."""
    seen: list[str] = []

    def guard(name: str, effect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) > number:
                raise Killed(name)
            return effect(*args, **kwargs)

        return guarded

    for name in EFFECTS:
        owner = shutil if name == "rmtree" else os
        monkeypatch.setattr(owner, name, guard(name, getattr(owner, name)))
    return seen


def test_a_commit_is_found_with_its_metadata_and_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    write(store, 10)
    found = store.latest()
    assert found is not None and found.step == 10 and found.path.name == "step-000010"
    assert found.metadata == {"incarnation": 1, "step": 10}
    manifest = json.loads((found.path / MANIFEST).read_text())
    assert set(manifest["files"]) == {"rank-0/state.bin", "ledger.json"}
    assert manifest["files"]["ledger.json"]["size"] == (found.path / "ledger.json").stat().st_size


@pytest.mark.parametrize("second", [20, 10, 5], ids=["later step", "same step again", "resumed before it"])
def test_killed_before_any_effect_a_whole_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    for number in range(200):
        directory = tmp_path / str(number)
        write(CheckpointStore(directory, keep=1), 10)
        with monkeypatch.context() as patch:
            seen = die_before_effect(patch, number)
            try:
                write(CheckpointStore(directory, keep=1), second, "new ")
                finished = True
            except Killed:
                finished = False
        survivor = CheckpointStore(directory, keep=1).latest()
        assert survivor is not None, f"nothing loadable after dying before {seen[-1]} ({number})"
        assert survivor.step in (10, second)
        content = (survivor.path / "rank-0" / "state.bin").read_bytes()
        assert content in (b"state of 10 " * 1000, b"new " * 1000)
        write(CheckpointStore(directory, keep=1), 30)  # the next commit clears whatever was left
        assert [path.name for path in directory.iterdir()] == ["step-000030"]
        if finished:
            assert survivor.step == second and content == b"new " * 1000
            break
    else:
        raise AssertionError("never finished")
    assert number > 5 and "rename" in seen and "fsync" in seen


def test_an_unfinished_checkpoint_is_never_the_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 10)
    (store.begin(20) / "half").write_text("x")
    found = store.latest()
    assert found is not None and found.step == 10


def test_beginning_again_starts_from_an_empty_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(20) / "half").write_text("x")
    assert list(store.begin(20).iterdir()) == []


def test_retention_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.begin(7)
    for step in (10, 20, 30):
        write(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000030"]


def test_what_cannot_be_removed_yet_costs_no_checkpoint_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    left = CheckpointStore(tmp_path).begin(7)

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        store.remove_leftovers()
        write(store, 10)
    assert store.steps() == [10] and left.is_dir()
    write(store, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020"]


def test_after_resuming_from_an_earlier_step_the_abandoned_lineage_is_not_the_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        write(store, step)
    write(store, 15)
    assert store.steps() == [10, 15]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("rank-0/state.bin", flip, "digest"),
        ("rank-0/state.bin", lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
        ("ledger.json", lambda path: path.unlink(), "missing"),
        (MANIFEST, lambda path: path.unlink(), "missing"),
        (MANIFEST, lambda path: path.write_text(path.read_text()[:40]), "cannot be read"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace('tion": 1,', 'tion": 2,')), "seal"),
        (MANIFEST, lambda path: path.write_text("[]"), "seal"),
    ],
)
def test_a_damaged_newest_checkpoint_is_refused_and_the_intact_one_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], word: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        write(store, step)
    damage(tmp_path / "step-000030" / name)
    flip(tmp_path / "step-000020" / "rank-0" / "state.bin")
    with pytest.raises(DamagedError) as caught:
        store.latest()
    message = str(caught.value)
    assert name in message and word in message and "step 10 is intact" in message and "\n" not in message
    assert store.load(10).step == 10


def test_damage_without_an_older_intact_checkpoint_says_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 10)
    flip(tmp_path / "step-000010" / "rank-0" / "state.bin")
    with pytest.raises(DamagedError, match="no older checkpoint is intact"):
        store.latest()
    unverified = store.latest(verify=False)
    assert unverified is not None and unverified.step == 10


def test_a_missing_step_names_those_that_exist(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 10)
    with pytest.raises(ClusterError, match="there are: 10"):
        store.load(11)
    with pytest.raises(ClusterError, match="commit without begin"):
        store.commit(12, {})
