"""Intervals hold the truth as often as they say, also where samples share a prompt and where all of them agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from trainers.agreement import agreement
from trainers.calibration import Estimate, mean_estimate, pair_accuracy, t_quantile, unless_certain, wilson_interval
from trainers.diversity import truncation_share
from trainers.length_bias import length_bias, pearson, spearman
from trainers.win_rate import win_rate


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilsons_interval_has_the_published_numbers(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_interval_knows_nothing_of_nothing_and_refuses_the_impossible() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="k=3, n=2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("freedom", "exact"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452), (10**6, 1.9600)]
)
def test_students_quantile_agrees_with_the_tables(freedom: int, exact: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(exact, rel=3e-3)


def _proportion(random: np.random.Generator) -> tuple[Estimate, float]:
    return pair_accuracy(random.random(40) + 0.9, np.ones(40)), 0.9


def _mean(random: np.random.Generator) -> tuple[Estimate, float]:
    return mean_estimate(random.exponential(1.0, size=30)), 1.0


def _ratio(random: np.random.Generator) -> tuple[Estimate, float]:
    tokens = random.integers(1, 60, size=40)
    shift = random.normal(0, 1, size=40)  # shared by the tokens of a sequence
    return mean_estimate(tokens * (2 + shift), tokens), 2.0


def _clustered(random: np.random.Generator) -> tuple[Estimate, float]:
    easy = np.repeat(random.random(60), 8)  # eight comparisons of one prompt hang together
    return win_rate((random.random(480) < easy).astype(float).tolist(), np.repeat(np.arange(60), 8).tolist()), 0.5


def _correlated(random: np.random.Generator) -> tuple[Estimate, float]:
    x, noise = random.normal(size=(2, 50))
    return pearson(x, 0.6 * x + 0.8 * noise), 0.6


def _samples_of_prompts(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Four samples of each of 50 prompts, which decide most of a sample's reward and, apart from it, its length."""
    prompts = np.repeat(np.arange(50), 4)
    reward, length = (2 * random.normal(size=50)[prompts] + random.normal(size=200) for _ in range(2))
    return reward, length, prompts.tolist()


def _length_bias(random: np.random.Generator) -> tuple[Estimate, float]:
    return length_bias(*_samples_of_prompts(random)).pearson, 0.0


def _rank_bias(random: np.random.Generator) -> tuple[Estimate, float]:
    return length_bias(*_samples_of_prompts(random)).spearman, 0.0


def _slope_of_length(random: np.random.Generator) -> tuple[Estimate, float]:
    return length_bias(*_samples_of_prompts(random)).slope, 0.0


def _rare_success(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Few prompts are right, with all their samples, and whatever their length is: a resample may have none of them."""
    prompts = np.repeat(np.arange(100), 4)
    right = (random.random(100) < 0.02).astype(float)[prompts]
    return right, random.normal(size=100)[prompts] + 0.5 * random.normal(size=400), prompts.tolist()


def _rare_bias(random: np.random.Generator) -> tuple[Estimate, float]:
    found = length_bias(*_rare_success(random)).pearson
    return found, 0.0


def _rare_rank_bias(random: np.random.Generator) -> tuple[Estimate, float]:
    return length_bias(*_rare_success(random)).spearman, 0.0


def _truncation(random: np.random.Generator) -> tuple[Estimate, float]:
    hard = np.repeat(random.random(60), 8)
    reasons = np.where(random.random(480) < hard, "length", "stop").tolist()
    return truncation_share(reasons, np.repeat(np.arange(60), 8).tolist()), 0.5


def _kappa(random: np.random.Generator) -> tuple[Estimate, float]:
    human = (random.random(50) < 0.5).astype(float)
    said = np.where(random.random(50) < 0.03, 1 - human, human)  # often all agree, and nothing is resampled
    return agreement(said.tolist(), human.tolist()).kappa, 0.94


CAUTIOUS = (_kappa, _rare_bias, _rare_rank_bias)  # where nothing varied there is an interval, and a wide one


@pytest.mark.parametrize(
    "draw",
    [_proportion, _mean, _ratio, _clustered, _correlated, _length_bias, _rank_bias, _slope_of_length, _truncation,
     _rare_bias, _rare_rank_bias, _kappa],
)  # fmt: skip
def test_ninety_five_intervals_of_a_hundred_hold_the_truth(
    draw: Callable[[np.random.Generator], tuple[Estimate, float]],
) -> None:
    random = np.random.default_rng(0)
    held = [covers(*draw(random)) for _ in range(200)]
    assert 0.89 <= np.mean(held) <= (1.0 if draw in CAUTIOUS else 0.99)


def test_where_all_agree_nothing_varies_and_the_interval_has_a_width_all_the_same() -> None:
    for found in (unless_certain(mean_estimate([1.0] * 20), 20), agreement([1.0] * 20, [1.0] * 20).kappa):
        assert found.value == found.high == 1 and 0.5 < found.low < 0.9
    assert unless_certain(mean_estimate([0.0] * 20), 20).high > 0.1
    for spread in ([0.0, 1.0], [0.5, 0.5]):
        assert unless_certain(mean_estimate(spread), 2) == mean_estimate(spread)
    for order, sign in (([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1)):
        found = spearman([1, 2, 3, 4], order)
        assert found.value == sign and found.low < 0 < found.high, "one order of twelve by chance alone"
    assert spearman(range(40), range(40)).low > 0.99


def test_a_correlation_is_none_beyond_1_and_rounding_is_no_variance() -> None:
    x = np.random.default_rng(1).normal(size=200)
    exact = length_bias(x, 3 * x + 1, np.repeat(np.arange(50), 4).tolist())
    assert exact.pearson.low > 0.99 and exact.pearson.high <= 1
    lengths = np.full(200, 64.0)
    lengths[:4] = [3, 5, 7, 9]  # all others were cut: most resamples without this prompt have no lengths to speak of
    slope = length_bias(x, lengths, np.repeat(np.arange(50), 4).tolist()).slope
    assert abs(slope.low) < 1 and abs(slope.high) < 1


def test_one_sample_of_each_prompt_is_what_it_was_without_prompts() -> None:
    reward, length, _ = _samples_of_prompts(np.random.default_rng(2))
    assert length_bias(reward, length, list(range(200))) == length_bias(reward, length)
    reasons = ["length", "stop", "stop"]
    assert truncation_share(reasons, ["a", "b", "c"]) == truncation_share(reasons)


def test_the_interval_of_a_ratio_sees_the_ratio_and_not_the_sizes() -> None:
    tokens = np.arange(1, 50)
    found = mean_estimate(2.5 * tokens, tokens)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.5, 2.5, 2.5, 49))
    assert mean_estimate([4.0]) == Estimate(4.0, -math.inf, math.inf, 1)
    assert math.isnan(mean_estimate([]).value)
