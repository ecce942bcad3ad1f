"""Workers that score groups, as the loop's protocols see them: reward functions, reward models, references.

They hold no state of the run: a worker that dies or does not answer is started again, and its work is done again, up
to ``health.max_attempts`` times (actors/crew.py).
May import: actors.{call_batches, crew, dispatch, membership}, cluster.*, trainers.{experience, protocols}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.call_batches import CallBatches, LostError
from actors.crew import Crew
from actors.dispatch import Dispatcher
from actors.membership import Event, no_event
from cluster.errors import DeadlineError, WorkerError
from cluster.settings import HealthSettings
from cluster.worker_group import WorkerGroup
from trainers.experience import GroupRewards
from trainers.protocols import GeneratedGroup, Payload


class RewardPool:
    """All reward workers, which run functions or ask a judge, as one ``Scorer``.

    Args:
        deadline_s: for a group, from when a worker has it.
        room: samples that one worker has at a time; the others wait here, where no deadline runs.  None: any number.
    """

    def __init__(
        self, workers: WorkerGroup, deadline_s: float, health: HealthSettings | None = None, event: Event = no_event,
        room: int | None = None,
    ) -> None:  # fmt: skip
        self.workers, self.deadline_s = workers, deadline_s
        self._dispatcher = Dispatcher(len(workers), room)
        self._crew = Crew(workers, self._back, self._gone, health, event)
        self._opened = asyncio.Event()
        self._failure: WorkerError | None = None

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        """Rewards of one group.  WorkerError when its workers die over it again and again."""
        last: BaseException | None = None
        for _ in range(self._crew.health.max_attempts):
            worker = await self._next(group)
            start = self._crew.start_of(worker)
            try:
                # Not awaited inside the payload's own argument slot: the reference travels in a list, so that
                # Ray leaves it to the worker to fetch it, with a deadline.
                rewards: GroupRewards = await self.workers.call(
                    worker, "score", [group.payload], self.deadline_s, deadline_s=self.deadline_s
                )
                return rewards
            except (WorkerError, DeadlineError) as error:
                if not self.workers.is_lost(worker, error):
                    raise
                last = error
                if self._crew.lost(worker, start, error, 1):
                    self._dispatcher.hold(worker)
            finally:
                self._dispatcher.done(worker, group.summary.num_samples, group.summary.num_samples)
                self._opened.set()
        tries = self._crew.health.max_attempts
        raise WorkerError(f"group {group.summary.group_id} was given to {tries} workers that died, the last: {last}")

    async def close(self) -> None:
        """No more restarts; the workers stay."""
        await self._crew.close()

    async def _next(self, group: GeneratedGroup) -> int:
        size = group.summary.num_samples
        while not self._dispatcher.with_room(size):
            if self._failure is not None:
                raise self._failure
            self._opened.clear()
            await self._opened.wait()  # ends: a call has a deadline, a restart too and a bounded number of tries
        return self._dispatcher.assign(size, size=size)

    def _back(self, worker: int) -> None:
        self._dispatcher.release(worker)
        self._opened.set()

    def _gone(self, worker: int, error: WorkerError) -> None:
        self._dispatcher.remove(worker)
        if not self._dispatcher.loads:
            self._failure = error
        self._opened.set()


def num_scored_tokens(group: GeneratedGroup) -> int:
    """What a forward pass over the group costs: its prompt with each completion."""
    summary = group.summary
    return summary.num_samples * summary.num_prompt_tokens + sum(summary.num_completion_tokens)


class _BatchedPool:
    """Waiting groups share a call up to ``token_budget``; a batch whose worker dies goes to the next one."""

    def __init__(
        self,
        workers: WorkerGroup,
        deadline_s: float,
        token_budget: int,
        health: HealthSettings | None = None,
        event: Event = no_event,
    ) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._crew = Crew(workers, self._back, self._gone, health, event)
        self._calls: CallBatches[GeneratedGroup, Any] = CallBatches(
            len(workers), token_budget, self._guarded, self._crew.health.max_attempts
        )

    async def close(self) -> None:
        """No more restarts; the workers stay."""
        await self._crew.close()

    async def _call(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[Any]:
        raise NotImplementedError

    async def _guarded(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[Any]:
        start = self._crew.start_of(worker)
        try:
            return await self._call(worker, groups)
        except (WorkerError, DeadlineError) as error:
            if not self.workers.is_lost(worker, error):
                raise
            self._crew.lost(worker, start, error, len(groups))
            raise LostError(error) from error

    def _back(self, worker: int) -> None:
        self._calls.put_back(worker)

    def _gone(self, worker: int, error: WorkerError) -> None:
        self._calls.give_up(error)


class RewardModelPool(_BatchedPool):
    """All replicas of one reward model as one ``Scorer``."""

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        rewards: GroupRewards = await self._calls.submit(group, num_scored_tokens(group))
        return rewards

    async def _call(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[GroupRewards]:
        rewards: list[GroupRewards] = await self.workers.call(
            worker, "score", [g.payload for g in groups], self.deadline_s, deadline_s=self.deadline_s
        )
        return rewards


class ReferencePool(_BatchedPool):
    """All reference replicas as one ``Reference``."""

    async def logprobs(self, group: GeneratedGroup) -> Payload:
        return await self._calls.submit(group, num_scored_tokens(group))

    async def _call(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[Payload]:
        _, *payloads = await self.workers.call_split(
            worker, "logprobs", [g.payload for g in groups], self.deadline_s, deadline_s=self.deadline_s,
            num_payloads=len(groups),
        )  # fmt: skip
        return payloads
