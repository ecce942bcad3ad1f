"""``make demo``: the shipped CPU recipe, then what it has learned.

    python -m scripts.demo [--recipe NAME] [--directory runs] [--seeds 0,1,2] [key=value ...]

A run of the same name that exists already is not touched: the new one gets the next free number.
May import: the launch room.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from launch.cli import REFUSED
from launch.journal import read_rows
from launch.overrides import load_config
from launch.plots import reward_plot
from launch.train import train
from trainers.errors import InputError


def free_name(directory: Path, name: str) -> str:
    """``name``, or ``name-2``, ``name-3`` ... where a run of that name exists."""
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(n for n in names if not (directory / n).exists())


def accuracies(folder: Path) -> tuple[float, float]:
    """(first, last) held-out accuracy of a run."""
    rows = read_rows(folder / "metrics.jsonl")
    values = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    return values[0], values[-1]


def main() -> int:
    """Run the demo once a seed; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("--recipe", default="cpu-demo")
    parser.add_argument("--directory", default="runs")
    parser.add_argument("--seeds", default="0", help="run.seed of each run, for instance 0,1,2")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    console, directory, folders = Console(), Path(arguments.directory), []
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        for seed in seeds:
            base = arguments.recipe if len(seeds) == 1 else f"{arguments.recipe}-seed{seed}"
            name = free_name(directory, base)
            overrides = [f"run.directory={directory}", f"run.name={name}", f"run.seed={seed}", *arguments.overrides]
            started = time.perf_counter()
            folders.append(train(load_config(arguments.recipe, overrides), False, console))
            before, after = accuracies(folders[-1])
            minutes = (time.perf_counter() - started) / 60
            console.print(
                f"[bold]{name}: held-out accuracy {before:.2f} -> {after:.2f} in {minutes:.1f} minutes[/bold]; "
                f"look closer with: .venv/bin/burnish inspect {folders[-1]}"
            )
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return REFUSED
    if len(folders) > 1:
        reward_plot(folders, directory / f"{arguments.recipe}.png")
        console.print(f"plot of all seeds: {directory / arguments.recipe}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
