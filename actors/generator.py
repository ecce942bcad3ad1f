"""VLLMGenerator: prompts in, groups of trajectories out, stamped with the weights that made them.

An asyncio actor around one vLLM engine; many groups run at once (continuous batching).
May import: numpy, actors.*, trainers.{experience, protocols}, cluster.weight_channel.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from actors.fingerprints import compare, served_manifest
from actors.modeling import load_tokenizer
from actors.settings import GeneratorSettings
from actors.vllm_beside import BesideEngine
from actors.vllm_engine import Completion, Engine, SampleRequest, set_environment
from actors.vllm_in_process import InProcessEngine
from cluster.weight_channel import WeightManifest
from trainers.experience import (
    GroupSummary,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.protocols import GroupRequest

PREFILL_TOKENS = 4096  # scheduled in one engine step on CPU
BLOCK_TOKENS = 32  # of the KV cache on CPU: the smallest its attention kernel takes


class VLLMGenerator:
    """One engine.  ``name`` is how reports and errors call it."""

    def __init__(
        self,
        name: str,
        model_path: str,
        settings: GeneratorSettings,
        dtype: str,
        device: str,
        max_length: int,
        seed: int,
        version: tuple[int, int] = (0, 0),
    ) -> None:
        self.name, self.settings = name, settings
        in_process = settings.engine == "in_process" or (settings.engine == "auto" and device == "cpu")
        threads = os.environ.get("OMP_NUM_THREADS")
        set_environment(device, settings.kv_cache_gib, in_process, int(threads) if threads else None)
        from actors import vllm_worker

        vllm_worker.register()
        compiled = settings.compile if settings.compile is not None else device == "cuda"
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": dtype,
            "seed": seed,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "max_model_len": max_length,
            "max_num_seqs": settings.max_num_seqs,
            "enforce_eager": not compiled,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # after temperature: the distribution that was sampled
            "worker_extension_cls": vllm_worker.WORKER_EXTENSION,
            "weight_transfer_config": {"backend": vllm_worker.BACKEND},
            "disable_log_stats": True,
        }
        if device == "cpu":
            # A prompt is prefilled whole: vLLM rewinds a sample's random stream after a partial prefill, and a
            # CPU generator cannot be rewound.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(max_length, PREFILL_TOKENS)
            # vLLM's own choice of 128 is longer than many prompts, and only whole blocks are shared: the samples
            # of a group would each prefill their prompt again.
            arguments["block_size"] = BLOCK_TOKENS
        if device == "cuda":
            arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
            if settings.tensor_parallel_size > 1:
                # In an actor of a placement group vLLM would take its Ray executor, and that a bundle for each GPU.
                arguments["distributed_executor_backend"] = "mp"
        arguments.update(settings.engine_args)
        self._tokenizer, self._model_path = load_tokenizer(model_path), model_path
        kind: type[Engine] = InProcessEngine if in_process else BesideEngine
        self._engine: Engine = kind(arguments, str(WeightVersion(*version)))  # type: ignore[call-arg]
        self._fused: dict[str, list[str]] | None = None
        self._numbers = itertools.count()  # of the groups that were asked for

    async def generate(self, request: GroupRequest) -> tuple[GroupSummary, pa.Buffer]:
        """Sample one group.  Returns (what the controller may know, the group as Arrow)."""
        # A group that comes back to an engine that still runs its first try must not be taken for that one.
        started, number = time.perf_counter(), next(self._numbers)
        prompt_ids = request.prompt.token_ids.tolist()
        completions = await asyncio.gather(
            *(
                self._engine.sample(
                    SampleRequest(
                        request_id=f"{request.group_id}/{i}/{number}",
                        token_ids=prompt_ids,
                        temperature=0.0 if request.greedy else request.temperature,
                        max_tokens=request.max_tokens,
                        seed=request.seeds[i],
                        stop=self.settings.sampling.stop,
                        salt=self._engine.version,
                    )
                )
                for i in range(request.num_samples)
            )
        )
        group = TrajectoryGroup(
            request.group_id,
            request.prompt,
            tuple(self._trajectory(i, request.seeds[i], c) for i, c in enumerate(completions)),
        )
        return summarize(group, self.name, time.perf_counter() - started), encode_group(group)

    def _trajectory(self, index: int, seed: int, completion: Completion) -> Trajectory:
        return Trajectory(
            sample_index=index,
            seed=seed,
            completion_ids=completion.token_ids,
            behavior_logprobs=completion.logprobs,
            text=self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True),
            finish_reason=completion.finish_reason if completion.finish_reason in ("stop", "length") else "abort",  # type: ignore[arg-type]
            version_spans=tuple(VersionSpan(_parse(v), n) for v, n in completion.spans),
        )

    async def abort(self) -> None:
        """Give up every group that is being sampled: whoever asked for them has gone back."""
        await self._engine.abort()

    # --- weights ----------------------------------------------------------------------------------

    async def init_transfer(self, info: dict[str, Any]) -> None:
        """Meet the learner rank that serves this engine (process-group transports)."""
        await self._engine.rpc("init_weight_transfer_engine", init_info=info)

    async def load_weights(self, info: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
        """Take version ``manifest["version"]`` in, prove it, go on sampling.

        Raises:
            DamagedError: what lies in memory now is not what the learner sent.
        """
        sent = WeightManifest.from_dict(manifest)
        more = {} if sent.low_rank is None else {"low_rank": manifest["low_rank"], "base": self._model_path}
        loaded = await self._engine.update_weights({**info, **more, "version": sent.version}, sent.version)
        if sent.low_rank is not None:
            sent = served_manifest(sent, await self._engine.rpc("burnish_served"), self.name)
        if self._fused is None:
            self._fused = (await self._engine.rpc("burnish_fused_names"))[0]
        verified = compare(sent, loaded.fingerprints, self._fused or {}, self.name)
        return {
            "pause_s": loaded.pause_s,
            "num_after_load": verified.num_after_load,
            "num_at_arrival": verified.num_at_arrival,
        }

    async def ping(self) -> str:
        """The version that is served.  WorkerDiedError when the engine has ended; no answer when it hangs."""
        await self._engine.check()
        return self._engine.version

    async def weight_version(self) -> str:
        return self._engine.version

    async def probe(self, prompt_ids: Sequence[int], max_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(completion ids int32 [T], behavior log-probs float32 [T]) of one sample, for the start-up probe."""
        completion = await self._engine.sample(
            SampleRequest(
                f"probe-{seed}", list(prompt_ids), self.settings.sampling.temperature, max_tokens, seed, (), "probe"
            )
        )  # fmt: skip
        return completion.token_ids, completion.logprobs

    def close(self) -> None:
        self._engine.close()


def _parse(version: str) -> WeightVersion:
    incarnation, step = version.split(".")
    return WeightVersion(int(incarnation), int(step))
