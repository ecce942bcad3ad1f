"""One plain class -> N Ray actors, or N objects in this process (the serial twin, for a debugger).

The only file that applies ``ray.remote``: a worker is written and tested as a plain class, with
plain or async methods, and runs unchanged in either form.  Every wait has a deadline, every failure
names its worker, and an exception raised by a worker arrives with the type it was raised with.

May import: ray and the modules of this room.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.errors import DeadlineError, WorkerError
from cluster.host import pin_to

if TYPE_CHECKING:
    from cluster.layout import WorkerSlot
    from cluster.placement import Placement

logger = logging.getLogger("burnish.cluster")


class WorkerGroup:
    """``name`` and the N workers behind it; launched at once, addressed by index."""

    def __init__(self, name: str, workers: Sequence[_RayWorker | _LocalWorker], start_deadline_s: float) -> None:
        self.name = name
        self._workers = tuple(workers)
        self._start_deadline_s = start_deadline_s

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
    ) -> WorkerGroup:
        """Start ``factory(**kwargs)`` once for each mapping, in its slot; does not wait for any of them.

        ``placement`` None keeps the workers in this process: they are constructed by ``ready``.
        ``concurrency`` is the number of calls a worker runs at a time; further calls queue.
        """
        if len(slots) != len(kwargs_per_worker):
            raise ValueError(f"{name}: {len(kwargs_per_worker)} workers but {len(slots)} slots")
        workers: list[_RayWorker | _LocalWorker] = []
        for index, (kwargs, slot) in enumerate(zip(kwargs_per_worker, slots, strict=True)):
            if placement is None:
                workers.append(_LocalWorker(factory, kwargs, concurrency))
            else:
                workers.append(_RayWorker(name, index, factory, kwargs, placement, slot, concurrency))
        return cls(name, workers, start_deadline_s)

    def __len__(self) -> int:
        return len(self._workers)

    async def ready(self) -> None:
        """Return when every constructor has returned; the first one that fails is raised at once."""
        await self._first_failure(
            self._bounded(index, "__init__", worker.construct(), self._start_deadline_s)
            for index, worker in enumerate(self._workers)
        )

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Result of one method of one worker.  DeadlineError, WorkerError, or what the method raised."""
        return await self._bounded(index, method, self._workers[index].call(method, args, kwargs), deadline_s)

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
            self.call(index, method, *own[index], *args, deadline_s=deadline_s, **kwargs) for index in range(len(self))
        )

    async def call_split(
        self, index: int, method: str, *args: Any, deadline_s: float, num_payloads: int = 1
    ) -> tuple[Any, ...]:
        """``(summary, payload, ...)`` of a method that returns such a tuple; only the summary travels here.

        A payload is a reference owned by this process, so it outlives a worker that merely exits, and
        ``cluster.transport.fetch`` turns it into the value.  In process it is the value itself.
        """
        parts: tuple[Any, ...] = await self._bounded(
            index, method, self._workers[index].call_split(method, args, num_payloads), deadline_s
        )
        return parts

    async def shutdown(self, deadline_s: float = 10.0) -> None:
        """Call ``close()`` of every worker that was constructed and has one, within the deadline; then end them all.

        A worker that is dead or does not answer is logged; what a ``close`` raised is raised after the end of all.
        """

        async def close(index: int) -> None:
            try:
                await self.call(index, "close", deadline_s=deadline_s)
            except (DeadlineError, WorkerError) as error:
                logger.warning("%s", error)

        closing = [
            close(index)
            for index, worker in enumerate(self._workers)
            if worker.constructed and hasattr(worker.factory, "close")
        ]
        try:
            outcomes = await asyncio.gather(*closing, return_exceptions=True)
        finally:
            for worker in self._workers:
                worker.end()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _bounded(self, index: int, method: str, call: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
        source = f"{self.name}[{index}]"
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
        except RayActorError as error:
            raise WorkerError(f"{source} died in or before {method}: {_one_line(error)}") from error
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


class _Worker:
    """What the two forms have in common; each adds ``construct``, ``call``, ``call_split`` and ``end``."""

    def __init__(self, factory: type) -> None:
        self.factory = factory
        self.constructed = False  # known to be; a worker that never came to be has nothing to close
        self.ended = False

    def refuse_after_end(self) -> None:
        """A killed actor may still answer for a moment: whether it does must not depend on who is faster."""
        if self.ended:
            raise WorkerError(f"{self.factory.__name__}: called after its group was shut down")


class _RayWorker(_Worker):
    """A Ray actor; never restarted by Ray, because its replacement needs a new state."""

    def __init__(
        self,
        group: str,
        index: int,
        factory: type,
        kwargs: Mapping[str, Any],
        placement: Placement,
        slot: WorkerSlot,
        concurrency: int,
    ) -> None:
        super().__init__(factory)
        # Ray shows what stands behind the last dot of a class's name.
        hosted: Any = ray.remote(_hosted(factory, f"burnish-{group.replace('.', '-')}-{index}"))
        options = {**placement.options(slot), "max_restarts": 0, "max_concurrency": concurrency}
        cpu_ids = slot.cpu_ids if slot.gpus == 0 else ()
        self._handle: Any = hosted.options(**options).remote(cpu_ids, dict(kwargs))

    async def construct(self) -> None:
        await self._handle.burnish_constructed.remote()
        self.constructed = True

    async def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.refuse_after_end()
        return await getattr(self._handle, method).remote(*args, **kwargs)

    async def call_split(self, method: str, args: tuple[Any, ...], num_payloads: int) -> tuple[Any, ...]:
        self.refuse_after_end()
        summary, *payloads = getattr(self._handle, method).options(num_returns=1 + num_payloads).remote(*args)
        return await summary, *payloads

    def end(self) -> None:
        self.ended = True
        ray.kill(self._handle, no_restart=True)


class _LocalWorker(_Worker):
    """An object of this process.  Its sync methods run in threads of its own, so the loop stays awake."""

    def __init__(self, factory: type, kwargs: Mapping[str, Any], concurrency: int) -> None:
        super().__init__(factory)
        self._kwargs = dict(kwargs)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix=factory.__name__)
        self._running = asyncio.Semaphore(concurrency)
        self._object: Any = None

    async def construct(self) -> None:
        # In the caller's thread: an engine may install signal handlers, which only the main thread can.
        self.refuse_after_end()
        if not self.constructed:
            self._object = self.factory(**self._kwargs)
            self.constructed = True

    async def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        await self.construct()
        bound = getattr(self._object, method)
        async with self._running:
            if inspect.iscoroutinefunction(bound):
                return await bound(*args, **kwargs)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: bound(*args, **kwargs))

    async def call_split(self, method: str, args: tuple[Any, ...], num_payloads: int) -> tuple[Any, ...]:
        summary, *payloads = await self.call(method, args, {})
        if len(payloads) != num_payloads:
            raise ValueError(f"{self.factory.__name__}.{method} gave {len(payloads)} payloads for {num_payloads}")
        return summary, *payloads

    def end(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._object, self.ended = None, True


class _Noted(contextlib.AbstractContextManager[None]):
    """Adds a note to whatever its block raises: the type stays, and the reader learns which worker it was."""

    def __init__(self, note: str) -> None:
        self._note = note

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        raised = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(raised, Exception):
            raised.add_note(self._note)


class _Kept(contextlib.AbstractContextManager[None]):
    """Keeps an exception of its block, to be raised somewhere else."""

    error: Exception | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _hosted(factory: Any, title: str) -> type:
    """``factory`` as an actor class: pinned to its cores first, named ``title`` in process lists and logs."""

    class Hosted(factory):  # type: ignore[misc]
        def __init__(self, cpu_ids: Sequence[int], kwargs: Mapping[str, Any]) -> None:
            if cpu_ids:
                pin_to(cpu_ids)
            # Ray reduces the exception of a constructor to text; kept, it reaches the caller with its type.
            self._burnish_start = _Kept()
            with self._burnish_start:
                super().__init__(**kwargs)

        def burnish_constructed(self) -> None:
            if self._burnish_start.error is not None:
                raise self._burnish_start.error

    Hosted.__name__ = Hosted.__qualname__ = title
    return Hosted


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."
