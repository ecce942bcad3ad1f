"""Finished groups beside a checkpoint: bit for bit what they were, used only under the settings they were made with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.checkpoints import Checkpoint
from launch.config import RunConfig
from launch.overrides import load_config
from launch.resuming import made_with, restored_ledger
from launch.spool import UNTRAINED, encode_spool, read_spool
from trainers.experience import (
    GroupRewards,
    Prompt,
    RewardFailure,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    decode_group,
    encode_group,
    encode_logprobs,
    summarize,
)
from trainers.ledger import Ledger, Pending
from trainers.protocols import LearnerGroup

NAN = float("nan")


def group(position: int, with_reference: bool) -> LearnerGroup:
    ids = np.arange(position, position + 3, dtype=np.int32)
    spans = (VersionSpan(WeightVersion(1, 4), 1), VersionSpan(WeightVersion(1, 5), 2))
    sampled = TrajectoryGroup(
        str(position),
        Prompt("p", np.array([1, 2], np.int32), "text", "source", {"answer": 3}),
        tuple(
            Trajectory(i, 2**62 + i, ids, np.array([-0.1, -1e-30, -2.5], np.float32), "ab", "stop", spans[i:])
            for i in range(2)
        ),
    )  # fmt: skip
    failure = RewardFailure("r", "timeout", "10 s")
    rewards = GroupRewards(
        str(position), np.array([0.1 + 0.2, NAN]), {"r": np.array([1e300, NAN])}, ((1, failure),), 0.25, ("m",)
    )
    reference = encode_logprobs([np.array([-0.5], np.float32)] * 2) if with_reference else None
    return LearnerGroup(summarize(sampled, "generator-1", 1.5), rewards, encode_group(sampled), reference, "values")


@pytest.mark.parametrize("with_reference", [True, False])
def test_groups_come_back_as_they_were_in_the_order_in_which_they_finished(
    tmp_path: Path, with_reference: bool
) -> None:
    groups = [group(position, with_reference) for position in (7, 3, 11)]
    (tmp_path / UNTRAINED).write_bytes(encode_spool(groups, 10.0))
    again = read_spool(tmp_path / UNTRAINED)
    assert [g.summary for g in again] == [g.summary for g in groups]
    assert again[0].summary.oldest_versions == (WeightVersion(1, 4), WeightVersion(1, 5))
    for before, after in zip(groups, again, strict=True):
        assert pa.py_buffer(after.payload).equals(pa.py_buffer(before.payload))
        assert decode_group(after.payload).prompt.columns == {"answer": 3}
        assert (after.reference_payload is None) == (not with_reference)
        if with_reference:
            assert pa.py_buffer(after.reference_payload).equals(before.reference_payload)
        assert after.values_payload is None, "values are those of the critic at the time of the update"
        np.testing.assert_array_equal(after.rewards.totals, before.rewards.totals)
        np.testing.assert_array_equal(after.rewards.parts["r"], before.rewards.parts["r"])
        emptied: dict[str, Any] = {"totals": 0, "parts": 0}
        assert dataclasses.replace(after.rewards, **emptied) == dataclasses.replace(before.rewards, **emptied)


def config(*overrides: str) -> RunConfig:
    return load_config("cpu-two-by-two", ["run.max_staleness=2", *overrides]).config


def checkpoint(folder: Path) -> Checkpoint:
    """Of a run that trained 0, has 7 and 3 finished and 1 in flight."""
    ledger = Ledger(3)
    for position in range(8):
        ledger.issue(position, "g", 0, 0.0)
    for position in (0, 7, 3):
        ledger.finish(position)
    ledger.train([0], 1)
    (folder / UNTRAINED).write_bytes(encode_spool([group(7, False), group(3, False)], 10.0))
    state = json.loads(json.dumps(ledger.state_dict()))
    metadata = {"ledger": state, "prompts": {"position": 1}, "made_with": made_with(config())}
    return Checkpoint(folder, 1, metadata)


def test_a_resumed_run_uses_what_was_finished_and_issues_the_rest_again(tmp_path: Path) -> None:
    ledger, groups = restored_ledger(config("run.num_steps=99"), checkpoint(tmp_path))
    assert [g.summary.group_id for g in groups] == ["7", "3"] and list(ledger.finished) == [7, 3]
    assert ledger.to_reissue == [1, 2, 4, 5, 6] and ledger.frontier == 1


@pytest.mark.parametrize(
    "override", ["run.samples_per_prompt=2", "run.max_staleness=1", "run.groups_per_step=8",
                 "generator.sampling.temperature=0.5", "rewards.0.weight=2.0", "algorithm.kl_coef=0.1"],
)  # fmt: skip
def test_under_other_settings_finished_groups_are_sampled_again(tmp_path: Path, override: str) -> None:
    ledger, groups = restored_ledger(config(override), checkpoint(tmp_path))
    assert groups == [] and ledger.to_reissue == [1, 2, 3, 4, 5, 6, 7]
    assert ledger.entry(7) == Pending() and ledger.counts["trained"] == 1


def test_a_checkpoint_without_finished_groups_or_without_a_ledger_goes_on_from_its_frontier(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path)
    (tmp_path / UNTRAINED).unlink()
    assert restored_ledger(config(), saved)[0].to_reissue == [1, 2, 3, 4, 5, 6, 7]
    ledger, groups = restored_ledger(config(), Checkpoint(tmp_path, 3, {"prompts": {"position": 12}}))
    assert (ledger.frontier, ledger.next_pending, groups) == (12, 12, [])
    assert restored_ledger(config(), None)[0].next_pending == 0
