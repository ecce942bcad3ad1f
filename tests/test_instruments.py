"""Laws of the instruments that count wins, and planted faults they must catch: intervals, calibration, win rate."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from trainers.calibration import (
    Estimate,
    accuracy_by_length_difference,
    expected_calibration_error,
    pair_accuracy,
    policy_calibration,
    reliability,
    score_summary,
)
from trainers.length_bias import length_bias
from trainers.verdicts import Verdict, combine
from trainers.win_rate import Comparison, compare, length_controlled_win_rate, win_rate


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


# --- judgement of a reward model --------------------------------------------------------------


def planted_pairs(num: int = 20_000, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores of chosen and rejected answers whose labels follow Bradley-Terry of these very scores."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 1.2, size=(num, 2))
    first_wins = random.random(num) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    return np.where(first_wins, *scores.T), np.where(first_wins, *scores.T[::-1])


def test_ties_count_half_and_failed_scores_not_at_all() -> None:
    found = pair_accuracy([1.0, 0.0, 2.0, math.nan, math.inf], [0.0, 0.0, 3.0, 1.0, 0.0])
    assert (found.value, found.n) == (0.5, 3)
    nothing = pair_accuracy([math.nan], [0.0])
    assert math.isnan(nothing.value) and (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)


def test_a_calibrated_reward_model_has_no_calibration_error_and_a_scaled_one_has_with_equal_accuracy() -> None:
    chosen, rejected = planted_pairs()
    honest, loud = (expected_calibration_error(reliability(s * (chosen - rejected))) for s in (1, 5))
    assert honest < 0.015
    assert loud > 0.15
    assert pair_accuracy(5 * chosen, 5 * rejected) == pair_accuracy(chosen, rejected)


def test_a_reliability_diagram_is_symmetric_and_counts_each_pair_in_both_orientations() -> None:
    chosen, rejected = planted_pairs(500)
    bins = reliability(chosen - rejected)
    assert sum(b.observed.n for b in bins) == 1000
    for low, high in zip(bins, reversed(bins), strict=True):
        assert low.predicted == pytest.approx(1 - high.predicted)
        assert low.observed.value == pytest.approx(1 - high.observed.value)
        assert low.observed.n == high.observed.n
        assert low.low <= low.predicted <= low.high


def test_a_reward_model_that_never_decides_is_calibrated_at_a_half() -> None:
    (only,) = reliability(np.zeros(7))
    assert (only.predicted, only.observed.value) == (0.5, 0.5)


def test_a_reward_model_that_likes_length_is_right_only_where_the_chosen_answer_is_longer() -> None:
    random = np.random.default_rng(2)
    chosen, rejected = random.integers(1, 200, size=(2, 1000))
    bins = accuracy_by_length_difference(chosen, rejected, chosen, rejected, num_bins=5)
    assert sum(b.accuracy.n for b in bins) == 1000
    assert all(150 < b.accuracy.n < 250 for b in bins)
    assert [b.accuracy.value for b in (bins[0], bins[1], bins[3], bins[4])] == [0.0, 0.0, 1.0, 1.0]
    assert all(a.high < b.low for a, b in pairwise(bins))
    assert len(accuracy_by_length_difference([1.0, 2.0], [0.0, 3.0], [5, 6], [5, 6])) == 1


def test_a_score_summary_counts_failures_and_leaves_them_out() -> None:
    found = score_summary([*range(101), math.nan])
    assert (found["num"], found["num_failed"], found["mean"]) == (101, 1, 50)
    assert [found[k] for k in ("min", "q05", "q25", "q50", "q75", "q95", "max")] == [0, 5, 25, 50, 75, 95, 100]
    assert score_summary([math.inf]) == {"num": 0, "num_failed": 1}


def test_a_policy_that_is_too_sure_is_caught() -> None:
    random = np.random.default_rng(3)
    chance = random.random(20_000)
    right = random.random(20_000) < chance
    honest, sure = policy_calibration(chance, right), policy_calibration(0.5 + chance / 2, right)
    assert honest.error < 0.015 and abs(honest.overconfidence) < 0.01
    assert sure.error == pytest.approx(0.25, abs=0.01) == sure.overconfidence
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        policy_calibration([1.2], [1])


# --- win rate ---------------------------------------------------------------------------------


def sampled(num: int, gain_a: float, words_a: float, taste_for_length: float, seed: int) -> list[Comparison]:
    """Answers of a and b, whose score is a quality of spread 1 plus what their length brings."""
    random = np.random.default_rng(seed)
    lengths = np.stack([random.normal(100 + words_a, 40, num), random.normal(100, 40, num)]).round()
    scores = random.normal([[gain_a], [0.0]], 1, size=(2, num)) + taste_for_length * lengths
    rows = zip(*lengths, *scores, strict=True)
    return [Comparison(f"p{i // 2}", int(la), int(lb), (sa, sb)) for i, (la, lb, sa, sb) in enumerate(rows)]


def test_a_model_against_itself_wins_half_within_its_interval() -> None:
    held = [compare(sampled(300, 0, 0, taste, seed)) for seed in range(10) for taste in (0.0, 0.05)]
    assert np.mean([covers(r.raw, 0.5) for r in held]) >= 0.9
    assert np.mean([covers(r.length_controlled, 0.5) for r in held]) >= 0.9
    assert all(r.raw.n == 150 and r.raw.high - r.raw.low < 0.15 for r in held)


def test_a_model_that_says_the_same_as_its_base_ties_everywhere() -> None:
    found = compare([Comparison(str(i), 5, 5, (1.0, 1.0)) for i in range(300)])
    assert found.raw.value == found.length_controlled.value == 0.5
    assert covers(found.raw, 0.5) and found.num_ties == 300


def test_a_length_hacking_policy_is_caught() -> None:
    comparisons = sampled(600, gain_a=0.0, words_a=60, taste_for_length=0.05, seed=4)
    found = compare(comparisons)
    assert found.raw.low > 0.75
    assert found.length_controlled.high < found.raw.low
    assert abs(found.length_controlled.value - 0.5) < 0.08 and covers(found.length_controlled, 0.5)
    assert found.mean_length_difference == pytest.approx(60, abs=5)
    rewards, lengths = [c.scores[0] for c in comparisons if c.scores], [c.length_a for c in comparisons]
    bias = length_bias(rewards, lengths)
    assert bias.pearson.low > 0.8 and bias.spearman.low > 0.8
    assert covers(bias.slope, 0.05)


def test_a_better_policy_keeps_its_win_rate_at_equal_length() -> None:
    found = compare(sampled(600, gain_a=1.5, words_a=60, taste_for_length=0.0, seed=5))
    assert found.length_controlled.low > 0.65
    assert found.length_controlled.value == pytest.approx(found.raw.value, abs=0.06)


def test_the_length_fit_finds_the_logits_it_was_made_from() -> None:
    random = np.random.default_rng(6)
    differences = random.normal(20, 50, size=500)
    scale = np.sqrt(np.square(differences).mean())
    chance = 1 / (1 + np.exp(-(0.4 + 2 * np.tanh(differences / scale))))
    found = length_controlled_win_rate(chance.tolist(), differences.tolist())
    assert found.value == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-3)
    mirrored = length_controlled_win_rate([0.0, 1.0, 0.5, 1.0], [-3, 2, 1, -1])
    swapped = length_controlled_win_rate([1.0, 0.0, 0.5, 0.0], [3, -2, -1, 1])
    assert mirrored.value == pytest.approx(1 - swapped.value)


def test_separated_outcomes_have_a_finite_fit_and_no_overlap_in_length_has_none() -> None:
    separated = length_controlled_win_rate([1.0] * 60 + [0.0] * 40, list(range(1, 61)) + list(range(-40, 0)))
    assert 0.2 < separated.value < 0.8 and 0 < separated.low < separated.high < 1
    every_time = length_controlled_win_rate([1.0] * 10, list(range(-5, 5)))
    assert every_time == win_rate([1.0] * 10)
    always_longer = length_controlled_win_rate([1.0] * 50, list(range(1, 51)))
    assert math.isnan(always_longer.value) and (always_longer.low, always_longer.high) == (0.0, 1.0)
    equal = [1.0, 1.0, 0.0, 1.0]
    assert length_controlled_win_rate(equal, [0] * 4) == win_rate(equal)


def test_comparisons_of_one_prompt_do_not_count_as_many() -> None:
    outcomes = [1.0, 0.0] * 20
    apart = win_rate(outcomes)
    together = win_rate([o for o in outcomes for _ in range(25)], [i for i in range(40) for _ in range(25)])
    assert together == apart
    uneven = np.random.default_rng(9).random(37).tolist()
    assert win_rate(uneven, seed=1) != win_rate(uneven, seed=0) == win_rate(uneven)
    assert win_rate([1.0] * 10).low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize(
    ("ab", "ba", "outcome"),
    [
        ("first", "second", 1.0), ("second", "first", 0.0), ("first", "first", 0.5), ("second", "second", 0.5),
        ("tie", "tie", 0.5), ("first", "tie", 0.5), (None, "second", None), ("first", None, None),
    ],
)  # fmt: skip
def test_a_judge_is_believed_where_both_orders_agree(
    ab: Verdict | None, ba: Verdict | None, outcome: float | None
) -> None:
    assert combine(ab, ba, "tie").value == outcome


def test_unreadable_verdicts_and_failed_scores_are_counted_and_left_out() -> None:
    won = Comparison("p", 1, 1, verdicts=("first", "second"))
    rows = [won, replace(won, prompt_id="q"), Comparison("r", 1, 1, verdicts=(None, "first")),
            Comparison("s", 9, 1, (math.nan, 0.0))]  # fmt: skip
    found = compare(rows)
    assert (found.raw.value, found.raw.n, found.num_left_out, found.mean_length_difference) == (1.0, 2, 2, 0.0)
    nothing = compare(rows[2:])
    assert math.isnan(nothing.raw.value) and covers(nothing.raw, 0.5) and nothing.num_left_out == 2
    with pytest.raises(ValueError, match="scores or verdicts"):
        Comparison("p", 1, 1)
