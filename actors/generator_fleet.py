"""All generators as one ``Generator``: dispatch, and re-issue of what a dead one was sampling.

A generator that dies in a call, misses its deadline, fails a push or falls silent is expelled at once: whoever
waits for it is told (actors/roster.py), and its groups are sampled elsewhere with the same seeds.
May import: actors.{membership, roster}, cluster.*, trainers.{errors, experience, protocols}.
"""

from __future__ import annotations

import asyncio

from actors.membership import Event, Membership, no_event
from actors.roster import Member, MemberGoneError
from cluster.errors import DeadlineError, WorkerError
from cluster.outcomes import outcome
from cluster.settings import HealthSettings
from cluster.transport import settle
from cluster.worker_group import WorkerGroup
from trainers.errors import GroupFailedError, NoGeneratorError
from trainers.experience import GroupSummary
from trainers.protocols import GeneratedGroup, GroupRequest, Payload


class GeneratorFleet(Membership):
    """``workers`` are ready, or will be before the first call; ``event`` hears of every change.

    Args:
        num_seats: samples that one generator decodes at once.  It is given twice as many, so that the next ones are
            there when these are done; what is more waits here, in its order, for whoever is free first.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        group_deadline_s: float,
        health: HealthSettings | None = None,
        event: Event = no_event,
        num_seats: int | None = None,
    ) -> None:
        super().__init__(workers, health, event, None if num_seats is None else 2 * num_seats)
        self.group_deadline_s = group_deadline_s
        self._line = asyncio.Lock()  # whose head is who waits for room

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        """Sample one group, on another generator when one dies over it.

        Raises:
            GroupFailedError: ``health.max_attempts`` generators died over it.
            NoGeneratorError: none is left.
        """
        cost = int(request.prompt.token_ids.shape[0]) + request.num_samples * request.max_tokens
        reasons: list[str] = []
        while len(reasons) < self.health.max_attempts:
            member = await self._next(cost, request, reasons)
            try:
                return await self._sample(member, request)
            except MemberGoneError as gone:
                reasons.append(f"{gone.name}: {gone.reason}")
                self.event(
                    "group_reissued", group_id=request.group_id, attempt=len(reasons), worker=gone.name,
                    reason=gone.reason,
                )  # fmt: skip
            finally:
                self._dispatcher.done(member.index, cost, request.num_samples)
                self._opened.set()
                member.num_running -= 1
                if not member.num_running:
                    member.idle.set()
        raise GroupFailedError(request.group_id, tuple(reasons))

    async def abort(self, deadline_s: float) -> None:
        """Have every generator give up what it samples; who cannot be told so is expelled."""

        async def one(member: Member) -> None:
            told = await outcome(member.during(self.workers.call(member.index, "abort", deadline_s=deadline_s)))
            if isinstance(told.error, WorkerError | DeadlineError):
                self.roster.expel(member, f"abort: {told.error}")
            elif not isinstance(told.error, MemberGoneError):
                told.value()

        await asyncio.gather(*(one(member) for member in self.roster.members))

    async def _next(self, cost: int, request: GroupRequest, reasons: list[str]) -> Member:
        """The member that takes a job now; waits while all are full, suspect or being replaced."""
        size = request.num_samples
        async with self._line:
            while self._failure is not None or not self._dispatcher.with_room(size):
                if self._failure is not None:
                    reasons.append(f"no generator is left: {self._failure}")
                    raise NoGeneratorError(request.group_id, tuple(reasons)) from self._failure
                self._opened.clear()
                # Ends: a group ends by its deadline, a suspect recovers or dies, and a fleet without members starts
                # one or fails.
                await self._opened.wait()
            member = self._members[self._dispatcher.assign(cost, request.prompt.prompt_id, size)]
        member.num_running += 1
        member.idle.clear()
        return member

    async def _sample(self, member: Member, request: GroupRequest) -> GeneratedGroup:
        try:
            summary, payload = await member.during(self._whole(member.index, request))
        except (WorkerError, DeadlineError) as error:
            if isinstance(error, DeadlineError) and not self.workers.is_lost(member.index, error):
                raise
            self.roster.expel(member, str(error))
            raise MemberGoneError(member.name, member.reason) from error
        self._beats.heard(member.index)
        return GeneratedGroup(summary, payload)

    async def _whole(self, index: int, request: GroupRequest) -> tuple[GroupSummary, Payload]:
        """One group, whose bytes no longer depend on the generator's node."""
        summary, payload = await self.workers.call_split(
            index, "generate", request, deadline_s=self.group_deadline_s
        )
        await settle(payload, self.group_deadline_s)
        return summary, payload
