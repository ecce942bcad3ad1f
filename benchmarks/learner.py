"""One update by DeepSpeedLearner and by the plain padded baseline, on the same recorded samples.

    python -m benchmarks.learner --samples FILE             tokens a second, both sides
    python -m benchmarks.learner --memory                   peak memory of one pass over 4,096 tokens, both sides

Both sides: forward, backward, clipping, AdamW; the same parameters, dtype, loss and preloads.
May import: torch, actors.*, benchmarks.*, trainers.*.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import Job, job_parser, learner_groups, load_samples, random_groups
from benchmarks.plain import PlainTrainer, pad_groups, synchronize
from benchmarks.process import median, run, write_output
from trainers.experience import TrajectoryGroup
from trainers.protocols import LearnerGroup

SIDES = ("ours", "plain", "reference")
LR = 1e-8  # weights stay what they are: every repeat does the same work
PAD_ID = 0
DEADLINE_S = 900.0
CPU_SETTINGS = {"token_budget": 512, "logprob_chunk": 256}  # of launch/recipes/cpu-demo.yaml
# 32 samples of 32 + 96 tokens: 4,096.  No prompt is shared, so that both sides compute every one of them.
MEMORY_GROUPS, MEMORY_SAMPLES, MEMORY_PROMPT, MEMORY_COMPLETION = 4, 8, 32, 96


def make_learner(job: Job, checkpointing: bool, share_prompts: bool | None, **settings: Any) -> Any:
    """A single-rank DeepSpeedLearner in this process, with the settings of the CPU recipes on a CPU."""
    from actors.learner import DeepSpeedLearner
    from actors.settings import LearnerSettings, SamplingSettings
    from cluster.rendezvous import Rendezvous, free_port
    from trainers.algorithms import AlgorithmSettings

    values = {"gradient_checkpointing": checkpointing, "share_prompts": share_prompts,
              "optimizer": {"lr": LR, "betas": (0.9, 0.99)}}  # fmt: skip
    values |= (CPU_SETTINGS if job.torch_device == "cpu" else {}) | settings
    return DeepSpeedLearner(
        rank=0, rendezvous=Rendezvous("127.0.0.1", free_port(), 1), model_path=job.model_path,
        settings=LearnerSettings.model_validate(values),
        algorithm=AlgorithmSettings.model_validate({"kl_coef": job.beta}),
        sampling=SamplingSettings.model_validate({"max_tokens": job.max_tokens}),
        dtype=job.dtype, device=job.torch_device, num_steps=1000, seed=job.seed,
    )  # fmt: skip


def num_tokens(groups: Sequence[TrajectoryGroup]) -> int:
    return sum(t.num_tokens for g in groups for t in g.trajectories)


def measure_ours(job: Job, batches: list[list[TrajectoryGroup]], repeats: int) -> dict[str, Any]:
    """Seconds of ``update`` for each batch, after a warm-up."""
    learner = make_learner(job, False, None)
    seconds = []
    try:
        learner.update(learner_groups(batches[0]), 0)
        for batch in batches:
            groups = learner_groups(batch)
            for _ in range(repeats):
                started = time.perf_counter()
                report = learner.update(groups, 0)
                synchronize(job.torch_device)
                seconds.append(time.perf_counter() - started)
    finally:
        learner.close()
    return {
        "seconds": seconds,
        "num_tokens": [num_tokens(b) for b in batches],
        "shared_prompt_fraction": report.metrics["learner/shared_prompt_fraction"],
    }


def measure_plain(job: Job, batches: list[list[TrajectoryGroup]], repeats: int) -> dict[str, Any]:
    """Seconds of forward + backward and of the optimizer, for each batch, after a warm-up."""
    trainer = PlainTrainer(job.model_path, job.dtype, job.torch_device, LR, job.beta)
    learn, optimizer = [], []
    trainer.update(pad_groups(learner_groups(batches[0]), PAD_ID, job.torch_device))
    for batch in batches:
        padded = pad_groups(learner_groups(batch), PAD_ID, job.torch_device)
        for _ in range(repeats):
            learn_s, optimizer_s = trainer.update(padded)
            learn.append(learn_s)
            optimizer.append(optimizer_s)
    return {
        "seconds": [a + b for a, b in zip(learn, optimizer, strict=True)],
        "learn_s": learn,
        "optimizer_s": optimizer,
        "num_tokens": [num_tokens(b) for b in batches],
    }


def measure_reference(job: Job, batches: list[list[TrajectoryGroup]], repeats: int) -> dict[str, Any]:
    """Seconds of one plain forward pass without gradients, for each batch."""
    trainer = PlainTrainer(job.model_path, job.dtype, job.torch_device, LR, job.beta)
    padded = [pad_groups(learner_groups(b), PAD_ID, job.torch_device) for b in batches]
    trainer.score(padded[0])
    seconds = []
    for batch in padded:
        for _ in range(repeats):
            started = time.perf_counter()
            trainer.score(batch)
            synchronize(job.torch_device)
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "num_tokens": [num_tokens(b) for b in batches]}


# --- memory -------------------------------------------------------------------------------------


class PeakMemory:
    """Highest memory since :meth:`start`, above what was held then, in bytes."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def start(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest resident set so far
            self._before = _status("VmRSS")

    def above(self) -> int:
        peak = int(torch.cuda.max_memory_allocated()) if self.on_gpu else _status("VmHWM")
        return peak - self._before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def memory_batch(vocabulary: int, scale: int = 1) -> list[LearnerGroup]:
    """4,096 / ``scale`` tokens of random ids."""
    prompt, completion = MEMORY_PROMPT // scale, MEMORY_COMPLETION // scale
    return learner_groups(random_groups(MEMORY_GROUPS, MEMORY_SAMPLES, prompt, [completion], vocabulary))


def measure_memory(job: Job, side: str, checkpointing: bool) -> dict[str, Any]:
    """Peak memory of one forward and backward pass, above weights and optimizer states.

    A tiny update goes first, so that optimizer states and lazily made buffers exist already.
    """
    from launch.model_facts import check_model_folder

    vocabulary = check_model_folder(job.model_path).vocab
    tiny, full = memory_batch(vocabulary, scale=16), memory_batch(vocabulary)
    peak = PeakMemory(job.torch_device)
    if side == "ours":
        learner = make_learner(job, checkpointing, False)
        learner.update(tiny, 0)
        peak.start()
        learner.update(full, 0)
        return {"bytes": peak.above(), "vocabulary": vocabulary, "token_budget": learner.settings.token_budget}
    trainer = PlainTrainer(job.model_path, job.dtype, job.torch_device, LR, job.beta, checkpointing)
    trainer.update(pad_groups(tiny, PAD_ID, job.torch_device))
    padded = pad_groups(full, PAD_ID, job.torch_device)
    peak.start()
    trainer.update(padded, rows=padded.input_ids.shape[0])
    return {"bytes": peak.above(), "vocabulary": vocabulary, "num_tokens": padded.input_ids.numel()}


# --- both sides ---------------------------------------------------------------------------------


def compare(job: Job, samples: Path, rounds: int) -> dict[str, Any]:
    """Completion tokens a second of both sides; ``ratio`` is ours over plain."""
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    details: dict[str, Any] = {}
    for i in range(rounds):
        for side in ("ours", "plain") if i % 2 == 0 else ("plain", "ours"):
            arguments = [*job.arguments(), f"--side={side}", "--repeats=1", f"--samples={samples}"]
            numbers = run("benchmarks.learner", arguments, DEADLINE_S)
            rates[side] += [numbers["num_tokens"][0] / s for s in numbers["seconds"]]
            details[side] = numbers
    medians = {name: median(values) for name, values in rates.items()}
    return {"rates": rates, "tokens_per_s": medians, "ratio": medians["ours"] / medians["plain"], "details": details}


def compare_memory(job: Job) -> dict[str, Any]:
    """Peak bytes of both sides, without and with gradient checkpointing; ``ratio`` is ours over plain."""
    found: dict[str, Any] = {}
    for name, flags in (("default", []), ("checkpointing", ["--checkpointing"])):
        sides = {
            side: run("benchmarks.learner", [*job.arguments(), f"--side={side}", "--memory", *flags], DEADLINE_S)
            for side in ("ours", "plain")
        }
        sizes = {side: numbers["bytes"] for side, numbers in sides.items()}
        found[name] = sizes | {"ratio": sizes["ours"] / sizes["plain"]}
        found["vocabulary"] = sides["ours"]["vocabulary"]
    return found


def main() -> None:
    """Measure one side, or compare both."""
    parser = job_parser("learner against padded transformers", SIDES)
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="files written by benchmarks.generation")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--checkpointing", action="store_true", help="memory: with gradient checkpointing")
    arguments = parser.parse_args()
    job = Job.from_arguments(arguments)
    batches = [load_samples(path) for path in arguments.samples]
    if arguments.memory:
        side = arguments.side
        result = compare_memory(job) if side is None else measure_memory(job, side, arguments.checkpointing)
    elif not batches:
        sys.exit("learner: --samples is needed; `python -m benchmarks.generation --record FILE` writes it")
    elif arguments.side is None:
        result = compare(job, arguments.samples[0], arguments.repeats)
    else:
        measures = {"ours": measure_ours, "plain": measure_plain, "reference": measure_reference}
        result = measures[arguments.side](job, batches, arguments.repeats)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
