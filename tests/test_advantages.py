"""Laws of group-relative advantages."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.advantages import STD_EPSILON, group_relative

REWARD = st.integers(-1000, 1000).map(lambda n: n / 100)  # hundredths: a spread is 0 or at least .01
GROUP = st.lists(REWARD, min_size=1, max_size=12)
BASELINES = ("group_mean", "leave_one_out")
SCALES = ("std", "none")


def naive(rewards: list[float], baseline: str, scale: str) -> list[float]:
    """Sample by sample, from the formulas, with the standard library alone."""
    n = len(rewards)
    if n < 2 or len(set(rewards)) == 1:
        return [0.0] * n
    out = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        b = statistics.fmean(others if baseline == "leave_one_out" else rewards)
        out.append((r - b) / (statistics.stdev(rewards) + 1e-4 if scale == "std" else 1.0))
    return out


def everyone(rewards: list[float] | np.ndarray) -> np.ndarray:
    return np.ones(len(rewards), dtype=bool)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=GROUP)
def test_advantages_equal_the_naive_formula(baseline: str, scale: str, rewards: list[float]) -> None:
    found = group_relative(np.array(rewards), everyone(rewards), baseline, scale)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, naive(rewards, baseline, scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(reward=st.floats(-1e9, 1e9), n=st.integers(1, 9))
def test_a_zero_variance_group_has_exactly_zero_advantage(baseline: str, scale: str, reward: float, n: int) -> None:
    found = group_relative(np.full(n, reward), np.ones(n, dtype=bool), baseline, scale)  # type: ignore[arg-type]
    assert (found == 0.0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=GROUP, data=st.data())
def test_a_masked_sample_never_changes_the_others(
    baseline: str, scale: str, rewards: list[float], data: st.DataObject
) -> None:
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))))
    rubbish = np.where(valid, rewards, data.draw(st.sampled_from([np.nan, np.inf, 1e30, 0.0])))
    found = group_relative(rubbish, valid, baseline, scale)  # type: ignore[arg-type]
    alone = [r for r, ok in zip(rewards, valid, strict=True) if ok]
    expected = group_relative(np.array(alone), everyone(alone), baseline, scale)  # type: ignore[arg-type]
    assert np.isnan(found[~valid]).all()
    np.testing.assert_array_equal(found[valid], expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=GROUP, shift=st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(
    baseline: str, scale: str, rewards: list[float], shift: float
) -> None:
    moved = np.array(rewards) + shift
    if np.ptp(moved) == 0 and np.ptp(rewards) != 0:  # pragma: no cover - the shift swallowed the spread
        return
    found = group_relative(moved, everyone(rewards), baseline, scale)  # type: ignore[arg-type]
    expected = group_relative(np.array(rewards), everyone(rewards), baseline, scale)  # type: ignore[arg-type]
    if np.ptp(rewards) == 0:  # rounding of the shift may part equal rewards by nothing at all
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@given(rewards=GROUP.filter(lambda r: len(set(r)) > 1), factor=st.floats(1, 1000))
def test_std_scaling_makes_advantages_blind_to_the_scale_of_the_reward(rewards: list[float], factor: float) -> None:
    values = np.array(rewards)
    found = group_relative(values * factor, everyone(rewards), "group_mean", "std")
    expected = group_relative(values, everyone(rewards), "group_mean", "std")
    std = values.std(ddof=1)
    # The 1e-4 beside the standard deviation is all that breaks the invariance, and by this much:
    exact = (std + STD_EPSILON) / (std + STD_EPSILON / factor)
    np.testing.assert_allclose(found, expected * exact, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=STD_EPSILON / std + 1e-9, atol=1e-12)


@given(rewards=GROUP, factor=st.floats(0.01, 1000))
def test_without_scaling_advantages_keep_the_scale_of_the_reward(rewards: list[float], factor: float) -> None:
    values = np.array(rewards)
    found = group_relative(values * factor, everyone(rewards), "leave_one_out", "none")
    expected = factor * group_relative(values, everyone(rewards), "leave_one_out", "none")
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * factor)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=GROUP)
def test_advantages_of_a_group_sum_to_zero(baseline: str, scale: str, rewards: list[float]) -> None:
    found = group_relative(np.array(rewards), everyone(rewards), baseline, scale)  # type: ignore[arg-type]
    assert abs(found.sum()) <= 1e-9 * max(1.0, float(np.abs(found).max()))


def test_golden_numbers_of_trl() -> None:
    """``(r - r.mean()) / (r.std() + 1e-4)`` with torch's std (n - 1): TRL's GRPOTrainer, scale_rewards="group"."""
    found = group_relative(np.array([1.0, 0.0, 0.0, 0.5]), np.ones(4, dtype=bool))
    np.testing.assert_allclose(found, [1.305310, -0.783186, -0.783186, 0.261062], atol=5e-7)


def test_golden_numbers_of_leave_one_out() -> None:
    """RLOO (arXiv:2402.14740) by hand: 1 - .5/3, 0 - 1.5/3, 0 - 1.5/3, .5 - 1/3."""
    found = group_relative(np.array([1.0, 0.0, 0.0, 0.5]), np.ones(4, dtype=bool), "leave_one_out", "none")
    np.testing.assert_allclose(found, [5 / 6, -1 / 2, -1 / 2, 1 / 6], atol=1e-12)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[G\]"):
        group_relative(np.zeros(3), np.ones(2, dtype=bool))
