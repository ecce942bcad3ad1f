"""Laws of reward normalisation, clipping and the missing-EOS penalty."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainers.reward_shaping import RewardShaping, RunningMoments, shape

TOTALS = st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), max_size=12)
SETTINGS = st.builds(
    RewardShaping,
    normalize=st.sampled_from(["none", "running", "batch"]),
    clip=st.one_of(st.none(), st.floats(0.1, 5)),
    missing_eos_penalty=st.floats(0, 3),
)
NONE = RunningMoments()


def everyone_ended(totals: np.ndarray) -> np.ndarray:
    return np.ones(totals.shape, dtype=bool)


# --- moments ----------------------------------------------------------------------------------


@hypothesis_settings(deadline=None)
@given(st.lists(TOTALS, max_size=6))
def test_running_moments_are_those_of_all_finite_values_however_they_came(batches: list[list[float]]) -> None:
    running = NONE
    for batch in batches:
        running = running.updated(np.array(batch, dtype=np.float64))
    seen = np.array([x for batch in batches for x in batch if math.isfinite(x)])
    assert running.count == seen.size
    if seen.size:
        assert running.mean == pytest.approx(seen.mean(), abs=1e-9)
        assert running.std == pytest.approx(seen.std(), abs=1e-6)
    else:
        assert math.isnan(running.std)


def test_a_large_offset_does_not_cancel_the_spread() -> None:
    """The sum of squares minus the square of the sum would return 0, or something negative."""
    running = NONE
    for batch in np.array([1.0, 2.0, 3.0, 4.0]) + 1e9:
        running = running.updated(np.array([batch]))
    assert running.std == pytest.approx(np.sqrt(1.25))


def test_resumed_moments_are_those_that_were_saved() -> None:
    running = NONE.updated(np.array([0.1, 0.7, math.nan]))
    assert RunningMoments.from_state(json.loads(json.dumps(running.state_dict()))) == running


# --- shaping ----------------------------------------------------------------------------------


@hypothesis_settings(deadline=None)
@given(TOTALS, SETTINGS)
def test_masked_samples_stay_masked_and_change_nobody(totals: list[float], settings: RewardShaping) -> None:
    values = np.array(totals, dtype=np.float64)
    ended = np.arange(values.size) % 2 == 0
    valid = np.isfinite(values)
    shaped, running = shape(values, ended, settings, NONE.updated(np.array([1.0, 4.0])))
    np.testing.assert_array_equal(np.isnan(shaped), ~valid)
    alone, running_alone = shape(values[valid], ended[valid], settings, NONE.updated(np.array([1.0, 4.0])))
    np.testing.assert_array_equal(shaped[valid], alone)
    assert running == running_alone
    assert running.count == 2 + (valid.sum() if settings.normalize == "running" else 0)


def test_the_defaults_change_nothing() -> None:
    totals = np.array([1.5, math.nan, -200.0])
    shaped, running = shape(totals, np.zeros(3, dtype=bool), RewardShaping(), NONE)
    np.testing.assert_array_equal(shaped, totals)
    assert running == NONE


def test_a_batch_is_normalised_to_mean_0_and_deviation_1() -> None:
    totals = np.array([1.0, 2.0, math.nan, 6.0])
    shaped, running = shape(totals, everyone_ended(totals), RewardShaping(normalize="batch"), NONE)
    assert np.nanmean(shaped) == pytest.approx(0.0, abs=1e-12)
    assert np.nanstd(shaped) == pytest.approx(1.0)
    assert running == NONE  # it keeps no history


def test_running_normalisation_counts_this_batch_and_all_before_it() -> None:
    settings = RewardShaping(normalize="running")
    first, second = np.array([0.0, 4.0]), np.array([2.0, 10.0])
    shaped, running = shape(first, everyone_ended(first), settings, NONE)
    np.testing.assert_allclose(shaped, [-1.0, 1.0])
    shaped, running = shape(second, everyone_ended(second), settings, running)
    history = np.concatenate([first, second])
    np.testing.assert_allclose(shaped, (second - history.mean()) / history.std())
    assert running.count == 4


@pytest.mark.parametrize("normalize", ["running", "batch"])
def test_rewards_that_are_all_equal_become_0_and_not_noise(normalize: str) -> None:
    totals = np.full(7, 0.1)
    shaped, running = shape(totals, everyone_ended(totals), RewardShaping(normalize=normalize), NONE)  # type: ignore[arg-type]
    np.testing.assert_allclose(shaped, 0.0, atol=1e-10)
    shaped, _ = shape(totals, everyone_ended(totals), RewardShaping(normalize=normalize), running)  # type: ignore[arg-type]
    np.testing.assert_allclose(shaped, 0.0, atol=1e-10)


def test_normalise_then_clip_then_charge_for_the_missing_end() -> None:
    """[0, 0, 0, 0, 10]: mean 2, deviation 4 -> -0.5 (4 times) and 2; clipped at 1; 3 off, also below the clip."""
    totals = np.array([0.0, 0.0, 0.0, 0.0, 10.0])
    settings = RewardShaping(normalize="batch", clip=1.0, missing_eos_penalty=3.0)
    shaped, _ = shape(totals, np.array([True, True, True, False, False]), settings, NONE)
    np.testing.assert_allclose(shaped, [-0.5, -0.5, -0.5, -3.5, -2.0])


def test_the_clip_has_two_sides() -> None:
    totals = np.array([-7.0, 0.5, 7.0])
    np.testing.assert_array_equal(shape(totals, everyone_ended(totals), RewardShaping(clip=2.0), NONE)[0], [-2, 0.5, 2])


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"clip": -1.0}, {"missing_eos_penalty": -0.1}, {"normalise": "none"}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RewardShaping.model_validate(wrong)
