"""vLLM's engine behind one face: what it is asked, what it answers, and its environment.

It has two forms: actors/vllm_in_process.py (the CPU default) and actors/vllm_beside.py (the GPU default).
May import: numpy, vllm (inside functions).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


def sampling_params(request: SampleRequest) -> Any:
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


def engine_prompt(request: SampleRequest) -> Any:
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=[int(t) for t in request.token_ids], cache_salt=request.salt)


def completion_of(output: Any, submitted_under: str, now: str) -> Completion:
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
