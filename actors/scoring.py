"""Log-probs of many samples, pack by pack, without gradients: the part learner and reference share.

May import: numpy, torch, actors.packing, trainers.batching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from actors.packing import Pack, build_pack
from trainers.batching import MicroBatch, Piece, SampleShape, plan_microbatches

Score = Callable[[Pack], torch.Tensor]  # pack -> log-probs float32 [N]


@torch.no_grad()
def score_samples(
    score: Score,
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    groups: Sequence[int],
    token_budget: int,
    share_prompts: bool,
    device: torch.device,
    num_ranks: int = 1,
    rank: int = 0,
) -> dict[int, np.ndarray]:
    """Sample index -> float32 [T], for the samples that this rank was dealt (all, with one rank).

    Empty completions are given an empty row.  A rank without work left runs nothing here; where ranks
    must run in step (ZeRO 3), ``score`` is called equally often on each because plans have equal length
    and an empty micro-batch is replaced by the smallest sample.
    """
    scored = [i for i, c in enumerate(completions) if c.shape[0] > 0]
    shapes = [SampleShape(groups[i], i, int(prompts[i].shape[0]), int(completions[i].shape[0])) for i in scored]
    out = {i: np.zeros(0, dtype=np.float32) for i, c in enumerate(completions) if c.shape[0] == 0}
    if not shapes:
        return out
    chosen_prompts = [prompts[i] for i in scored]
    chosen_completions = [completions[i] for i in scored]
    for microbatch in plan_microbatches(shapes, num_ranks, token_budget, share_prompts)[rank]:
        filler = not microbatch
        if filler:
            microbatch = filler_microbatch(shapes)
        pack = build_pack(microbatch, chosen_prompts, chosen_completions, device)
        logprobs = score(pack).float().cpu()
        if filler:
            continue
        for member, row in zip(pack.members, logprobs.split(pack.lengths), strict=True):
            out[scored[member]] = row.numpy()
    return out


def filler_microbatch(shapes: Sequence[SampleShape]) -> MicroBatch:
    """The cheapest sample alone: what a rank computes, with weight 0, when it has no samples left."""
    smallest = min(range(len(shapes)), key=lambda i: (shapes[i].cost, i))
    return (Piece((smallest,), shapes[smallest].cost),)
