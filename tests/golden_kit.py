"""What the tests of golden numbers share: the files of tests/golden, and this project's code on the same inputs."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.experience_batch import ExperienceBatch
from actors.objective import SUMS, TokenTerms, pack_loss
from trainers.algorithms import AlgorithmSettings
from trainers.experience import GroupRewards, GroupSummary, WeightVersion
from trainers.losses import kl_estimate
from trainers.ppo_targets import ppo_targets
from trainers.protocols import LearnerGroup

FOLDER = Path(__file__).with_name("golden")
SOURCES = ("trl", "verl", "openrlhf")
# Relative.  Files have 12 digits and most numbers were made in float64.
EXACT = 1e-9
NEARLY = 5e-8  # where they add 1e-8 to a length, or take a deviation in float32
SINGLE = 2e-6  # where ours or theirs passes through float32: token advantages, ORPO's odds ratio, moments of a batch


@dataclass(frozen=True)
class Case:
    """One line of a file."""

    data: dict[str, Any]  # the inputs
    settings: dict[str, Any]
    outputs: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        return double(self.outputs[name])


@functools.cache
def source(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def case(of: str, name: str) -> Case:
    file = source(of)
    row = file["cases"][name]
    return Case(file["inputs"].get(row["inputs"], {}), row["settings"], row["outputs"])


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, expected: Any, rtol: float = EXACT) -> None:
    """Equal to ``rtol`` of each number, or of the largest one where a number is nearly 0."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (found, expected))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1e-3, float(np.abs(b).max(initial=0.0))))


# --- policy gradients ---------------------------------------------------------------------------


def algorithm(name: str, **keys: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": name, **keys})


def per_token(data: dict[str, Any], values: Any) -> torch.Tensor:
    """float64 [tokens] of one number a sample."""
    return torch.repeat_interleave(double(values), torch.tensor(data["lengths"]))


def in_samples(data: dict[str, Any], name: str) -> list[torch.Tensor]:
    return list(torch.split(double(data[name]), data["lengths"]))


def batch_of(data: dict[str, Any], chosen: AlgorithmSettings) -> ExperienceBatch:
    version, size = WeightVersion(0, 0), data["group_size"]
    groups = []
    for g, greedy in enumerate(data["greedy_rewards"]):
        part = slice(g * size, (g + 1) * size)
        summary = GroupSummary(
            str(g), f"p{g}", 3, tuple(data["lengths"][part]), ("stop",) * size, version, version, "g", 0.0
        )  # fmt: skip
        rewards = GroupRewards(str(g), np.array(data["rewards"][part]), {})
        groups.append(LearnerGroup(summary, rewards, None, None, greedy_reward=greedy))
    return ExperienceBatch(groups, chosen, data["max_tokens"])


def advantages_of(chosen: AlgorithmSettings, data: dict[str, Any]) -> torch.Tensor:
    """As the learner makes them: float64 [tokens]."""
    whole, penalties = batch_of(data, chosen), None
    if chosen.kl_coef and chosen.kl_placement == "reward":
        penalties = [
            chosen.kl_coef * kl_estimate(p, r, chosen.kl_estimator).numpy()
            for p, r in zip(in_samples(data, "proximal"), in_samples(data, "reference"), strict=True)
        ]
    if chosen.has_token_advantages:
        return torch.from_numpy(np.concatenate(whole.token_advantages(penalties))).double()
    return per_token(data, whole.advantages(None if penalties is None else np.array([p.sum() for p in penalties])))


def targets_of(chosen: AlgorithmSettings, data: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's advantages and returns, float64 [tokens] each."""
    rows = {name: [row.numpy() for row in in_samples(data, name)]
            for name in ("proximal", "reference", "proximal_values")}  # fmt: skip
    targets, _ = ppo_targets(
        np.array(data["rewards"]), np.ones(len(data["lengths"]), dtype=bool), rows["proximal"], rows["reference"],
        rows["proximal_values"], chosen, chosen.kl_coef,
    )  # fmt: skip
    found = (np.concatenate([getattr(t, name) for t in targets]) for name in ("advantages", "returns"))
    return tuple(torch.from_numpy(row).double() for row in found)  # type: ignore[return-value]


@dataclass(frozen=True)
class Loss:
    value: torch.Tensor
    gradient: torch.Tensor  # [tokens], in the policy's log-probs
    weights: torch.Tensor  # [tokens]
    clipped: float  # share of the tokens

    def is_that_of(self, theirs: Case, rtol: float = EXACT) -> None:
        close(self.value, theirs.outputs["loss"], rtol)
        close(self.gradient, theirs.outputs["gradient"], rtol)
        assert max(map(abs, theirs.outputs["gradient"])) > 1e-3, "the comparison says nothing"


def loss_of(
    chosen: AlgorithmSettings, data: dict[str, Any], advantages: torch.Tensor, policy: str = "policy",
    behavior: str = "proximal",
) -> Loss:  # fmt: skip
    """Of the whole batch, as the learner has it; ``behavior`` names the log-probs it was sampled under."""
    whole = batch_of(data, chosen)
    everyone = list(range(len(data["lengths"])))
    weights = per_token(data, whole.weights(everyone, whole.trainable()))
    leaf = double(data[policy]).requires_grad_()
    terms = TokenTerms(
        weights=weights, advantages=advantages, behavior_logprobs=double(data[behavior]),
        proximal_logprobs=double(data["proximal"]),
        reference_logprobs=double(data["reference"]) if chosen.kl_coef else None, lengths=tuple(data["lengths"]),
    )  # fmt: skip
    found = pack_loss(leaf, torch.zeros_like(leaf), terms, chosen)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    sums = dict(zip(SUMS, found.sums.tolist(), strict=True))
    clipped = (sums["clip_low"] + sums["clip_high"]) / sums["tokens"]
    return Loss(found.loss.detach(), gradient, weights, clipped)
