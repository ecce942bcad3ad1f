"""What a run shows when it has ended: its metrics, where the time went, samples before and after, a plot.

May import: rich, launch.{accountant, plots, telemetry}.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from launch.accountant import bubble_table
from launch.plots import before_after, before_after_table, reward_plot
from launch.telemetry import Telemetry


def show_end(console: Console, folder: Path, telemetry: Telemetry) -> None:
    console.print(telemetry.summary())
    if (bubbles := bubble_table(folder)) is not None:
        console.print(bubbles)
    if (folder / "samples-after.jsonl").exists():
        console.print(before_after_table(before_after(folder)))
    if (folder / "metrics.jsonl").exists():
        reward_plot([folder], folder / "reward.png")
        console.print(f"plot: {folder / 'reward.png'}")
