"""Where our policy gradients differ from TRL's, verl's and OpenRLHF's on purpose (tests/golden).

Every difference is asserted in its exact form, so that neither side can drift.  docs/algorithms.md lists them; what is
equal is in tests/test_golden.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from golden_kit import (
    NEARLY,
    SINGLE,
    SOURCES,
    Case,
    advantages_of,
    algorithm,
    case,
    close,
    double,
    in_samples,
    loss_of,
    per_token,
    source,
)

from trainers.losses import clipped_ratio, kl_estimate

BETA = 0.2
SPREADS = (0.4787135538781691, 0.5153882032022076)  # sample deviations of the first two groups' rewards


@pytest.mark.parametrize(
    ("theirs", "epsilon"),
    [(case("verl", "advantages of grpo"), 1e-6), (case("openrlhf", "advantages of group_norm"), 1e-9)],
    ids=["verl", "openrlhf"],
)
def test_grpo_differs_by_what_is_added_to_the_deviation(theirs: Case, epsilon: float) -> None:
    """1e-4 as in TRL: a group whose rewards differ in their fifth digit does not weigh as much as any other."""
    ours, size = advantages_of(algorithm("grpo"), theirs.data), theirs.data["group_size"]
    factor = [(s + 1e-4) / (s + epsilon) for s in SPREADS for _ in range(size)] + [1.0] * size
    close(ours * per_token(theirs.data, factor), theirs.outputs["advantages"], 1e-8)


def test_reinforce_plus_plus_in_verl_divides_by_the_deviation_of_a_sample() -> None:
    theirs = case("verl", "advantages of reinforce_plus_plus, kl")
    ours = advantages_of(algorithm("reinforce_plus_plus", kl_coef=BETA), theirs.data)
    count = sum(theirs.data["lengths"])
    close(ours * math.sqrt((count - 1) / count), theirs.outputs["advantages"], SINGLE)


@pytest.mark.parametrize(
    ("theirs", "is_unbiased"),
    [(case("openrlhf", "advantages of reinforce_baseline"), False),
     (case("verl", "advantages of reinforce_plus_plus_baseline"), True)],
    ids=["openrlhf", "verl"],
)  # fmt: skip
def test_the_reinforce_plus_plus_baseline_lacks_the_mean_over_the_tokens_of_the_batch(
    theirs: Case, is_unbiased: bool
) -> None:
    """Ours = theirs + mean / deviation, of the group-centred rewards over all tokens of the batch.

    The authors subtract that mean once more after the mean of the group; it is not 0 where length and reward go
    together.  Then a group without a spread has an advantage: here the last one.
    """
    data = theirs.data
    rewards = np.array(data["rewards"]).reshape(-1, data["group_size"])
    tokens = np.repeat((rewards - rewards.mean(1, keepdims=True)).ravel(), data["lengths"])
    shift, count = tokens.mean() / tokens.std(), tokens.size
    ours = advantages_of(algorithm("reinforce_plus_plus_baseline"), data)
    factor = math.sqrt((count - 1) / count) if is_unbiased else 1.0
    close((ours - shift) * factor, theirs.outputs["advantages"], SINGLE)
    last = sum(data["lengths"][-data["group_size"] :])
    assert abs(shift) > 0.05 and (ours[-last:] == 0).all()
    close(theirs.tensor("advantages")[-last:], np.full(last, -shift * factor), SINGLE)


@pytest.mark.parametrize(("theirs", "beta"), [(case("trl", "rloo"), 0.0), (case("trl", "rloo, kl"), BETA)])
def test_rloo_has_a_ratio_of_tokens_where_trl_has_one_of_the_completion(theirs: Case, beta: float) -> None:
    """TRL: one ratio a completion, the product over its tokens, clipped once, and a mean over completions."""
    chosen = algorithm("rloo", kl_coef=beta)
    data, policy = theirs.data, double(theirs.data["policy"]).requires_grad_()
    by_sample = torch.stack([row.sum() for row in torch.split(policy - double(data["proximal"]), data["lengths"])])
    loss = clipped_ratio(by_sample, theirs.tensor("advantages"), 0.2, 0.2).loss.mean()
    close(loss, theirs.outputs["loss"])
    close(torch.autograd.grad(loss, policy)[0], theirs.outputs["gradient"])
    ours = loss_of(chosen, data, advantages_of(chosen, data))  # which is verl's "rloo, kl", above
    assert abs(ours.value * data["max_tokens"] - loss) > 0.01


def test_the_first_update_of_rloo_is_trls_divided_by_max_tokens() -> None:
    """Where every ratio is 1 the two gradients are REINFORCE's, but for the constant that ours divides by."""
    theirs, chosen = case("trl", "rloo, first update"), algorithm("rloo", kl_coef=BETA)
    found = loss_of(chosen, theirs.data, advantages_of(chosen, theirs.data), policy="proximal")
    close(found.gradient * theirs.data["max_tokens"], theirs.outputs["gradient"])


def bounded_kl(data: dict[str, Any], weights: torch.Tensor, correction: torch.Tensor) -> tuple[float, torch.Tensor]:
    """What weighing k3 token by token adds to the loss and to its gradient, by plain arithmetic."""
    d = double(data["policy"]) - double(data["reference"])
    more = BETA * weights * (correction - 1)
    return float((more * (torch.exp(-d) - 1 + d)).sum()), more * (1 - torch.exp(-d))


def test_cispo_weighs_the_kl_term_as_well() -> None:
    """The paper has no KL term.  TRL adds one as it is; ours has the token's weight, as everything of that token."""
    theirs = case("trl", "cispo, kl")
    chosen = algorithm("cispo", kl_coef=BETA, correction={"kind": "cispo", "cap": 1.25})
    found = loss_of(chosen, theirs.data, advantages_of(chosen, theirs.data))
    weight = torch.exp(double(theirs.data["policy"]) - double(theirs.data["proximal"])).clamp(max=1.25)
    value, gradient = bounded_kl(theirs.data, found.weights, weight)
    close(found.value - value, theirs.outputs["loss"], NEARLY)
    close(found.gradient - gradient, theirs.outputs["gradient"], NEARLY)
    assert abs(value) > 1e-3


def test_cispo_compares_with_the_policy_that_sampled_where_trl_has_two_factors() -> None:
    """Ours min(pi / pi_behavior, cap); TRL's min(pi / pi_proximal, cap) min(pi_proximal / pi_behavior, another cap)."""
    theirs, data = case("trl", "cispo, sampler"), case("trl", "cispo, sampler").data
    chosen = algorithm("cispo", correction={"kind": "cispo", "cap": 1.25})
    found = loss_of(chosen, data, advantages_of(chosen, data), behavior="behavior")
    policy, proximal, behavior = (double(data[name]) for name in ("policy", "proximal", "behavior"))
    ours = torch.exp(policy - behavior).clamp(max=1.25)
    two = torch.exp(policy - proximal).clamp(max=1.25) * torch.exp(proximal - behavior).clamp(max=1.2)
    close(theirs.tensor("sampling_weights"), torch.exp(proximal - behavior).clamp(max=1.2), SINGLE)
    close(found.gradient * two / ours, theirs.outputs["gradient"], SINGLE)
    assert (ours - two).abs().max() > 0.1


def test_cispo_has_no_lower_bound_of_the_weight() -> None:
    """As in the runs of its paper; verl's has one where its ``clip_ratio_low`` is below 1."""
    theirs = case("verl", "cispo, lower bound")
    chosen = algorithm("cispo", correction={"kind": "cispo", "cap": 1.25})
    advantages, policy = theirs.tensor("advantages"), double(theirs.data["policy"])
    ratio = torch.exp(policy - double(theirs.data["proximal"]))
    found = loss_of(chosen, theirs.data, advantages)
    more = found.weights * (0.8 - ratio).clamp(min=0) * advantages
    close(found.gradient - more, theirs.outputs["gradient"])
    close(found.value - (more * policy).sum(), theirs.outputs["loss"])
    assert (ratio < 0.8).any()


def test_there_is_no_dual_clip() -> None:
    """verl and others bound the loss of a negative advantage by c |A| (arXiv:1912.09729): c = 3 there by default."""
    theirs, bound = case("verl", "dapo, dual clip"), 1.2
    advantages = theirs.tensor("advantages")
    found = loss_of(algorithm("dapo"), theirs.data, advantages)
    ratio = torch.exp(double(theirs.data["policy"]) - double(theirs.data["proximal"]))
    held = (advantages < 0) & (ratio > bound)
    close(found.value + (found.weights * advantages * (ratio - bound))[held].sum(), theirs.outputs["loss"])
    close(torch.where(held, 0.0, found.gradient), theirs.outputs["gradient"])
    assert held.any()


@pytest.mark.parametrize(
    ("theirs", "kind", "bound"),
    [(case("verl", "k1"), "k1", math.inf), (case("verl", "k2"), "k2", math.inf), (case("verl", "k3"), "k3", 10.0)],
)
def test_no_kl_estimator_is_bounded(theirs: Case, kind: Any, bound: float) -> None:
    """verl's k3 ends at 10 nats, where it has no gradient; its last two tokens are beyond."""
    policy = double(theirs.data["policy"] + theirs.settings["policy"]).requires_grad_()
    found = kl_estimate(policy, double(theirs.data["reference"] + theirs.settings["reference"]), kind)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    close(found.clamp(max=bound), theirs.outputs["estimate"])
    close(torch.where(found > bound, 0.0, gradient), theirs.outputs["gradient"])
    assert bool((found > bound).any()) == (kind == "k3")


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [(case("trl", "token_truncate"), "token_truncate"), (case("trl", "sequence_truncate"), "sequence_truncate"),
     (case("trl", "token_mask"), "token_mask"), (case("trl", "sequence_mask"), "sequence_mask")],
)  # fmt: skip
def test_an_off_policy_correction_has_trls_weights_and_weighs_the_kl_term_too(theirs: Case, kind: str) -> None:
    """TRL weighs the policy's term alone; ours all that was estimated from the same samples."""
    bounds = {"cap": 1.2} if kind.endswith("truncate") else {"low": 0.8, "high": 1.4}
    chosen = algorithm("grpo", kl_coef=BETA, correction={"kind": kind, **bounds})
    found = loss_of(chosen, theirs.data, advantages_of(chosen, theirs.data), behavior="behavior")
    value, gradient = bounded_kl(theirs.data, found.weights, theirs.tensor("sampling_weights"))
    close(found.value - value, theirs.outputs["loss"], SINGLE)  # their sampler's log-probs are float32
    close(found.gradient - gradient, theirs.outputs["gradient"], SINGLE)
    assert abs(value) > 1e-4


def test_the_inputs_hold_what_the_differences_need() -> None:
    """Tokens beyond both clips, lengths that go with rewards, a group without a spread."""
    data = source("trl")["inputs"]["batch"]
    assert all(source(name)["inputs"]["batch"] == data for name in SOURCES)
    ratio = torch.exp(double(data["policy"]) - double(data["proximal"]))
    assert ((ratio < 0.8).any() and (ratio > 1.28).any()) and len(in_samples(data, "policy")) == 12
    rewards = np.array(data["rewards"]).reshape(-1, data["group_size"])
    close(rewards.std(1, ddof=1), [*SPREADS, 0.0])
