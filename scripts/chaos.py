"""``make chaos``: faults on a seeded schedule under real runs, and a report.

    python -m scripts.chaos [--directory runs/chaos] [--seed 0] [--faults 100] [--families hosts] [--quick | --short]

    schedule --> deal --> runs under faults, and the same runs without --> prompts counted --> report.md, report.json
Stopped, it goes on with the run in which it was when it is called again with the same schedule and directory.
May import: rich, scripts.*, launch.{cli, journal}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

from rich.console import Console

from launch.cli import REFUSED
from launch.journal import read_rows
from scripts.chaos_folder import FolderError, Planned, clear, open_folder, read_outcome, write_outcome
from scripts.chaos_report import Asked, markdown, report
from scripts.chaos_run import ChaosRun, RunOutcome
from scripts.chaos_runs import EPOCH, EPOCH_STEPS, FAMILIES, SAVE_EVERY, commands, environment, make_reward_model
from scripts.count_prompts import Count, count_prompts
from scripts.disk import Disk, open_disk
from scripts.faults import KINDS, deal, schedule
from scripts.hosts import HostsError, lacking
from scripts.sites import OneMachine, open_hosts

NUM_SEEDS = 3
LONG = {f"async-{i}": ("async", i) for i in range(NUM_SEEDS)} | {name: (name, 0) for name in ("ppo", "beside", "hosts")}
NUM_STEPS = 16 * EPOCH_STEPS
HOST_STEPS = 2 * EPOCH_STEPS  # for each lost host: more than come before it is back
MORE_STEPS = 16 * EPOCH_STEPS  # when a run ends before its faults are through: more than any recovery takes
QUICK_STEPS, SHORT_STEPS = 12 * EPOCH_STEPS, 4 * EPOCH_STEPS
QUICK = ("kill_generator", "stall_push", "pause_generator", "slow_generator", "kill_reward_worker", "kill_reference",
         "kill_learner", "fill_disk", "terminate_driver", "kill_everything")  # fmt: skip


def plan(seed: int, num_faults: int, families: Sequence[str]) -> list[Planned]:
    """The long schedule of these families: runs under faults, then those of the family ``async`` again, unharmed."""
    shape = {name: (family, s) for name, (family, s) in LONG.items() if family in families}
    able = {name: FAMILIES[family].kinds for name, (family, _) in shape.items()}
    kinds = tuple(kind for kind in KINDS if any(kind in some for some in able.values()))
    dealt = deal(schedule(seed, num_faults, kinds), able)
    hit = []
    for name, (family, s) in shape.items():
        num_steps = HOST_STEPS * max(1, len(dealt[name])) if family == "hosts" else NUM_STEPS
        hit.append(Planned(name, family, s, num_steps, dealt[name]))
    pairs = range(NUM_SEEDS) if "async" in families else ()
    return hit + [Planned(f"unharmed-{i}", "async", i, NUM_STEPS) for i in pairs]


def brief(seed: int, family: str, num_steps: int, kinds: Sequence[str]) -> list[Planned]:
    """One run, each kind once."""
    return [Planned(family, family, seed, num_steps, schedule(seed, len(kinds), kinds))]


def mean_reward(folder: Path, num_steps: int) -> float:
    """Over the planned steps, learning included; those that were added for faults do not count."""
    rows = read_rows(folder / "metrics.jsonl")
    return fmean(float(row["reward"]) for row in rows if row["step"] <= num_steps)


def run_one(p: Planned, directory: Path, disk: Disk, console: Console) -> RunOutcome:
    """Leaves its folder, its output and what became of it in ``directory``."""
    clear(directory, p.name)
    clear(disk.folder, p.name)
    model = make_reward_model(directory / "reward-model") if p.family == "ppo" else None
    folder, two = disk.folder / p.name, p.family == "hosts"
    try:
        with open_hosts(environment(), directory / f"{p.name}-ray") if two else nullcontext(OneMachine()) as site:
            command = commands(p.family, p.name, disk.folder, p.seed, model, site.overrides)
            outcome = ChaosRun(
                p.name, folder, command, p.faults, p.num_steps, MORE_STEPS, SAVE_EVERY, disk,
                directory / f"{p.name}.log", environment(), console.print, site,
            ).go()  # fmt: skip
    except HostsError as error:  # before there was a run, or at the end of its hosts
        outcome = RunOutcome(p.name, p.num_steps, problem=str(error))
    if disk.folder != directory and folder.exists():
        shutil.move(folder, directory / p.name)
    write_outcome(directory, outcome)
    return outcome


def run_all(
    planned: Sequence[Planned], directory: Path, disk: Disk, console: Console
) -> tuple[list[RunOutcome], dict[str, Count]]:
    """One run after the other; those that are over are not run again."""
    outcomes, counts = [], {}
    for p in planned:
        console.rule(f"{p.name}: {len(p.faults)} faults")
        outcome = read_outcome(directory, p.name) or run_one(p, directory, disk, console)
        outcomes.append(outcome)
        if (directory / p.name / "metrics.jsonl").exists():
            counts[p.name] = count_prompts(directory / p.name, EPOCH)
        console.print(f"{p.name}: {outcome.seconds:.0f} s, {len(outcome.faults)} faults, {outcome.num_starts} starts")
    return outcomes, counts


def asked_of(arguments: argparse.Namespace, planned: Sequence[Planned], left_out: str) -> Asked:
    faults = [fault for p in planned for fault in p.faults]
    kinds = tuple(dict.fromkeys(f.kind for f in faults))
    is_brief = arguments.quick or arguments.short
    each = 1 if is_brief else min(5, len(faults) // max(1, len(kinds)))
    compare = not is_brief and any(p.family == "async" for p in planned)
    return Asked(arguments.seed, len(faults), each, kinds, compare, left_out)


def rewards_of(planned: Sequence[Planned], outcomes: Sequence[RunOutcome], directory: Path) -> Mapping[str, float]:
    """Of the runs of the family ``async`` that reached their planned end."""
    whole = {outcome.name for outcome in outcomes if outcome.problem is None}
    return {
        p.name: mean_reward(directory / p.name, p.num_steps)
        for p in planned
        if p.family == "async" and p.name in whole
    }


def main() -> int:
    """Exit code 1 when something did not pass."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs, hosts and disk go with it
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/chaos"), help="a new one, or one to go on with")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--faults", type=int, default=100, help="of the long schedule")
    known = tuple(dict.fromkeys(family for family, _ in LONG.values()))
    parser.add_argument("--families", nargs="+", choices=known, help="of the long schedule; default: all")
    parser.add_argument("--quick", action="store_true", help="one run, ten kinds of faults once each")
    parser.add_argument("--short", action="store_true", help="one run, two faults: what `make test` has time for")
    arguments = parser.parse_args()
    if arguments.faults < 1:
        parser.error(f"--faults {arguments.faults}: there is nothing to inject; give at least 1")
    if arguments.families and (arguments.quick or arguments.short):
        parser.error("--families chooses runs of the long schedule; leave it out, or --quick and --short")
    families, left_out = arguments.families or list(known), ""
    is_brief = arguments.quick or arguments.short
    if "hosts" in families and not is_brief and (why := lacking()):
        families = [family for family in families if family != "hosts"]
        left_out = f"{' and '.join(FAMILIES['hosts'].kinds)}, because {why}"
        print(f"chaos: left out: {left_out}", file=sys.stderr)  # noqa: T201 - the command's answer
        if not families:
            return REFUSED
    directory, console = arguments.directory.absolute(), Console(highlight=False)
    if arguments.short:
        planned = brief(arguments.seed, "small", SHORT_STEPS, FAMILIES["small"].kinds)
    elif arguments.quick:
        planned = brief(arguments.seed, "async", QUICK_STEPS, QUICK)
    else:
        planned = plan(arguments.seed, arguments.faults, families)
    try:
        open_folder(directory, planned)
    except FolderError as error:
        print(f"chaos: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return REFUSED
    disk = open_disk(directory / "disk")
    console.print(f"the disk is full by {disk.how}")
    try:
        outcomes, counts = run_all(planned, directory, disk, console)
    finally:
        disk.close()
    found = report(
        asked_of(arguments, planned, left_out), outcomes, counts, rewards_of(planned, outcomes, directory), disk.how
    )
    (directory / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(found)
    (directory / "report.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
