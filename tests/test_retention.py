"""Laws of retention: which checkpoints stay."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from cluster.checkpoints import MANIFEST, CheckpointStore
from cluster.errors import DamagedError
from cluster.manifest import _seal
from cluster.retention import retained

NAN = float("nan")
SCORES: dict[int, float | None] = {10: 0.9, 20: None, 30: 0.2, 40: NAN, 50: 0.9, 60: 0.5}


@pytest.mark.parametrize(
    ("newest", "keep", "keep_best", "best", "expected"),
    [
        (60, 2, 0, "highest", {50, 60}),
        (60, 0, 0, "highest", {60}),  # never without the newest
        (60, 1, 1, "highest", {50, 60}),  # of two equals the later
        (60, 1, 2, "highest", {10, 50, 60}),
        (60, 1, 1, "lowest", {30, 60}),
        (60, 1, 9, "lowest", {10, 30, 50, 60}),  # those without a score are never among the best
        (30, 1, 1, "highest", {10, 30}),  # later steps are of a lineage that was left
        (60, 9, 9, "highest", set(SCORES)),
    ],
)
def test_the_newest_and_the_best_stay(
    newest: int, keep: int, keep_best: int, best: str, expected: set[int]
) -> None:
    assert retained(SCORES, newest, keep, keep_best, best) == expected  # type: ignore[arg-type]


def test_the_best_of_a_whole_run_stays_however_it_is_committed(tmp_path: Path) -> None:
    for number, scores in enumerate(itertools.permutations((0.1, 0.5, 0.9))):
        store = CheckpointStore(tmp_path / str(number), keep=1, keep_best=1)
        for step, score in enumerate(scores):
            (store.begin(step) / "state").write_text(str(score))
            store.commit(step, {}, score=score)
        assert store.steps() == sorted({scores.index(0.9), 2})
        newest = store.latest()
        assert newest is not None and newest.score == scores[2]


def test_a_damaged_manifest_is_not_among_the_best_and_removes_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_best=1)
    for step, score in ((1, 9.0), (2, 0.5), (3, 0.1)):
        store.begin(step)
        store.commit(step, {}, score=score)
    (tmp_path / "step-000001" / MANIFEST).write_text("{")
    store.begin(4)
    store.commit(4, {}, score=0.0)
    assert store.steps() == [2, 3, 4]


def test_a_checkpoint_of_an_older_format_is_refused_and_the_format_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(1)
    path = store.commit(1, {}).path / MANIFEST
    manifest = json.loads(path.read_text()) | {"format_version": 1}
    path.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    with pytest.raises(DamagedError, match="format_version 1 is older than 2"):
        store.latest()
