"""The numbers of OpenRLHF: DPO, conservative DPO, IPO; policy losses of PPO and GSPO; REINFORCE++ and its baseline.

Writes openrlhf.json.  Needs an environment of its own: a new virtual environment with a CPU build of torch,
transformers (5.19 was there), accelerate, datasets, torchdata, peft, ray, deepspeed and pylatexenc, then
``pip install --no-deps openrlhf==0.11.2``, and

    python tests/golden/make_openrlhf.py

One module of OpenRLHF, ring_attn_utils, imports flash_attn, which has no CPU build; none of what runs here calls it,
and an empty module stands in for it.  The experience maker is never set up: its method reads settings from a
namespace.  float64, but for what a function casts itself (KL estimates and the moments of the batch: float32).
May import: torch, openrlhf, tests/golden/inputs.py.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from inputs import double, inputs, laid_out, leaf, mask, padded, write

sys.modules["openrlhf.models.ring_attn_utils"] = MagicMock()

from openrlhf.models.loss import DPOLoss, PairWiseLoss, PolicyLoss, ValueLoss, aggregate_loss  # noqa: E402
from openrlhf.models.utils import compute_approx_kl  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from openrlhf.trainer.ppo_utils.length_penalty import apply_overlong_penalty  # noqa: E402

GIVEN = inputs()
ANSWERS, BATCH = GIVEN["answers"], GIVEN["batch"]
LENGTHS = BATCH["lengths"]
MASK = mask(LENGTHS)


def rows(name: str) -> torch.Tensor:
    return padded(double(BATCH[name]), LENGTHS)


def pairs_of(beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> dict[str, Any]:
    policy = leaf(ANSWERS["chosen"] + ANSWERS["rejected"])
    loss, chosen, rejected = DPOLoss(beta, label_smoothing, ipo)(
        *policy.chunk(2), double(ANSWERS["reference_chosen"]), double(ANSWERS["reference_rejected"])
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, policy)
    return {
        "function": "DPOLoss", "inputs": "answers",
        "settings": {"loss": "ipo" if ipo else "sigmoid", "beta": beta, "label_smoothing": label_smoothing},
        "outputs": {
            "loss": loss, "gradient_chosen": gradient.chunk(2)[0], "gradient_rejected": gradient.chunk(2)[1],
            "metrics": {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()},
        },
    }  # fmt: skip


def ranked() -> dict[str, Any]:
    """The pairwise loss of a reward model; the answers' log-probs stand for its scores."""
    scores = leaf(ANSWERS["chosen"] + ANSWERS["rejected"])
    margin = double([0.5, 0.0, 1.0, 0.25, 2.0])
    loss = PairWiseLoss()(*scores.chunk(2), margin)
    (gradient,) = torch.autograd.grad(loss, scores)
    outputs = {"loss": loss, "gradient_chosen": gradient.chunk(2)[0], "gradient_rejected": gradient.chunk(2)[1]}
    return {"function": "PairWiseLoss", "inputs": "answers", "settings": {"margin": margin}, "outputs": outputs}


def advantages_of(estimator: str, beta: float) -> dict[str, torch.Tensor]:
    num = len(LENGTHS)
    maker: Any = object.__new__(RemoteExperienceMaker)
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=beta)
    maker.strategy = SimpleNamespace(args=SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=BATCH["group_size"]), reward=SimpleNamespace(clip_range=None),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.9, no_std_norm=False)
        ),
    ))  # fmt: skip
    experience = SimpleNamespace(
        rewards=double(BATCH["rewards"]), index=list(range(num)), info={}, action_mask=MASK,
        kl=(rows("proximal") - rows("reference")) * MASK, values=rows("proximal_values"),
    )  # fmt: skip
    maker.compute_advantages_and_returns([experience])
    found = {"advantages": laid_out(experience.advantages, LENGTHS)}
    return found | ({"returns": laid_out(experience.returns, LENGTHS)} if estimator == "gae" else {})


def estimated(estimator: str, beta: float = 0.0) -> dict[str, Any]:
    return {
        "function": "RemoteExperienceMaker.compute_advantages_and_returns", "inputs": "batch",
        "settings": {"estimator": estimator, "kl_coef": beta, "gamma": 1.0, "lambd": 0.9},
        "outputs": advantages_of(estimator, beta),
    }  # fmt: skip


def lost(kind: str, estimator: str, token_level: bool, low: float, high: float, beta: float = 0.0) -> dict[str, Any]:
    """The policy loss, plus ``beta`` times the k2 as OpenRLHF's trainer adds it."""
    found, policy = advantages_of(estimator, 0.0)["advantages"], leaf(BATCH["policy"])
    made = PolicyLoss(low, high, token_level_loss=token_level, policy_loss_type=kind)
    loss, clipped, *_ = made(padded(policy, LENGTHS), rows("proximal"), padded(found, LENGTHS), MASK)
    if beta:
        kl = compute_approx_kl(padded(policy, LENGTHS), rows("reference"), kl_estimator="k2")
        loss = loss + beta * aggregate_loss(kl, MASK, token_level)
    (gradient,) = torch.autograd.grad(loss, policy)
    settings = {
        "policy_loss_type": kind, "estimator": estimator, "token_level_loss": token_level, "clip_eps_low": low,
        "clip_eps_high": high, "kl_coef": beta, "kl_estimator": "k2",
    }  # fmt: skip
    outputs = {"advantages": found, "loss": loss, "gradient": gradient, "clipped": clipped}
    return {"function": "PolicyLoss", "inputs": "batch", "settings": settings, "outputs": outputs}


def valued() -> dict[str, Any]:
    returns, values = advantages_of("gae", 0.2)["returns"], leaf(BATCH["values"])
    loss = ValueLoss(0.2)(padded(values, LENGTHS), rows("proximal_values"), padded(returns, LENGTHS), MASK)
    (gradient,) = torch.autograd.grad(loss, values)
    outputs = {"returns": returns, "loss": loss, "gradient": gradient}
    settings = {"clip_eps": 0.2, "kl_coef": 0.2}
    return {"function": "ValueLoss", "inputs": "batch", "settings": settings, "outputs": outputs}


def estimate(kind: str) -> dict[str, Any]:
    policy = leaf(BATCH["policy"])
    found = compute_approx_kl(policy, double(BATCH["reference"]), kl_estimator=kind)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    outputs = {"estimate": found, "gradient": gradient}
    return {"function": "compute_approx_kl", "inputs": "batch", "settings": {"kind": kind}, "outputs": outputs}


def overlong(max_tokens: int, share: float) -> dict[str, Any]:
    """DAPO's soft punishment of lengths up to the limit."""
    lengths = torch.arange(1, max_tokens + 1)
    experience = SimpleNamespace(response_length=lengths, rewards=torch.zeros(max_tokens, dtype=torch.float64))
    apply_overlong_penalty([experience], max_tokens, share * max_tokens)
    settings = {"max_tokens": max_tokens, "share": share, "lengths": lengths.tolist()}
    outputs = {"rewards": experience.rewards}
    return {"function": "apply_overlong_penalty", "inputs": None, "settings": settings, "outputs": outputs}


def main() -> None:
    cases = {
        "conservative dpo": pairs_of(0.3, 0.1), "dpo": pairs_of(0.3), "ipo": pairs_of(0.2, ipo=True),
        "bradley-terry": ranked(),
        "advantages of group_norm": estimated("group_norm"), "advantages of dr_grpo": estimated("dr_grpo"),
        "advantages of rloo": estimated("rloo"),
        "advantages of reinforce, kl": estimated("reinforce", 0.2),
        "advantages of reinforce_baseline": estimated("reinforce_baseline"),
        "gae, kl": estimated("gae", 0.2),
        "dapo": lost("ppo", "group_norm", True, 0.2, 0.28),
        "grpo": lost("ppo", "group_norm", False, 0.2, 0.2),
        "gspo": lost("gspo", "group_norm", True, 3e-4, 4e-4),
        "reinforce_baseline, kl": lost("ppo", "reinforce_baseline", True, 0.2, 0.2, 0.2),
        "value loss": valued(),
        "k1": estimate("k1"), "k2": estimate("k2"), "k3": estimate("k3"),
        "overlong": overlong(20, 0.2),
    }  # fmt: skip
    write("openrlhf", ["batch", "answers"], cases)


if __name__ == "__main__":
    main()
