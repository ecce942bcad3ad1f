"""One weight push: our verified file push and the plain loop one would write instead, on the same medium.

    ours    float32 parameters -> WeightFileWriter -> read_weight_file in vLLM's worker -> fingerprints after load
    plain   cast -> safetensors save_file -> load_file -> checksum, on both ends -> model.load_weights

May import: torch, safetensors, vllm (inside functions), actors.*, benchmarks.*, cluster.*.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.job import Job, job_parser
from benchmarks.plain import load_into_vllm
from benchmarks.process import median, run, write_output

SIDES = ("ours", "plain", "memcpy")
SHARED_MEMORY = Path("/dev/shm")
MEMCPY_BYTES = 512 * 2**20
CHECKSUM_SAMPLE_BYTES = 64 * 2**20
DEADLINE_S = 300.0
CHECKSUMS: dict[str, Callable[[Any], bytes]] = {
    "zlib.crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "hashlib.blake2b": lambda data: hashlib.blake2b(data).digest(),
}


class Parameters:
    """The part of ``actors.engine.TrainingEngine`` that a WeightSource needs, over a plain model."""

    rank, zero_stage, device = 0, 0, torch.device("cpu")

    def __init__(self, model_path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, local_files_only=True)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.named_parameters())

    def shape_of(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        return nullcontext()


def scratch_folder() -> Path:
    """A folder in shared memory where there is one: the medium of both sides."""
    return Path(tempfile.mkdtemp(prefix="burnish-bench-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))


def measure_ours(job: Job, repeats: int) -> dict[str, Any]:
    """Publisher's file path: publish_file on the learner, load_weights on the generator."""
    from actors.engine import TrainingEngine
    from actors.generator import VLLMGenerator
    from actors.publishing import WeightSource
    from actors.settings import GeneratorSettings
    from cluster.weight_channel import WeightManifest
    from launch.model_facts import check_model_folder

    source = WeightSource(cast(TrainingEngine, Parameters(job.model_path)))
    settings = GeneratorSettings.model_validate({"max_num_seqs": 64, "kv_cache_gib": job.kv_cache_gib})
    max_length = check_model_folder(job.model_path).max_length
    generator = VLLMGenerator("generator-0", job.model_path, settings, job.dtype, job.device, max_length, job.seed)
    folder = scratch_folder()

    async def push(step: int) -> tuple[float, float, int, dict[str, Any]]:
        path = folder / f"weights-0.{step}.safetensors"
        started = time.perf_counter()
        manifest = source.publish_file(str(path), f"0.{step}", job.dtype)
        assert manifest is not None
        written = time.perf_counter()
        loaded = await generator.load_weights({"transport": "file", "path": str(path)}, manifest)
        ended = time.perf_counter()
        path.unlink()
        return written - started, ended - written, WeightManifest.from_dict(manifest).num_bytes, loaded

    async def go() -> dict[str, Any]:
        await push(0)
        rounds = [await push(i + 1) for i in range(repeats)]
        return {
            "seconds": [w + r for w, r, _, _ in rounds],
            "write_s": [w for w, _, _, _ in rounds],
            "load_s": [r for _, r, _, _ in rounds],
            "num_bytes": rounds[-1][2],
            "num_verified_after_load": rounds[-1][3]["num_after_load"],
            "num_verified_at_arrival": rounds[-1][3]["num_at_arrival"],
        }

    try:
        return asyncio.run(go())
    finally:
        generator.close()
        shutil.rmtree(folder, ignore_errors=True)


def measure_plain(job: Job, repeats: int) -> dict[str, Any]:
    """The plain loop.  Its checksum is whichever of the two usual ones is faster here."""
    from safetensors.torch import load_file, save_file

    from actors.vllm_engine import set_environment
    from launch.model_facts import check_model_folder

    threads = os.environ.get("OMP_NUM_THREADS")
    set_environment(job.device, job.kv_cache_gib, job.device == "cpu", int(threads) if threads else None)
    from vllm import LLM

    llm = LLM(
        model=job.model_path, dtype=job.dtype, seed=job.seed, max_num_seqs=64, enforce_eager=True,
        max_model_len=check_model_folder(job.model_path).max_length, disable_log_stats=True,
    )  # fmt: skip
    parameters, dtype = Parameters(job.model_path).named_parameters(), getattr(torch, job.dtype)
    checksum, folder = fastest_checksum(), scratch_folder()
    path = folder / "weights.safetensors"

    def push() -> np.ndarray:
        marks = [time.perf_counter()]
        state = {name: p.detach().to(dtype).contiguous() for name, p in parameters}
        sent = [CHECKSUMS[checksum](as_bytes(t)) for t in state.values()]
        marks.append(time.perf_counter())
        save_file(state, path)
        marks.append(time.perf_counter())
        received = load_file(path)
        marks.append(time.perf_counter())
        if [CHECKSUMS[checksum](as_bytes(received[name])) for name in state] != sent:
            raise RuntimeError("the file was damaged")
        marks.append(time.perf_counter())
        load_into_vllm(llm, list(received.items()))
        marks.append(time.perf_counter())
        path.unlink()
        return np.diff(marks)

    try:
        push()
        rounds = [push() for _ in range(repeats)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stages = np.median(rounds, axis=0)
    names = ("cast_and_checksum_s", "write_s", "read_s", "checksum_s", "load_s")
    return {
        "seconds": [float(r.sum()) for r in rounds],
        "num_bytes": sum(p.numel() for _, p in parameters) * dtype.itemsize,
        "checksum": checksum,
    } | dict(zip(names, map(float, stages), strict=True))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, without a copy."""
    return memoryview(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def fastest_checksum() -> str:
    """The faster one of ``CHECKSUMS`` on this machine."""
    data = bytes(CHECKSUM_SAMPLE_BYTES)

    def seconds(name: str) -> float:
        started = time.perf_counter()
        CHECKSUMS[name](data)
        return time.perf_counter() - started

    return min(CHECKSUMS, key=seconds)


def measure_memcpy(repeats: int) -> dict[str, Any]:
    """Bytes a second of one copy of 512 MiB between two buffers that are already in memory."""
    source, target = np.ones(MEMCPY_BYTES, np.uint8), np.zeros(MEMCPY_BYTES, np.uint8)
    np.copyto(target, source)
    seconds = []
    for _ in range(max(repeats, 5)):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "bytes_per_s": MEMCPY_BYTES / median(seconds)}


def compare(job: Job, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of both pushes; ``ratio`` is ours over plain (lower is better)."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    details: dict[str, Any] = {}
    for i in range(rounds):
        for side in ("ours", "plain") if i % 2 == 0 else ("plain", "ours"):
            arguments = [*job.arguments(), f"--side={side}", f"--repeats={repeats}"]
            details[side] = run("benchmarks.push", arguments, DEADLINE_S)
            seconds[side] += details[side]["seconds"]
    memcpy = run("benchmarks.push", ["--side=memcpy", f"--repeats={repeats}"], DEADLINE_S)
    medians = {side: median(values) for side, values in seconds.items()}
    size = details["ours"]["num_bytes"]
    return {
        "seconds": medians,
        "bytes_per_s": {side: size / s for side, s in medians.items()},
        "memcpy_bytes_per_s": memcpy["bytes_per_s"],
        "num_bytes": size,
        "ratio": medians["ours"] / medians["plain"],
        "details": details,
    }


def main() -> None:
    """Measure one side, or compare both."""
    parser = job_parser("weight push against a plain loop", SIDES)
    arguments = parser.parse_args()
    job = Job.from_arguments(arguments)
    if arguments.side == "ours":
        result = measure_ours(job, arguments.repeats)
    elif arguments.side == "plain":
        result = measure_plain(job, arguments.repeats)
    elif arguments.side == "memcpy":
        result = measure_memcpy(arguments.repeats)
    else:
        result = compare(job, 2, arguments.repeats)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
