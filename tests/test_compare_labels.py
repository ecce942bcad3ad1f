"""What the labelling run of a comparison leaves is what each of its offline methods learns from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from compare_stub import config_of

from launch.compare_labels import write_labelled
from launch.compare_methods import METHODS
from launch.compare_plan import make_plan
from launch.compare_recipes import rows_path
from launch.label_config import LabelConfig
from launch.label_records import RecordFile, Summary, preferences, record_of, schema, write_preferences
from launch.overrides import resolve
from launch.tuning_prepare import prepare_tuning
from trainers.comparisons import ComparisonTable
from trainers.experience import Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion
from trainers.labellers import from_scores, pairs_to_compare

OFFLINE = [name for name, method in METHODS.items() if method.kind == "offline"]
CONSTANTS = {"policy": "p", "policy_digest": "d", "label_source": "function", "label_version": "v"}
SCORES = {0: (0.0, 0.0, 0.0, 0.0), 1: (1.0, 1.0, 0.0, 0.0), 2: (1.0, 0.0, 0.0, 0.0)}  # of a prompt's four answers


def group(position: int) -> TrajectoryGroup:
    """Four answers, of which the last was cut off, and in every third group two have one text."""
    texts = [f"{position} a", f"{position} b", f"{position} c", f"{position} d"]
    if position % 3 == 2:
        texts[2] = texts[1]
    span, ids = (VersionSpan(WeightVersion(0, 0), 2),), np.array([3, 4], np.int32)
    answers = tuple(
        Trajectory(i, i, ids, np.zeros(2, np.float32), text, "length" if i == 3 else "stop", span)
        for i, text in enumerate(texts)
    )
    source = f"question {position}?"
    return TrajectoryGroup(str(position), Prompt(f"p{position}", np.array([5, 6], np.int32), source, source), answers)


@pytest.mark.parametrize("name", OFFLINE)
def test_each_offline_method_reads_what_was_labelled(name: str, tmp_path: Path) -> None:
    config = config_of(f"compare.algorithms=[{name}]")
    plan, method = make_plan(config, tmp_path), METHODS[name]
    found = {
        stage.name: resolve(json.loads(json.dumps(plan.recipes[stage.recipe])), stage.overrides, stage.name).config
        for stage in plan.stages
    }
    label, run = found["label-seed-0"], tmp_path / "label-seed-0"
    assert isinstance(label, LabelConfig)
    run.mkdir()
    records = RecordFile(run / "labelled.jsonl")
    for position in (5, 3, 0, 1, 2, 4):  # in the order in which they were done
        sampled = group(position)
        texts, masks = [t.text for t in sampled.trajectories], [None] * 4
        pairs, dropped = pairs_to_compare(texts, masks, label.keep.pairs, label.keep.drop_identical, 0)
        labels = from_scores(SCORES[position % 3], masks, pairs, dropped)
        records.append(record_of(position, 0, sampled, [1.0] * 4, labels, {}))
    rows = preferences(records, label, CONSTANTS, Summary())
    write_preferences(run / "preferences.parquet", rows, schema(False, label.output.rows, CONSTANTS, {}), False)
    records.close()
    (tmp_path / "data").mkdir()
    write_labelled(run, rows_path(tmp_path, METHODS["kto"], 0))

    task = prepare_tuning(found[f"{name}-seed-0"]).task
    task.write(tmp_path)
    table = ComparisonTable(tmp_path / "train.arrow")
    if method.is_labelled:
        assert task.sizes == [24] and sum(table[i].label is True for i in range(24)) == 2 * 2 + 2 * 1
        return
    assert task.sizes == [4], "groups without a spread teach nothing"
    assert sorted((len(table[i].completion_ids), len(table[i].pairs)) for i in range(4)) == [(3, 2)] * 2 + [(4, 4)] * 2
    ends = [ids[-1] for i in range(4) for ids in table[i].completion_ids]
    assert sum(end != max(ends, key=ends.count) for end in ends) == 4, "the answers that were cut off have no EOS"
