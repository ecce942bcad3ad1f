"""Laws of token rewards, GAE, whitening over the whole batch, and explained variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.gae import explained_variance, gae, token_rewards, whiten

NUMBER = st.floats(-5, 5)
STEPS = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=12)
RATE = st.floats(0, 1)
ROWS = st.lists(st.tuples(st.lists(NUMBER, max_size=6), st.booleans()), min_size=1, max_size=8)


def columns(steps: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    rewards, values = zip(*steps, strict=True)
    return np.array(rewards), np.array(values)


# --- GAE --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(STEPS, RATE, RATE)
def test_gae_equals_the_naive_double_sum(steps: list[tuple[float, float]], gamma: float, lam: float) -> None:
    rewards, values = columns(steps)
    advantages, returns = gae(rewards, values, gamma, lam)
    after = [*values[1:], 0.0]
    for t in range(len(steps)):
        expected = 0.0
        for k in range(len(steps) - t):
            delta = rewards[t + k] + gamma * after[t + k] - values[t + k]
            expected += (gamma * lam) ** k * delta
        assert advantages[t] == pytest.approx(expected, abs=1e-9)
        assert returns[t] == pytest.approx(expected + values[t], abs=1e-9)


@settings(deadline=None)
@given(STEPS, RATE)
def test_with_lambda_1_the_advantage_is_the_return_to_go_minus_the_value(
    steps: list[tuple[float, float]], gamma: float
) -> None:
    rewards, values = columns(steps)
    to_go = np.array([sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))])
    advantages, returns = gae(rewards, values, gamma, 1.0)
    np.testing.assert_allclose(advantages, to_go - values, atol=1e-9)
    np.testing.assert_allclose(returns, to_go, atol=1e-9)  # whatever the critic says


@settings(deadline=None)
@given(STEPS, RATE)
def test_with_lambda_0_the_advantage_is_the_td_error(steps: list[tuple[float, float]], gamma: float) -> None:
    rewards, values = columns(steps)
    expected = rewards + gamma * np.append(values[1:], 0.0) - values
    np.testing.assert_allclose(gae(rewards, values, gamma, 0.0)[0], expected, atol=1e-12)


def test_golden_numbers_of_gae() -> None:
    """delta = (-0.41, 0.175, 0.75) by hand, with gamma lam = 0.9 * 0.5 = 0.45."""
    advantages, returns = gae(np.array([0.0, 0.1, 1.0]), np.array([0.5, 0.1, 0.25]), 0.9, 0.5)
    deltas = (0.09 - 0.5, 0.1 + 0.225 - 0.1, 1.0 - 0.25)
    last = deltas[2]
    middle = deltas[1] + 0.45 * last
    np.testing.assert_allclose(advantages, [deltas[0] + 0.45 * middle, middle, last], rtol=1e-12)
    np.testing.assert_allclose(advantages, [-0.156875, 0.5625, 0.75], rtol=1e-12)
    np.testing.assert_allclose(returns, [0.343125, 0.6625, 1.0], rtol=1e-12)


def test_gae_computes_in_double_precision_and_changes_none_of_its_arguments() -> None:
    rewards, values = np.array([1e-9, 1.0], dtype=np.float32), np.array([0.5, 1.0], dtype=np.float32)
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    assert advantages.dtype == returns.dtype == np.float64
    assert advantages[0] == pytest.approx(0.5 + 1e-9, abs=1e-15)  # float32 would lose the 1e-9
    np.testing.assert_array_equal(values, np.array([0.5, 1.0], dtype=np.float32))


def test_an_episode_without_tokens_has_no_advantages() -> None:
    advantages, returns = gae(np.empty(0), np.empty(0), 1.0, 0.95)
    assert advantages.shape == returns.shape == (0,)


def test_rewards_and_values_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        gae(np.zeros(3), np.zeros(2), 1.0, 1.0)


# --- token rewards ----------------------------------------------------------------------------


@settings(deadline=None)
@given(NUMBER, st.lists(NUMBER, min_size=1, max_size=12))
def test_token_rewards_sum_to_the_reward_minus_all_penalties(total: float, penalties: list[float]) -> None:
    charged = np.array(penalties)
    rewards = token_rewards(total, charged, len(penalties))
    assert rewards.sum() == pytest.approx(total - sum(penalties), abs=1e-9)
    np.testing.assert_allclose(rewards[:-1], -charged[:-1])
    assert rewards[-1] == pytest.approx(total - penalties[-1], abs=1e-12)
    np.testing.assert_array_equal(charged, penalties)  # not written to


def test_without_penalties_only_the_last_token_is_paid() -> None:
    np.testing.assert_array_equal(token_rewards(2.0, None, 3), [0.0, 0.0, 2.0])


def test_a_reward_that_no_token_can_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        token_rewards(1.0, None, 0)
    with pytest.raises(ValueError, match="must be"):
        token_rewards(1.0, np.zeros(2), 3)


# --- whitening --------------------------------------------------------------------------------


def random_rows() -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [draws.normal(3.0 + i, 2.0, size=length) for i, length in enumerate((5, 1, 0, 9, 3))]


def test_whitened_tokens_have_mean_0_and_deviation_1_over_the_batch_not_over_the_row() -> None:
    whitened = whiten(random_rows(), [True] * 5)
    tokens = np.concatenate(whitened)
    assert tokens.mean() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std() == pytest.approx(1.0, abs=1e-7)
    assert abs(whitened[0].mean()) > 0.1  # one row by itself is not centred
    raw = np.concatenate(random_rows())  # a long row counts for more than a short one: tokens, not samples
    np.testing.assert_allclose(tokens, (raw - raw.mean()) / raw.std(), rtol=1e-6)


@settings(deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_whitening_does_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[list[float], bool]], order: Random
) -> None:
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    arrays, included = [np.array(row) for row, _ in rows], [keep for _, keep in rows]
    expected = whiten(arrays, included)
    found = whiten([arrays[i] for i in shuffled], [included[i] for i in shuffled])
    for i, row in zip(shuffled, found, strict=True):
        np.testing.assert_array_equal(row, expected[i])  # to the last bit


@settings(deadline=None)
@given(ROWS)
def test_excluded_rows_change_nobody_and_come_back_as_nan(rows: list[tuple[list[float], bool]]) -> None:
    arrays = [np.array(row) if keep else np.full(len(row), np.nan) for row, keep in rows]
    found = whiten(arrays, [keep for _, keep in rows])
    kept = [np.array(row) for row, keep in rows if keep]
    expected = iter(whiten(kept, [True] * len(kept)))
    for (row, keep), whitened in zip(rows, found, strict=True):
        assert whitened.shape == (len(row),)
        np.testing.assert_array_equal(whitened, next(expected) if keep else np.full(len(row), np.nan))


def test_without_the_shift_the_mean_stays_and_the_deviation_is_1() -> None:
    raw = np.concatenate(random_rows())
    tokens = np.concatenate(whiten(random_rows(), [True] * 5, shift_mean=False))
    assert tokens.mean() == pytest.approx(raw.mean())
    assert tokens.std() == pytest.approx(1.0, abs=1e-7)


def test_a_batch_without_a_spread_becomes_0_and_not_noise() -> None:
    whitened = whiten([np.full(3, 0.1), np.full(4, 0.1)], [True, True])
    np.testing.assert_allclose(np.concatenate(whitened), 0.0, atol=1e-11)
    assert np.concatenate(whiten([np.array([7.0])], [True])).tolist() == [0.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_included_row_that_is_not_finite_is_named_before_it_spoils_the_batch(poison: float) -> None:
    with pytest.raises(ValueError, match="row 1"):
        whiten([np.array([1.0]), np.array([2.0, poison])], [True, True])


# --- explained variance -----------------------------------------------------------------------


def test_explained_variance_of_a_perfect_a_constant_and_a_harmful_critic() -> None:
    returns = np.array([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, returns + 3.0) == 1.0  # an offset is no variance
    assert explained_variance(returns, np.full(4, 2.0)) == pytest.approx(0.0)
    assert explained_variance(returns, -returns) == pytest.approx(-3.0)
    assert explained_variance(returns, returns / 2) == pytest.approx(0.75)


def test_returns_that_do_not_vary_leave_nothing_to_explain() -> None:
    assert math.isnan(explained_variance(np.full(3, 2.0), np.array([1.0, 2.0, 3.0])))
    assert math.isnan(explained_variance(np.empty(0), np.empty(0)))
