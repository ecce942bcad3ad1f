"""Laws of the off-policy correction: weights, masks, what they leave of the gradient, what the metrics say.

Expectations are exact: a policy of two binary tokens has four answers, and each one stands in the pack with the
probability that the behavior policy has of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.objective import SUMS, PackOutcome, TokenTerms, pack_loss
from actors.update_totals import UpdateTotals
from trainers.algorithms import AlgorithmSettings
from trainers.correction import CorrectionSettings, resolved
from trainers.metrics import check
from trainers.off_policy import importance_correction, ratio_histogram, ratio_quantiles

KINDS = ("token_truncate", "sequence_truncate", "token_mask", "sequence_mask", "decoupled", "cispo")
HUGE = 1e9
UNBOUNDED: dict[str, dict[str, float]] = {  # each kind with its bounds out of reach
    "token_truncate": {"cap": HUGE}, "sequence_truncate": {"cap": HUGE}, "token_mask": {"low": 0.0, "high": HUGE},
    "sequence_mask": {"low": 0.0, "high": HUGE}, "decoupled": {}, "cispo": {"cap": HUGE},
}  # fmt: skip
TOKEN_KINDS = ("token_truncate", "token_mask", "decoupled", "cispo")
TOKEN = st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-6, 0))  # policy, proximal, behavior
BATCH = st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=1, max_size=4)


def of_kind(kind: str, **keys: float) -> CorrectionSettings:
    return CorrectionSettings.model_validate({"kind": kind, **keys})


def algorithm(kind: str, bounds: dict[str, float] | None = None, **keys: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"correction": {"kind": kind, **(bounds or {})}, **keys})


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- weights ----------------------------------------------------------------------------------


def naive_weights(batch: list[list[tuple[float, float, float]]], s: CorrectionSettings) -> list[float]:
    found = []
    for sample in batch:
        ratios = [math.exp((p if s.kind == "cispo" else q) - b) for p, q, b in sample]
        if s.kind.startswith("sequence"):
            ratios = [math.exp(sum(q - b for _, q, b in sample))] * len(sample)
        for r in ratios:
            if s.kind.endswith("mask"):
                found.append(r if s.low <= r <= s.high else 0.0)
            else:
                found.append(r if s.kind == "decoupled" else min(r, s.cap))
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(batch=BATCH)
def test_the_weights_equal_plain_python(kind: str, batch: list[list[tuple[float, float, float]]]) -> None:
    policy, proximal, behavior = (column(*c) for c in zip(*(t for s in batch for t in s), strict=True))
    samples = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(s) for s in batch]))
    found = importance_correction(policy, proximal, behavior, samples, len(batch), of_kind(kind))
    torch.testing.assert_close(found.weights, column(*naive_weights(batch, of_kind(kind))), rtol=1e-9, atol=0)
    assert (found.weights[found.masked] == 0).all()
    assert (found.weights[found.truncated] == 2.0).all()


def terms_of(
    behavior: torch.Tensor, advantages: torch.Tensor, lengths: tuple[int, ...], weights: torch.Tensor | None = None
) -> TokenTerms:
    uniform = torch.full_like(behavior, 1 / len(behavior))
    return TokenTerms(uniform if weights is None else weights, advantages, behavior, None, behavior - 0.3, lengths)


def loss_and_gradient(
    logprobs: torch.Tensor, terms: TokenTerms, alg: AlgorithmSettings
) -> tuple[PackOutcome, torch.Tensor]:
    leaf = logprobs.detach().clone().requires_grad_()
    outcome = pack_loss(leaf, torch.ones_like(leaf), terms, alg)
    (gradient,) = torch.autograd.grad(outcome.loss, leaf)
    return outcome, gradient


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_where_behavior_is_proximal_every_correction_is_the_identity(kind: str) -> None:
    """To the bit; of CISPO the gradient, since the value of its loss is another one."""
    logprobs = torch.tensor([-0.5, -1.7, -0.2, -3.0, -0.9])
    terms = terms_of(logprobs, torch.tensor([1.0, 1.0, -0.5, -0.5, 2.0]), (2, 2, 1))
    keys = {"kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1}
    plain, expected = loss_and_gradient(logprobs, terms, algorithm("none", **keys))
    found, gradient = loss_and_gradient(logprobs, terms, algorithm(kind, **keys))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    if kind != "cispo":
        assert found.loss == plain.loss
    sums = dict(zip(SUMS, found.sums.tolist(), strict=True))
    assert sums["ratio"] == sums["tokens"] == 5
    assert sums["truncated"] == sums["masked"] == sums["clip_low"] == sums["clip_high"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_plain_one_times_the_weights_and_none_flows_through_them(kind: str) -> None:
    logprobs = torch.tensor([-0.5, -1.7, -0.2, -3.0, -0.9])
    behavior = torch.tensor([-1.9, -1.2, -0.4, -2.5, -3.1])
    terms = terms_of(behavior, torch.tensor([1.0, 1.0, -0.5, -0.5, 2.0]), (2, 2, 1))
    keys = {"kl_coef": 0.3, "kl_estimator": "k2"}
    _, plain = loss_and_gradient(logprobs, terms, algorithm("none", **keys))
    _, found = loss_and_gradient(logprobs, terms, algorithm(kind, **keys))
    rows = [(float(p), float(p), float(b)) for p, b in zip(logprobs, behavior, strict=True)]
    weights = torch.tensor(naive_weights([rows[:2], rows[2:4], rows[4:]], of_kind(kind)))
    assert len(weights.unique()) > 1
    torch.testing.assert_close(found, plain * weights)


@pytest.mark.parametrize("kind", ["decoupled", "token_mask"])
def test_the_decoupled_objective_clips_against_the_proximal_policy_and_weighs_by_proximal_to_behavior(
    kind: str,
) -> None:
    """A later minibatch: policy / proximal has left the clip range upwards, proximal / behavior is 3."""
    policy, proximal, behavior = column(-0.5, -1.0), column(-1.0, -1.0), column(-1.0, -1.0) - math.log(3)
    terms = TokenTerms(column(0.5, 0.5), column(1.0, 1.0), behavior, proximal, None, (2,))
    outcome, gradient = loss_and_gradient(policy, terms, algorithm(kind))
    torch.testing.assert_close(gradient, column(0.0, -0.5 * 3))
    assert outcome.loss.item() == pytest.approx(-0.5 * 3 * (1.2 + 1.0))


def test_cispo_weighs_by_the_policy_now_and_clips_no_token_out() -> None:
    policy, proximal, behavior = column(-0.5, -2.0), column(-1.0, -1.0), column(-1.0, -1.0)
    terms = TokenTerms(column(0.5, 0.5), column(1.0, -1.0), behavior, proximal, None, (2,))
    outcome, gradient = loss_and_gradient(policy, terms, algorithm("cispo", {"cap": 1.5}))
    torch.testing.assert_close(gradient, column(-0.5 * 1.5, 0.5 * math.exp(-1.0)))
    sums = dict(zip(SUMS, outcome.sums.tolist(), strict=True))
    assert (sums["clip_low"], sums["clip_high"], sums["truncated"]) == (0, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_weigh_the_same_alone_and_in_any_company(kind: str) -> None:
    """So packs, micro-batches and ranks cannot change a weight: they are cut between samples."""
    logprobs = torch.tensor([-0.5, -1.7, -0.2, -3.0, -0.9, -1.0])
    behavior = torch.tensor([-1.1, -1.2, -0.4, -2.5, -1.4, -0.1])
    advantages, lengths = torch.tensor([1.0, 1.0, -0.5, -0.5, -0.5, 2.0]), (2, 3, 1)
    _, together = loss_and_gradient(logprobs, terms_of(behavior, advantages, lengths), algorithm(kind))
    for order in ([2, 0, 1], [1], [0, 2]):
        rows = [r for i in order for r in range(sum(lengths[:i]), sum(lengths[: i + 1]))]
        weights = torch.full((len(rows),), 1 / 6)
        some = terms_of(behavior[rows], advantages[rows], tuple(lengths[i] for i in order), weights)
        _, found = loss_and_gradient(logprobs[rows], some, algorithm(kind))
        torch.testing.assert_close(found, together[rows], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["token_mask", "sequence_mask"])
def test_what_is_masked_has_no_gradient_at_all_and_leaves_the_others_weight_alone(kind: str) -> None:
    """Neither from the advantage nor from KL and entropy."""
    alg = algorithm(kind, kl_coef=0.3, entropy_coef=0.5)
    logprobs, behavior = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-9.0, -1.0, -1.0])
    entropy = torch.ones(3, requires_grad=True)
    leaf = logprobs.requires_grad_()
    outcome = pack_loss(leaf, entropy, terms_of(behavior, torch.ones(3), (2, 1)), alg)
    of_logprobs, of_entropy = torch.autograd.grad(outcome.loss, (leaf, entropy))
    gone = 1 if kind == "token_mask" else 2
    assert (of_logprobs[:gone] == 0).all() and (of_entropy[:gone] == 0).all()
    torch.testing.assert_close(of_entropy[gone:], torch.full((3 - gone,), -0.5 / 3))
    assert dict(zip(SUMS, outcome.sums.tolist(), strict=True))["masked"] == gone


# --- exact expectations: two binary tokens, four answers ---------------------------------------

STATE, CHOICE = torch.tensor([0, 1, 0, 1, 0, 2, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])
ADVANTAGES = column(1.0, -1.0, 0.5, 0.2)
LOGITS = torch.tensor([[0.4, -0.3], [1.2, 0.0], [-0.7, 0.5]], dtype=torch.float64)
BEHAVIOR = torch.tensor([[-0.8, 0.1], [0.2, 0.9], [0.4, -0.1]], dtype=torch.float64)
LENGTHS = (2, 2, 2, 2)


def tokens(logits: torch.Tensor) -> torch.Tensor:
    """Log-probs of the eight tokens of the four answers, [8]."""
    return logits.log_softmax(1)[STATE, CHOICE]


def of_answers(per_token: torch.Tensor) -> torch.Tensor:
    return per_token.reshape(4, 2).sum(1)


def gradient_of(loss_of: Any) -> torch.Tensor:
    leaf = LOGITS.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss_of(leaf), leaf)
    return found


def stale_gradient(alg: AlgorithmSettings) -> torch.Tensor:
    """Of the expected loss of samples that BEHAVIOR made, in the logits."""
    behavior = tokens(BEHAVIOR)
    weights = of_answers(behavior).exp().repeat_interleave(2)
    terms = TokenTerms(weights, ADVANTAGES.repeat_interleave(2), behavior, None, tokens(BEHAVIOR.flip(1)), LENGTHS)
    return gradient_of(lambda leaf: pack_loss(tokens(leaf), torch.zeros(8, dtype=torch.float64), terms, alg).loss)


def weighted_policy_gradient(weights: torch.Tensor) -> torch.Tensor:
    """Of ``- sum over tokens of weight * advantage * log pi``; weights [8]."""
    return gradient_of(lambda leaf: -(weights * ADVANTAGES.repeat_interleave(2) * tokens(leaf)).sum())


PI, MU = of_answers(tokens(LOGITS)).exp(), of_answers(tokens(BEHAVIOR)).exp()


@pytest.mark.parametrize("kind", ["sequence_truncate", "sequence_mask"])
def test_a_sequence_weight_makes_the_stale_gradient_the_on_policy_one(kind: str) -> None:
    expected = gradient_of(lambda leaf: -(of_answers(tokens(leaf)).exp() * ADVANTAGES).sum())
    torch.testing.assert_close(stale_gradient(algorithm(kind, UNBOUNDED[kind])), expected)
    assert not torch.allclose(stale_gradient(algorithm("none")), expected, rtol=0.1)


def test_a_sequence_weight_corrects_a_kl_in_the_loss_too() -> None:
    """k2: over samples of the policy its gradient is ``d * grad log pi`` in each token's own state."""
    d = tokens(LOGITS) - tokens(BEHAVIOR.flip(1))
    expected = gradient_of(
        lambda leaf: (PI.repeat_interleave(2) * (0.7 * d - ADVANTAGES.repeat_interleave(2)) * tokens(leaf)).sum()
    )
    alg = algorithm("sequence_truncate", UNBOUNDED["sequence_truncate"], kl_coef=0.7, kl_estimator="k2")
    torch.testing.assert_close(stale_gradient(alg), expected)


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_a_token_weight_corrects_the_choice_and_neither_how_it_was_reached_nor_what_follows(kind: str) -> None:
    pi, mu = tokens(LOGITS).exp().reshape(4, 2), tokens(BEHAVIOR).exp().reshape(4, 2)
    weights = torch.stack([pi[:, 0] * mu[:, 1], mu[:, 0] * pi[:, 1]], 1).flatten()
    found = stale_gradient(algorithm(kind, UNBOUNDED[kind]))
    torch.testing.assert_close(found, weighted_policy_gradient(weights))
    assert not torch.allclose(found, weighted_policy_gradient(PI.repeat_interleave(2)), rtol=0.1)


def test_over_one_token_a_token_weight_is_exact() -> None:
    """The two answers of the first state."""
    behavior, first = tokens(BEHAVIOR)[[0, 4]], [0, 4]
    terms = TokenTerms(behavior.exp(), column(1.0, -0.4), behavior, None, None, (1, 1))
    zeros = torch.zeros(2, dtype=torch.float64)
    for kind in TOKEN_KINDS:
        alg = algorithm(kind, UNBOUNDED[kind])
        found = gradient_of(lambda leaf, alg=alg: pack_loss(tokens(leaf)[first], zeros, terms, alg).loss)
        expected = gradient_of(lambda leaf: -(tokens(leaf)[first].exp() * column(1.0, -0.4)).sum())
        torch.testing.assert_close(found, expected)


def test_truncation_costs_the_mass_above_the_cap_and_nothing_else() -> None:
    """``E_behavior[min(q, cap) f] = E_policy[f] - sum over answers of max(0, pi - cap mu) f``."""
    cap = 1.25
    lost = torch.clamp(PI - cap * MU, min=0)
    assert 0 < int((lost > 0).sum()) < 4
    expected = weighted_policy_gradient((PI - lost).repeat_interleave(2))
    torch.testing.assert_close(stale_gradient(algorithm("sequence_truncate", {"cap": cap})), expected)


def test_a_mask_costs_what_lies_outside_its_band_and_nothing_else() -> None:
    low, high = 0.8, 1.5
    ratios = PI / MU
    inside = (ratios >= low) & (ratios <= high)
    assert 0 < int(inside.sum()) < 4
    expected = weighted_policy_gradient((PI * inside).repeat_interleave(2))
    torch.testing.assert_close(stale_gradient(algorithm("sequence_mask", {"low": low, "high": high})), expected)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"correction": {"kind": "none", "cap": 3.0}}, "cap=3 does nothing with correction.kind=none"),
        ({"correction": {"kind": "decoupled", "cap": 3.0}}, "cap=3 does nothing"),
        ({"correction": {"kind": "token_truncate", "low": 0.1}}, "low=0.1 does nothing"),
        ({"correction": {"high": 9.0}}, "high=9 does nothing with correction.kind=auto"),
        ({"correction": {"kind": "cispo"}, "clip_high": 0.28}, "clip_high=0.28 does nothing"),
        ({"correction": {"kind": "token_truncate", "cap": 0.9}}, "greater than or equal to 1"),
        ({"correction": {"kind": "token_mask", "low": 1.0}}, "less than 1"),
        ({"correction": {"kind": "token_mask", "high": 1.0}}, "greater than 1"),
    ],
)
def test_a_bound_that_does_nothing_or_would_cut_a_ratio_of_1_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AlgorithmSettings.model_validate(keys)


def test_auto_is_a_token_truncation_of_stale_runs_and_nothing_else() -> None:
    auto = of_kind("auto", cap=3.0)
    assert resolved(auto, 0) == of_kind("none")
    assert resolved(auto, 1) == resolved(auto, 16) == of_kind("token_truncate", cap=3.0)
    assert resolved(CorrectionSettings(), 4) == of_kind("token_truncate")
    for kind in ("none", *KINDS):
        assert resolved(of_kind(kind), 0) == resolved(of_kind(kind), 4) == of_kind(kind)
    assert not auto.is_on and not of_kind("none").is_on and all(of_kind(kind).is_on for kind in KINDS)


# --- metrics ----------------------------------------------------------------------------------


class NoLayout:
    """A pack's share of what the totals read of it."""

    num_inputs = 0

    class layout:
        blocks = ()


def metrics_of(monkeypatch: pytest.MonkeyPatch, packs: list[tuple[torch.Tensor, tuple[int, ...]]]) -> dict[str, float]:
    """One rank's metrics; each pack is log ratios and lengths."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *args, **kwargs: None)
    totals = UpdateTotals(torch.device("cpu"))
    for log_ratios, lengths in packs:
        logprobs, ones = torch.full_like(log_ratios, -2.0), torch.ones_like(log_ratios)
        terms = TokenTerms(ones, ones, logprobs - log_ratios, None, None, lengths)
        outcome = pack_loss(logprobs, torch.zeros_like(logprobs), terms, algorithm("token_truncate"))
        totals.add(outcome, NoLayout(), first=True)  # type: ignore[arg-type]
    metrics = totals.reduced()
    for name in metrics:
        check(name)
    return metrics


def test_the_effective_sample_size_is_that_of_whole_samples_whatever_the_packs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [column(0.1, 0.2), column(-0.5), column(0.4, 0.4, -0.1)]
    w = np.exp([float(r.sum()) for r in rows])
    expected = w.sum() ** 2 / (3 * (w**2).sum())
    apart = metrics_of(monkeypatch, [(r, (len(r),)) for r in rows])
    together = metrics_of(monkeypatch, [(torch.cat(rows), (2, 1, 3))])
    name = "sampling/effective_sample_size"
    assert apart[name] == pytest.approx(expected) and together[name] == pytest.approx(expected)
    assert apart["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(0.4))
    assert apart["correction/truncated_fraction"] == 0.0 == apart["correction/masked_fraction"]


@pytest.mark.parametrize("far", [0.0, 700.0, -700.0])
def test_equal_weights_have_all_samples_and_one_outweighing_all_has_one(
    monkeypatch: pytest.MonkeyPatch, far: float
) -> None:
    """However far off: sequence weights of e^1400 do not overflow."""
    name = "sampling/effective_sample_size"
    equal = [(column(far, far), (2,))] * 4
    assert metrics_of(monkeypatch, equal)[name] == pytest.approx(1.0)
    assert metrics_of(monkeypatch, [*equal[:3], (column(far, far + 60), (2,))])[name] == pytest.approx(0.25)


def test_the_mismatch_kl_is_that_of_behavior_against_proximal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens as often as behavior (1/2, 1/4, 1/4) has them; proximal is (1/4, 1/4, 1/2)."""
    log_ratios = column(math.log(0.5), math.log(0.5), 0.0, math.log(2.0))
    metrics = metrics_of(monkeypatch, [(log_ratios, (4,))])
    exact = 0.5 * math.log(2.0) - 0.25 * math.log(2.0)
    assert metrics["sampling/mismatch_kl/k1"] == pytest.approx(exact)
    assert metrics["sampling/mismatch_kl/k3"] == pytest.approx(exact)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-45, 45), min_size=1, max_size=60), st.integers(1, 59))
def test_quantiles_come_out_of_a_histogram_that_adds_up(log_ratios: list[float], cut: int) -> None:
    whole = column(*log_ratios)
    counts = ratio_histogram(whole)
    torch.testing.assert_close(ratio_histogram(whole[:cut]) + ratio_histogram(whole[cut:]), counts)
    for share, found in zip((0.01, 0.5, 0.99), ratio_quantiles(counts, (0.01, 0.5, 0.99)), strict=True):
        exact = float(np.quantile(log_ratios, share, method="inverted_cdf"))
        assert abs(math.log(found) - exact) <= 0.004 * max(abs(exact), 1e-4)


def test_ratios_of_exactly_1_have_quantiles_of_exactly_1_and_no_ratio_at_all_has_none() -> None:
    assert ratio_quantiles(ratio_histogram(torch.zeros(7)), (0.01, 0.5, 0.99)) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="without any"):
        ratio_quantiles(ratio_histogram(torch.tensor([math.nan])), (0.5,))
