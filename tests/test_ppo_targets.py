"""What PPO fixes before an update: who enters it, what a token is paid, and that no order matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
from pydantic import ValidationError

from trainers.algorithms import AlgorithmSettings
from trainers.experience import FinishReason, GroupRewards, GroupSummary, WeightVersion
from trainers.ppo_lap import PPOState
from trainers.ppo_targets import SampleTargets, decode_targets, encode_targets, ppo_targets
from trainers.protocols import LearnerGroup

LENGTHS = (5, 1, 7, 3, 4)
TRAINABLE = np.array([True, True, False, True, False])
SCORES = np.array([1.0, -0.5, 100.0, 2.0, np.nan])
COEF = 0.3


def algorithm(**ppo: object) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate(
        {"name": "ppo", "kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k1", "ppo": ppo}
    )


def rows(seed: int, lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(-1.0, 1.0, t).astype(np.float32) for t in lengths]


PROXIMAL, REFERENCE, VALUES = rows(1), rows(2), rows(3)


def targets(
    settings: AlgorithmSettings, scores: np.ndarray = SCORES, coef: float = COEF, order: Sequence[int] = range(5)
) -> list[SampleTargets]:
    pick = lambda found: [found[i] for i in order]  # noqa: E731
    found, _ = ppo_targets(
        scores[list(order)], TRAINABLE[list(order)], pick(PROXIMAL), pick(REFERENCE), pick(VALUES), settings, coef
    )
    return found


def test_nothing_of_a_masked_sample_enters_any_other_and_its_own_rows_are_nan() -> None:
    settings = algorithm()
    found = targets(settings)
    odd = [row if keep else np.full_like(row, np.nan) for row, keep in zip(VALUES, TRAINABLE, strict=True)]
    spoiled, summary = ppo_targets(
        np.where(TRAINABLE, SCORES, 1e9), TRAINABLE, PROXIMAL, REFERENCE, odd, settings, COEF
    )
    assert summary.num_samples == 3 and np.isfinite([summary.score, summary.kl, summary.penalty]).all()
    for a, b, keep in zip(found, spoiled, TRAINABLE, strict=True):
        np.testing.assert_array_equal(a.advantages, b.advantages)
        np.testing.assert_array_equal(a.returns, b.returns)
        assert np.isfinite(a.advantages).all() == keep == np.isfinite(a.returns).all()


def test_advantages_are_whitened_over_all_tokens_of_the_batch_and_returns_are_not() -> None:
    plain, white = targets(algorithm(whiten_advantages=False)), targets(algorithm())
    kept = np.concatenate([t.advantages for t, keep in zip(white, TRAINABLE, strict=True) if keep])
    assert kept.mean() == pytest.approx(0.0, abs=1e-6) and kept.std() == pytest.approx(1.0, rel=1e-5)
    # One scale for everyone: sample by sample it would be another line for each.
    before = np.concatenate([t.advantages for t, keep in zip(plain, TRAINABLE, strict=True) if keep])
    slope, shift = np.polyfit(before, kept, 1)
    np.testing.assert_allclose(kept, slope * before + shift, atol=1e-5)
    for a, b in zip(plain, white, strict=True):
        np.testing.assert_array_equal(a.returns, b.returns)


def test_the_kl_in_the_reward_costs_each_sample_the_kl_of_its_sequence() -> None:
    settings = algorithm(gae_lambda=1.0, whiten_advantages=False)  # then a first return is the whole reward
    found, summary = ppo_targets(SCORES, TRAINABLE, PROXIMAL, REFERENCE, VALUES, settings, COEF)
    kls = np.array([float((p.astype(float) - r).sum()) for p, r in zip(PROXIMAL, REFERENCE, strict=True)])
    for i in np.flatnonzero(TRAINABLE):
        assert found[i].returns[0] == pytest.approx(SCORES[i] - COEF * kls[i], rel=1e-5)
        last = float(PROXIMAL[i][-1] - REFERENCE[i][-1])
        assert found[i].returns[-1] == pytest.approx(SCORES[i] - COEF * last, rel=1e-5)
    assert summary.kl == pytest.approx(kls[TRAINABLE].mean())
    metrics = summary.metrics()
    assert metrics["objective/non_score_reward"] == pytest.approx(-COEF * kls[TRAINABLE].mean())
    assert metrics["objective/rlhf_reward"] == pytest.approx((SCORES - COEF * kls)[TRAINABLE].mean())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_estimator_of_the_penalty_is_the_configured_one(estimator: str) -> None:
    settings = algorithm(gae_lambda=1.0, whiten_advantages=False).model_copy(update={"kl_estimator": estimator})
    d = PROXIMAL[0].astype(float) - REFERENCE[0]
    expected = {"k2": 0.5 * d**2, "k3": np.exp(-d) - 1 + d}[estimator]
    assert targets(settings)[0].returns[0] == pytest.approx(SCORES[0] - COEF * expected.sum(), rel=1e-5)


def test_the_coefficient_of_the_batch_counts_and_a_kl_in_the_loss_costs_no_reward() -> None:
    free = targets(algorithm(gae_lambda=1.0, whiten_advantages=False), coef=0.0)
    assert free[0].returns[0] == pytest.approx(SCORES[0])
    in_loss = algorithm(gae_lambda=1.0).model_copy(update={"kl_placement": "loss", "kl_estimator": "k2"})
    assert targets(in_loss)[0].returns[0] == pytest.approx(SCORES[0])
    with pytest.raises(ValueError, match="reference"):
        ppo_targets(SCORES, TRAINABLE, PROXIMAL, None, VALUES, algorithm(), COEF)


def test_the_order_of_the_samples_does_not_matter() -> None:
    order = [3, 0, 4, 2, 1]
    expected, found = targets(algorithm()), targets(algorithm(), order=order)
    for place, i in enumerate(order):
        for field in fields(SampleTargets):
            np.testing.assert_array_equal(getattr(found[place], field.name), getattr(expected[i], field.name))


def test_targets_survive_the_journey_and_so_does_a_sample_without_tokens() -> None:
    lengths = (3, 0, 2)
    found, _ = ppo_targets(
        np.array([1.0, np.nan, 2.0]), np.array([True, False, True]), rows(1, lengths), rows(2, lengths),
        rows(3, lengths), algorithm(), COEF,
    )  # fmt: skip
    for a, b in zip(found, decode_targets(encode_targets(found)), strict=True):
        for field in fields(SampleTargets):
            assert getattr(b, field.name).dtype == np.float32
            np.testing.assert_array_equal(getattr(b, field.name), getattr(a, field.name))


def test_a_trainable_sample_that_is_not_finite_is_an_error_and_not_a_nan_gradient() -> None:
    broken = [VALUES[0] * np.nan, *VALUES[1:]]
    with pytest.raises(ValueError, match="sample 0"):
        ppo_targets(SCORES, TRAINABLE, PROXIMAL, REFERENCE, broken, algorithm(), COEF)


# --- scores: what the loop does to rewards before the learner sees them ------------------------


def group(name: str, totals: Sequence[float], reasons: Sequence[FinishReason]) -> LearnerGroup:
    version, n = WeightVersion(0, 0), len(totals)
    summary = GroupSummary(name, name, 2, (3,) * n, tuple(reasons), version, version, "g", 0.0)
    return LearnerGroup(summary, GroupRewards(name, np.array(totals), {}), None, None)


GROUPS = (group("a", (1.0, 2.0), ("stop", "length")), group("b", (9.0, np.nan, 3.0), ("abort", "stop", "stop")))


def test_scores_are_charged_for_no_end_and_aborted_samples_are_nobodys_statistic() -> None:
    settings = algorithm(reward_shaping={"normalize": "batch", "missing_eos_penalty": 5.0})
    scores, _ = PPOState.initial(settings).scores(GROUPS, settings)
    assert [s.shape for s in scores] == [(2,), (3,)]
    valid = np.array([1.0, 2.0, 3.0])
    expected = (valid - valid.mean()) / valid.std()
    np.testing.assert_allclose(scores[0], [expected[0], expected[1] - 5.0], atol=1e-6)
    np.testing.assert_allclose(scores[1], [np.nan, np.nan, expected[2]], atol=1e-6)
    masking = settings.model_copy(update={"mask_truncated": True})
    assert np.isnan(PPOState.initial(masking).scores(GROUPS, masking)[0][0]).tolist() == [False, True]


def test_a_restored_state_goes_on_with_the_steered_coefficient_and_the_running_moments() -> None:
    settings = algorithm(kl_target=4.0, kl_horizon=100, reward_shaping={"normalize": "running"})
    state = PPOState.initial(settings)
    _, moments = state.scores(GROUPS, settings)
    later = PPOState(state.kl.updated(40.0, 10), moments)
    assert later.kl.coef != state.kl.coef and later.moments.count == 3
    assert PPOState.restored(settings, later.state_dict()) == later
    fixed = settings.model_copy(update={"ppo": settings.ppo.model_copy(update={"kl_target": None})})
    assert PPOState.restored(fixed, later.state_dict()).kl.coef == settings.kl_coef


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "ppo", "scale": "none"}, "scale=none does nothing"),
        ({"name": "ppo", "baseline": "leave_one_out"}, "baseline=leave_one_out does nothing"),
        ({"name": "grpo", "ppo": {"gamma": 0.9}}, "ppo.gamma=0.9 does nothing with name=grpo"),
        ({"name": "ppo", "ppo": {"kl_target": 3.0}}, "kl_coef=0 stays 0"),
        ({"name": "ppo", "kl_coef": 0.1, "kl_placement": "loss"}, "expected gradient of zero"),
        (
            {"name": "ppo", "mask_truncated": True, "ppo": {"reward_shaping": {"missing_eos_penalty": 1.0}}},
            "mask_truncated leaves out",
        ),
    ],
)
def test_keys_that_would_be_ignored_or_contradict_each_other_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AlgorithmSettings.model_validate(keys)
