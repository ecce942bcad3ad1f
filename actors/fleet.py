"""Groups of workers as the loop's protocols see them: one Generator, one Scorer, one Learner ...

Thin: dispatch, deadlines and nothing else.
May import: actors.*, trainers.protocols, cluster.worker_group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.dispatch import Dispatcher
from cluster.worker_group import WorkerGroup
from trainers.experience import GroupRewards
from trainers.protocols import (
    CriticReport,
    GeneratedGroup,
    GroupRequest,
    LearnerGroup,
    Payload,
    PreparedBatch,
    UpdateReport,
)


class GeneratorFleet:
    """All generators as one ``Generator``."""

    def __init__(self, workers: WorkerGroup, group_deadline_s: float) -> None:
        self.workers, self.group_deadline_s = workers, group_deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        cost = int(request.prompt.token_ids.shape[0]) + request.num_samples * request.max_tokens
        worker = self._dispatcher.assign(cost, request.prompt.prompt_id)
        try:
            summary, payload = await self.workers.call_split(
                worker, "generate", request, deadline_s=self.group_deadline_s
            )
        finally:
            self._dispatcher.done(worker, cost)
        return GeneratedGroup(summary, payload)


class RewardPool:
    """All reward workers as one ``Scorer``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        worker = self._dispatcher.assign(group.summary.num_samples)
        try:
            # Not awaited inside the payload's own argument slot: the reference travels in a list, so that
            # Ray leaves it to the worker to fetch it, with a deadline.
            rewards: GroupRewards = await self.workers.call(
                worker, "score", [group.payload], self.deadline_s, deadline_s=self.deadline_s
            )
        finally:
            self._dispatcher.done(worker, group.summary.num_samples)
        return rewards


class ReferencePool:
    """All reference replicas as one ``Reference``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def logprobs(self, group: GeneratedGroup) -> Payload:
        cost = sum(group.summary.num_completion_tokens)
        worker = self._dispatcher.assign(cost)
        try:
            _, payload = await self.workers.call_split(
                worker, "logprobs", [group.payload], self.deadline_s, deadline_s=self.deadline_s
            )
        finally:
            self._dispatcher.done(worker, cost)
        return payload


class Gang:
    """All ranks of one trained model; every call is made on all of them at once."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s

    async def _first_with_payload(self, method: str, *args: Any) -> tuple[Any, Payload]:
        """``call_split`` on rank 0 while the others, who have no result, make the same call."""
        workers, deadline_s = self.workers, self.deadline_s
        found: tuple[Any, Payload]
        found, *_ = await asyncio.gather(
            workers.call_split(0, method, *args, deadline_s=deadline_s),
            *(workers.call(rank, method, *args, deadline_s=deadline_s) for rank in range(1, len(workers))),
        )
        return found

    async def save(self, directory: str) -> None:
        await self.workers.call_all("save", directory, deadline_s=self.deadline_s)

    async def load(self, directory: str) -> None:
        await self.workers.call_all("load", directory, deadline_s=self.deadline_s)


class LearnerGang(Gang):
    """All learner ranks as one ``Learner``, and one ``PolicyLearner``."""

    async def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> PreparedBatch:
        prepared, payload = await self._first_with_payload("prepare", list(groups), list(scores), kl_coef)
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

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        super().__init__(workers, deadline_s)
        self._turn = asyncio.Lock()  # a forward pass may be a collective: groups reach every rank in one order

    async def values(self, group: GeneratedGroup) -> Payload:
        async with self._turn:
            _, payload = await self._first_with_payload("values", [group.payload], self.deadline_s)
        return payload

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Payload) -> CriticReport:
        reports = await self.workers.call_all("update", list(groups), step, [targets], deadline_s=self.deadline_s)
        first: CriticReport = reports[0]
        return first
