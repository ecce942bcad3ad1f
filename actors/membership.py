"""The coming and going of a fleet's members: who is alive, how many there are to be, who starts and who leaves.

    Heartbeats  a silent member is held, then expelled
    _staff      as many members as are wanted: starts what is missing, lets the surplus drain
    _bring      one start: construct -> catch up with the present version -> work
    _drain      one leaving: finish its groups -> out of the pushes -> end

Without ``open`` nobody is watched, replaced or added.
May import: actors.{dispatch, roster}, cluster.*.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from actors.dispatch import Dispatcher
from actors.roster import Member, MemberGoneError, Roster
from cluster.errors import WorkerError
from cluster.health import Dead, Health, Staffing, State, Suspect
from cluster.heartbeats import Heartbeats
from cluster.outcomes import outcome
from cluster.settings import HealthSettings
from cluster.worker_group import WorkerGroup

Event = Callable[..., None]


def no_event(kind: str, **fields: Any) -> None:
    """Where nobody records."""


@dataclass(frozen=True)
class Recruiting:
    """How a fleet gets a new member and lets one go."""

    hire: Callable[[], Awaitable[int]]  # starts a worker where there is room; its index
    catch_up: Callable[[Member], Awaitable[str]]  # pushes, verifies, admits to the roster; the version
    between_pushes: Callable[[], Awaitable[None]]  # returns when no push is going on
    vacate: Callable[[int], None]  # the worker has ended, its place is free
    node_of: Callable[[int], str] | None = None  # Ray's id of the node that a worker is on; None: all in this process


class Membership:
    """``workers`` are ready, or will be before their first call; ``event`` hears of every change.

    ``room``: samples that one may have at a time; None: any number.
    """

    def __init__(
        self, workers: WorkerGroup, health: HealthSettings | None, event: Event, room: int | None = None
    ) -> None:
        self.workers, self.event = workers, event
        self.health = health or HealthSettings()
        self.roster = Roster()
        self.roster.on_expel = self._expelled
        self._dispatcher = Dispatcher(room=room)
        self._members: dict[int, Member] = {}  # those that start too
        self._leaving: set[int] = set()
        self._opened = asyncio.Event()  # somebody may take work, or nobody ever will
        self._failure: BaseException | None = None
        self._beats = Heartbeats(Health(self.health.detect_s), self._ping, self._changed)
        self._staffing = Staffing(len(workers), self.health.retry_s)
        self._recruiting: Recruiting | None = None
        self._num_starting = 0
        self._lost: list[tuple[str, float]] = []  # (name, when) of the dead that nobody stands for yet
        self._tasks: set[asyncio.Task[None]] = set()
        for index in workers.indices:
            self._enter(index)
            self._admit(self._members[index])
            self.roster.admit(self._members[index])

    # --- liveness ---------------------------------------------------------------------------------

    async def _ping(self, index: int) -> None:
        await self.workers.ping(index, 2 * self.health.detect_s)

    def _changed(self, change: Suspect | Dead | int) -> None:
        index = change if isinstance(change, int) else change.member
        member = self._members.get(index)
        if member is None:
            return
        if isinstance(change, Dead):
            member.silent_s = change.silent_s
            self.roster.expel(member, change.reason)
        elif isinstance(change, Suspect):
            self._dispatcher.hold(index)
            self.event("worker_suspect", role=self.workers.name, worker=member.name, silent_s=round(change.silent_s, 3))
        else:
            self._dispatcher.release(index)
            self._opened.set()
            self.event("worker_recovered", role=self.workers.name, worker=member.name)

    def _expelled(self, member: Member) -> None:
        """A member is out for good, whoever found it dead."""
        now = self._beats.clock()
        served = self._beats.health.state(member.index) is not State.STARTING
        dead = self._beats.health.failed(member.index, now, member.reason)
        if dead is not None:
            member.silent_s = dead.silent_s
        if served and member.index not in self._leaving:
            self._lost.append((member.name, now))
        self._forget(member)
        self._staffing.reset()  # its place is free: whatever failed before may work now
        self.event(
            "worker_died", role=self.workers.name, worker=member.name, reason=member.reason,
            silent_s=round(member.silent_s, 3), detect_s=self.health.detect_s, num_generators=len(self.roster),
        )  # fmt: skip
        if not self.health.replace:
            self._staffing.target = len(self._members) - len(self._leaving)
        self._staff()

    def _enter(self, index: int) -> Member:
        member = self._members[index] = Member(index, f"{self.workers.name}-{index}")
        self._beats.join(index, math.inf)  # its start has a deadline of its own
        return member

    def _admit(self, member: Member) -> None:
        self._beats.started(member.index)
        self._dispatcher.add(member.index)
        self._opened.set()

    def _forget(self, member: Member) -> None:
        """End its worker and free its place, once; nothing of it is left but what its callers hold."""
        if self._members.pop(member.index, None) is None:
            return
        self._dispatcher.remove(member.index)
        self._leaving.discard(member.index)
        self.workers.end(member.index)
        if self._recruiting is not None:
            self._recruiting.vacate(member.index)

    # --- coming and going -------------------------------------------------------------------------

    def open(self, recruiting: Recruiting) -> None:
        """Watch over the members from now on, and keep their number."""
        self._recruiting = recruiting
        if not self.workers.in_process:  # objects of this process cannot fall silent alone
            self._spawn(self._beats.run())
        self._staff()

    async def close(self) -> None:
        """End what :meth:`open` began; the workers themselves stay."""
        self._recruiting = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_wanted(self) -> int:
        return self._staffing.target

    def scale(self, num_workers: int) -> None:
        """Want ``num_workers`` generators from now on.  They join and leave as they can; events tell when."""
        if num_workers < 1:
            raise ValueError(f"{num_workers} generators: at least one is needed")
        before, self._staffing.target = self._staffing.target, num_workers
        self._staffing.reset()  # who asks for more may have made room for them: no pause
        self.event("scaling", role=self.workers.name, before=before, wanted=num_workers)
        self._staff()

    def lose(self, indices: Collection[int], reason: str, num_fewer: int = 0) -> None:
        """The node of these members has gone, and they with it; ``num_fewer`` less are wanted from now on."""
        num_fewer = num_fewer if self.health.replace else 0  # else every death has lowered the number
        for index in indices:
            member = self._members.get(index)
            if member is None:  # found dead before
                continue
            if num_fewer and self._staffing.target > 1:  # so that nobody is started in its place
                self._staffing.target, num_fewer = self._staffing.target - 1, num_fewer - 1
            self.roster.expel(member, reason)
        if num_fewer and self._staffing.target > 1:
            self.scale(max(1, self._staffing.target - num_fewer))
        self._staffing.reset()  # what failed on that node may work elsewhere
        self._staff()

    def _staff(self) -> None:
        """Bring the number of generators to the one wanted; called after every change."""
        if self._recruiting is None or not self._staffing.target:
            if not self._members:
                self._fail(WorkerError(f"the last one went: {self.roster.last_reason}"))
            return
        inside = {member.index for member in self.roster.members}
        staying = [index for index in self._members if index not in self._leaving]
        # Those that start yet leave first, then the youngest.
        for index in sorted(staying, key=lambda i: (i not in inside, i), reverse=True):
            if len(staying) <= self._staffing.target:  # a start without a place yet is taken back when it has one
                break
            staying.remove(index)
            self._leaving.add(index)
            self._spawn(self._drain(self._members[index], self._recruiting))
        for _ in range(self._staffing.num_to_start(len(staying) + self._num_starting, self._beats.clock())):
            self._num_starting += 1
            self._spawn(self._bring(self._recruiting))

    async def _bring(self, recruiting: Recruiting) -> None:
        started = time.perf_counter()
        hired = await outcome(_awaited(recruiting.hire()))
        self._num_starting -= 1
        if hired.error is None:
            member = self._enter(hired.value())
            self._staff()  # fewer may be wanted by now
            joined = await outcome(member.during(self._join(member, recruiting, started)))
            if joined.error is None or isinstance(joined.error, MemberGoneError):  # it was told to leave already
                return
            self._start_failed(member, joined.error)
        else:
            self._start_failed(None, hired.error)

    async def _join(self, member: Member, recruiting: Recruiting, started: float) -> None:
        await self.workers.ready_at(member.index)
        ready = time.perf_counter()
        version = await recruiting.catch_up(member)
        self._admit(member)
        self._staffing.reset()
        now = time.perf_counter()
        place = {} if recruiting.node_of is None else {"node": recruiting.node_of(member.index)}
        self.event(
            "generator_joined", worker=member.name, version=version, start_s=round(ready - started, 3),
            catch_up_s=round(now - ready, 3), num_generators=len(self.roster), **place,
        )  # fmt: skip
        if self._lost:
            name, since = self._lost.pop(0)
            self.event(
                "worker_replaced", role=self.workers.name, worker=name, by=member.name,
                recover_s=round(self._beats.clock() - since, 3),
            )  # fmt: skip

    def _start_failed(self, member: Member | None, error: BaseException | None) -> None:
        """A start that came to nothing: again after a pause, unless nobody is left and it has failed too often."""
        if member is not None:
            self._beats.health.leave(member.index)
            self.roster.strike(member, str(error))
            self._forget(member)
        pause_s = self._staffing.failed(self._beats.clock())
        reason = f"{type(error).__name__}: {error}"
        self.event(
            "start_failed", role=self.workers.name, worker=None if member is None else member.name, reason=reason,
            again_in_s=round(pause_s, 3), num_generators=len(self.roster),
        )  # fmt: skip
        if self._staffing.num_failed >= self.health.max_attempts and not len(self.roster):
            self._fail(WorkerError(f"{self._staffing.num_failed} starts in a row failed, the last: {reason}"))
            return
        self._spawn(self._staff_after(pause_s))

    async def _staff_after(self, pause_s: float) -> None:
        await asyncio.sleep(1.01 * pause_s)  # certainly after the pause, however the clocks are rounded
        self._staff()

    async def _drain(self, member: Member, recruiting: Recruiting) -> None:
        """Let one finish its groups and go; in pushes until then, so that its groups grow no older than others."""
        self._dispatcher.remove(member.index)
        self.event("generator_leaving", worker=member.name, num_running=member.num_running)
        drained = await outcome(member.during(member.idle.wait()))
        if drained.error is not None:  # it was expelled meanwhile
            return
        await recruiting.between_pushes()
        if member.gone:
            return
        self._beats.health.leave(member.index)
        self.roster.strike(member, "it left")
        closed = await outcome(self.workers.retire(member.index))  # what its close raised costs the others nothing
        self._forget(member)
        error = closed.error
        said = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        self.event("generator_left", worker=member.name, num_generators=len(self.roster), **said)
        self._staff()

    # --- tasks ------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _fail(self, error: BaseException | None) -> None:
        """The fleet cannot go on; whoever waits for a generator hears of it."""
        self._failure = self._failure or error
        self._opened.set()


async def _awaited(waiting: Awaitable[int]) -> int:
    return await waiting
