"""A rank of learner or critic is lost: both start again from the newest checkpoint, and everybody else stays.

    the loop fails --> is a rank lost? --no--> the error ends the run
                             | yes: event ``rank_died``; too often without progress: the run ends
    all ranks end           generators give up what they sample, their engines stay
    newest checkpoint       later rows are set aside, the incarnation is a new one
    ranks start, load       in their places, elsewhere where a node has gone
    push                    generators have the restored weights; event ``learner_restarted``
    a new loop              with the ledger of the checkpoint

What a rank *raises* would be raised again, so it ends the run.  But the peers of a rank that dies raise too, and often
sooner than its death is known: so after any failure but those that Burnish raises on purpose the ranks are asked.
May import: cluster.*, trainers.*, launch.{assemble, checkpointing, config, resuming, signals, telemetry,
trained_ranks}.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.checkpoints import Checkpoint
from cluster.errors import DeadlineError, WorkerDiedError, WorkerError
from cluster.outcomes import Outcome, outcome
from cluster.worker_group import WorkerGroup
from launch.assemble import Fleet
from launch.checkpointing import Checkpointer
from launch.config import RunConfig
from launch.resuming import newest_checkpoint
from launch.signals import stop_on_signals
from launch.telemetry import Telemetry
from launch.trained_ranks import end_all
from trainers.errors import BurnishError
from trainers.experience import WeightVersion
from trainers.loop import TrainingLoop

ASK_DEADLINE_S = 60.0  # Ray knows of a dead process at once, of a dead node after up to a minute
NAMED_DEADLINE_S = 5.0  # where the error names a rank, so that all start again whoever else has died

Dead = Mapping[tuple[str, int], str]  # (role, rank) -> how it ended


@dataclass(frozen=True, slots=True)
class Loss:
    """One rank that is lost, and with it the state that all ranks hold together."""

    role: str
    rank: int
    reason: str

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"


def lost_rank(error: BaseException, dead: Dead, num_ranks: Mapping[str, int]) -> Loss | None:
    """The rank whose loss is behind ``error``; None when all are there, so that it would come again.

    Args:
        dead: ranks that are known to have ended.
        num_ranks: of each role.
    """
    for (role, rank), reason in dead.items():
        return Loss(role, rank, reason)
    if isinstance(error, DeadlineError):  # one that is frozen, or hangs with its device
        for role, num in num_ranks.items():
            for rank in range(num):
                if error.source == f"{role}[{rank}]":
                    return Loss(role, rank, str(error))
    return None


class Restarts:
    """How often the ranks may start again: ``max_attempts`` times without a step that was not reached before."""

    def __init__(self, max_attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_attempts, self._clock = max_attempts, clock
        self.num_in_vain = 0  # since the run got further than ever
        self.furthest = -1  # finished steps at a loss
        self._since: float | None = None

    def lost(self, step: int) -> bool:
        """A rank was lost, or a start failed, after ``step`` finished steps.  Whether to start again."""
        if self._since is None:
            self._since = self._clock()
        if step > self.furthest:
            self.furthest, self.num_in_vain = step, 0
        if self.num_in_vain == self.max_attempts:
            return False
        self.num_in_vain += 1
        return True

    def back(self) -> float:
        """The loop goes on: seconds since the first loss that this start makes good, failed starts included."""
        since, self._since = self._since, None
        return 0.0 if since is None else self._clock() - since


class RestartableRun(Protocol):
    """A run as :func:`train_on` needs it; launch/train.py has the one there is."""

    config: RunConfig
    folder: Path
    fleet: Fleet
    telemetry: Telemetry
    version: WeightVersion
    first_step: int  # of the checkpoint that it goes on from; 0 without one
    loop: TrainingLoop  # that goes on, or ended last
    saver: Checkpointer | None  # the same

    async def train(self) -> None:
        """From ``first_step`` to the end of the run, or until it is told to stop."""
        ...

    def go_on_from(self, checkpoint: Checkpoint | None, incarnation: int) -> None:
        """The next :meth:`train` begins there; ``incarnation``: the last one that was served."""
        ...

    async def restore(self) -> object:
        """The checkpoint's state into every rank, its weights into every generator."""
        ...


async def train_on(run: RestartableRun, clock: Callable[[], float] = time.monotonic) -> None:
    """Train to the end, again from the newest checkpoint whenever a rank is lost.

    Raises:
        WorkerError: ranks are lost, or do not start, again and again without progress.
        Exception: whatever else ended the loop, as it was raised.
    """
    restarts = Restarts(run.config.health.max_attempts, clock)
    loss: Loss | None = None  # that the ranks have to come back from
    while True:
        try:
            if loss is not None:
                if not await _stands_again(run, loss, restarts):
                    return
                loss = None
            await run.train()
            return
        except BurnishError:  # raised on purpose: it would come again, whoever is there
            raise
        except Exception as error:  # raised again unless a rank is lost
            found = await find_loss(error, run.fleet.trained)
            if found is None and loss is not None and isinstance(error, WorkerError | DeadlineError):
                found = Loss(loss.role, loss.rank, f"{type(error).__name__}: {error}")  # it did not come back
            if found is None or run.loop.stopping:
                raise
            kind = "rank_died" if loss is None else "start_failed"
            run.telemetry.event(
                kind, role=found.role, worker=f"{found.role}-{found.rank}", rank=found.rank, reason=found.reason
            )
            if not restarts.lost(run.loop.step):
                raise WorkerError(
                    f"{found} was lost again, {restarts.max_attempts} restarts after step {restarts.furthest} "
                    f"(health.max_attempts), the last time: {found.reason}"
                ) from error
            loss = found


async def find_loss(
    error: BaseException, groups: Mapping[str, WorkerGroup], deadline_s: float = ASK_DEADLINE_S
) -> Loss | None:
    """The rank whose loss is behind ``error``, by asking all of them; None when it would come again."""
    groups = {role: group for role, group in groups.items() if not group.in_process}
    num_ranks = {role: len(group) for role, group in groups.items()}
    is_named = lost_rank(error, {}, num_ranks) is not None
    dead = await dead_ranks(groups, min(NAMED_DEADLINE_S, deadline_s) if is_named else deadline_s)
    return lost_rank(error, dead, num_ranks)


async def dead_ranks(groups: Mapping[str, WorkerGroup], deadline_s: float) -> dict[tuple[str, int], str]:
    """Ranks that have ended: at once when one is known, else when all have answered or ``deadline_s`` has passed.

    One that does not answer may compute, or wait for a peer that raised: it does not count.
    """
    asked: dict[asyncio.Task[Outcome[None]], tuple[str, int]] = {}
    for role, group in groups.items():
        for rank in group.indices:
            asked[asyncio.create_task(outcome(group.ping(rank, deadline_s)))] = (role, rank)
    pending = set(asked)
    dead: dict[tuple[str, int], str] = {}
    try:
        while pending and not dead:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task, place in asked.items():
                if task.done() and isinstance(ended := task.result().error, WorkerDiedError):
                    dead[place] = str(ended)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return dead


async def _stands_again(run: RestartableRun, loss: Loss, restarts: Restarts) -> bool:
    """Bring ``run`` back to its newest checkpoint.  False when a signal ended it meanwhile: there is nothing to save.

    The loop's own handlers are not there between two loops.
    """
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        task.cancel()

    async with stop_on_signals(stop, run.telemetry, run.config.checkpoint.grace_s) as stopping:
        try:
            await _restart(run, loss, restarts)
        except asyncio.CancelledError:
            if not stopping.received:
                raise
            task.uncancel()
            run.telemetry.event("stopped", step=run.first_step)
            return False
    return True


async def _restart(run: RestartableRun, loss: Loss, restarts: Restarts) -> None:
    fleet, reached = run.fleet, run.loop.step
    fleet.publisher.disconnect()
    end_all(fleet.trained)
    if run.saver is not None:
        await run.saver.close()
    checkpoint = await asyncio.to_thread(newest_checkpoint, run.config, run.folder)
    run.go_on_from(checkpoint, run.version.incarnation)
    num_superseded = run.telemetry.go_back(None if checkpoint is None else checkpoint.step)
    giving_up = asyncio.create_task(fleet.generator.abort(run.config.push.deadline_s))
    try:
        fleet.take_ranks(await fleet.ranks.relaunch(fleet.trained))
        for group in fleet.trained.values():
            await group.ready()
        await giving_up  # before the push: what is under way keeps its weights, and would meet others in it
    finally:
        giving_up.cancel()
    await run.restore()
    run.telemetry.event(
        "learner_restarted", role=loss.role, rank=loss.rank, step=run.first_step, reached=reached,
        version=str(run.version), checkpoint="none: from the beginning" if checkpoint is None else str(checkpoint.path),
        num_superseded=num_superseded, attempt=restarts.num_in_vain, recover_s=round(restarts.back(), 3),
    )  # fmt: skip
