"""Laws of the mean over seeds and prompts: its interval knows of both, and covers the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainers.calibration import mean_estimate
from trainers.crossed import crossed_mean


def drawn(
    seeds: int, prompts: int, of_seeds: float, of_prompts: float, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """[seeds, prompts] with mean 0 and these standard deviations."""
    table = noise * rng.normal(size=(seeds, prompts))
    return np.asarray(table + of_seeds * rng.normal(size=(seeds, 1)) + of_prompts * rng.normal(size=(1, prompts)))


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_prompts"), [(4, 0.3, 1.0), (4, 0.0, 1.0), (6, 0.5, 0.0), (3, 0.0, 0.0)]
)
def test_the_interval_covers_the_truth_whichever_of_the_two_varies(
    seeds: int, of_seeds: float, of_prompts: float
) -> None:
    rng = np.random.default_rng(3)
    found = [crossed_mean(drawn(seeds, 30, of_seeds, of_prompts, 0.5, rng)) for _ in range(600)]
    covered = np.mean([e.low <= 0 <= e.high for e in found])
    assert 0.90 <= covered <= 0.995


@pytest.mark.parametrize("of_seeds", [0.2, 0.5, 1.0])
def test_with_two_seeds_it_covers_somewhat_less_as_the_documentation_says(of_seeds: float) -> None:
    rng = np.random.default_rng(8)
    found = [crossed_mean(drawn(2, 100, of_seeds, 1.0, 1.0, rng)) for _ in range(600)]
    assert 0.86 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.97


def test_where_seeds_differ_an_interval_over_prompts_alone_would_be_too_narrow() -> None:
    rng = np.random.default_rng(4)
    tables = [drawn(3, 50, 0.5, 0.5, 0.5, rng) for _ in range(300)]
    naive = [mean_estimate(table.mean(axis=0)) for table in tables]
    assert np.mean([e.low <= 0 <= e.high for e in naive]) < 0.6
    assert np.mean([(e := crossed_mean(table)).low <= 0 <= e.high for table in tables]) > 0.9


def test_a_prompt_that_is_hard_for_every_seed_is_not_counted_once_a_seed() -> None:
    prompts = np.random.default_rng(5).normal(size=40)
    one, many = crossed_mean([prompts]), crossed_mean(np.tile(prompts, (5, 1)))
    assert many.value == pytest.approx(one.value)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=1e-6), "repeating the prompts teaches nothing"


def test_one_seed_is_the_mean_over_prompts() -> None:
    values = np.random.default_rng(6).normal(size=12)
    assert crossed_mean([values]) == mean_estimate(values)


def test_a_prompt_without_a_value_under_one_seed_is_left_out_under_all() -> None:
    table = np.array([[1.0, 2.0, math.nan], [3.0, 4.0, 100.0]])
    found = crossed_mean(table)
    assert found.value == 2.5 and found.n == 4
    nothing = crossed_mean(np.full((2, 3), math.nan))
    assert math.isnan(nothing.value) and nothing.n == 0


def test_equal_values_have_no_width_and_a_row_is_no_table() -> None:
    same = crossed_mean(np.ones((3, 4)))
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="a row a seed"):
        crossed_mean([1.0, 2.0])
