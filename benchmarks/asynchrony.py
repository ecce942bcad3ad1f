"""Sampling beside learning: the throughput of asynchronous runs, over a synchronous one and over the pipeline's limit.

    python -m benchmarks.asynchrony [--quick]

Each side is a `burnish train` of the recipe cpu-demo on two cores, looked at from its first push to a later one:

    sync, own cores       generator and learner have a core each and take turns: one core always waits
    async, own cores      run.max_staleness 1 and 4: the same two cores, both at work
    sync, shared cores    every phase has both cores

Rates are completion tokens trained on, of the tokens that were sampled meanwhile where these are fewer, a second.
The pipeline's limit is the slower of two phases, sampling and update, on a core each: those of the synchronous run,
and those of the asynchronous run itself.  The first knows whether the phases disturb each other; the second is of the
same minutes, and a machine that is shared with others may be a third slower in one minute than in the next.  That is
also why the modes take turns, in ``NUM_ROUNDS`` rounds.  Work is balanced by ``generator.max_num_seqs``: few samples at
once are slow samples.
May import: benchmarks.*, cluster.host, launch.accountant.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from benchmarks.live import ENDLESS, Row, live_run
from benchmarks.process import MeasurementError, median, write_output
from benchmarks.step import RECIPE, overrides
from cluster.host import num_cpus
from launch.accountant import bubble_rows

NUM_CORES = 2  # one of the generator, one of the learner
DEADLINE_S = 900.0  # for one run
SEATS = 6  # samples decoded at once, to begin with
SEATS_BOUNDS = (1, 64)
BALANCED = 0.75  # the shorter phase over the longer one
MAX_TRIES = 3
NUM_ROUNDS = 2
JOB = Job(num_prompts=4, num_samples=8, max_tokens=32, beta=0.0)  # without KL: a reference would need a core as well


@dataclass(frozen=True)
class Mode:
    """One way to run."""

    name: str
    max_staleness: int
    own_cores: bool
    num_steps: int  # whose throughput is measured, after the first


SYNC, SHARED = Mode("sync", 0, True, 2), Mode("shared", 0, False, 2)
STALE = (Mode("async 1", 1, True, 3), Mode("async 4", 4, True, 3))


@dataclass(frozen=True)
class Pace:
    """What a run did between the rows of two steps; phases in s a token."""

    tokens_per_s: float
    generate_s: float  # a token
    learn_s: float  # a token
    push_s: float  # median of a whole push
    lag: float  # mean of staleness/mean

    @property
    def limit(self) -> float:
        """Tokens a second when the two phases overlap without any loss."""
        return 1.0 / max(self.generate_s, self.learn_s)

    @property
    def balance(self) -> float:
        """Sampling over learning: 1 is balanced."""
        return self.generate_s / self.learn_s


def pace(rows: Sequence[Row], first: int, last: int, num_samples: int) -> Pace:
    """Of the steps after ``first`` up to ``last``; ``num_samples``: of a group."""
    by_step = {row["step"]: row for row in rows}
    counted = [by_step[step] for step in range(first + 1, last + 1)]
    seconds = by_step[last]["time_unix"] - by_step[first]["time_unix"]
    num_trained = sum(row["groups/num_trained"] for row in counted)
    num_tokens = sum(num_samples * row["groups/num_trained"] * row["completions/mean_length"] for row in counted)
    # What a run trains on out of a store that it does not fill again is not its pace.
    generated = sum(row["groups/num_generated"] for row in counted) / num_trained
    return Pace(
        tokens_per_s=min(1.0, generated) * num_tokens / seconds,
        generate_s=sum(sampling_s(by_step[row["step"] - 1], row) for row in counted) / (generated * num_tokens),
        learn_s=sum(row["time/learn_s"] for row in counted) / num_tokens,
        push_s=median([row["time/push_s"] for row in counted]),
        lag=sum(row["staleness/mean"] for row in counted) / len(counted),
    )


def sampling_s(before: Row, row: Row) -> float:
    """Of one step: a phase of a synchronous run, elsewhere how long the generator had something to sample."""
    if "time/generate_s" in row:
        return float(row["time/generate_s"])
    return float(row["accounting/generator/generate_fraction"] * (row["time_unix"] - before["time_unix"]))


def balanced_seats(balance: float, seats: int) -> int:
    """How many samples to decode at once next; ``seats`` when sampling and learning take about as long."""
    if BALANCED <= balance <= 1 / BALANCED:
        return seats
    low, high = SEATS_BOUNDS
    return min(high, 2 * seats) if balance > 1 else max(low, seats // 2)


def ratios(sync: Pace, stale: Pace, shared: Pace | None) -> dict[str, float]:
    """An asynchronous pace over what it is compared with; ``own``: the limit by its own phases."""
    found = {
        "sync": stale.tokens_per_s / sync.tokens_per_s,
        "limit": stale.tokens_per_s / sync.limit,
        "own": stale.tokens_per_s / stale.limit,
    }
    return found if shared is None else found | {"shared": stale.tokens_per_s / shared.tokens_per_s}


def over_rounds(rounds: Sequence[Mapping[str, Pace]], mode: str, shared: Pace | None) -> dict[str, Any]:
    """Medians of the :func:`ratios` of each round, and ``rounds``: those to the synchronous run, one by one."""
    each = [ratios(paces[SYNC.name], paces[mode], shared) for paces in rounds]
    return {name: median([found[name] for found in each]) for name in each[0]} | {
        "rounds": [found["sync"] for found in each]
    }


def middle(paces: Sequence[Pace]) -> Pace:
    """Each number's median."""
    return Pace(**{f.name: median([getattr(pace, f.name) for pace in paces]) for f in fields(Pace)})


def run_overrides(job: Job, mode: Mode, seats: int) -> list[str]:
    """The run, which is ended when enough was seen of it."""
    return [
        *overrides(job, Path("runs"), ENDLESS), f"run.max_staleness={mode.max_staleness}",
        f"cluster.own_cores={str(mode.own_cores).lower()}",
        f"generator.max_num_seqs={seats}",
    ]  # fmt: skip


def measure(job: Job, mode: Mode, seats: int) -> tuple[Pace, list[tuple[str, ...]]]:
    """Pace of one run and its bubble table."""
    with live_run(RECIPE, run_overrides(job, mode, seats), num_cores=NUM_CORES) as run:
        last = 1 + mode.num_steps
        run.step(last, DEADLINE_S)
        bubbles = bubble_rows(run.folder) or []
        return pace(run.rows("metrics.jsonl"), 1, last, job.num_samples), bubbles


def balanced_sync(job: Job, seats: int, num_tries: int) -> tuple[int, Pace, list[tuple[str, ...]]]:
    """The synchronous run on own cores, with the number of seats that balances it best."""
    tried: dict[int, tuple[Pace, list[tuple[str, ...]]]] = {}
    for _ in range(num_tries):
        if seats in tried:
            break
        tried[seats] = measure(job, SYNC, seats)
        seats = balanced_seats(tried[seats][0].balance, seats)
    best = min(tried, key=lambda n: max(tried[n][0].balance, 1 / tried[n][0].balance))
    return best, *tried[best]


def compare(job: Job, quick: bool) -> dict[str, Any]:
    """Paces and bubble tables by mode, and ``ratio`` of each asynchronous mode.

    Raises:
        MeasurementError: there are not enough cores, or a run failed.
    """
    if num_cpus() < NUM_CORES:
        raise MeasurementError(f"generator and learner need a core each, and there are {num_cpus()}")
    seats, sync, bubbles = balanced_sync(job, SEATS, 1 if quick else MAX_TRIES)
    rounds, tables = [{SYNC.name: sync}], {SYNC.name: bubbles}
    stale = [replace(STALE[0], num_steps=2)] if quick else [*STALE]
    for number in range(1 if quick else NUM_ROUNDS):
        if number:
            rounds.append({SYNC.name: measure(job, SYNC, seats)[0]})
        for mode in stale:
            rounds[-1][mode.name], tables[mode.name] = measure(job, mode, seats)
    paces = {name: middle([paces[name] for paces in rounds]) for name in rounds[0]}
    shared = None
    if not quick:
        shared, tables[SHARED.name] = measure(job, SHARED, seats)
        paces[SHARED.name] = shared
    return {
        "paces": {name: vars(found) for name, found in paces.items()},
        "limits": {name: found.limit for name, found in paces.items()},
        "balance": paces[SYNC.name].balance,
        "seats": seats,
        "bubbles": tables,
        "ratio": {mode.name: over_rounds(rounds, mode.name, shared) for mode in stale},
    }


def explained(found: Mapping[str, Any]) -> str:
    """What the numbers of :func:`compare` rest on, in a line."""
    return f"sampling takes {found['balance']:.2f} times as long as the update, with {found['seats']} samples at once"


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description="asynchronous against synchronous runs on two cores")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one staleness: does it run?")
    parser.add_argument("--output", type=Path, default=None, help="where the numbers go, as JSON")
    arguments = parser.parse_args()
    write_output(arguments.output, compare(quick_job() if arguments.quick else JOB, arguments.quick))


def quick_job() -> Job:
    """The job on a model that means nothing."""
    return replace(JOB, model="builtin:tiny-llama", num_prompts=2, num_samples=4, max_tokens=16)


if __name__ == "__main__":
    main()
