"""One whole GRPO step through the real system, over the sum of its ideals.

The system: `burnish train` on the recipe cpu-demo with a KL term, wall time of steps 2..n from its
metrics.jsonl.  The ideals, measured on the very samples of those steps:

    raw vLLM generation (each sample to its recorded length) + plain reference forward
    + plain padded forward and backward + fused AdamW + plain push loop

May import: numpy, pyarrow, benchmarks.*, launch.journal.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import push
from benchmarks.job import Job, describe_lengths, job_parser, load_samples
from benchmarks.process import environment, median, run, write_output
from launch.journal import read_rows

RECIPE = "cpu-demo"
DEADLINE_S = 900.0
IDEAL_DEADLINE_S, COMPILED_DEADLINE_S = 600.0, 900.0


def overrides(job: Job, directory: Path, num_steps: int) -> list[str]:
    """The recipe as the job: no evaluation, no export; weights stay what they are (learning rate 1e-8)."""
    return [
        "run.name=step", f"run.directory={directory}", f"run.num_steps={num_steps}", f"run.seed={job.seed}",
        f"run.groups_per_step={job.num_prompts}", f"run.samples_per_prompt={job.num_samples}",
        f"model.path={job.model}", f"generator.sampling.max_tokens={job.max_tokens}",
        f"generator.max_num_seqs={max(64, job.num_prompts * job.num_samples)}",
        f"algorithm.kl_coef={job.beta}", "learner.optimizer.lr=1e-8", "evaluation.every=0", "checkpoint.every=0",
        "checkpoint.export=false", "telemetry.wandb=disabled", "telemetry.progress=false",
    ]  # fmt: skip


def run_system(
    job: Job, directory: Path, num_steps: int, recipe: str = RECIPE, more: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[Path]]:
    """(metric rows, sample files) of steps 2..n.  The system sets its workers' environment itself."""
    arguments = ["train", recipe, *overrides(job, directory, num_steps), *more]
    run("launch.cli", arguments, DEADLINE_S, variables=environment(preload=False), wants_output=False)
    folder = directory / "step"
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] >= 2]
    return rows, [folder / "trajectories" / f"step-{row['step']:06d}.parquet" for row in rows]


def measure_ideals(job: Job, samples: list[Path], compiled: bool) -> dict[str, float]:
    """Median seconds a step of each ideal, by name."""
    common = [*job.arguments(), "--repeats=1"]
    files = ["--samples", *map(str, samples)]
    forms = [median(run("benchmarks.generation", [*common, "--side=raw", *files], IDEAL_DEADLINE_S)["seconds"])]
    if compiled:
        arguments = [*common, "--side=raw", "--compiled", *files]
        forms.append(median(run("benchmarks.generation", arguments, COMPILED_DEADLINE_S)["seconds"]))
    plain = run("benchmarks.learner", [*common, "--side=plain", *files], IDEAL_DEADLINE_S)
    reference = run("benchmarks.learner", [*common, "--side=reference", *files], IDEAL_DEADLINE_S)
    pushed = run("benchmarks.push", [*job.arguments(), "--repeats=3", "--side=plain"], push.DEADLINE_S)
    return {
        "generate": min(forms),
        "reference": median(reference["seconds"]),
        "forward_backward": median(plain["learn_s"]),
        "optimizer": median(plain["optimizer_s"]),
        "push": median(pushed["seconds"]),
    }


def compare(job: Job, num_steps: int, compiled: bool) -> dict[str, Any]:
    """Wall time of a step, its ideals, and ``ratio`` of the first to their sum (lower is better)."""
    with tempfile.TemporaryDirectory(prefix="burnish-bench-step-") as folder:
        rows, samples = run_system(job, Path(folder), num_steps)
        ideals = measure_ideals(job, samples, compiled)
        lengths = describe_lengths([g for path in samples for g in load_samples(path)])
    return summary(job, rows, ideals, ("generate", "score", "learn", "push")) | {"lengths": lengths}


def summary(job: Job, rows: list[dict[str, Any]], ideals: dict[str, float], phases: Sequence[str]) -> dict[str, Any]:
    """Medians of the metric rows beside the ideals; ``phases``: names of ``time/<name>_s``."""
    seconds = [row["time/step_s"] for row in rows]
    step_s = median(seconds)
    return {
        "seconds": seconds,
        "step_s": step_s,
        "samples_per_s": job.num_prompts * job.num_samples / step_s,
        "phases": {name: median([row[f"time/{name}_s"] for row in rows]) for name in phases},
        "ideals": ideals,
        "ideal_s": sum(ideals.values()),
        "ratio": step_s / sum(ideals.values()),
        "num_cores": os.cpu_count(),
    }


def main() -> None:
    """Run the system and its ideals, and print both."""
    parser = job_parser("one GRPO step over the sum of its ideals", ())
    parser.add_argument("--steps", type=int, default=5, help="steps of the run; the first one is not counted")
    parser.add_argument("--compiled", action="store_true", help="compiled raw vLLM too (its start takes minutes)")
    arguments = parser.parse_args()
    write_output(arguments.output, compare(Job.from_arguments(arguments), arguments.steps, arguments.compiled))


if __name__ == "__main__":
    main()
