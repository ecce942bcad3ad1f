"""vLLM's ``AsyncLLM``, the engine in a process of its own, which overlaps scheduling with the device.

May import: vllm (inside the constructor and methods), cluster.errors, actors.vllm_engine.
"""

from __future__ import annotations

import time
from typing import Any

from actors.vllm_engine import Completion, Engine, Loaded, SampleRequest, completion_of, engine_prompt, sampling_params
from cluster.errors import WorkerDiedError


class BesideEngine(Engine):
    """``AsyncLLM``: the engine in its own process."""

    def __init__(self, engine_args: dict[str, Any], version: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
        self.version = version
        self._announced = self._updating = self._worked = False
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
            asked = engine_prompt(request), sampling_params(request), request.request_id
            async for output in self._engine.generate(*asked):
                final = output
        except EngineDeadError as error:
            raise WorkerDiedError(f"vLLM's engine has ended: {error}") from error
        finally:
            self._running.discard(request.request_id)
        if final is None:
            raise RuntimeError(f"vLLM ended request {request.request_id} without an output")
        self._worked = True
        return completion_of(final, submitted_under, self.version)

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
        # It answers nothing while it loads weights, nor while it compiles what its first samples need.
        if not self._updating and (self._worked or not self._running):
            try:
                await self._engine.is_sleeping()
            except EngineDeadError as error:  # between the two questions
                raise WorkerDiedError(f"vLLM's engine has ended: {error}") from error

    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return list(await self._engine.collective_rpc(method, args=args, kwargs=kwargs))

    def close(self) -> None:
        self._engine.shutdown()
