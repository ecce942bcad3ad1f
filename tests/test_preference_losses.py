"""The preference losses: each against a numpy of its own, and the laws that the papers claim for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from trainers.preference_losses import (
    LEAST_SURPRISE,
    AnswerLogps,
    Outcome,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    mismatched_kl,
    orpo_loss,
    paired_outcome,
    robust_dpo_loss,
    simpo_loss,
    unpaired_outcome,
)
from trainers.preference_training import LABELLED, LOSSES, PreferenceSettings

BETA = 0.5
CASES = {  # reference, reward, pi* = reference exp(R / beta) / Z: DESIGN's numbers
    "two answers": ((0.6, 0.4), (1.0, 0.0), (0.917243, 0.082757)),
    "three answers": ((0.5, 0.3, 0.2), (1.0, 0.5, -1.0), (0.814296, 0.179738, 0.005966)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3},
    "conservative": {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.1},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.05},
    "orpo": {"beta": 0.4},
    "simpo": {"beta": 2.5, "gamma": 0.7},
    "kto": {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8},
}
PAIRED = [name for name in OPTIONS if name != "kto"]


def settings(name: str) -> PreferenceSettings:
    return PreferenceSettings(name="dpo", **{"loss": name, **OPTIONS[name]})


def double(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-np.asarray(x)))


def drawn(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Sums of token log-probs, as answers of 1 to 30 tokens have them."""
    draw = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {"weights": draw.dirichlet(np.ones(num)), "label": draw.random(num) < 0.6}
    for side in ("chosen", "rejected"):
        found[f"num_{side}"] = draw.integers(1, 30, num).astype(np.float64)
        found[side] = -draw.uniform(0.05, 3, num) * found[f"num_{side}"]
        found[f"reference_{side}"] = found[side] + draw.normal(0, 2, num)
    return found


def answers(data: dict[str, np.ndarray], side: str, has_reference: bool = True) -> AnswerLogps:
    reference = double(data[f"reference_{side}"]) if has_reference else None
    return AnswerLogps(double(data[side]).requires_grad_(), reference, double(data[f"num_{side}"]))


def outcome(name: str, data: dict[str, np.ndarray], kl: float = 0.4) -> Outcome:
    made = settings(name)
    has_reference = made.kind.has_reference
    if made.kind.rows == LABELLED:
        label = torch.tensor(data["label"])
        return unpaired_outcome(answers(data, "chosen"), label, int(data["label"].sum()), len(label), kl, made)
    chosen, rejected = (answers(data, side, has_reference) for side in ("chosen", "rejected"))
    return paired_outcome(chosen, rejected, double(data["weights"]), made)


# --- against numpy ------------------------------------------------------------------------------


def by_numpy(name: str, d: dict[str, np.ndarray], kl: float) -> float:
    """The loss of ``name`` by its paper's formula: probabilities first, logarithms last."""
    o = OPTIONS[name]
    beta = o["beta"]
    if name == "kto":
        reward = d["chosen"] - d["reference_chosen"]
        value = np.where(
            d["label"], o["desirable_weight"] * sigmoid(beta * (reward - kl)),
            o["undesirable_weight"] * sigmoid(beta * (kl - reward)),
        )  # fmt: skip
        sizes = np.where(d["label"], o["desirable_weight"], o["undesirable_weight"])
        return float(np.mean(sizes - value))
    means = {side: d[side] / d[f"num_{side}"] for side in ("chosen", "rejected")}
    if name == "orpo":
        p = {side: np.exp(mean) for side, mean in means.items()}
        odds = {side: q / (1 - q) for side, q in p.items()}
        ratio = np.log(sigmoid(np.log(odds["chosen"] / odds["rejected"])))
        return float((d["weights"] * (-means["chosen"] - beta * ratio)).sum())
    if name == "simpo":
        h = beta * means["chosen"] - beta * means["rejected"] - o["gamma"]
        return float((-d["weights"] * np.log(sigmoid(h))).sum())
    margin = (d["chosen"] - d["rejected"]) - (d["reference_chosen"] - d["reference_rejected"])
    if name == "ipo":
        return float((d["weights"] * (margin - 1 / (2 * beta)) ** 2).sum())
    won, lost = -np.log(sigmoid(beta * margin)), -np.log(sigmoid(-beta * margin))
    e = o.get("label_smoothing", 0.0)
    terms = ((1 - e) * won - e * lost) / (1 - 2 * e) if name == "robust" else (1 - e) * won + e * lost
    return float((d["weights"] * terms).sum())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_is_that_of_its_papers_formula(name: str, seed: int) -> None:
    data = drawn(17, seed)
    assert outcome(name, data).loss.item() == pytest.approx(by_numpy(name, data, 0.4), rel=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    data, step = drawn(5), 1e-5
    made = settings(name)
    parts = [answers(data, side, made.kind.has_reference) for side in ("chosen", "rejected")]
    if name == "kto":
        found = unpaired_outcome(parts[0], torch.tensor(data["label"]), int(data["label"].sum()), 5, 0.4, made)
    else:
        found = paired_outcome(*parts, double(data["weights"]), made)
    found.loss.backward()
    for side, known in zip(("chosen", "rejected")[: 1 if name == "kto" else 2], parts, strict=False):
        assert known.policy.grad is not None
        for i in range(5):
            up, down = ({**data, side: data[side] + sign * step * (np.arange(5) == i)} for sign in (1, -1))
            expected = (by_numpy(name, up, 0.4) - by_numpy(name, down, 0.4)) / (2 * step)
            assert known.policy.grad[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_a_batch_add_up_to_its_loss_and_metrics(name: str) -> None:
    data, made = drawn(12), settings(name)
    whole = outcome(name, data)
    chosen, rejected = (answers(data, side, made.kind.has_reference) for side in ("chosen", "rejected"))
    weights, label = double(data["weights"]), torch.tensor(data["label"])
    parts = [
        unpaired_outcome(part(chosen, r), label[r], int(label.sum()), 12, 0.4, made)
        if name == "kto"
        else paired_outcome(part(chosen, r), part(rejected, r), weights[r], made)
        for r in PARTS
    ]
    assert sum(found.loss.item() for found in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for metric, value in whole.metrics.items():
        assert sum(found.metrics[metric].item() for found in parts) == pytest.approx(value.item(), rel=1e-10), metric


PARTS = (slice(0, 1), slice(1, 8), slice(8, 12), slice(12, 12))  # the last: a rank that has nothing


def part(known: AnswerLogps, rows: slice) -> AnswerLogps:
    reference = None if known.reference is None else known.reference[rows]
    return AnswerLogps(known.policy[rows], reference, known.num_tokens[rows])


# --- at the start -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "conservative", "robust"])
def test_while_policy_and_reference_are_one_the_loss_is_ln_2(name: str) -> None:
    data = drawn(9)
    same = {**data, **{f"reference_{side}": data[side] for side in ("chosen", "rejected")}}
    found = outcome(name, same)
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert found.metrics["rewards/accuracies"].item() == pytest.approx(0.5)
    assert found.metrics["rewards/margins"].item() == 0
    assert found.metrics["logps/chosen"].item() == pytest.approx(float((data["weights"] * data["chosen"]).sum()))


def test_while_policy_and_reference_are_one_ipo_and_kto_begin_where_their_papers_say() -> None:
    data = drawn(9)
    same = {**data, **{f"reference_{side}": data[side] for side in ("chosen", "rejected")}}
    assert outcome("ipo", same).loss.item() == pytest.approx((1 / (2 * 0.05)) ** 2)
    sizes = np.where(data["label"], 1.3, 0.8)
    assert outcome("kto", same, kl=0.0).loss.item() == pytest.approx(0.5 * sizes.mean())


# --- where they end -----------------------------------------------------------------------------

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def trained(reference: torch.Tensor, preferred: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The policy where ``loss`` is lowest; ``preferred[i, j]``: how often answer i is preferred to j."""
    n = len(reference)
    pairs = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j])
    weights = preferred[pairs[:, 0], pairs[:, 1]] / len(pairs)
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference.log()
        total = loss(ratio[pairs[:, 0]], ratio[pairs[:, 1]], weights)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return logits.detach().softmax(0)


def bradley_terry(rewards: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


@pytest.mark.parametrize("case", CASES)
def test_dpo_with_bradley_terry_labels_ends_at_the_regularised_optimum(case: str) -> None:
    reference, rewards, expected = (double(row) for row in CASES[case])
    found = trained(reference, bradley_terry(rewards), lambda w, r, weights: dpo_loss(w, r, weights, BETA))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_robust_dpo_ends_there_too_when_labels_are_flipped_and_dpo_and_conservative_dpo_do_not(
    case: str, noise: float
) -> None:
    reference, rewards, expected = (double(row) for row in CASES[case])
    true = bradley_terry(rewards)
    flipped = (1 - noise) * true + noise * (1 - true)
    robust = trained(reference, flipped, lambda w, r, weights: robust_dpo_loss(w, r, weights, BETA, noise))
    torch.testing.assert_close(robust, expected, rtol=0, atol=2e-6)
    for smoothing in (0.0, noise):
        other = trained(reference, flipped, partial(dpo_loss, beta=BETA, label_smoothing=smoothing))
        assert float((other - expected).abs().max()) > 0.005


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_robust_dpo_is_unbiased_at_planted_noise(noise: float) -> None:
    data = drawn(11)
    w, r, weights = (double(data[name]) for name in ("chosen", "rejected", "weights"))
    robust: Loss = lambda a, b, v: robust_dpo_loss(a, b, v, 0.1, noise)  # noqa: E731
    expected = dpo_loss(w, r, weights, 0.1).item()
    # Exactly, over both labels of each pair ...
    assert ((1 - noise) * robust(w, r, weights) + noise * robust(r, w, weights)).item() == pytest.approx(expected)
    # ... and as a mean over labels that were drawn.
    flips = torch.tensor(np.random.default_rng(0).random((20_000, 11)) < noise)
    a, b = torch.where(flips, r, w).flatten(), torch.where(flips, w, r).flatten()
    mean = robust(a, b, weights.repeat(20_000) / 20_000).item()
    assert mean == pytest.approx(expected, rel=0.02)
    assert dpo_loss(a, b, weights.repeat(20_000) / 20_000, 0.1).item() != pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_conservative_dpo_is_lowest_where_it_is_as_sure_as_the_labels(smoothing: float) -> None:
    best = math.log((1 - smoothing) / smoothing) / BETA
    margin = double([best - 0.1, best, best + 0.1]).requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(margin, torch.zeros(3), torch.ones(3), BETA, smoothing), margin)
    assert gradient[0] < 0 < gradient[2] and gradient[1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
def test_ipo_is_lowest_at_a_margin_of_one_over_two_tau(tau: float) -> None:
    best = 1 / (2 * tau)
    margin = double([best - 0.1, best, best + 0.1]).requires_grad_()
    loss = ipo_loss(margin, torch.zeros(3), double([1.0, 1.0, 1.0]), tau)
    (gradient,) = torch.autograd.grad(loss, margin)
    assert gradient[0] < 0 < gradient[2] and gradient[1].item() == pytest.approx(0, abs=1e-12)
    reference = double((0.6, 0.4))
    found = trained(reference, double([[0, 1], [0, 0]]), lambda w, r, v: ipo_loss(w, r, v, tau))
    ratio = (found / reference).log()
    assert (ratio[0] - ratio[1]).item() == pytest.approx(best, rel=1e-5)


# --- lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_same"), [("simpo", True), ("orpo", True), ("sigmoid", False), ("ipo", False)])
def test_only_the_losses_of_means_are_unchanged_when_tokens_of_equal_log_prob_repeat(name: str, is_same: bool) -> None:
    token = {"chosen": np.array([-0.7, -1.1]), "rejected": np.array([-1.3, -0.2])}

    def of(times: int) -> float:
        data = {"weights": np.array([0.5, 0.5])}
        for side, logp in token.items():
            data |= {side: logp * 3 * times, f"num_{side}": np.array([3.0 * times] * 2)}
            data[f"reference_{side}"] = 0.9 * data[side]
        return outcome(name, data).loss.item()

    assert (of(1) == pytest.approx(of(5), rel=1e-12)) == is_same


def test_the_log_odds_keep_their_digits_and_end_where_certainty_begins() -> None:
    for mean in (-1e-6, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -40.0):
        with localcontext() as context:
            context.prec = 40
            exact = Decimal(mean) - (1 - Decimal(mean).exp()).ln()
        assert log_odds(double([mean])).item() == pytest.approx(float(exact), rel=1e-9, abs=1e-12)
    edge = double([0.0, -LEAST_SURPRISE / 2, -200.0, -0.1]).requires_grad_()
    values = log_odds(edge)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(values).all() and edge.grad is not None and torch.isfinite(edge.grad).all()
    assert edge.grad[0] == 0 and edge.grad[3] == pytest.approx(1 / (1 - math.exp(-0.1)))


def test_a_hopeless_pair_has_a_finite_loss_and_gradient() -> None:
    w, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-9000.0, 9000.0))
    one = torch.ones(1, dtype=torch.float64)
    for loss in (dpo_loss(w, r, one, 0.5), robust_dpo_loss(w, r, one, 0.5, 0.1), simpo_loss(w, r, one, 2.0, 0.5),
                 orpo_loss(w, torch.zeros_like(w), one, 0.1)):  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, w, retain_graph=True)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient.item() < 0


# --- KTO ------------------------------------------------------------------------------------------


def test_the_kl_of_kto_is_a_mean_that_never_falls_below_zero() -> None:
    assert mismatched_kl(6.0, 4) == 1.5
    assert mismatched_kl(-6.0, 4) == 0.0


@pytest.mark.parametrize("labels", [(True, True, True), (False, False, False), (True, False, False)])
def test_kto_takes_whatever_labels_there_are(labels: tuple[bool, ...]) -> None:
    ratio = double([0.5, -0.2, 3.0]).requires_grad_()
    known = AnswerLogps(ratio, torch.zeros(3, dtype=torch.float64), torch.ones(3))
    found = unpaired_outcome(known, torch.tensor(labels), sum(labels), 3, 0.1, settings("kto"))
    found.loss.backward()
    assert ratio.grad is not None
    assert [g < 0 for g in ratio.grad.tolist()] == list(labels), "a desirable answer is to become likelier"
    assert ("rewards/chosen" in found.metrics) == any(labels)
    assert ("rewards/rejected" in found.metrics) == (not all(labels))
    assert ("rewards/margins" in found.metrics) == (any(labels) and not all(labels))


def test_metrics_of_kto_are_means_over_the_answers_of_one_label() -> None:
    data = drawn(30)
    reward, label = 0.2 * (data["chosen"] - data["reference_chosen"]), data["label"]
    found = {name: value.item() for name, value in outcome("kto", data).metrics.items()}
    assert found["rewards/chosen"] == pytest.approx(reward[label].mean())
    assert found["rewards/rejected"] == pytest.approx(reward[~label].mean())
    assert found["rewards/margins"] == pytest.approx(reward[label].mean() - reward[~label].mean())
    assert found["logps/rejected"] == pytest.approx(data["chosen"][~label].mean())


def test_the_weights_of_kto_scale_what_they_name() -> None:
    ratio, label, third = double([0.4, -0.3, 1.0]), torch.tensor([True, False, True]), double([1 / 3] * 3)
    plain = kto_loss(ratio[label], label[label], third[:2], 0.2, 0.3).item()
    rest = kto_loss(ratio[~label], label[~label], third[:1], 0.2, 0.3).item()
    assert kto_loss(ratio, label, third, 0.2, 0.3, 2.0, 5.0).item() == pytest.approx(2 * plain + 5 * rest)


# --- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRED)
def test_metrics_are_means_over_pairs_under_trls_names(name: str) -> None:
    data, made = drawn(13), settings(name)
    found = {metric: value.item() for metric, value in outcome(name, data).metrics.items()}
    if made.kind.has_reference:
        w, r = (data[side] - data[f"reference_{side}"] for side in ("chosen", "rejected"))
        shown = data["chosen"]
    else:
        w, r = (data[side] / data[f"num_{side}"] for side in ("chosen", "rejected"))
        shown = w
    beta, weights = OPTIONS[name]["beta"], data["weights"]
    assert found["rewards/chosen"] == pytest.approx(float((weights * beta * w).sum()))
    assert found["rewards/rejected"] == pytest.approx(float((weights * beta * r).sum()))
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["rewards/accuracies"] == pytest.approx(float((weights * (w > r)).sum()))
    assert found["logps/chosen"] == pytest.approx(float((weights * shown).sum()))
    assert ({"nll_loss", "log_odds_ratio", "log_odds_chosen"} <= found.keys()) == (name == "orpo")
    if name == "orpo":
        assert found["nll_loss"] - beta * found["log_odds_ratio"] == pytest.approx(found["loss"])


# --- settings -----------------------------------------------------------------------------------


def test_every_loss_has_defaults_for_all_that_it_reads() -> None:
    for loss, kind in LOSSES.items():
        extra = {"label_smoothing": 0.1} if loss == "robust" else {}
        made = PreferenceSettings(name="dpo", loss=loss, **extra)
        assert all(made.option(name) == value for name, value in kind.defaults.items())
    assert PreferenceSettings(name="dpo", beta=0.7).option("beta") == 0.7


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss=ipo has no label smoothing, only sigmoid and robust have"),
        ({"loss": "simpo", "label_smoothing": 0.1}, "loss=simpo has no label smoothing"),
        ({"loss": "robust"}, "give that share"),
        ({"gamma": 0.5}, "loss=sigmoid has no gamma, only simpo has"),
        ({"loss": "dpo"}, "Input should be"),
        ({"loss": "orpo", "desirable_weight": 2.0}, "loss=orpo has no desirable_weight, only kto has"),
        ({"loss": "orpo", "reference_cache": "x"}, "loss=orpo has no reference"),
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
    ],
)
def test_settings_of_another_loss_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PreferenceSettings(name="dpo", **given)
