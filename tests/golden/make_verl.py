"""The numbers of verl: advantages, policy losses, KL estimators, aggregations and the value loss of its core_algos.

Writes verl.json.  Needs an environment of its own: a new virtual environment with a CPU build of torch, transformers
(5.19 was there), accelerate and ray, then ``pip install --no-deps verl==0.9.1 "tensordict<=0.10.0" pyvers orjson
omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 codetiming dill``, and

    python tests/golden/make_verl.py

Nothing is stubbed.  float64.  May import: numpy, torch, verl, tests/golden/inputs.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from inputs import double, inputs, laid_out, leaf, mask, padded, write
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

BATCH = inputs()["batch"]
LENGTHS, MAX_TOKENS = BATCH["lengths"], BATCH["max_tokens"]
MASK = mask(LENGTHS)
GROUPS = np.arange(len(LENGTHS)) // BATCH["group_size"]
OFF = 1e9  # a bound of dual clipping that no ratio reaches


def rows(name: str) -> torch.Tensor:
    return padded(double(BATCH[name]), LENGTHS)


def token_rewards(beta: float) -> torch.Tensor:
    """[samples, longest]: each sample's reward at its last token, and what its KL costs each token."""
    found = -beta * core_algos.kl_penalty(rows("proximal"), rows("reference"), "k1") * MASK
    last = MASK.sum(1, keepdim=True) - 1
    return found.scatter_add(1, last, double(BATCH["rewards"])[:, None])


def advantages_of(name: str, beta: float = 0.0) -> tuple[str, dict[str, torch.Tensor]]:
    """By verl's name of the estimator: the function's own name, and its advantages (of ``gae`` its returns too)."""
    function: Any = core_algos.get_adv_estimator_fn(name)
    more: dict[str, Any] = {"index": GROUPS}
    if name == "gae":
        more = {"values": rows("proximal_values"), "gamma": 0.99, "lam": 0.9}
    elif name == "remax":
        more = {"reward_baselines": double(BATCH["greedy_rewards"]).repeat_interleave(BATCH["group_size"])}
    elif name == "reinforce_plus_plus":
        more = {"config": AlgoConfig(gamma=1.0)}
    found, returns = function(token_level_rewards=token_rewards(beta), response_mask=MASK, **more)
    outputs = {"advantages": laid_out(found, LENGTHS)}
    if name == "gae":
        outputs["returns"] = laid_out(returns, LENGTHS)
    return function.__name__, outputs


def estimated(name: str, beta: float = 0.0, **settings: Any) -> dict[str, Any]:
    function, outputs = advantages_of(name, beta)
    return {"function": function, "inputs": "batch", "settings": {"kl_coef": beta} | settings, "outputs": outputs}


def centred() -> dict[str, Any]:
    """Dr. GRPO: the function of GRPO, told not to divide by the deviation."""
    found, _ = core_algos.compute_grpo_outcome_advantage(
        token_rewards(0.0), MASK, GROUPS, norm_adv_by_std_in_grpo=False
    )  # fmt: skip
    outputs = {"advantages": laid_out(found, LENGTHS)}
    settings = {"norm_adv_by_std_in_grpo": False}
    return {"function": "compute_grpo_outcome_advantage", "inputs": "batch", "settings": settings, "outputs": outputs}


def lost(
    loss: str, estimator: str, aggregation: str, low: float, high: float, beta: float = 0.0, kl: str = "",
    dual_clip: float = OFF,
) -> dict[str, Any]:  # fmt: skip
    """The policy loss, with ``beta`` times the KL estimate ``kl`` in the loss (in the reward where it is "")."""
    _, found = advantages_of(estimator, 0.0 if kl else beta)
    policy = leaf(BATCH["policy"])
    config = ActorConfig(
        strategy="fsdp", rollout_n=BATCH["group_size"], use_dynamic_bsz=True, clip_ratio_low=low, clip_ratio_high=high,
        clip_ratio_c=dual_clip, global_batch_info={"loss_scale_factor": MAX_TOKENS},
    )  # fmt: skip
    function: Any = core_algos.get_policy_loss_fn(loss)
    advantages = padded(found["advantages"], LENGTHS)
    total, metrics = function(rows("proximal"), padded(policy, LENGTHS), advantages, MASK, aggregation, config)
    if kl:
        estimate = core_algos.kl_penalty(padded(policy, LENGTHS), rows("reference"), kl)
        total = total + beta * core_algos.agg_loss(estimate, MASK, aggregation, loss_scale_factor=MAX_TOKENS)
    (gradient,) = torch.autograd.grad(total, policy)
    settings = {
        "policy_loss": loss, "adv_estimator": estimator, "loss_agg_mode": aggregation, "clip_ratio_low": low,
        "clip_ratio_high": high, "clip_ratio_c": dual_clip, "kl_coef": beta, "kl_in_loss": kl or None,
    }  # fmt: skip
    outputs = {"advantages": found["advantages"], "loss": total, "gradient": gradient, "metrics": metrics}
    return {"function": function.__name__, "inputs": "batch", "settings": settings, "outputs": outputs}


def estimate(kind: str) -> dict[str, Any]:
    """Per token, with two more tokens that are far apart: verl bounds what it finds."""
    policy, reference = BATCH["policy"] + [-5.0, -0.5], BATCH["reference"] + [-0.2, -30.0]
    moved = leaf(policy)
    found = core_algos.kl_penalty(moved, double(reference), kind)
    (gradient,) = torch.autograd.grad(found.sum(), moved)
    settings = {"kind": kind, "policy": policy[-2:], "reference": reference[-2:]}
    outputs = {"estimate": found, "gradient": gradient}
    return {"function": "kl_penalty", "inputs": "batch", "settings": settings, "outputs": outputs}


def aggregated(mode: str) -> dict[str, Any]:
    """Of the policy's log-probs, which stand for any numbers of tokens."""
    terms = leaf(BATCH["policy"])
    found = core_algos.agg_loss(padded(terms, LENGTHS), MASK, mode, loss_scale_factor=MAX_TOKENS)
    (weights,) = torch.autograd.grad(found, terms)
    settings = {"loss_agg_mode": mode, "loss_scale_factor": MAX_TOKENS}
    outputs = {"loss": found, "weights": weights}
    return {"function": "agg_loss", "inputs": "batch", "settings": settings, "outputs": outputs}


def valued(clip: float) -> dict[str, Any]:
    _, found = advantages_of("gae", 0.2)
    values = leaf(BATCH["values"])
    total, clipped = core_algos.compute_value_loss(
        padded(values, LENGTHS), padded(found["returns"], LENGTHS), rows("proximal_values"), MASK, clip
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(total, values)
    outputs = {"returns": found["returns"], "loss": total, "gradient": gradient, "clipped": clipped}
    settings = {"cliprange_value": clip, "kl_coef": 0.2}
    return {"function": "compute_value_loss", "inputs": "batch", "settings": settings, "outputs": outputs}


def main() -> None:
    whole, token, constant = "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"
    cases = {
        "advantages of grpo": estimated("grpo", epsilon=1e-6),
        "advantages of dr_grpo": centred(),
        "advantages of rloo": estimated("rloo"),
        "advantages of rloo, kl": estimated("rloo", 0.2),
        "advantages of reinforce_plus_plus, kl": estimated("reinforce_plus_plus", 0.2),
        "advantages of reinforce_plus_plus_baseline": estimated("reinforce_plus_plus_baseline"),
        "advantages of remax, kl": estimated("remax", 0.2),
        "gae, kl": estimated("gae", 0.2, gamma=0.99, gae_lambda=0.9),
        "rloo": lost("vanilla", "rloo", constant, 0.2, 0.2),
        "rloo, kl": lost("vanilla", "rloo", constant, 0.2, 0.2, 0.2),
        "remax, kl": lost("vanilla", "remax", constant, 0.2, 0.2, 0.2),
        "reinforce_plus_plus, kl": lost("vanilla", "reinforce_plus_plus", token, 0.2, 0.2, 0.2),
        "ppo, kl": lost("vanilla", "gae", token, 0.2, 0.2, 0.2),
        "grpo, kl": lost("vanilla", "grpo", whole, 0.2, 0.2, 0.2, "k3"),
        "grpo, k2": lost("vanilla", "grpo", whole, 0.2, 0.2, 0.2, "k2"),
        "dapo": lost("vanilla", "grpo", token, 0.2, 0.28),
        "dapo, dual clip": lost("vanilla", "grpo", token, 0.2, 0.28, dual_clip=1.2),
        "gspo": lost("gspo", "grpo", whole, 3e-4, 4e-4),
        "gspo, wide": lost("gspo", "grpo", whole, 0.2, 0.2),
        "cispo": lost("cispo", "grpo", token, 1.0, 0.25),
        "cispo, lower bound": lost("cispo", "grpo", token, 0.2, 0.25),
        "k1": estimate("k1"), "k2": estimate("k2"), "k3": estimate("k3"),
        "token-mean": aggregated(token), "seq-mean-token-mean": aggregated(whole),
        "seq-mean-token-sum-norm": aggregated(constant),
        "value loss": valued(0.2), "value loss, unclipped": valued(1e9),
    }  # fmt: skip
    write("verl", ["batch"], cases)


if __name__ == "__main__":
    main()
