"""How long a checkpoint stops the learner, against one plain copy of the same state to the host.

    ours    DeepSpeedLearner.begin_save: weights and Adam's moments copied, the thread that writes them started
    plain   tensor by tensor ``.to("cpu", copy=True)`` of a transformers model's weights and AdamW's moments

Between two timed saves ours waits until the file is written; the plain side writes nothing.
May import: torch, actors.* (inside functions), benchmarks.*.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.job import Job, job_parser, learner_groups, random_groups
from benchmarks.learner import LR, PAD_ID, make_learner
from benchmarks.plain import PlainTrainer, pad_groups, synchronize
from benchmarks.process import median, run, timed, write_output
from trainers.protocols import LearnerGroup

SIDES = ("ours", "plain")
DEADLINE_S = 900.0
WRITE_DEADLINE_S = 300.0


def small_batch() -> list[LearnerGroup]:
    """One update on it gives Adam its moments; token ids that every vocabulary has."""
    return learner_groups(random_groups(1, 2, 4, [3], 200))


def measure_ours(job: Job, repeats: int, scratch: Path) -> dict[str, Any]:
    """Seconds of ``begin_save``, and of the write that goes on after it, after a warm-up."""
    learner = make_learner(job, False, None)
    stops, writes, size = [], [], 0
    try:
        learner.update(small_batch(), 0)
        for number in range(1 + repeats):
            synchronize(job.torch_device)
            begun = learner.begin_save(str(scratch / "learner"))
            outcome = learner.save_outcome(WRITE_DEADLINE_S)
            if outcome is None or outcome.error is not None:
                raise RuntimeError(f"the state was not written: {outcome}")
            shutil.rmtree(scratch / "learner")
            if number:
                stops.append(begun.stop_s)
                writes.append(outcome.write_s)
            size = begun.num_bytes
    finally:
        learner.close()
    return {"seconds": stops, "write_s": median(writes), "num_bytes": size}


def measure_plain(job: Job, repeats: int) -> dict[str, Any]:
    """Seconds of a copy of everything, after a warm-up."""
    trainer = PlainTrainer(job.model_path, job.dtype, job.torch_device, LR, job.beta)
    trainer.update(pad_groups(small_batch(), PAD_ID, job.torch_device))
    parameters = list(trainer.model.parameters())
    states = [trainer.optimizer.state[p] for p in parameters]
    tensors = [*parameters, *(s[name] for s in states for name in ("exp_avg", "exp_avg_sq"))]

    def copy() -> None:
        held = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        synchronize(job.torch_device)
        held.clear()

    copy()
    return {"seconds": timed(copy, repeats), "num_bytes": sum(t.nbytes for t in tensors)}


def compare(job: Job, rounds: int, repeats: int) -> dict[str, Any]:
    """Medians over processes that alternate; ``ratio`` is ours over plain."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    last: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for side in SIDES:
            last[side] = run(
                "benchmarks.checkpoint", [*job.arguments(), f"--side={side}", f"--repeats={repeats}"], DEADLINE_S
            )
            seconds[side] += last[side]["seconds"]
    medians = {side: median(values) for side, values in seconds.items()}
    return {
        "seconds": medians,
        "ratio": medians["ours"] / medians["plain"],
        "write_s": last["ours"]["write_s"],
        "num_bytes": last["ours"]["num_bytes"],
        "plain_num_bytes": last["plain"]["num_bytes"],
    }


def main() -> None:
    """Measure one side, or compare both."""
    arguments = job_parser("what a checkpoint costs the learner", SIDES).parse_args()
    job = Job.from_arguments(arguments)
    if arguments.side == "plain":
        result = measure_plain(job, arguments.repeats)
    elif arguments.side == "ours":
        with tempfile.TemporaryDirectory(prefix="burnish-bench-checkpoint-") as scratch:
            result = measure_ours(job, arguments.repeats, Path(scratch))
    else:
        result = compare(job, 2, arguments.repeats)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
