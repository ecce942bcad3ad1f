"""The numbers of one step that come from groups and rewards.  Pure.  May import: numpy, trainers.*."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trainers.experience import GroupRewards, WeightVersion
from trainers.protocols import LearnerGroup

NUM_LENGTH_PARTS = 4


def group_metrics(
    groups: Sequence[LearnerGroup], version: WeightVersion, dropped: Sequence[GroupRewards] | None = None
) -> dict[str, float]:
    """Rewards, lengths, failures and lag of one batch.

    Args:
        version: the learner's, before the update.
        dropped: groups that were filtered; None when nothing is.  The share of groups without a spread counts them:
            without them it would be 0 whatever the prompts are worth.
    """
    totals = np.concatenate([g.rewards.totals for g in groups])
    lengths = np.array([t for g in groups for t in g.summary.num_completion_tokens], dtype=np.float64)
    reasons = np.array([r for g in groups for r in g.summary.finish_reasons])
    scored = [g.rewards for g in groups] + list(dropped or ())
    stds = [_std(r.totals) for r in scored if r.valid.any()]
    lags = np.array([version.step - g.summary.oldest_version.step for g in groups], dtype=np.float64)
    sample_lags = np.array([version.step - v.step for g in groups for v in _oldest_versions(g)], dtype=np.float64)
    ended = lengths[reasons == "stop"]
    metrics = {
        "reward": _mean(totals),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/min_length": float(lengths.min()),
        "completions/clipped_ratio": float((reasons == "length").mean()),
        "completions/mean_terminated_length": float(ended.mean()) if ended.size else float("nan"),
        "failures/num_reward": float(sum(_num_failed(g.rewards) for g in groups)),
        "failures/num_samples_masked": float((~np.isfinite(totals)).sum()),
        "failures/masked_fraction": float((~np.isfinite(totals)).mean()),
        "staleness/mean": float(lags.mean()),
        "staleness/max": float(lags.max()),
        "version/incarnation": float(version.incarnation),
        "version/step": float(version.step),
    }
    if any(g.summary.num_samples > 1 for g in groups):  # one sample has no spread, neither 0 nor any other
        metrics["reward_std"] = _mean(np.array(stds))
        # By the range: 0.1 six times has a standard deviation of 1e-17.
        same = [float(np.ptp(r.totals[r.valid]) == 0.0) for r in scored if r.valid.any()]
        metrics["frac_reward_zero_std"] = _mean(np.array(same))
    greedy = [g.greedy_reward for g in groups if g.greedy_reward is not None]
    if greedy:
        metrics["baseline/greedy_reward"] = _mean(np.array(greedy))
    if dropped is not None:
        metrics["groups/reward_generated"] = _mean(np.concatenate([r.totals for r in scored]))
    # Three members of an ensemble that fail alike on a sample are one value that it has not.
    kinds = Counter(kind for g in groups for _, _, kind in {(i, f.reward, f.kind) for i, f in g.rewards.failures})
    metrics |= {f"failures/kind/{kind}": float(count) for kind, count in sorted(kinds.items())}
    by_length = np.array_split(sample_lags[np.argsort(lengths, kind="stable")], NUM_LENGTH_PARTS)
    metrics |= {f"staleness/length_quartile_{i + 1}": float(p.mean()) for i, p in enumerate(by_length) if p.size}
    for name in groups[0].rewards.parts:
        part = np.concatenate([g.rewards.parts[name] for g in groups])
        metrics[f"rewards/{name}/mean"] = _mean(part)
        metrics[f"rewards/{name}/std"] = _std(part)
    return metrics


def throughput(
    times: Mapping[str, float], generate_s: float, num_generated: int, num_learned: int, num_samples: int
) -> dict[str, float]:
    """Tokens and samples per second of the phases that took time.  ``generate_s``: in which were ``num_generated``."""
    rates = {}
    if generate_s > 0:
        rates["throughput/generate_tokens_per_s"] = num_generated / generate_s
    if times.get("time/learn_s", 0) > 0:
        rates["throughput/learn_tokens_per_s"] = num_learned / times["time/learn_s"]
    if times.get("time/step_s", 0) > 0:
        rates["throughput/samples_per_s"] = num_samples / times["time/step_s"]
    return rates


def _num_failed(rewards: GroupRewards) -> int:
    """(sample, part) that should have a value and have none; a function that does not apply has not failed."""
    return len({(i, failure.reward) for i, failure in rewards.failures if failure.kind != "abstained"})


def _oldest_versions(group: LearnerGroup) -> tuple[WeightVersion, ...]:
    summary = group.summary
    return summary.oldest_versions or (summary.oldest_version,) * summary.num_samples


def _mean(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else float("nan")


def _std(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.std(ddof=1)) if kept.size > 1 else 0.0
