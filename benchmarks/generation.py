"""Tokens a second of VLLMGenerator and of raw vLLM (``LLM.generate``), on the same requests and seeds.

    python -m benchmarks.generation [--compiled]        both sides, alternating, each in its own process
    python -m benchmarks.generation --side raw          one side, in this process

May import: vllm (inside functions), actors.*, benchmarks.*, launch.model_facts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.job import (
    Job,
    completion_lengths,
    describe_lengths,
    job_parser,
    load_samples,
    make_requests,
    save_samples,
)
from benchmarks.process import median, run, write_output
from trainers.experience import decode_group
from trainers.protocols import GroupRequest

SIDES = ("ours", "raw")
MAX_NUM_SEQS = 64
DEADLINE_S, COMPILED_DEADLINE_S = 300.0, 900.0


def measure_ours(job: Job, repeats: int, record: Path | None, gpu_memory: float, compiled: bool) -> dict[str, Any]:
    """Our generator as a plain object.  Only the first repeat finds its prompts uncached: compare one a process."""
    from actors.generator import VLLMGenerator
    from actors.settings import GeneratorSettings
    from launch.model_facts import check_model_folder

    settings = GeneratorSettings.model_validate({
        "max_num_seqs": max(MAX_NUM_SEQS, job.num_prompts * job.num_samples), "kv_cache_gib": job.kv_cache_gib,
        "gpu_memory_utilization": gpu_memory, "compile": compiled or job.device == "cuda",
        "sampling": {"max_tokens": job.max_tokens},
    })  # fmt: skip
    max_length = check_model_folder(job.model_path).max_length
    generator = VLLMGenerator("generator-0", job.model_path, settings, job.dtype, job.device, max_length, job.seed)

    async def once(requests: list[GroupRequest]) -> list[Any]:
        return list(await asyncio.gather(*(generator.generate(r) for r in requests)))

    async def go() -> dict[str, Any]:
        await once(make_requests(job, warm_up=True))
        requests, seconds, results = make_requests(job), [], []
        for _ in range(repeats):
            started = time.perf_counter()
            results = await once(requests)
            seconds.append(time.perf_counter() - started)
        groups = [decode_group(buffer) for _, buffer in results]
        if record is not None:
            save_samples(record, groups)
        lengths = describe_lengths(groups)
        return {"seconds": seconds, "num_tokens": lengths["num_tokens"], "lengths": lengths, "dtype": job.dtype}

    try:
        return asyncio.run(go())
    finally:
        generator.close()


def measure_raw(
    job: Job, repeats: int, compiled: bool, samples: list[Path], gpu_memory: float
) -> dict[str, Any]:
    """Raw vLLM.  With ``samples``: one timed call a file, with its prompts and exactly its lengths."""
    from actors.vllm_engine import set_environment
    from launch.model_facts import check_model_folder

    threads = os.environ.get("OMP_NUM_THREADS")
    set_environment(job.device, job.kv_cache_gib, job.device == "cpu", int(threads) if threads else None)
    from vllm import LLM

    extra = {"gpu_memory_utilization": gpu_memory} if job.device == "cuda" else {}
    llm = LLM(
        model=job.model_path, dtype=job.dtype, seed=job.seed,
        max_model_len=check_model_folder(job.model_path).max_length,
        max_num_seqs=max(MAX_NUM_SEQS, job.num_prompts * job.num_samples),
        enforce_eager=not compiled, enable_prefix_caching=True, logprobs_mode="processed_logprobs",
        disable_log_stats=True, **extra,
    )  # fmt: skip
    requests = make_requests(job)
    runs = [_sized_inputs(path) for path in samples] or [_inputs(requests)] * repeats
    warm_up = _inputs(make_requests(job, warm_up=True))
    llm.generate(*warm_up, use_tqdm=False)
    seconds, tokens = [], []
    for i, (prompts, parameters) in enumerate(runs):
        if samples or i > 0:
            llm.reset_prefix_cache()  # a step's first prompt finds nothing cached under its new weights
        if not samples and i > 0:
            llm.generate(*warm_up, use_tqdm=False)  # as for our first call: only what prompts share is cached
        started = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(c.token_ids) for o in outputs for c in o.outputs))
    return {"seconds": seconds, "num_tokens": tokens[-1], "all_num_tokens": tokens, "dtype": job.dtype}


def _inputs(requests: list[GroupRequest]) -> tuple[list[Any], list[Any]]:
    """Prompts and sampling parameters as our generator would hand them to vLLM."""
    from vllm.inputs import TokensPrompt

    prompts, parameters = [], []
    for request in requests:
        for seed in request.seeds:
            prompts.append(TokensPrompt(prompt_token_ids=request.prompt.token_ids.tolist()))
            parameters.append(_parameters(request.max_tokens, seed, ignore_eos=False))
    return prompts, parameters


def _sized_inputs(path: Path) -> tuple[list[Any], list[Any]]:
    """The recorded prompts, each sampled to exactly the recorded length."""
    from vllm.inputs import TokensPrompt

    groups = load_samples(path)
    prompts = [TokensPrompt(prompt_token_ids=g.prompt.token_ids.tolist()) for g in groups for _ in g.trajectories]
    return prompts, [_parameters(int(n), i, ignore_eos=True) for i, n in enumerate(completion_lengths(groups))]


def _parameters(max_tokens: int, seed: int, ignore_eos: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0, max_tokens=max_tokens, seed=seed, logprobs=0, detokenize=False, ignore_eos=ignore_eos,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def compare(job: Job, rounds: int, with_compiled: bool, record: Path | None) -> dict[str, Any]:
    """Both sides, one timed call a process, the order alternating.

    Returns:
        rates in tokens/s, ``ratio`` of ours to the faster form of raw vLLM, and the samples' lengths.
    """
    rates: dict[str, list[float]] = {"ours": [], "raw": [], "raw_compiled": []}
    found: dict[str, Any] = {}
    for i in range(rounds):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            more = [f"--record={record}"] if side == "ours" and record is not None else []
            arguments = [*job.arguments(), f"--side={side}", "--repeats=1", *more]
            numbers = run("benchmarks.generation", arguments, DEADLINE_S)
            rates[side] += [numbers["num_tokens"] / s for s in numbers["seconds"]]
            if side == "ours":
                found |= {"lengths": numbers["lengths"], "dtype": numbers["dtype"]}
    if with_compiled:
        arguments = [*job.arguments(), "--side=raw", "--compiled", f"--repeats={rounds}"]
        numbers = run("benchmarks.generation", arguments, COMPILED_DEADLINE_S)
        rates["raw_compiled"] = [numbers["num_tokens"] / s for s in numbers["seconds"]]
    medians = {name: median(values) for name, values in rates.items() if values}
    fastest = max(medians[name] for name in medians if name != "ours")
    return found | {"rates": rates, "tokens_per_s": medians, "ratio": medians["ours"] / fastest}


def main() -> None:
    """Measure one side, or compare both."""
    parser: argparse.ArgumentParser = job_parser("generation against raw vLLM", SIDES)
    parser.add_argument("--compiled", action="store_true", help="torch.compile (CUDA graphs on a GPU)")
    parser.add_argument("--record", type=Path, default=None, help="write what was sampled to this file")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="raw: sample to these files' lengths")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="share of a GPU for one engine")
    arguments = parser.parse_args()
    job = Job.from_arguments(arguments)
    if arguments.side == "ours":
        result = measure_ours(job, arguments.repeats, arguments.record, arguments.gpu_memory, arguments.compiled)
    elif arguments.side == "raw":
        compiled = arguments.compiled or job.device == "cuda"
        result = measure_raw(job, arguments.repeats, compiled, arguments.samples, arguments.gpu_memory)
    else:
        result = compare(job, arguments.repeats, arguments.compiled, arguments.record)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
