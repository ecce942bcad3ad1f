"""What ``make chaos`` says: whether it passed, and detection and recovery times by kind of fault.  Pure.

May import: numpy, trainers.calibration, scripts.{chaos_run, count_prompts, faults} (types and names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from scripts.chaos_run import Outcome, RunOutcome
from scripts.count_prompts import Count
from scripts.faults import KINDS
from trainers.calibration import Estimate, t_quantile

MAX_DIFFERENCE = 0.05  # in reward, between runs with faults and without


@dataclass(frozen=True)
class Asked:
    """What a pass takes.  ``kinds``: that were scheduled; ``compare``: whether rewards are compared; ``left_out``: what
    did not run here and why, in one line.
    """

    seed: int
    num_faults: int
    num_each: int
    kinds: tuple[str, ...]
    compare: bool
    left_out: str = ""


def difference(faulted: Sequence[float], unharmed: Sequence[float]) -> Estimate:
    """Mean of ``faulted`` less that of ``unharmed``, with the interval of Student's t at equal variances (95 %).

    The whole line with fewer than two runs on a side.
    """
    n, m = len(faulted), len(unharmed)
    if min(n, m) == 0:
        return Estimate(math.nan, -math.inf, math.inf, n + m)
    value = fmean(faulted) - fmean(unharmed)
    if min(n, m) < 2:
        return Estimate(value, -math.inf, math.inf, n + m)
    squares = sum((x - fmean(side)) ** 2 for side in (faulted, unharmed) for x in side)
    half = t_quantile(0.95, n + m - 2) * math.sqrt(squares / (n + m - 2) * (1 / n + 1 / m))
    return Estimate(value, value - half, value + half, n + m)


def report(
    asked: Asked, runs: Sequence[RunOutcome], counts: Mapping[str, Count], rewards: Mapping[str, float], disk: str
) -> dict[str, Any]:
    """JSON values.

    Args:
        counts: of each run that left batches, by name.
        rewards: mean reward of the last planned steps, by name; of the runs that are compared.
        disk: how it was filled.
    """
    faults = [outcome for run in runs for outcome in run.faults]
    kinds = {kind: _times([f for f in faults if f.kind == kind]) for kind in asked.kinds}
    hit = {run.name for run in runs if run.faults}
    ended = sum(run.problem is None for run in runs)
    exact = sum(not count.problems for count in counts.values())
    checks = [
        (f"at least {asked.num_faults} faults", f"{len(faults)}", len(faults) >= asked.num_faults),
        (f"at least {asked.num_each} of each kind", f"{min((k['num'] for k in kinds.values()), default=0)} of the "
         "rarest", all(k["num"] >= asked.num_each for k in kinds.values())),
        ("each run ended by itself", f"{ended} of {len(runs)}", ended == len(runs)),
        ("every prompt once an epoch", f"{exact} of {len(runs)} runs", exact == len(runs)),
    ]  # fmt: skip
    compared = None
    if asked.compare:
        compared = difference(
            [value for name, value in rewards.items() if name in hit],
            [value for name, value in rewards.items() if name not in hit],
        )
        inside = compared.low > -MAX_DIFFERENCE and compared.high < MAX_DIFFERENCE
        checks.append((f"reward difference within ±{MAX_DIFFERENCE:g}", f"{compared} (95 %)", inside))
    return {
        "seed": asked.seed,
        "passed": all(passed for _, _, passed in checks),
        "checks": [{"check": what, "found": found, "passed": passed} for what, found, passed in checks],
        "left_out": asked.left_out,
        "kinds": kinds,
        "disk": disk,
        "rewards": dict(rewards),
        "reward_difference": None if compared is None else asdict(replace(compared, low=_finite(compared.low),
                                                                          high=_finite(compared.high))),
        "runs": [asdict(run) for run in runs],
        "prompts": {name: asdict(count) for name, count in counts.items()},
    }  # fmt: skip


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return max(-1e9, min(1e9, value))


def _times(faults: Sequence[Outcome]) -> dict[str, Any]:
    detected = [f.detected_s for f in faults if f.detected_s is not None]
    recovered = [f.recovered_s for f in faults]
    return {
        "num": len(faults),
        "num_resumed": sum(f.resumed for f in faults),
        "detected_s": _spread(detected),
        "recovered_s": _spread(recovered),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    return {"median": round(median(seconds), 2), "max": round(max(seconds), 2)} if seconds else None


def markdown(found: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"# Chaos: {'passed' if found['passed'] else 'FAILED'}", "", f"Seed {found['seed']}.", ""]
    lines += _table(("what", "found", ""), [
        (c["check"], c["found"], "yes" if c["passed"] else "**no**") for c in found["checks"]
    ])  # fmt: skip
    lines += ["", f"Left out: {found['left_out']}."] * bool(found["left_out"])
    lines += ["", "## Faults", ""]
    lines += _table(
        ("kind", "what is done", "times", "detected, s (median, max)", "recovered, s (median, max)", "by --resume"),
        [
            (kind, f"{KINDS[kind].act} {KINDS[kind].target}", str(row["num"]), _shown(row["detected_s"]),
             _shown(row["recovered_s"]), str(row["num_resumed"]))
            for kind, row in found["kinds"].items()
        ],
    )  # fmt: skip
    lines += ["", f"The disk is full by {found['disk']}. A dash: nothing in the run can notice it.", "", "## Runs", ""]
    lines += _table(
        ("run", "steps", "faults", "starts", "unexplained deaths", "orphans", "groups", "reward", "s", "ended"),
        [_run(run, found) for run in found["runs"]],
    )
    problems = [f"- {run['name']}: {run['problem']}" for run in found["runs"] if run["problem"]]
    problems += [f"- {name}: {p}" for name, count in found["prompts"].items() for p in count["problems"]]
    if problems:
        lines += ["", "## Problems", "", *problems]
    return "\n".join(lines) + "\n"


def _run(run: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    count, reward = found["prompts"].get(run["name"]), found["rewards"].get(run["name"])
    return (
        run["name"], str(run["num_steps"]), str(len(run["faults"])), str(run["num_starts"]),
        str(run["num_unexplained"]), str(run["num_orphans"]), "-" if count is None else str(count["num_groups"]),
        "-" if reward is None else f"{reward:.3f}", f"{run['seconds']:.0f}", "no" if run["problem"] else "by itself",
    )  # fmt: skip


def _shown(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.1f}, {spread['max']:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
