"""Metric sums of one update, over packs, minibatches and ranks.

May import: torch, actors.{objective, packing}, trainers.off_policy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from actors.objective import MAXIMA, SUMS, PackOutcome
from actors.packing import Pack
from trainers.off_policy import NUM_BINS, effective_sample_size, ratio_histogram, ratio_quantiles, weight_sums

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


class UpdateTotals:
    """Metric sums over packs, then over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
        self.first_deviation = torch.zeros((), dtype=torch.float64, device=device)
        self.inputs = torch.zeros(2, dtype=torch.float64, device=device)  # computed, and what samples alone would need
        self.histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=device)  # of tokens' proximal_ / behavior_
        self.sample_log_ratios = [torch.zeros(0, dtype=torch.float64, device=device)]  # of whole samples, a pack each
        self.num_microbatches = 0
        self.num_trained = 0.0  # tokens of all ranks that had a gradient; known once the sums are reduced
        self.pretrain = torch.zeros((), dtype=torch.float64, device=device)  # mean cross-entropies of the updates

    def add(self, outcome: PackOutcome, pack: Pack, first: bool) -> None:
        self.sums += outcome.sums
        self.maxima = torch.maximum(self.maxima, outcome.maxima)
        if first:
            self.first_deviation = torch.maximum(self.first_deviation, outcome.maxima[MAXIMA.index("ratio_deviation")])
        self.histogram += ratio_histogram(outcome.log_ratios)
        self.sample_log_ratios.append(outcome.sample_log_ratios)
        alone = sum(len(b.completions) * b.num_prompt + sum(b.completions) for b in pack.layout.blocks)
        self.inputs += torch.tensor([pack.num_inputs, alone], dtype=torch.float64, device=self.inputs.device)

    def pretrain_loss(self) -> float:
        """Sum over the updates of PPO-ptx's mean cross-entropy, over all ranks; a collective."""
        dist.all_reduce(self.pretrain)
        return float(self.pretrain)

    def reduced(self) -> dict[str, float]:
        """The metrics; a collective.  Means over tokens are left out where no token was trained: there is none."""
        sums = torch.cat([self.sums, self.inputs])
        log_weights = torch.cat(self.sample_log_ratios)
        largest = log_weights.max() if log_weights.numel() else torch.full_like(self.first_deviation, -torch.inf)
        maxima = torch.cat([self.maxima, self.first_deviation[None], largest[None]])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        spread = torch.cat([weight_sums(log_weights, maxima[-1]), self.histogram.double()])
        dist.all_reduce(spread)
        total = dict(zip(SUMS, sums.tolist(), strict=False))
        peak = dict(zip(MAXIMA, maxima.tolist(), strict=False))
        computed, alone = sums[-2:].tolist()
        n = self.num_trained = total["tokens"]
        metrics = {
            "loss": total["loss"],
            "learner/num_microbatches": float(self.num_microbatches),
            "learner/shared_prompt_fraction": 1.0 - computed / alone if alone else 0.0,
        }
        if n == 0:
            return metrics
        num_samples, weights, squares = spread[:3].tolist()
        if num_samples:
            metrics["sampling/effective_sample_size"] = effective_sample_size(num_samples, weights, squares)
            found = ratio_quantiles(spread[3:].long(), list(QUANTILES.values()))
            metrics |= {f"sampling/importance_sampling_ratio/{k}": v for k, v in zip(QUANTILES, found, strict=True)}
        return metrics | {
            "entropy": total["entropy"] / n,
            "kl": total["kl"] / n,
            "ratio/mean": total["ratio"] / n,
            "ratio/max": peak["ratio"],
            "ratio/first_minibatch_max_deviation": maxima[-2].item(),
            "clip_ratio/low_mean": total["clip_low"] / n,
            "clip_ratio/high_mean": total["clip_high"] / n,
            "clip_ratio/region_mean": (total["clip_low"] + total["clip_high"]) / n,
            "sampling/sampling_logp_difference/mean": total["mismatch"] / n,
            "sampling/sampling_logp_difference/max": peak["mismatch"],
            "sampling/importance_sampling_ratio/max": peak["sampling_ratio"],
            "sampling/mismatch_kl/k1": total["mismatch_k1"] / n,
            "sampling/mismatch_kl/k3": total["mismatch_k3"] / n,
            "correction/truncated_fraction": total["truncated"] / n,
            "correction/masked_fraction": total["masked"] / n,
        }
