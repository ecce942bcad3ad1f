"""Metric sums of one update, over packs, minibatches and ranks.  May import: torch, actors.{objective, packing}."""

from __future__ import annotations

import torch
import torch.distributed as dist

from actors.objective import MAXIMA, SUMS
from actors.packing import Pack


class UpdateTotals:
    """Metric sums over packs, then over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
        self.first_deviation = torch.zeros((), dtype=torch.float64, device=device)
        self.inputs = torch.zeros(2, dtype=torch.float64, device=device)  # computed, and what samples alone would need
        self.num_microbatches = 0
        self.num_trained = 0.0  # tokens of all ranks that had a gradient; known once the sums are reduced
        self.pretrain = torch.zeros((), dtype=torch.float64, device=device)  # mean cross-entropies of the updates

    def add(self, sums: torch.Tensor, maxima: torch.Tensor, pack: Pack, first: bool) -> None:
        self.sums += sums
        self.maxima = torch.maximum(self.maxima, maxima)
        if first:
            self.first_deviation = torch.maximum(self.first_deviation, maxima[MAXIMA.index("ratio_deviation")])
        alone = sum(len(b.completions) * b.num_prompt + sum(b.completions) for b in pack.layout.blocks)
        self.inputs += torch.tensor([pack.num_inputs, alone], dtype=torch.float64, device=self.inputs.device)

    def pretrain_loss(self) -> float:
        """Sum over the updates of PPO-ptx's mean cross-entropy, over all ranks; a collective."""
        dist.all_reduce(self.pretrain)
        return float(self.pretrain)

    def reduced(self) -> dict[str, float]:
        """The metrics; a collective.  Means over tokens are left out where no token was trained: there is none."""
        sums = torch.cat([self.sums, self.inputs])
        maxima = torch.cat([self.maxima, self.first_deviation[None]])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
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
        return metrics | {
            "entropy": total["entropy"] / n,
            "kl": total["kl"] / n,
            "ratio/mean": total["ratio"] / n,
            "ratio/max": peak["ratio"],
            "ratio/first_minibatch_max_deviation": maxima[-1].item(),
            "clip_ratio/low_mean": total["clip_low"] / n,
            "clip_ratio/high_mean": total["clip_high"] / n,
            "clip_ratio/region_mean": (total["clip_low"] + total["clip_high"]) / n,
            "sampling/sampling_logp_difference/mean": total["mismatch"] / n,
            "sampling/sampling_logp_difference/max": peak["mismatch"],
        }
