"""One score for each of many texts, pack by pack, without gradients: what reward model and its trainer share.

May import: numpy, torch, actors.{packing, scoring, sequence_packing}, trainers.batching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from actors.packing import Pack
from actors.scoring import filler_microbatch
from actors.sequence_packing import end_pack
from trainers.batching import SampleShape, plan_microbatches


@torch.no_grad()
def end_scores(
    score: Callable[[Pack], torch.Tensor],
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    groups: Sequence[int],
    token_budget: int,
    share_prompts: bool,
    device: torch.device,
    num_ranks: int = 1,
    rank: int = 0,
) -> dict[int, np.float32]:
    """Text index -> score at its last token, for the texts that this rank was dealt (all, with one rank).

    Args:
        score: pack -> float32 [N]; called equally often on every rank, as ZeRO 3 needs.
        prompts: int32 [P] of each text; equal arrays for texts of one group.
        completions: int32 [T] of each text, T >= 1.
        groups: texts of one group share their prompt.

    Raises:
        ValueError: a text is longer than ``token_budget``.
    """
    shapes = [
        SampleShape(g, i, int(p.shape[0]), int(c.shape[0]))
        for i, (g, p, c) in enumerate(zip(groups, prompts, completions, strict=True))
    ]
    found: dict[int, np.float32] = {}
    if not shapes:
        return found
    for microbatch in plan_microbatches(shapes, num_ranks, token_budget, share_prompts)[rank]:
        pack = end_pack(microbatch or filler_microbatch(shapes), prompts, completions, device)
        scores = score(pack).float().cpu().numpy()
        if microbatch:
            found.update(zip(pack.members, scores, strict=True))
    return found
