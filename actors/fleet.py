"""Gangs: all ranks of one trained model as the loop's protocols see them, one Learner, one Critic.

Roles whose workers stand alone are in ``generator_fleet.py`` and ``scorer_pools.py``.
Thin: deadlines and nothing else.
May import: actors.*, trainers.protocols, cluster.worker_group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.call_batches import CallBatches
from actors.scorer_pools import num_scored_tokens
from actors.state_saving import SaveBegun, SaveOutcome
from cluster.worker_group import WorkerGroup
from trainers.protocols import (
    CriticReport,
    GeneratedGroup,
    LearnerGroup,
    Payload,
    PreparedBatch,
    UpdateReport,
)


class Gang:
    """All ranks of one trained model; every call is made on all of them at once."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s

    async def _first_with_payloads(self, num_payloads: int, method: str, *args: Any) -> tuple[Any, ...]:
        """``call_split`` on rank 0 while the others, who have no result, make the same call."""
        workers, deadline_s = self.workers, self.deadline_s
        found: tuple[Any, ...]
        found, *_ = await asyncio.gather(
            workers.call_split(0, method, *args, deadline_s=deadline_s, num_payloads=num_payloads),
            *(workers.call(rank, method, *args, deadline_s=deadline_s) for rank in range(1, len(workers))),
        )
        return found

    async def begin_save(self, directory: str) -> list[SaveBegun]:
        """Of each rank; returns when all have a copy of their state and are free to train."""
        begun: list[SaveBegun] = await self.workers.call_all("begin_save", directory, deadline_s=self.deadline_s)
        return begun

    async def save_outcome(self, rank: int) -> SaveOutcome | None:
        """What came of ``begin_save`` on one rank; None while it writes.  Answered between two other calls."""
        outcome: SaveOutcome | None = await self.workers.call(rank, "save_outcome", deadline_s=self.deadline_s)
        return outcome

    async def load(self, directory: str) -> None:
        await self.workers.call_all("load", directory, deadline_s=self.deadline_s)


class LearnerGang(Gang):
    """All learner ranks as one ``Learner``, and one ``PolicyLearner``."""

    async def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> PreparedBatch:
        prepared, payload = await self._first_with_payloads(1, "prepare", list(groups), list(scores), kl_coef)
        found: PreparedBatch = replace(prepared, payload=payload)
        return found

    async def update(
        self, groups: Sequence[LearnerGroup], step: int, targets: Payload | None = None, kl_coef: float | None = None
    ) -> UpdateReport:
        reports = await self.workers.call_all(
            "update", list(groups), step, None if targets is None else [targets], kl_coef, deadline_s=self.deadline_s
        )
        first: UpdateReport = reports[0]
        return first

    async def export(self, directory: str) -> None:
        await self.workers.call_all("export", directory, deadline_s=self.deadline_s)


class CriticGang(Gang):
    """All critic ranks as one ``Critic``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float, token_budget: int) -> None:
        """``token_budget``: of each rank; waiting groups share a call up to that of all ranks."""
        super().__init__(workers, deadline_s)
        # One batch at a time, as of one worker: a forward pass may be a collective, and every rank has to see the
        # same calls in the same order.
        self._calls = CallBatches(1, token_budget * len(workers), self._values)

    async def values(self, group: GeneratedGroup) -> Payload:
        return await self._calls.submit(group, num_scored_tokens(group))

    async def _values(self, _: int, groups: list[GeneratedGroup]) -> Sequence[Payload]:
        payloads = [g.payload for g in groups]
        _, *values = await self._first_with_payloads(len(groups), "values", payloads, self.deadline_s)
        return values

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Payload) -> CriticReport:
        reports = await self.workers.call_all("update", list(groups), step, [targets], deadline_s=self.deadline_s)
        first: CriticReport = reports[0]
        return first
