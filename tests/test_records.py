"""Records survive their journey as Arrow buffers, and say what they must."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    decode_group,
    decode_logprobs,
    encode_group,
    encode_logprobs,
    summarize,
)


def a_group(num_samples: int = 3) -> TrajectoryGroup:
    prompt = Prompt("p1", np.array([5, 6, 7], np.int32), "2+2?", [{"role": "user", "content": "2+2?"}], {"answer": "4"})
    return TrajectoryGroup(
        "17",
        prompt,
        tuple(
            Trajectory(
                i, 2**62 + i, np.arange(i + 1, dtype=np.int32), -np.ones(i + 1, np.float32) * i, f"t{i}",
                "stop" if i else "length",
                (VersionSpan(WeightVersion(0, 3), 1), VersionSpan(WeightVersion(1, 4), i)) if i
                else (VersionSpan(WeightVersion(0, 3), 1),),
            )
            for i in range(num_samples)
        ),
    )  # fmt: skip


def test_a_group_comes_out_of_arrow_as_it_went_in() -> None:
    group = a_group()
    back = decode_group(encode_group(group))
    assert back.group_id == group.group_id
    assert back.prompt.source == group.prompt.source
    assert back.prompt.columns == group.prompt.columns
    np.testing.assert_array_equal(back.prompt.token_ids, group.prompt.token_ids)
    for one, other in zip(back.trajectories, group.trajectories, strict=True):
        np.testing.assert_array_equal(one.completion_ids, other.completion_ids)
        np.testing.assert_array_equal(one.behavior_logprobs, other.behavior_logprobs)
        assert (one.seed, one.text, one.finish_reason, one.version_spans) == (
            other.seed, other.text, other.finish_reason, other.version_spans,
        )  # fmt: skip
        assert one.completion_ids.dtype == np.int32
        assert one.behavior_logprobs.dtype == np.float32


def test_every_token_has_a_version() -> None:
    for trajectory in a_group().trajectories:
        assert sum(span.num_tokens for span in trajectory.version_spans) == trajectory.num_tokens


def test_the_summary_names_the_oldest_and_the_newest_version() -> None:
    summary = summarize(a_group(), "generator-0", 1.5)
    assert (summary.oldest_version, summary.newest_version) == (WeightVersion(0, 3), WeightVersion(1, 4))
    assert summary.num_completion_tokens == (1, 2, 3)


def test_a_version_after_a_restore_is_newer_than_any_before_it() -> None:
    assert WeightVersion(1, 10) > WeightVersion(0, 99)


def test_logprob_rows_come_back_even_when_one_is_empty() -> None:
    rows = [np.array([-1.0, -2.0], np.float32), np.zeros(0, np.float32)]
    back = decode_logprobs(encode_logprobs(rows))
    for one, other in zip(back, rows, strict=True):
        np.testing.assert_array_equal(one, other)


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_group().group_id = "18"  # type: ignore[misc]


def test_a_failed_reward_is_not_a_zero() -> None:
    rewards = GroupRewards("17", np.array([0.0, np.nan]), {})
    assert rewards.valid.tolist() == [True, False]
