"""Checkpointer: saves a run without stopping it.

    save(10)  ranks copy their state to the host ......... all that training waits for
                 `-- ranks write, each in a thread; asked now and then whether they are done
                        `-- manifest, one rename ......... event ``checkpoint``
                        `-- the disk refused ............. event ``checkpoint_failed``; the older ones stay
    save(20)  while 10 is still being written: waits, event ``checkpoint_waits``; after a deadline it is left out

One save is in flight at most.  What a killed run left half written is removed when the next one starts.
May import: actors.state_saving, cluster.{checkpoints, errors}, trainers.protocols.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from actors.state_saving import SaveBegun, SaveOutcome
from cluster.checkpoints import CheckpointStore, FileEntry
from cluster.errors import DamagedError, DeadlineError
from trainers.protocols import Recorder

POLL_S = 0.1  # between two questions to a rank that is writing; it answers between its other calls
CLOSE_S = 10.0  # for a save in flight when the run has failed already


class SavingRanks(Protocol):
    """All ranks of one trained model (actors.fleet.Gang)."""

    @property
    def workers(self) -> Sized: ...

    async def begin_save(self, directory: str) -> Sequence[SaveBegun]: ...

    async def save_outcome(self, rank: int) -> SaveOutcome | None: ...


@dataclass
class _Flight:
    """A save that training no longer waits for."""

    step: int
    started: float
    stop_s: float
    num_bytes: int
    writing: set[tuple[str, int]]  # (role, rank) of those that have not ended
    unwanted: bool = False
    task: asyncio.Task[None] = field(init=False)

    @property
    def writers(self) -> str:
        return ", ".join(f"{role}[{rank}]" for role, rank in sorted(self.writing)) or "the manifest's writer"


class Checkpointer:
    """``roles``: each role's folder in a checkpoint and its ranks.  ``wait_s``: for the save before, at most."""

    def __init__(
        self, store: CheckpointStore, roles: Mapping[str, SavingRanks], recorder: Recorder, wait_s: float,
        saved_step: int = -1,
    ) -> None:  # fmt: skip
        self._store, self._roles, self._recorder, self._wait_s = store, dict(roles), recorder, wait_s
        self.saved_step = saved_step  # of the newest checkpoint that was committed
        self._flight: _Flight | None = None
        self._metrics: dict[str, float] = {}
        if left := store.remove_leftovers():
            recorder.event("checkpoint_leftovers", removed=left)

    async def save(
        self, step: int, metadata: Mapping[str, Any], *, files: Mapping[str, bytes] | None = None,
        score: float | None = None,
    ) -> bool:  # fmt: skip
        """Begin to save; training may go on when this returns.  False when there is nothing to wait for.

        Args:
            metadata: JSON values, as they are at this step.
            files: what else belongs to the checkpoint, by path in it.
            score: what retention compares; None where it was not measured at this step.
        """
        started = time.perf_counter()
        frozen = json.loads(json.dumps(dict(metadata)))  # the state goes on changing, nested lists included
        if not await self._earlier_is_over(step):
            return False
        try:
            directory = await asyncio.to_thread(self._open, step, files or {})
            begun = await asyncio.gather(*(r.begin_save(str(directory / role)) for role, r in self._roles.items()))
        except DeadlineError:  # a rank that does not answer is no full disk, though it too is an OSError
            raise
        except OSError as error:
            await self._give_up(step, str(error))
            return False
        ranks = {(role, rank) for role, r in self._roles.items() for rank in range(len(r.workers))}
        size = sum(b.num_bytes for role in begun for b in role)
        flight = _Flight(step, started, time.perf_counter() - started, size, ranks)
        flight.task = asyncio.create_task(self._complete(flight, frozen, score))
        self._flight = flight
        self._metrics["time/checkpoint_stop_s"] = flight.stop_s
        return True

    async def settle(self) -> None:
        """Return when nothing is in flight, or after ``wait_s``, which is recorded as a failure of that save."""
        flight = self._flight
        if flight is not None and not await self._over(flight):
            self._failed(flight.step, f"{flight.writers} did not end writing it within {self._wait_s:g} s")

    def abandon(self) -> None:
        """What is in flight must not become the newest checkpoint: the run goes back to an earlier one."""
        if self._flight is not None:
            self._flight.unwanted = True

    async def close(self) -> None:
        """Give a save in flight a last chance, and stop asking about it.  What went wrong with it is not raised."""
        flight, self._flight = self._flight, None
        if flight is not None:
            task = asyncio.current_task()
            hurried = task is not None and task.cancelling() > 0  # a second Ctrl-C
            await asyncio.wait([flight.task], timeout=0 if hurried else CLOSE_S)
            flight.task.cancel()
            await asyncio.gather(flight.task, return_exceptions=True)

    def metrics(self) -> dict[str, float]:
        """Of the saves since this was last asked; each value once."""
        found, self._metrics = self._metrics, {}
        return found

    # --- in flight ----------------------------------------------------------------------------

    async def _earlier_is_over(self, step: int) -> bool:
        flight = self._flight
        if flight is None:
            return True
        if not flight.task.done():
            self._recorder.event("checkpoint_waits", step=step, behind=flight.step, on=flight.writers)
        if await self._over(flight):
            return True
        reason = f"{flight.writers} did not end writing that of step {flight.step} within {self._wait_s:g} s"
        self._failed(step, reason)
        return False

    async def _over(self, flight: _Flight) -> bool:
        """Whether it ended within the deadline; raises what went wrong, except a disk's refusal."""
        done, _ = await asyncio.wait([flight.task], timeout=self._wait_s)
        if not done:
            return False
        self._flight = None
        flight.task.result()
        return True

    async def _complete(self, flight: _Flight, metadata: Mapping[str, Any], score: float | None) -> None:
        try:
            described = await self._written(flight)
            if flight.unwanted:
                await asyncio.to_thread(self._store.abandon, flight.step)
                return
            await asyncio.to_thread(self._store.commit, flight.step, metadata, described, score)
        except DeadlineError:
            raise
        except (OSError, DamagedError) as error:
            await self._give_up(flight.step, str(error))
            return
        if flight.unwanted:  # too late to stop; without its event, the run's way back still leads past it
            return
        took = time.perf_counter() - flight.started
        self.saved_step = flight.step
        self._metrics |= {"time/checkpoint_s": took, "checkpoint/num_bytes": float(flight.num_bytes)}
        self._recorder.event(
            "checkpoint", step=flight.step, seconds=round(took, 3), stop_s=round(flight.stop_s, 3),
            num_bytes=flight.num_bytes, score=score,
        )  # fmt: skip

    async def _written(self, flight: _Flight) -> dict[str, FileEntry]:
        """What every rank wrote, by path in the checkpoint; returns when none of them writes any more."""
        described: dict[str, FileEntry] = {}
        refusals: list[str] = []
        while True:
            asked = sorted(flight.writing)
            answers = await asyncio.gather(*(self._roles[role].save_outcome(rank) for role, rank in asked))
            for (role, rank), answer in zip(asked, answers, strict=True):
                if answer is None:
                    continue
                flight.writing.discard((role, rank))
                described |= {f"{role}/{name}": entry for name, entry in answer.files.items()}
                if answer.error is not None:
                    refusals.append(f"{role}[{rank}]: {answer.error}")
            if not flight.writing:
                break
            await asyncio.sleep(POLL_S)
        if refusals:
            raise OSError("; ".join(refusals))
        return described

    def _open(self, step: int, files: Mapping[str, bytes]) -> Path:
        directory = self._store.begin(step)
        for name, data in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return directory

    async def _give_up(self, step: int, reason: str) -> None:
        """A full disk costs this checkpoint, not the run: the last one is still there."""
        await asyncio.to_thread(self._store.abandon, step)
        self._failed(step, reason)

    def _failed(self, step: int, reason: str) -> None:
        kept = self._store.steps()
        self._recorder.event(
            "checkpoint_failed", step=step, reason=reason,
            intact=f"step {kept[-1]}" if kept else "none", remedy="free space; the run goes on and saves again later",
        )  # fmt: skip
