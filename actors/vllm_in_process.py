"""vLLM's engine in this process, stepped by a thread of ours.

Starts fastest, leaves both cores of a small machine to the arithmetic, and runs a weight update *between* two steps,
so that the version of every token is exact.
May import: vllm (inside the constructor), cluster.errors, actors.vllm_engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from actors.vllm_engine import Completion, Engine, Loaded, SampleRequest, completion_of, engine_prompt, sampling_params
from cluster.errors import WorkerDiedError

T = TypeVar("T")

_STEPS = threading.Lock()  # a forward pass keeps its context in a global of vLLM: one engine of a process at a time


class InProcessEngine(Engine):
    """``LLMEngine`` stepped by a thread."""

    def __init__(self, engine_args: dict[str, Any], version: str) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**engine_args))
        self._set_version(version)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[Completion], str]] = {}
        self._closed = False
        self._is_whole = True  # the weights are those of one version
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)
        self._thread.start()

    def _set_version(self, version: str) -> None:
        self.version = version
        if hasattr(self._engine, "set_weight_version"):
            self._engine.set_weight_version(version)

    # --- the stepping thread ------------------------------------------------------------------

    def _has_work(self) -> bool:
        return self._is_whole and self._engine.has_unfinished_requests()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._closed or self._has_work()):
                        self._wake.wait()
                    commands = list(self._commands)
                    self._commands.clear()
                    if self._closed:
                        return
                with _STEPS:
                    for command in commands:
                        command()
                    outputs = self._engine.step() if self._has_work() else []
                for output in outputs:
                    self._deliver(output)
        except BaseException as error:
            self._fail(error)
            raise

    def _deliver(self, output: Any) -> None:
        if not output.finished:
            return
        waiting = self._waiting.pop(output.request_id, None)
        if waiting is None:  # aborted meanwhile
            return
        loop, future, submitted_under = waiting
        completion = completion_of(output, submitted_under, self.version)
        loop.call_soon_threadsafe(_set_result, future, completion)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        with self._wake:
            waiting, self._waiting = list(self._waiting.values()), {}
            self._closed = True
        for loop, future, _ in waiting:
            loop.call_soon_threadsafe(_set_exception, future, WorkerDiedError(f"vLLM's engine failed: {error!r}"))

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the stepping thread, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def command() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - handed to the caller, whatever it is
                loop.call_soon_threadsafe(_set_exception, future, error)
            else:
                loop.call_soon_threadsafe(_set_result, future, result)

        with self._wake:
            if self._closed:
                raise WorkerDiedError(f"vLLM's engine has ended: {self._failure!r}")
            self._commands.append(command)
            self._wake.notify()
        return await future

    # --- Engine ---------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Completion:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()

        def add() -> None:
            self._waiting[request.request_id] = (loop, future, self.version)
            try:
                self._engine.add_request(request.request_id, engine_prompt(request), sampling_params(request))
            except ValueError as error:  # a prompt that vLLM refuses is this request's failure, not the engine's
                del self._waiting[request.request_id]
                loop.call_soon_threadsafe(_set_exception, future, error)

        with self._wake:
            if self._closed:
                raise WorkerDiedError(f"vLLM's engine has ended: {self._failure!r}")
            self._commands.append(add)
            self._wake.notify()
        return await future

    async def abort(self) -> None:
        def give_up() -> None:
            waiting, self._waiting = self._waiting, {}
            self._engine.abort_request(list(waiting))
            for loop, future, _ in waiting.values():
                loop.call_soon_threadsafe(_set_exception, future, RuntimeError("given up: nobody waits for it"))

        await self._between_steps(give_up)

    async def update_weights(self, info: dict[str, Any], version: str) -> Loaded:
        def load() -> Loaded:
            started = time.perf_counter()  # here, not before the wait for the step that is being made
            self._is_whole = False
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", kwargs={"update_info": info})
            self._engine.collective_rpc("finish_weight_update")
            self._set_version(version)
            fingerprints = self._engine.collective_rpc("burnish_fingerprints")
            self._is_whole = True
            return Loaded(fingerprints, time.perf_counter() - started)

        return await self._between_steps(load)

    async def check(self) -> None:
        # Not between two steps: a push may hold the stepping thread for longer than anyone waits for a heartbeat.
        if self._closed:
            raise WorkerDiedError(f"vLLM's engine has ended: {self._failure!r}")

    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._between_steps(lambda: self._engine.collective_rpc(method, args=args, kwargs=kwargs))

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=10.0)


def _set_result(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
