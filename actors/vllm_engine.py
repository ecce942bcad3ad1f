"""vLLM's engine behind one face, in two forms.

``InProcessEngine``: the engine lives in this process and a thread of ours steps it.  Starts fastest,
leaves both cores of a small machine to the arithmetic, and runs a weight update *between* two steps,
so that the version of every token is exact.  The CPU default.

``BesideEngine``: vLLM's ``AsyncLLM`` with the engine in a process of its own, which overlaps
scheduling with the device.  The GPU default.

May import: vllm (inside constructors and methods), cluster.errors.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cluster.errors import WorkerDiedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample, as vLLM reports it."""

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    finish_reason: str
    spans: tuple[tuple[str, int], ...]  # (weight version, tokens), lengths sum to T


@dataclass(frozen=True, slots=True)
class Loaded:
    """New weights in every vLLM worker."""

    fingerprints: list[dict[str, tuple[int, int]]]  # of each worker, taken after the load: see vllm_worker
    pause_s: float  # the engine stood still, for the load and its fingerprints


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to sample.  ``salt`` keeps prefix caches of different weights apart."""

    request_id: str
    token_ids: Sequence[int]
    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...]
    salt: str


def set_environment(device: str, kv_cache_gib: float, in_process: bool, threads: int | None) -> None:
    """vLLM reads its environment when it is imported, so this comes before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        # vLLM wants whole GiB.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(kv_cache_gib))))
        # Workers are pinned by the placement already; vLLM must not pin them again, all to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if threads is not None:
            os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


def _sampling_params(request: SampleRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0,  # the sampled token's own
        stop=list(request.stop) or None,
        detokenize=bool(request.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _prompt(request: SampleRequest) -> Any:
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=[int(t) for t in request.token_ids], cache_salt=request.salt)


def _completion(output: Any, submitted_under: str, now: str) -> Completion:
    """Read vLLM's final output; versions that do not report spans are exact while no push intervened."""
    sample = output.outputs[0]
    ids = np.asarray(sample.token_ids, dtype=np.int32)
    logprobs = np.array([row[int(t)].logprob for row, t in zip(sample.logprobs, ids, strict=True)], dtype=np.float32)
    reported = getattr(sample, "weight_versions", None)
    if reported:
        spans = tuple((str(s.version), int(s.end) - int(s.start)) for s in reported)
    elif submitted_under == now:
        spans = ((now, int(ids.size)),)
    else:
        raise RuntimeError("this vLLM does not report weight versions, and weights changed while it sampled")
    return Completion(ids, logprobs, sample.finish_reason or "abort", spans)


class Engine(ABC):
    """What the generator needs of an engine."""

    version: str

    @abstractmethod
    async def sample(self, request: SampleRequest) -> Completion: ...

    @abstractmethod
    async def abort(self) -> None:
        """Give up every sample that is under way; who still waits for one gets an error or what there is of it."""

    @abstractmethod
    async def update_weights(self, info: dict[str, Any], version: str) -> Loaded:
        """Keep running samples and their KV cache, load the weights, go on under ``version``.

        When that fails nothing is sampled until another update succeeds: half a version may be in memory.
        """

    @abstractmethod
    async def check(self) -> None:
        """Return when the engine answers.  WorkerDiedError when it has ended."""

    @abstractmethod
    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of every vLLM worker."""

    @abstractmethod
    def close(self) -> None: ...


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
                for command in commands:
                    command()
                if self._has_work():
                    for output in self._engine.step():
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
        completion = _completion(output, submitted_under, self.version)
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
                self._engine.add_request(request.request_id, _prompt(request), _sampling_params(request))
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


class BesideEngine(Engine):
    """``AsyncLLM``: the engine in its own process."""

    def __init__(self, engine_args: dict[str, Any], version: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
        self.version = version
        self._announced = self._updating = False
        self._running: set[str] = set()  # request ids

    async def _announce(self) -> None:
        if not self._announced and hasattr(self._engine, "update_weight_version"):
            await self._engine.update_weight_version(self.version)
        self._announced = True

    async def sample(self, request: SampleRequest) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        await self._announce()
        submitted_under = self.version
        final = None
        self._running.add(request.request_id)
        try:
            async for output in self._engine.generate(_prompt(request), _sampling_params(request), request.request_id):
                final = output
        except EngineDeadError as error:
            raise WorkerDiedError(f"vLLM's engine has ended: {error}") from error
        finally:
            self._running.discard(request.request_id)
        if final is None:
            raise RuntimeError(f"vLLM ended request {request.request_id} without an output")
        return _completion(final, submitted_under, self.version)

    async def abort(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.abort(list(self._running))
        except EngineDeadError as error:
            raise WorkerDiedError(f"vLLM's engine has ended: {error}") from error

    async def update_weights(self, info: dict[str, Any], version: str) -> Loaded:
        started = time.perf_counter()
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        self._updating = True
        try:
            await self.rpc("start_weight_update")
            await self.rpc("update_weights", update_info=info)
            await self.rpc("finish_weight_update")
            if hasattr(self._engine, "update_weight_version"):
                await self._engine.update_weight_version(version)
            self.version, self._announced = version, True
            fingerprints = await self.rpc("burnish_fingerprints")
        finally:
            self._updating = False
        await self._engine.resume_generation()  # and not after a failure
        return Loaded(fingerprints, time.perf_counter() - started)

    async def check(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._engine.errored:
            raise WorkerDiedError(f"vLLM's engine has ended: {self._engine.dead_error}")
        if not self._updating:  # it answers nothing while it loads weights
            try:
                await self._engine.is_sleeping()
            except EngineDeadError as error:  # between the two questions
                raise WorkerDiedError(f"vLLM's engine has ended: {error}") from error

    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return list(await self._engine.collective_rpc(method, args=args, kwargs=kwargs))

    def close(self) -> None:
        self._engine.shutdown()


def _set_result(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
