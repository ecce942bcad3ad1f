"""Laws of what is read off the evaluations of a comparison, and of the labels that it shares out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.compare_answers import Answers, against_itself, best_of, measure, read_answers
from launch.compare_labels import labelled_rows
from launch.eval_files import samples_table
from launch.eval_report import Answers as Said
from launch.eval_report import Measured
from trainers.experience import GroupRewards, Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion

N, G = 200, 2


def answers(reward: np.ndarray, base: np.ndarray, kl: float = 0.0) -> Answers:
    lengths = np.full(reward.shape, 5.0)
    return Answers(reward, lengths, np.full(reward.shape, kl), base, lengths)


def normal(seed: int, columns: int = G) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, columns))


def test_the_best_of_n_is_chosen_among_answers_that_are_not_the_bases() -> None:
    drawn = answers(rewards := normal(1, G * (1 + 4)), rewards)
    found = best_of(drawn, G, 4)
    assert found.reward.shape == (N, G) and (found.base_reward == rewards[:, :G]).all()
    pools = rewards[:, G:].reshape(N, G, 4)
    assert (found.reward == pools.max(axis=2)).all()
    assert (found.kl > 0).all() and (found.kl[:, 0] == found.kl[:, 1]).all()
    two = best_of(drawn, G, 2)
    assert (two.reward <= found.reward).all() and (two.reward == pools[:, :, :2].max(axis=2)).all()


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_best_of_n_beats_an_independent_answer_n_times_in_n_plus_1(n: int) -> None:
    rewards = np.random.default_rng(n).normal(size=(4000, 1 + n))
    found = measure([best_of(answers(rewards, rewards), 1, n)]).win_rate
    assert found.value == pytest.approx(n / (n + 1), abs=0.02)


def test_an_answer_without_a_reward_is_never_the_best_unless_all_are() -> None:
    rewards = np.array([[0.0, math.nan, 1.0], [0.0, math.nan, math.nan]])
    found = best_of(answers(rewards, rewards), 1, 2)
    assert found.reward[0, 0] == 1.0 and math.isnan(found.reward[1, 0])
    measured = measure([found])
    assert measured.reward.value == 1.0 and measured.reward.n == 1 and measured.pairs.num_left_out == 1


def test_the_base_against_itself_ties_and_has_not_moved() -> None:
    rewards = normal(2)
    found = measure([against_itself(answers(rewards, rewards, math.nan))])
    assert found.win_rate.value == 0.5 and (found.kl.value, found.kl.low, found.kl.high) == (0, 0, 0)


def test_a_policy_that_is_always_right_or_always_wrong_is_not_known_without_doubt() -> None:
    base = np.zeros((N, G))
    right, wrong = (measure([answers(np.full((N, G), value), base)]).reward for value in (1.0, 0.0))
    assert right.value == 1.0 == right.high and 0.97 < right.low < 1.0
    assert wrong.value == 0.0 == wrong.low and 0.0 < wrong.high < 0.03
    other = measure([answers(np.full((N, G), 2.5), base)]).reward
    assert (other.low, other.high) == (2.5, 2.5), "a reward of another kind is no share"


def test_seeds_are_pooled_and_a_share_stays_a_share() -> None:
    base = np.zeros((N, G))
    always = measure([answers(np.ones((N, G)), base, 1.0), answers(np.ones((N, G)), base, 2.0)])
    assert always.win_rate.value == 1.0 and always.win_rate.high == 1.0 and 0.9 < always.win_rate.low < 1.0
    assert always.kl.value == 1.5 and always.kl.low < 1.0 < 2.0 < always.kl.high, "two seeds that differ"
    assert always.reward.n == 2 * N
    with pytest.raises(ValueError, match="no evaluation"):
        measure([])


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "model": ["policy"] * 4 + ["base"] * 4,
        "completion_ids": [[1] * i for i in (1, 2, 3, 4, 5, 6, 7, 8)],
        "reward": [0.0, 1.0, None, 0.5, 0.0, 0.0, 1.0, 1.0],
        "policy_logprobs": [[-1.0], [-1.0, -0.5], [], [-2.0], None, None, None, None],
        "base_logprobs": [[-2.0], [-1.0, -1.0], [], [-1.0], None, None, None, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "samples.parquet")
    found = read_answers(tmp_path / "samples.parquet", 2)
    assert found.kl.tolist() == [[1.0, 0.5], [0.0, -1.0]]
    assert found.length.tolist() == [[1, 2], [3, 4]] and found.base_length.tolist() == [[5, 6], [7, 8]]
    assert math.isnan(found.reward[1, 0]) and found.base_reward.tolist() == [[0, 0], [1, 1]]
    alone = {name: column[:4] for name, column in columns.items() if not name.endswith("logprobs")}
    pq.write_table(pa.table(alone), tmp_path / "alone.parquet")
    base = read_answers(tmp_path / "alone.parquet", 2)
    assert (base.base_length == base.length).all() and np.isnan(base.kl).all()


def sampled(group: str, texts: list[str]) -> TrajectoryGroup:
    span = (VersionSpan(WeightVersion(0, 0), 2),)
    ids = np.array([3, 4], np.int32)
    prompt = Prompt(group, np.array([1, 2], np.int32), group, group, {})
    logprobs = np.full(2, -0.5, np.float32)
    return TrajectoryGroup(
        group, prompt, tuple(Trajectory(i, i, ids, logprobs, text, "stop", span) for i, text in enumerate(texts))
    )


def test_an_evaluation_keeps_what_its_kl_is_made_of(tmp_path: Path) -> None:
    groups = [sampled("eval-0", ["a", "b"]), sampled("eval-1", ["c", "d"])]
    rewards = [GroupRewards(g.group_id, np.array([0.0, 1.0]), {"r": np.array([0.0, 1.0])}, (), 0.0) for g in groups]
    side = Said(groups, {}, rewards)
    ours = [np.array([-0.25, -0.5], np.float32)] * 4
    theirs = [np.array([-0.5, -1.0 - i], np.float32) for i in range(4)]
    pq.write_table(samples_table(Measured(side, side, (ours, theirs))), tmp_path / "both.parquet")
    found = read_answers(tmp_path / "both.parquet", 2)
    assert found.kl.tolist() == [[0.75, 1.75], [2.75, 3.75]] and found.reward.tolist() == [[0, 1], [0, 1]]
    table = samples_table(Measured(side))
    assert "policy_logprobs" not in table.column_names and table.num_rows == 4


# --- labels ---------------------------------------------------------------------------------------


def record(position: int, scores: list[float | None], prompt: Any = "two?") -> dict[str, Any]:
    said = [{"text": f"{position}-{i}", "ids": [1, 2, 3], "finish_reason": "stop"} for i in range(len(scores))]
    said[-1]["finish_reason"] = "length"
    return {"position": position, "prompt": prompt, "candidates": said, "labels": {"scores": scores}}


def test_an_answer_is_good_where_it_is_better_than_the_mean_of_all() -> None:
    records = [record(0, [1.0, 0.0]), record(1, [0.0, 0.0]), record(2, [0.25, None])]
    rows, counts = labelled_rows(records)
    assert [row["label"] for row in rows] == [True, False, False, False, False]
    assert [row["finish_reason"] for row in rows][:2] == ["stop", "length"]
    assert (counts.num_sampled, counts.num_tokens, counts.num_good, counts.num_bad) == (6, 18, 1, 4)
    assert counts.desirable_weight == 4.0
    assert labelled_rows(list(reversed(records)))[0] == rows, "whoever was labelled first"


def test_equal_scores_are_neither_good_nor_bad_enough_to_weigh() -> None:
    assert labelled_rows([record(0, [1.0, 1.0])])[1].desirable_weight is None
    assert labelled_rows([])[1].desirable_weight is None


def test_an_answer_to_a_conversation_is_a_message() -> None:
    (row, _), _ = labelled_rows([record(0, [1.0, 0.0], [{"role": "user", "content": "two?"}])])
    assert row["completion"] == [{"role": "assistant", "content": "0-0"}]
