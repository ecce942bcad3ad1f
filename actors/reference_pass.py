"""Reference log-probs of comparisons by the rank that trains an adapter, with the adapter as it started.

A comparison is scored when it is first learned from, on whichever rank it falls to, and remembered by all of them.
May import: numpy, torch, actors.{rank, scoring}, trainers.*.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from actors.packing import Pack
from actors.rank import EngineRank
from actors.scoring import score_samples
from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.reference_logps import TEMPERATURE


class ReferencePass:
    """Every method is called on all ranks at once."""

    def __init__(self, rank: EngineRank) -> None:
        self._rank = rank
        self._known: dict[tuple[str, int], np.ndarray] = {}
        self._took_s = 0.0

    def took_s(self) -> float:
        """Seconds since this was last asked."""
        took, self._took_s = self._took_s, 0.0
        return took

    def rows(self, name: str, indices: Sequence[int], comparisons: Sequence[Comparison]) -> list[np.ndarray]:
        """float64 [K] of each comparison: the sum of each answer's token log-probs.

        Raises:
            InputError: one of them is no finite number.
        """
        started = time.perf_counter()
        missing = {i: c for i, c in zip(indices, comparisons, strict=True) if (name, i) not in self._known}
        if missing:
            self._score(name, missing)
        self._took_s += time.perf_counter() - started
        return [self._known[name, i] for i in indices]

    def _score(self, name: str, missing: dict[int, Comparison]) -> None:
        rank = self._rank
        assert rank.adapter is not None
        owner = [i for i, c in missing.items() for _ in c.completion_ids]
        share = rank.device.type != "cuda" if rank.settings.share_prompts is None else rank.settings.share_prompts
        with rank.adapter.as_started(), rank.evaluating():
            mine = score_samples(
                self._logprobs, [missing[i].prompt_ids for i in owner],
                [answer for c in missing.values() for answer in c.completion_ids], owner,
                rank.settings.token_budget, share, rank.device, rank.engine.world_size, rank.rank,
            )  # fmt: skip
        found = rank.everyone(mine) if rank.engine.world_size > 1 else mine
        sums = [float(found[position].astype(np.float64).sum()) for position in range(len(owner))]
        for i in missing:
            row = np.array([total for total, of in zip(sums, owner, strict=True) if of == i])
            if not np.isfinite(row).all():
                raise InputError("reference", row.tolist(), f"log-probs of comparison {i} of {name} are not finite",
                                 "set model.dtype=float32, or leave its row out")  # fmt: skip
            self._known[name, i] = row

    def _logprobs(self, pack: Pack) -> torch.Tensor:
        logprobs: torch.Tensor = self._rank.engine.forward(pack, TEMPERATURE, with_entropy=False)[0]
        return logprobs
