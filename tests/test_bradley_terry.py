"""Laws of the preference loss, of the pairs of a ranking and of their weights."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.bradley_terry import pair_weights, preference_loss, probability, ranking_pairs

SCORE = st.floats(-6, 6)
PAIRS = st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=8)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniform(n: int) -> torch.Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


# --- the loss ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(SCORE, st.sampled_from([0.0, 0.1, 0.3]))
def test_at_zero_margin_the_loss_is_ln_2_whatever_the_smoothing(score: float, smoothing: float) -> None:
    found = preference_loss(column(score), column(score), column(1.0), label_smoothing=smoothing)
    assert found.loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert probability(found.margin).item() == 0.5


@settings(deadline=None)
@given(PAIRS, st.floats(-3, 3))
def test_a_constant_added_to_both_scores_changes_nothing_unless_they_are_centred(
    rows: list[tuple[float, float]], shift: float
) -> None:
    chosen, rejected = (column(*c) for c in zip(*rows, strict=True))
    weights = uniform(len(rows))
    here = preference_loss(chosen, rejected, weights, label_smoothing=0.1).per_pair
    there = preference_loss(chosen + shift, rejected + shift, weights, label_smoothing=0.1).per_pair
    torch.testing.assert_close(here, there)
    centred = preference_loss(chosen + shift, rejected + shift, weights, centering_coef=0.5)
    extra = 0.5 * ((chosen + rejected + 2 * shift) ** 2 * weights).sum()
    plain = preference_loss(chosen, rejected, weights)
    torch.testing.assert_close(centred.loss, plain.loss + extra)


def test_golden_numbers_of_the_preference_loss() -> None:
    """Against float64 numpy, by ``log(1 + exp(-x))`` instead of logsigmoid, and 30-digit decimals."""
    chosen, rejected = np.array([1.0, -0.5, 2.0]), np.array([0.25, 0.5, -2.0])
    margin, weights = np.array([0.5, 0.0, 1.0]), np.array([0.5, 0.25, 0.25])
    x = chosen - rejected - margin
    per_pair = 0.9 * np.log1p(np.exp(-x)) + 0.1 * np.log1p(np.exp(x)) + 0.01 * (chosen + rejected) ** 2
    np.testing.assert_allclose(per_pair, [0.616564419879, 1.213261687518, 0.348587351574], rtol=1e-11)
    c, r, w, m = (torch.tensor(a, dtype=torch.float32) for a in (chosen, rejected, weights, margin))
    found = preference_loss(c, r, w, m, label_smoothing=0.1, centering_coef=0.01)
    assert found.loss.dtype == torch.float32
    np.testing.assert_allclose(found.per_pair.numpy(), per_pair, rtol=1e-6)
    assert found.loss.item() == pytest.approx(float((per_pair * weights).sum()), rel=1e-6)
    np.testing.assert_allclose(found.margin.numpy(), chosen - rejected)  # of the scores, not of the loss


def test_a_hopeless_pair_has_a_finite_loss_and_gradient() -> None:
    """log(sigmoid(x)) in two steps would be -inf below x = -104 in float32."""
    chosen = torch.tensor([-500.0]).requires_grad_()
    found = preference_loss(chosen, torch.tensor([500.0]), torch.ones(1))
    found.loss.backward()
    assert found.loss.item() == 1000.0
    assert chosen.grad is not None and chosen.grad.item() == -1.0


def test_a_pair_of_weight_0_is_not_looked_at() -> None:
    chosen = torch.tensor([1.0, math.nan]).requires_grad_()
    rejected = torch.tensor([0.0, math.inf]).requires_grad_()
    found = preference_loss(chosen, rejected, torch.tensor([1.0, 0.0]), torch.zeros(2), 0.1, 0.1)
    found.loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert math.isfinite(found.loss.item()) and found.per_pair[1] == 0
    assert chosen.grad[1] == 0 and rejected.grad[1] == 0
    assert chosen.grad[0] != 0


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.4])
def test_smoothing_has_its_optimum_at_the_margin_of_the_noise(smoothing: float) -> None:
    """d* = log((1 - s) / s): there the model is as certain as the labels are, and no more."""
    best = math.log((1 - smoothing) / smoothing)
    margins = column(best - 0.1, best, best + 0.1).requires_grad_()
    loss = preference_loss(margins, torch.zeros(3, dtype=torch.float64), torch.ones(3), label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss.loss, margins)
    assert gradient[0] < 0 < gradient[2]
    assert gradient[1].item() == pytest.approx(0.0, abs=1e-12)
    assert probability(margins.detach()[1]).item() == pytest.approx(1 - smoothing)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_smoothing_that_says_nothing_or_the_opposite_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(column(1.0), column(0.0), column(1.0), label_smoothing=smoothing)


def test_scores_of_different_shapes_are_refused_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match="must all be"):
        preference_loss(torch.zeros(3), torch.zeros(3, 1), torch.ones(3))


def test_the_loss_recovers_a_planted_reward_up_to_a_constant() -> None:
    """Both orders of every pair, each weighted by its Bradley-Terry probability: soft labels, no noise."""
    planted = column(1.3, -0.4, 0.2, 2.0, -1.1)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    better, worse = (torch.tensor(c) for c in zip(*pairs, strict=True))
    weights = probability(planted[better] - planted[worse]) / len(pairs)
    scores = torch.full((5,), 0.7, dtype=torch.float64).requires_grad_()
    for _ in range(300):
        loss = preference_loss(scores[better], scores[worse], weights).loss
        (gradient,) = torch.autograd.grad(loss, scores)
        with torch.no_grad():
            scores -= 4.0 * gradient
    found = scores.detach()
    torch.testing.assert_close(found - found.mean(), planted - planted.mean(), rtol=0, atol=1e-6)
    assert found.mean().item() == pytest.approx(0.7)  # the constant is not learnt: it stays where it began


# --- rankings ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_ranking_without_ties_makes_all_pairs_in_the_right_order(order: list[int], k: int) -> None:
    ranks = order[:k]
    pairs = ranking_pairs(ranks)
    assert len(pairs) == len(set(pairs)) == math.comb(k, 2)
    assert all(ranks[better] < ranks[worse] for better, worse in pairs)  # rank 1 is the best


def test_ties_and_unranked_answers_make_no_pair() -> None:
    assert sorted(ranking_pairs([1, 2, 2, 3])) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ranking_pairs([2, math.nan, 1]) == [(2, 0)]
    assert ranking_pairs([1, 1]) == ranking_pairs([1]) == ranking_pairs([]) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 36), min_size=1, max_size=12))
def test_each_prompt_weighs_once_whatever_its_number_of_pairs(counts: list[int]) -> None:
    weights = pair_weights(counts)
    shares = weights * counts
    with_pairs = [share for share, n in zip(shares, counts, strict=True) if n]
    assert weights.dtype == np.float64
    assert all(a == pytest.approx(b) for a, b in pairwise(with_pairs))
    assert sum(with_pairs) == pytest.approx(1.0 if any(counts) else 0.0)
    assert all(weight == 0.0 for weight, n in zip(weights, counts, strict=True) if not n)
    assert np.repeat(weights, counts).sum() == pytest.approx(1.0 if any(counts) else 0.0)


def test_golden_numbers_of_the_pair_weights() -> None:
    np.testing.assert_allclose(pair_weights([1, 0, 6]), [1 / 2, 0, 1 / 12])
