"""How long a push pauses a generator of an asynchronous run, against a plain load of the same weights.

    ours    time/push_pause_s of `burnish train` with run.max_staleness 1, while groups are being sampled: the engine
            reads, checks, loads, and takes the fingerprints of what it has loaded
    plain   the receiving half of benchmarks.push's plain loop, in an idle engine: load_file, checksum, load_weights

May import: benchmarks.*.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import push
from benchmarks.job import Job, job_parser
from benchmarks.live import live_run
from benchmarks.process import median, run, write_output
from benchmarks.step import RECIPE, overrides

DEADLINE_S = 900.0  # for the run


def measure_pauses(job: Job, num_steps: int) -> list[float]:
    """Seconds of each push after the first, in the default layout, where the engine has all cores as the plain one."""
    more = ["run.max_staleness=1", "algorithm.kl_coef=0"]
    with live_run(RECIPE, [*overrides(job, Path("runs"), num_steps + 2), *more]) as going:
        going.step(1 + num_steps, DEADLINE_S)
        return [row["time/push_pause_s"] for row in going.rows("metrics.jsonl") if row["step"] > 1]


def compare(job: Job, num_steps: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both; ``ratio`` is ours over plain (lower is better)."""
    pauses = measure_pauses(job, num_steps)
    plain = run("benchmarks.push", [*job.arguments(), "--side=plain", f"--repeats={repeats}"], push.DEADLINE_S)
    stages = {name: plain[name] for name in ("read_s", "checksum_s", "load_s")}
    return {
        "pauses": pauses,
        "pause_s": median(pauses),
        "plain": stages,
        "plain_s": sum(stages.values()),
        "ratio": median(pauses) / sum(stages.values()),
        "num_bytes": plain["num_bytes"],
    }


def main() -> None:
    """Compare, and print."""
    parser = job_parser("the pause of a push against a plain load", ())
    parser.add_argument("--steps", type=int, default=4, help="pushes that count; the first one does not")
    arguments = parser.parse_args()
    write_output(arguments.output, compare(Job.from_arguments(arguments), arguments.steps, arguments.repeats))


if __name__ == "__main__":
    main()
