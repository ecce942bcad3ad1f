"""Policy gradients against the numbers of TRL, verl and OpenRLHF (tests/golden): what is equal.

Where ours differ on purpose: tests/test_golden_differences.py.  Preferences: tests/test_golden_preferences.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_kit import (
    EXACT,
    FOLDER,
    NEARLY,
    SINGLE,
    SOURCES,
    Case,
    advantages_of,
    algorithm,
    case,
    close,
    double,
    loss_of,
    per_token,
    source,
    targets_of,
)

from trainers.losses import kl_estimate, token_weights
from trainers.value_loss import clipped_value_loss
from trainers.verifiers import length

BETA = 0.2


# --- the files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_case_of_a_file_is_compared_by_a_test(name: str) -> None:
    here = FOLDER.parent
    tests = "".join(f.read_text() for f in here.glob("test_golden*.py"))
    missing = [c for c in source(name)["cases"] if f'"{name}", "{c}"' not in tests]
    assert missing == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_says_which_release_and_script_made_it(name: str) -> None:
    found = source(name)
    assert found["package"] == name and found["functions"]
    assert f"{name}=={found['version']}" in (FOLDER.parent.parent / found["made_by"]).read_text()


# --- losses -------------------------------------------------------------------------------------

# Rewards to advantages to loss and gradient, all by our code.  TRL's epsilon beside a deviation is ours.
WHOLE = [
    ("trl", "grpo", "grpo", {}),
    ("trl", "grpo, kl", "grpo", {"kl_coef": BETA}),
    ("trl", "dr_grpo", "dr_grpo", {}),
    ("trl", "dr_grpo, kl", "dr_grpo", {"kl_coef": BETA}),
    ("trl", "dapo", "dapo", {}),
    ("trl", "gspo", "gspo", {}),
    ("trl", "gspo, wide", "gspo", {"clip_low": 0.2, "clip_high": 0.2}),
    ("trl", "cispo", "cispo", {"correction": {"kind": "cispo", "cap": 1.25}}),
]


@pytest.mark.parametrize(("of", "name", "ours", "keys"), WHOLE, ids=[f"{s} {n}" for s, n, *_ in WHOLE])
def test_from_rewards_to_gradient_the_numbers_are_theirs(of: str, name: str, ours: str, keys: dict[str, Any]) -> None:
    theirs, chosen = case(of, name), algorithm(ours, **keys)
    advantages = advantages_of(chosen, theirs.data)
    close(advantages, per_token(theirs.data, theirs.outputs["advantages"]), NEARLY)
    found = loss_of(chosen, theirs.data, advantages)
    found.is_that_of(theirs, NEARLY)
    shown = theirs.outputs["metrics"].get("clip_ratio/region_mean")
    if shown is not None and chosen.ratio == "token":
        close(found.clipped, shown, SINGLE)


# Their advantages given (those are compared below), the loss and its gradient.
GIVEN = [
    ("verl", "rloo", "rloo", {}),
    ("verl", "rloo, kl", "rloo", {"kl_coef": BETA}),
    ("verl", "remax, kl", "remax", {"kl_coef": BETA}),
    ("verl", "reinforce_plus_plus, kl", "reinforce_plus_plus", {"kl_coef": BETA}),
    ("verl", "ppo, kl", "ppo", {"kl_coef": BETA}),
    ("verl", "grpo, kl", "grpo", {"kl_coef": BETA}),
    ("verl", "grpo, k2", "grpo", {"kl_coef": BETA, "kl_estimator": "k2"}),
    ("verl", "dapo", "dapo", {}),
    ("verl", "gspo", "gspo", {"ratio": "sequence_token"}),
    ("verl", "gspo, wide", "gspo", {"clip_low": 0.2, "clip_high": 0.2}),
    ("verl", "cispo", "cispo", {"correction": {"kind": "cispo", "cap": 1.25}}),
    ("openrlhf", "grpo", "grpo", {}),
    ("openrlhf", "dapo", "dapo", {}),
    ("openrlhf", "gspo", "gspo", {}),
    ("openrlhf", "reinforce_baseline, kl", "reinforce_plus_plus_baseline", {"kl_coef": BETA}),
]


@pytest.mark.parametrize(("of", "name", "ours", "keys"), GIVEN, ids=[f"{s} {n}" for s, n, *_ in GIVEN])
def test_on_their_advantages_loss_and_gradient_are_theirs(of: str, name: str, ours: str, keys: dict[str, Any]) -> None:
    theirs, chosen = case(of, name), algorithm(ours, **keys)
    found = loss_of(chosen, theirs.data, theirs.tensor("advantages"))
    # OpenRLHF's KL is float32.
    found.is_that_of(theirs, SINGLE if of == "openrlhf" and chosen.kl_coef else NEARLY)
    if "clipped" in theirs.outputs:
        close(found.clipped, theirs.outputs["clipped"], SINGLE)


ADVANTAGES = [
    ("trl", "rloo", "rloo", {}),
    ("trl", "rloo, kl", "rloo", {"kl_coef": BETA}),
    ("verl", "advantages of dr_grpo", "dr_grpo", {}),
    ("verl", "advantages of rloo", "rloo", {}),
    ("verl", "advantages of rloo, kl", "rloo", {"kl_coef": BETA}),
    ("verl", "advantages of remax, kl", "remax", {"kl_coef": BETA}),
    ("openrlhf", "advantages of dr_grpo", "dr_grpo", {}),
    ("openrlhf", "advantages of rloo", "rloo", {}),
    ("openrlhf", "advantages of reinforce, kl", "reinforce_plus_plus", {"kl_coef": BETA}),
]


@pytest.mark.parametrize(("of", "name", "ours", "keys"), ADVANTAGES, ids=[f"{s} {n}" for s, n, *_ in ADVANTAGES])
def test_advantages_are_theirs(of: str, name: str, ours: str, keys: dict[str, Any]) -> None:
    theirs, chosen = case(of, name), algorithm(ours, **keys)
    expected = theirs.outputs["advantages"]
    expected = per_token(theirs.data, expected) if of == "trl" else double(expected)
    close(advantages_of(chosen, theirs.data), expected, SINGLE if chosen.has_token_advantages else EXACT)


@pytest.mark.parametrize(
    ("theirs", "gamma", "is_unbiased"),
    [(case("verl", "gae, kl"), 0.99, True), (case("openrlhf", "gae, kl"), 1.0, False)],
    ids=["verl", "openrlhf"],
)
def test_gae_gives_their_returns_and_up_to_the_variance_their_advantages(
    theirs: Case, gamma: float, is_unbiased: bool
) -> None:
    """verl divides by the deviation of a sample of tokens (n - 1), we and OpenRLHF by that of all there are."""
    chosen = algorithm("ppo", kl_coef=BETA, ppo={"gamma": gamma, "gae_lambda": 0.9})
    advantages, returns = targets_of(chosen, theirs.data)
    close(returns, theirs.outputs["returns"], SINGLE)
    count = sum(theirs.data["lengths"])
    factor = math.sqrt((count - 1) / count) if is_unbiased else 1.0
    close(advantages * factor, theirs.outputs["advantages"], SINGLE)


@pytest.mark.parametrize(
    ("theirs", "clip"),
    [(case("verl", "value loss"), 0.2), (case("verl", "value loss, unclipped"), None),
     (case("openrlhf", "value loss"), 0.2)],
    ids=["verl", "verl, unclipped", "openrlhf"],
)  # fmt: skip
def test_the_value_loss_is_theirs(theirs: Case, clip: float | None) -> None:
    values = double(theirs.data["values"]).requires_grad_()
    found = clipped_value_loss(values, double(theirs.data["proximal_values"]), theirs.tensor("returns"), clip)
    loss = found.loss.mean()
    close(loss, theirs.outputs["loss"])
    close(torch.autograd.grad(loss, values)[0], theirs.outputs["gradient"])
    if "clipped" in theirs.outputs:
        close(found.clipped.double().mean(), theirs.outputs["clipped"], SINGLE)


@pytest.mark.parametrize(
    ("theirs", "aggregation"),
    [(case("verl", "token-mean"), "token"), (case("verl", "seq-mean-token-mean"), "sequence"),
     (case("verl", "seq-mean-token-sum-norm"), "constant")],
)  # fmt: skip
def test_token_weights_are_those_of_their_aggregation(theirs: Case, aggregation: Any) -> None:
    lengths = theirs.data["lengths"]
    found = token_weights(lengths, [True] * len(lengths), aggregation, theirs.data["max_tokens"])
    close(per_token(theirs.data, found), theirs.outputs["weights"], NEARLY)
    close((per_token(theirs.data, found) * double(theirs.data["policy"])).sum(), theirs.outputs["loss"], NEARLY)


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [(case("openrlhf", "k1"), "k1"), (case("openrlhf", "k2"), "k2"), (case("openrlhf", "k3"), "k3")],
)
def test_kl_estimators_and_their_gradients_are_theirs(theirs: Case, kind: Any) -> None:
    policy = double(theirs.data["policy"]).requires_grad_()
    found = kl_estimate(policy, double(theirs.data["reference"]), kind)
    close(found, theirs.outputs["estimate"], 1e-5)  # theirs is float32
    close(torch.autograd.grad(found.sum(), policy)[0], theirs.outputs["gradient"], 1e-5)


def test_the_punishment_of_long_answers_is_theirs() -> None:
    theirs = case("openrlhf", "overlong")
    limit, share = theirs.settings["max_tokens"], theirs.settings["share"]
    found = length([[0] * n for n in theirs.settings["lengths"]], limit, int(share * limit))
    close(found, theirs.outputs["rewards"])
    assert min(found) == -1.0 and max(found) == 0.0
