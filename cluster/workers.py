"""The two forms of a worker: a Ray actor, or an object of this process (the serial twin, for a debugger).

The only file that applies ``ray.remote``: a worker is written and tested as a plain class, with plain or async
methods, and runs unchanged in either form.
May import: ray and the modules of this room.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray

from cluster.errors import WorkerError
from cluster.host import pin_to

if TYPE_CHECKING:
    from cluster.layout import WorkerSlot
    from cluster.placement import Placement


class _Worker:
    """What the two forms have in common; each adds ``construct``, ``call``, ``call_split`` and ``end``."""

    def __init__(self, factory: type) -> None:
        self.factory = factory
        self.constructed = False  # known to be; a worker that never came to be has nothing to close
        self.ended = False

    def refuse_after_end(self) -> None:
        """A killed actor may still answer for a moment: whether it does must not depend on who is faster."""
        if self.ended:
            raise WorkerError(f"{self.factory.__name__}: called after it was ended")


class RayWorker(_Worker):
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


class LocalWorker(_Worker):
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
