"""What more generators bring, and what the loss of one costs, where generation is the bottleneck.

    python -m benchmarks.elastic rollouts [--quick]         rollouts/s of two generators over those of one
    python -m benchmarks.elastic scaled [--quick]           `burnish scale` of one live run, 1 -> 3 -> 2 generators
    python -m benchmarks.elastic replacement [--quick]      one is killed: time lost over its successor's start

A run needs a core for each generator and one for the learner.  Where there are fewer the engines are paced fakes
(benchmarks/paced.py) and all else is real; the result says which it was.
May import: benchmarks.*, cluster.host, launch.scale.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from benchmarks.live import DRIVER, ENDLESS, LiveRun, Row, live_run
from benchmarks.process import write_output
from benchmarks.step import RECIPE, overrides
from cluster.host import num_cpus
from launch.scale import ScaleRequest, scale

DEADLINE_S = 900.0  # for one run
MAX_STALENESS = 2
SCALED = (1, 3, 2)  # generators of one live run, one number after the other


@dataclass(frozen=True)
class World:
    """With what engines, and how long, the runs of a comparison go on."""

    driver: str
    job: Job  # its prompts are groups of a step
    num_seats: int  # few samples at once are slow samples: sampling is the bottleneck
    num_generators: int  # of the run that loses one
    num_steps: int  # measured after the first, or after the successor of a lost one has come
    extra: tuple[str, ...]

    @property
    def is_real(self) -> bool:
        return self.driver == DRIVER

    def overrides(self, num_generators: int) -> list[str]:
        """The run, which is ended when enough was seen of it."""
        return [
            *overrides(self.job, Path("runs"), ENDLESS), f"run.max_staleness={MAX_STALENESS}",
            f"generator.num_workers={num_generators}", f"generator.max_num_seqs={self.num_seats}", *self.extra,
        ]  # fmt: skip

    def run(self, num_generators: int) -> AbstractContextManager[LiveRun]:
        """The run; it is ended with the block."""
        return live_run(
            RECIPE, self.overrides(num_generators), driver=self.driver,
            num_cores=num_generators + 1 if self.is_real else None,
        )  # fmt: skip


def paced(token_s: float, start_s: float, num_steps: int) -> World:
    """Fakes that take so long for a token and for their start."""
    job = Job(model="builtin:tiny-llama", num_prompts=9, num_samples=8, max_tokens=64, beta=0.0)
    pace = f"generator.engine_args={{token_s: {token_s}, load_s: 0.05, start_s: {start_s}}}"
    extra = (pace, "learner.deepspeed={update_s: 0.2}", "push.backend=file")
    return World("benchmarks.paced", job, 8, 3, num_steps, extra)


REAL = World(
    DRIVER, Job(num_prompts=2, num_samples=8, max_tokens=32, beta=0.0), 1, 2, 4, ("cluster.own_cores=true",)
)
PACED, QUICK = paced(0.01, 10.0, 8), paced(0.004, 2.0, 4)


def world_of(num_generators: int | None, quick: bool) -> World:
    """Real engines where each generator and the learner can have a core of their own; None: as REAL has them."""
    if quick:
        return QUICK
    return REAL if num_cpus() > (num_generators or REAL.num_generators) else PACED


# --- arithmetic ---------------------------------------------------------------------------------


def taken_at(row: Row) -> float:
    """When the batch of a step was taken, s since 1970: its row comes after the update and the push."""
    return float(row["time_unix"]) - float(row["time/learn_s"]) - float(row["time/push_s"])


def rate(rows: Sequence[Row], first: int, last: int) -> float:
    """Groups sampled a second between the batches of two steps."""
    by_step = {row["step"]: row for row in rows}
    num_groups = sum(by_step[step]["groups/num_generated"] for step in range(first + 1, last + 1))
    return float(num_groups) / (taken_at(by_step[last]) - taken_at(by_step[first]))


def rate_between(rows: Sequence[Row], begin: float, end: float) -> float:
    """Groups sampled a second from ``begin`` to ``end``, s since 1970, taken to come evenly within a step.

    Raises:
        ValueError: these times are not within the rows.
    """
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    times = [taken_at(row) for row in ordered]
    if not times or not times[0] <= begin < end <= times[-1]:
        raise ValueError(f"{begin:.1f} .. {end:.1f} s is not within the steps of the run")
    num_groups = 0.0
    for (since, until), row in zip(pairwise(times), ordered[1:]):
        if until > since:
            shared = max(0.0, min(until, end) - max(since, begin))
            num_groups += row["groups/num_generated"] * shared / (until - since)
    return num_groups / (end - begin)


def duration(rows: Sequence[Row], first: int, last: int) -> float:
    """Seconds from the row of one step to that of another."""
    times = {row["step"]: row["time_unix"] for row in rows}
    return float(times[last] - times[first])


def loss(
    calm: Sequence[Row], hurt: Sequence[Row], events: Sequence[Row], last: int, num_generators: int
) -> dict[str, float]:
    """What a lost generator costs: ``hurt`` and its ``events`` against the same steps of a ``calm`` run.

    Returns:
        lost_s, start_s (of the successor: constructed and brought to the present version), ratio of the two; detect_s;
        meanwhile and share: groups a second while one was missing, and the others' share of the calm run's;
        survivors: ratio of these two.
    """
    died = next(e for e in events if e["kind"] == "worker_died")
    joined = next(e for e in events if e["kind"] == "generator_joined" and e["time_unix"] > died["time_unix"])
    lost_s = duration(hurt, 1, last) - duration(calm, 1, last)
    start_s = joined["start_s"] + joined["catch_up_s"]
    missing = rate_between(hurt, died["time_unix"], joined["time_unix"])
    share = (num_generators - 1) / num_generators * rate(calm, 1, last)
    return {
        "lost_s": lost_s,
        "start_s": start_s,
        "ratio": lost_s / start_s,
        "detect_s": died["silent_s"],
        "meanwhile": missing,
        "share": share,
        "survivors": missing / share,
    }


# --- comparisons --------------------------------------------------------------------------------


def compare_rollouts(quick: bool) -> dict[str, Any]:
    """Rollouts a second by the number of generators, and ``ratio`` of two over one."""
    world = world_of(2, quick)
    rates = {}
    for num_generators in (1, 2):
        with world.run(num_generators) as run:
            run.step(1 + world.num_steps, DEADLINE_S)
            groups_per_s = rate(run.rows("metrics.jsonl"), 1, 1 + world.num_steps)
        rates[num_generators] = world.job.num_samples * groups_per_s
    return {"rollouts_per_s": rates, "ratio": rates[2] / rates[1], "is_real": world.is_real}


def compare_scaled(quick: bool) -> dict[str, Any]:
    """Rollouts a second of one run with 1, then 3, then 2 generators, by their number; ``ratio`` of 3 and 2 over 1."""
    world = world_of(max(SCALED), quick)
    rates, step = {}, 1
    with world.run(SCALED[0]) as run:
        run.step(step, DEADLINE_S)
        for num_generators in SCALED:
            if rates:
                step = rescale(run, num_generators)
            run.step(step + world.num_steps, DEADLINE_S)
            groups_per_s = rate(run.rows("metrics.jsonl"), step, step + world.num_steps)
            rates[num_generators] = world.job.num_samples * groups_per_s
    ratio = {n: rates[n] / rates[SCALED[0]] for n in SCALED[1:]}
    return {"rollouts_per_s": rates, "ratio": ratio, "is_real": world.is_real}


def rescale(run: LiveRun, num_generators: int) -> int:
    """Ask for a fleet of that size and wait for it; the first step all of whose groups it was given.

    Groups that wait in a generator stay with it when another one comes: as many steps as may be under way.
    """
    asked = time.time()  # on the way up the fleet had had other sizes
    scale(run.folder, ScaleRequest(generators=num_generators))
    changes = ("generator_joined", "generator_left")
    done = run.until(
        "events.jsonl",
        lambda e: e["time_unix"] > asked and e["kind"] in changes and e["num_generators"] == num_generators,
        f"a fleet of {num_generators}", DEADLINE_S,
    )  # fmt: skip
    return int(done["step"]) + 1 + MAX_STALENESS


def compare_replacement(quick: bool) -> dict[str, Any]:
    """See :func:`loss`."""
    world = world_of(None, quick)
    num_generators = world.num_generators
    with world.run(num_generators) as run:
        run.step(1, DEADLINE_S)
        run.kill_worker("generator", num_generators - 1)
        joined = lambda event: event["kind"] == "generator_joined"  # noqa: E731
        came = run.until("events.jsonl", joined, "a new generator", DEADLINE_S)
        last = came["step"] + world.num_steps  # it works as the others do by then
        run.step(last, DEADLINE_S)
        hurt, events = run.rows("metrics.jsonl"), run.rows("events.jsonl")
    with world.run(num_generators) as run:
        run.step(last, DEADLINE_S)
        calm = run.rows("metrics.jsonl")
    found = loss(calm, hurt, events, last, num_generators)
    more = {"num_generators": num_generators, "num_samples": world.job.num_samples, "is_real": world.is_real}
    return found | more


def main() -> None:
    """Compare, and print."""
    comparisons = {"rollouts": compare_rollouts, "scaled": compare_scaled, "replacement": compare_replacement}
    parser = argparse.ArgumentParser(description="more generators, and one less")
    parser.add_argument("what", choices=comparisons)
    parser.add_argument("--quick", action="store_true", help="small, with fakes: does it run?")
    parser.add_argument("--output", type=Path, default=None, help="where the numbers go, as JSON")
    arguments = parser.parse_args()
    write_output(arguments.output, comparisons[arguments.what](arguments.quick))


if __name__ == "__main__":
    main()
