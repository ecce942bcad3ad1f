"""Held-out evaluation through the run's own generators and rewards.

One evaluation is made under one weight version: the caller holds pushes back while it runs, and a
group sampled under another version is an error.
May import: asyncio, numpy, trainers.*.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainers.errors import VerificationError
from trainers.experience import GroupRewards, Prompt, WeightVersion
from trainers.protocols import GeneratedGroup, Generator, GroupRequest, Scorer
from trainers.sampling_seeds import sample_seed

CORRECT = 1.0 - 1e-6  # a verifier's full mark; partial credit is not an answer


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics (names in trainers/metrics.py) and the groups they were taken from."""

    metrics: dict[str, float]
    groups: tuple[GeneratedGroup, ...]
    rewards: tuple[GroupRewards, ...]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples is right.

    ``1 - C(n - c, k) / C(n, k)``: Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


async def evaluate(
    prompts: Sequence[Prompt],
    generator: Generator,
    scorer: Scorer,
    *,
    version: WeightVersion,
    step: int,
    num_samples: int,
    temperature: float,
    max_tokens: int,
    reward: str,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationReport:
    """Sample and score every prompt; greedily when ``num_samples`` is 1.

    ``reward`` names the part that means "correct".  A sample whose reward failed counts as wrong and is
    counted apart.
    """
    started = time.perf_counter()
    done = 0

    async def one(index: int, prompt: Prompt) -> tuple[GeneratedGroup, GroupRewards]:
        nonlocal done
        request = GroupRequest(
            group_id=f"eval-{step}-{index}",
            prompt=prompt,
            num_samples=num_samples,
            seeds=tuple(sample_seed(seed, prompt.prompt_id, s, -1) for s in range(num_samples)),
            temperature=temperature,
            max_tokens=max_tokens,
            greedy=num_samples == 1,
        )
        group = await generator.generate(request)
        if (group.summary.oldest_version, group.summary.newest_version) != (version, version):
            raise VerificationError(
                f"evaluation at version {version}: {group.summary.generator} sampled under "
                f"{group.summary.oldest_version}"
            )
        rewards = await scorer.score(group)
        done += 1
        progress(done, len(prompts))
        return group, rewards

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(i, p)) for i, p in enumerate(prompts)]
    groups, rewards = zip(*(t.result() for t in running), strict=True)
    return EvaluationReport(
        metrics=_metrics(groups, rewards, num_samples, reward) | {"time/evaluate_s": time.perf_counter() - started},
        groups=groups,
        rewards=rewards,
    )


def _metrics(
    groups: Sequence[GeneratedGroup], rewards: Sequence[GroupRewards], num_samples: int, reward: str
) -> dict[str, float]:
    correct = [int((np.nan_to_num(r.parts[reward], nan=0.0) >= CORRECT).sum()) for r in rewards]
    totals = np.concatenate([r.totals for r in rewards])
    metrics = {
        "eval/accuracy": float(np.mean([pass_at_k(num_samples, c, 1) for c in correct])),
        "eval/pass_at_k": float(np.mean([pass_at_k(num_samples, c, num_samples) for c in correct])),
        "eval/reward": float(np.nanmean(totals)) if np.isfinite(totals).any() else float("nan"),
        "eval/num_prompts": float(len(groups)),
        "eval/mean_length": float(np.mean([t for g in groups for t in g.summary.num_completion_tokens])),
    }
    for name in rewards[0].parts:
        values = np.concatenate([r.parts[name] for r in rewards])
        metrics[f"eval/{name}/mean"] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return metrics
