"""One plain class -> N Ray actors, or N objects in this process (the serial twin, for a debugger).

The two forms are in ``cluster/workers.py``.  Every wait has a deadline, every failure names its worker, and an
exception raised by a worker arrives with the type it was raised with.

May import: ray and the modules of this room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayActorError, RayError, RayTaskError

from cluster.errors import DeadlineError, WorkerDiedError, WorkerError
from cluster.workers import LocalWorker, RayWorker

if TYPE_CHECKING:
    from cluster.layout import WorkerSlot
    from cluster.placement import Placement

logger = logging.getLogger("burnish.cluster")


class WorkerGroup:
    """``name`` and the workers behind it, addressed by index.

    A gang keeps those it was launched with.  Of a role whose workers stand alone some may end, start again or be
    added later; an added one has an index that was never used before.
    """

    def __init__(
        self, name: str, factory: type, placement: Placement | None, concurrency: int, start_deadline_s: float
    ) -> None:
        self.name, self.start_deadline_s = name, start_deadline_s
        self._factory, self._placement, self._concurrency = factory, placement, concurrency
        self._workers: dict[int, RayWorker | LocalWorker] = {}
        self._places: list[tuple[Mapping[str, Any], WorkerSlot]] = []  # by index, of those that ended too
        self._closed = False

    @classmethod
    def launch(
        cls,
        name: str,
        factory: type,
        kwargs_per_worker: Sequence[Mapping[str, Any]],
        *,
        placement: Placement | None,
        slots: Sequence[WorkerSlot],
        concurrency: int = 1,
        start_deadline_s: float,
    ) -> Self:
        """Start ``factory(**kwargs)`` once for each mapping, in its slot; does not wait for any of them.

        ``placement`` None keeps the workers in this process: they are constructed by ``ready``.
        ``concurrency`` is the number of calls a worker runs at a time; further calls queue.
        """
        if len(slots) != len(kwargs_per_worker):
            raise ValueError(f"{name}: {len(kwargs_per_worker)} workers but {len(slots)} slots")
        group = cls(name, factory, placement, concurrency, start_deadline_s)
        for kwargs, slot in zip(kwargs_per_worker, slots, strict=True):
            group.add(kwargs, slot)
        return group

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def indices(self) -> tuple[int, ...]:
        """Of the workers that are there, ascending."""
        return tuple(sorted(self._workers))

    @property
    def next_index(self) -> int:
        """What the next added worker will be called by."""
        return len(self._places)

    @property
    def placement(self) -> Placement | None:
        """What holds the slots; None in this process."""
        return self._placement

    @property
    def in_process(self) -> bool:
        """Whether the workers are objects of this process, which neither die alone nor can be ended."""
        return self._placement is None

    def source(self, index: int) -> str:
        """How errors call a worker."""
        return f"{self.name}[{index}]"

    def slot(self, index: int) -> WorkerSlot:
        """The place of a worker, or that of one that has ended."""
        return self._places[index][1]

    # --- membership -------------------------------------------------------------------------------

    def add(self, kwargs: Mapping[str, Any], slot: WorkerSlot) -> int:
        """Start one more worker; does not wait for it.  Its index."""
        index = len(self._places)
        self._places.append((kwargs, slot))
        self._start(index)
        return index

    def end(self, index: int) -> None:
        """End one worker at once, whatever it is doing; nothing when it has gone already."""
        worker = self._workers.pop(index, None)
        if worker is not None:
            worker.end()

    async def retire(self, index: int, deadline_s: float = 10.0) -> None:
        """``close()`` one worker within the deadline, then end it."""
        try:
            await self._close(index, deadline_s)
        finally:
            self.end(index)

    async def restart(self, index: int, slot: WorkerSlot) -> None:
        """End a worker that is lost and construct it again with the same arguments, in ``slot``."""
        self.end(index)
        self._places[index] = self._places[index][0], slot
        self._start(index)
        await self.ready_at(index)

    def is_lost(self, index: int, error: BaseException) -> bool:
        """Whether ``error``, of a call to this worker, says that it died or did not answer: not that it refused."""
        silent = isinstance(error, DeadlineError) and error.source == self.source(index)
        return isinstance(error, WorkerDiedError) or (silent and not self.in_process)

    def _start(self, index: int) -> None:
        if self._closed:  # whoever missed a worker that its group ended; an actor now would outlive the run
            raise WorkerError(f"{self.name} was shut down: nobody starts in it any more")
        kwargs, slot = self._places[index]
        if self._placement is None:
            self._workers[index] = LocalWorker(self._factory, kwargs, self._concurrency)
        else:
            self._workers[index] = RayWorker(
                self.name, index, self._factory, kwargs, self._placement, slot, self._concurrency
            )

    def _worker(self, index: int) -> RayWorker | LocalWorker:
        if index not in self._workers:
            raise WorkerDiedError(f"{self.source(index)} has ended")
        return self._workers[index]

    # --- calls ------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Return when every constructor has returned; the first one that fails is raised at once."""
        await self._first_failure(self.ready_at(index) for index in self.indices)

    async def ready_at(self, index: int) -> None:
        """Return when one worker is constructed."""
        await self._bounded(index, "__init__", self._worker(index).construct(), self.start_deadline_s)

    async def ping(self, index: int, deadline_s: float) -> None:
        """Whether a worker answers: by its own ``ping`` method where it has one.  Errors as of ``call``."""
        worker = self._worker(index)
        own = hasattr(worker.factory, "ping")
        question = worker.call("ping", (), {}) if own else worker.construct()
        await self._bounded(index, "ping", question, deadline_s)

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Result of one method of one worker.  DeadlineError, WorkerError, or what the method raised."""
        return await self._bounded(index, method, self._worker(index).call(method, args, kwargs), deadline_s)

    async def call_all(
        self,
        method: str,
        *args: Any,
        deadline_s: float,
        per_worker: Sequence[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Results of one method of every worker, in index order; worker i gets ``*per_worker[i], *args``.

        The first failure is raised at once: the peers of a rank that died inside a collective never return.
        """
        own: Sequence[tuple[Any, ...]] = per_worker if per_worker is not None else [()] * len(self)
        if len(own) != len(self):
            raise ValueError(f"{self.name}.{method}: {len(own)} argument tuples for {len(self)} workers")
        return await self._first_failure(
            self.call(index, method, *first, *args, deadline_s=deadline_s, **kwargs)
            for index, first in zip(self.indices, own, strict=True)
        )

    async def call_split(
        self, index: int, method: str, *args: Any, deadline_s: float, num_payloads: int = 1
    ) -> tuple[Any, ...]:
        """``(summary, payload, ...)`` of a method that returns such a tuple; only the summary travels here.

        A payload is a reference owned by this process, so it outlives a worker that merely exits, and
        ``cluster.transport.fetch`` turns it into the value.  In process it is the value itself.
        """
        parts: tuple[Any, ...] = await self._bounded(
            index, method, self._worker(index).call_split(method, args, num_payloads), deadline_s
        )
        return parts

    async def shutdown(self, deadline_s: float = 10.0) -> None:
        """Call ``close()`` of every worker that was constructed and has one, within the deadline; then end them all.

        A worker that is dead or does not answer is logged; what a ``close`` raised is raised after the end of all.
        None can be added or started again from then on.
        """
        self._closed = True
        try:
            closing = (self._close(index, deadline_s) for index in self.indices)
            outcomes = await asyncio.gather(*closing, return_exceptions=True)
        finally:
            for index in self.indices:
                self.end(index)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _close(self, index: int, deadline_s: float) -> None:
        worker = self._worker(index)
        if worker.constructed and hasattr(worker.factory, "close"):
            try:
                await self.call(index, "close", deadline_s=deadline_s)
            except (DeadlineError, WorkerError) as error:
                logger.warning("%s", error)

    async def _bounded(self, index: int, method: str, call: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
        source = self.source(index)
        limit = asyncio.timeout(deadline_s)
        try:
            async with limit:
                with _Noted(f"raised by {source}.{method}"):
                    return await call
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, BaseException):
                raise WorkerError(f"{source}.{method} raised: {_one_line(error)}") from error
            raise cause from error
        except (RayActorError, NodeDiedError, ActorUnschedulableError) as error:
            raise WorkerDiedError(f"{source} died in or before {method}: {_one_line(error)}") from error
        except RayError as error:
            raise WorkerError(f"{source}.{method} was lost: {_one_line(error)}") from error
        except TimeoutError:
            # A worker may itself raise a TimeoutError (a DeadlineError is one): that one keeps its type.
            if limit.expired():
                raise DeadlineError(method, source, deadline_s) from None
            raise

    @staticmethod
    async def _first_failure(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            if tasks:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()  # raises the failure, the lowest index first
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Noted(contextlib.AbstractContextManager[None]):
    """Adds a note to whatever its block raises: the type stays, and the reader learns which worker it was."""

    def __init__(self, note: str) -> None:
        self._note = note

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        raised = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(raised, Exception):
            raised.add_note(self._note)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."
