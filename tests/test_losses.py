"""Laws of the surrogate, the KL estimators, the token weights and the loss of a pack."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.objective import SUMS, TokenTerms, pack_loss
from trainers.algorithms import AlgorithmSettings
from trainers.losses import clipped_surrogate, kl_estimate, token_weights

LOGPROB = st.floats(-8, 0)
ADVANTAGE = st.floats(-5, 5)
AGGREGATIONS = ("token", "sequence", "constant")
PI = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)  # an enumerable policy and its reference
REF = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- clipped surrogate ------------------------------------------------------------------------


@given(st.lists(st.tuples(LOGPROB, LOGPROB, ADVANTAGE), min_size=1, max_size=8), st.floats(0, 0.9), st.floats(0, 3))
def test_the_surrogate_equals_plain_python(rows: list[tuple[float, float, float]], low: float, high: float) -> None:
    policy, proximal, advantages = (column(*c) for c in zip(*rows, strict=True))
    found = clipped_surrogate(policy, proximal, advantages, low, high)
    for i, (p, q, a) in enumerate(rows):
        ratio = math.exp(p - q)
        expected = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        assert found.loss[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert found.ratio[i].item() == pytest.approx(ratio, rel=1e-9)
        assert bool(found.clipped_low[i]) == (found.ratio[i].item() < 1 - low and a < 0)
        assert bool(found.clipped_high[i]) == (found.ratio[i].item() > 1 + high and a > 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.25, 1.0, False), (1.29, 1.0, True), (1.29, -1.0, False),
        (0.85, -1.0, False), (0.79, -1.0, True), (0.79, 1.0, False),
    ],
)  # fmt: skip
def test_the_clip_is_asymmetric_and_a_clipped_token_has_no_gradient(
    ratio: float, advantage: float, clipped: bool
) -> None:
    policy = column(math.log(ratio)).requires_grad_()
    found = clipped_surrogate(policy, column(0.0), column(advantage), clip_low=0.2, clip_high=0.28)
    found.loss.sum().backward()
    assert bool(found.clipped_low | found.clipped_high) == clipped
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient() -> None:
    policy = column(-1.0, -2.0, -3.0).requires_grad_()
    advantages = column(2.0, -0.5, 0.0)
    clipped_surrogate(policy, policy.detach(), advantages, 0.2, 0.2).loss.sum().backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, -advantages)


def test_golden_numbers_of_the_surrogate() -> None:
    """``-min(c1 A, clamp(c1, 1 - eps_low, 1 + eps_high) A)`` with c1 = exp(lp - old_lp): TRL's GRPOTrainer."""
    found = clipped_surrogate(
        column(-1.0, -1.0, -2.0, -2.0), column(-1.5, -1.5, -1.5, -1.5), column(1.0, -1.0, 1.0, -1.0), 0.2, 0.28
    )
    torch.testing.assert_close(found.loss, column(-1.28, 1.6487212707, -0.6065306597, 0.8))


# --- KL estimators ----------------------------------------------------------------------------


@given(LOGPROB, LOGPROB)
def test_k2_and_k3_are_never_negative(policy: float, reference: float) -> None:
    for estimator in ("k2", "k3"):
        assert kl_estimate(column(policy), column(reference), estimator).item() >= 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(logprob=LOGPROB)
def test_every_estimator_is_0_where_the_policies_agree(estimator: str, logprob: float) -> None:
    assert kl_estimate(column(logprob), column(logprob), estimator).item() == 0.0  # type: ignore[arg-type]


def test_k3_keeps_its_precision_near_equality() -> None:
    """In float32 ``exp(-d) - 1 + d`` would lose everything below 1e-7; ``expm1`` keeps more of it."""
    d = torch.tensor([1e-3], dtype=torch.float32)
    assert kl_estimate(d, torch.zeros(1), "k3").item() == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_of_k1_and_k3_is_the_kl(estimator: str) -> None:
    exact = (PI * (PI.log() - REF.log())).sum()
    torch.testing.assert_close((PI * kl_estimate(PI.log(), REF.log(), estimator)).sum(), exact)  # type: ignore[arg-type]


def test_golden_numbers_of_the_estimators() -> None:
    """k3 is TRL's ``exp(ref - lp) - (ref - lp) - 1``."""
    policy, reference = column(-1.0, -2.0), column(-1.5, -1.0)
    torch.testing.assert_close(kl_estimate(policy, reference, "k1"), column(0.5, -1.0))
    torch.testing.assert_close(kl_estimate(policy, reference, "k2"), column(0.125, 0.5))
    torch.testing.assert_close(kl_estimate(policy, reference, "k3"), column(0.1065306597, 0.7182818285))


def expected_gradient(estimator: str) -> torch.Tensor:
    """Gradient in the logits of E over *fixed* samples of pi of the estimator: what a loss term does."""
    logits = PI.log().clone().requires_grad_()
    (PI * kl_estimate(logits.log_softmax(0), REF.log(), estimator)).sum().backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    return logits.grad


def exact_gradient(forward: bool) -> torch.Tensor:
    """Gradient in the logits of KL(pi || ref), or of KL(ref || pi)."""
    logits = PI.log().clone().requires_grad_()
    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - REF.log())).sum() if forward else (REF * (REF.log() - logp)).sum()
    kl.backward()
    assert logits.grad is not None
    return logits.grad


def test_the_expected_gradient_of_k1_is_zero() -> None:
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros_like(PI))


def test_the_expected_gradient_of_k2_is_that_of_the_kl() -> None:
    torch.testing.assert_close(expected_gradient("k2"), exact_gradient(forward=True))


def test_the_expected_gradient_of_k3_is_that_of_the_reversed_kl() -> None:
    torch.testing.assert_close(expected_gradient("k3"), exact_gradient(forward=False))
    assert not torch.allclose(expected_gradient("k3"), exact_gradient(forward=True), rtol=1e-2)


# --- token weights ----------------------------------------------------------------------------

SAMPLES = st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=20)


@given(SAMPLES)
def test_token_weights_sum_to_one(samples: list[tuple[int, bool]]) -> None:
    lengths, included = zip(*samples, strict=True)
    counted = [t for t, ok in samples if ok and t > 0]
    for aggregation in ("token", "sequence"):
        total = float((token_weights(lengths, included, aggregation, 50) * lengths).sum())  # type: ignore[arg-type]
        assert total == pytest.approx(1.0 if counted else 0.0)
    constant = float((token_weights(lengths, included, "constant", 50) * lengths).sum())
    assert constant == pytest.approx(sum(counted) / (len(counted) * 50) if counted else 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(samples=SAMPLES)
def test_excluded_samples_weigh_nothing_and_change_nobody(aggregation: str, samples: list[tuple[int, bool]]) -> None:
    lengths, included = zip(*samples, strict=True)
    weights = token_weights(lengths, included, aggregation, 50)  # type: ignore[arg-type]
    keep = np.array(included) & (np.array(lengths) > 0)
    assert (weights[~keep] == 0.0).all()
    alone = [t for t, ok in samples if ok and t > 0]
    np.testing.assert_array_equal(weights[keep], token_weights(alone, [True] * len(alone), aggregation, 50))  # type: ignore[arg-type]


def test_what_each_aggregation_gives_equal_weight() -> None:
    lengths, everyone = [2, 8], [True, True]
    np.testing.assert_allclose(token_weights(lengths, everyone, "token", 16), [0.1, 0.1])
    np.testing.assert_allclose(token_weights(lengths, everyone, "sequence", 16) * lengths, [0.5, 0.5])
    np.testing.assert_allclose(token_weights(lengths, everyone, "constant", 16), [1 / 32, 1 / 32])


# --- the loss of a pack -----------------------------------------------------------------------


def test_a_masked_token_changes_neither_loss_nor_gradient_nor_metrics() -> None:
    """Even where its advantage is NaN, its reference infinite and its ratio overflows."""
    algorithm = AlgorithmSettings(kl_coef=0.1, entropy_coef=0.01)
    nan, inf = float("nan"), float("inf")

    def outcome(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs = torch.tensor([-1.0, -200.0, -2.0])[rows].requires_grad_()
        entropy = torch.tensor([1.0, 0.5, 2.0])[rows].requires_grad_()
        terms = TokenTerms(
            weights=torch.tensor([0.5, 0.0, 0.5])[rows],
            advantages=torch.tensor([1.0, nan, -1.0])[rows],
            behavior_logprobs=torch.tensor([-1.1, nan, -2.1])[rows],
            proximal_logprobs=torch.tensor([-1.2, -inf, -1.9])[rows],
            reference_logprobs=torch.tensor([-1.3, inf, -2.2])[rows],
            lengths=(1,) * len(rows),
        )
        found = pack_loss(logprobs, entropy, terms, algorithm)
        found.loss.backward()
        assert logprobs.grad is not None and entropy.grad is not None
        return found.loss, found.sums, logprobs.grad, entropy.grad

    loss, sums, grad, grad_entropy = outcome([0, 1, 2])
    expected_loss, expected_sums, expected_grad, expected_grad_entropy = outcome([0, 2])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(sums, expected_sums)
    torch.testing.assert_close(grad[[0, 2]], expected_grad)
    torch.testing.assert_close(grad_entropy[[0, 2]], expected_grad_entropy)
    assert grad[1] == 0 and grad_entropy[1] == 0
    assert dict(zip(SUMS, sums.tolist(), strict=True))["tokens"] == 2


def test_kl_in_the_reward_is_measured_but_not_in_the_loss() -> None:
    logprobs = torch.tensor([-1.0, -2.0])
    terms = TokenTerms(torch.full((2,), 0.5), torch.tensor([1.0, 1.0]), logprobs, None, logprobs - 1.0, (2,))
    in_reward = pack_loss(
        logprobs, torch.zeros(2), terms, AlgorithmSettings(kl_coef=1.0, kl_estimator="k1", kl_placement="reward")
    )
    assert in_reward.loss.item() == pytest.approx(-1.0)
    assert dict(zip(SUMS, in_reward.sums.tolist(), strict=True))["kl"] == pytest.approx(2.0)
    in_loss = pack_loss(logprobs, torch.zeros(2), terms, AlgorithmSettings(kl_coef=1.0, kl_estimator="k2"))
    assert in_loss.loss.item() == pytest.approx(-1.0 + 0.5)
