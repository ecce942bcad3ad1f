"""The same job under TRL's GRPOTrainer, in the environment that benchmarks/setup_trl.sh makes (.bench/trl).

    shipped      GRPOConfig's defaults, transformers' generation, the environment of a user's shell
    tuned        by hand: compute dtype of our job, no gradient checkpointing, fused AdamW, our preloads
    tuned-vllm   the same with vLLM colocated, its dtype and its weight sync mended (see ``mend_vllm``)

One process a variant; the first step is the warm-up.
May import: trl, datasets, transformers (inside functions), benchmarks.{job, plain, process}.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from typing import Any

from benchmarks.job import Job, job_parser, load_prompts
from benchmarks.plain import load_into_vllm
from benchmarks.process import ROOT, environment, median, run, write_output

VARIANTS = ("shipped", "tuned", "tuned-vllm")
PYTHON = ROOT / ".bench" / "trl" / "bin" / "python"
DEADLINES_S = {"shipped": 2400.0, "tuned": 900.0, "tuned-vllm": 900.0}
VLLM_MAX_LENGTH = 512  # prompt + completion; the job needs a third of it


def accuracy(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The last number of the completion is the answer."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    last = [re.findall(r"-?\d+", text)[-1:] for text in texts]
    return [float(found == [a]) for found, a in zip(last, answer, strict=True)]


def configuration(variant: str, job: Job, num_steps: int, folder: str) -> dict[str, Any]:
    """Arguments of GRPOConfig: the job, and for the tuned variants what a careful user would set."""
    values: dict[str, Any] = {
        "output_dir": folder, "use_cpu": job.device == "cpu", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "max_steps": num_steps, "seed": job.seed,
        "per_device_train_batch_size": job.num_samples, "gradient_accumulation_steps": job.num_prompts,
        "num_generations": job.num_samples, "max_completion_length": job.max_tokens,
        "beta": job.beta, "temperature": 1.0,
    }  # fmt: skip
    if variant == "shipped":
        return values
    values |= {
        "bf16": job.dtype == "bfloat16", "gradient_checkpointing": False, "optim": "adamw_torch_fused",
        "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    if variant == "tuned-vllm":
        values |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": VLLM_MAX_LENGTH}
    return values


def mend_vllm(dtype: str) -> None:
    """What a user of TRL 1.16 has to mend for vLLM in float32 on a CPU.

    TRL leaves the dtype to vLLM, which turns float32 into bfloat16, and its weight sync bypasses vLLM's
    reload, which CPU kernels need.
    """
    from functools import partial

    from trl.generation import vllm_generation  # type: ignore[import-not-found, unused-ignore]

    vllm_generation.LLM = partial(vllm_generation.LLM, dtype=dtype)

    def sync_weights(self: Any) -> None:
        load_into_vllm(self.llm, [(name, p.detach()) for name, p in self.model.named_parameters()])
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights


def measure(variant: str, job: Job, num_steps: int) -> dict[str, Any]:
    """Seconds of each optimizer step, generation to update, without the first."""
    if variant == "tuned-vllm":
        from actors.vllm_engine import set_environment

        threads = os.environ.get("OMP_NUM_THREADS")
        set_environment(job.device, job.kv_cache_gib, True, int(threads) if threads else None)
        mend_vllm(job.dtype)
    from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found, unused-ignore]

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Takes the time at the end of every optimizer step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            self.ends.append(time.perf_counter())

    clock, lengths = Clock(), []

    def record(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.append([len(c) for c in completion_ids])
        return [0.0] * len(completion_ids)

    prompts = load_prompts(job, job.num_prompts * num_steps)
    rows = [{"prompt": [{"role": "user", "content": p.source}], "answer": str(p.columns["answer"])} for p in prompts]
    with tempfile.TemporaryDirectory(prefix="burnish-bench-trl-") as folder:
        trainer = GRPOTrainer(
            model=job.model_path,
            reward_funcs=[accuracy, record],
            args=GRPOConfig(**configuration(variant, job, num_steps, folder)),
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    size = job.num_prompts * job.num_samples
    tokens = [n for step in lengths[1:] for n in step]
    return {
        "seconds": seconds,
        "step_s": median(seconds),
        "samples_per_s": size / median(seconds),
        "mean_length": sum(tokens) / max(len(tokens), 1),
        "bf16": bool(trainer.args.bf16),
        "parameters": str(next(trainer.model.parameters()).dtype),
        "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
    }


def compare(job: Job, variant: str, num_steps: int) -> dict[str, Any]:
    """Run one variant in TRL's environment."""
    arguments = [*job.arguments(), f"--side={variant}", f"--steps={num_steps}"]
    variables = environment(preload=variant != "shipped", PYTHONUNBUFFERED="1")
    return run("benchmarks.trl_job", arguments, DEADLINES_S[variant], python=str(PYTHON), variables=variables)


def main() -> None:
    """Measure one variant in this process, or all of them in TRL's environment."""
    parser = job_parser("the job under TRL", VARIANTS)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first one is not counted")
    arguments = parser.parse_args()
    job = Job.from_arguments(arguments)
    if arguments.side is None:
        result = {variant: compare(job, variant, arguments.steps) for variant in VARIANTS}
    else:
        result = measure(arguments.side, job, arguments.steps)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
