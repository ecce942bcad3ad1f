"""Pictures and before/after tables of runs, for READMEs and reports.

May import: matplotlib (in the function that draws), rich, trainers.errors, launch.journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from launch.journal import read_rows
from trainers.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.8  # weight of the past in the thick line over the raw training reward
RUN_COLOURS = ("#1f5fa8", "#d1662b", "#3b8f4e", "#8a4fa3", "#b0303c", "#4d4d4d")
PART_STYLES = ("--", ":", "-.")


def reward_plot(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw held-out accuracy, training reward, completion length and, where there is one, KL into ``out`` (PNG).

    Panels without data in any run are left out.  InputError when a folder has no metrics.
    """
    runs = [(folder.resolve().name, list(read_rows(folder / "metrics.jsonl"))) for folder in run_dirs]
    for folder, (_, rows) in zip(run_dirs, runs, strict=True):
        if not rows:
            raise InputError("RUN", str(folder), "no metrics.jsonl with rows in it", "give a folder such as runs/NAME")
    if not runs:
        raise InputError("RUN", [], "no run given", "give at least one run folder")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("eval/accuracy", "held-out accuracy", "fraction correct"),
        ("reward", "training reward", "reward"),
        ("completions/mean_length", "completion length", "tokens"),
        ("kl", "KL from the reference", "nats per token"),
    ]
    panels = [p for p in panels if any(_series(rows, p[0])[0] for _, rows in runs)]
    columns = min(2, len(panels)) or 1
    lines = (len(panels) + columns - 1) // columns or 1
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    for place, (name, title, unit) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for number, (run, rows) in enumerate(runs):
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            steps, values = _series(rows, name)
            if name == "reward":
                _draw_reward(axes, run, rows, colour, alone=len(runs) == 1)
            elif steps:
                dotted = "o" if name == "eval/accuracy" else ""
                axes.plot(steps, values, color=colour, marker=dotted, markersize=4, linewidth=1.8, label=run)
        if name == "eval/accuracy":
            axes.set_ylim(0, 1)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1 or name == "reward":
            axes.legend(fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", facecolor="white")


def _draw_reward(axes: Axes, run: str, rows: Sequence[dict[str, Any]], colour: str, alone: bool) -> None:
    """Raw reward thin, its running mean thick; the parts of a single run in other strokes."""
    steps, values = _series(rows, "reward")
    if not steps:
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth(values), color=colour, linewidth=2, label="total" if alone else run)
    parts = sorted({n for row in rows for n in row if n.startswith("rewards/") and n.endswith("/mean")})
    if not alone or len(parts) < 2:
        return
    for number, part in enumerate(parts):
        steps, values = _series(rows, part)
        if steps:
            axes.plot(steps, smooth(values), color=RUN_COLOURS[(number + 1) % len(RUN_COLOURS)], linewidth=1.4,
                      linestyle=PART_STYLES[number % len(PART_STYLES)],
                      label=part.removeprefix("rewards/").removesuffix("/mean"))


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the steps where it has none."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [s for s, _ in pairs], [v for _, v in pairs]


def smooth(values: Sequence[float], past: float = SMOOTHING) -> list[float]:
    """Exponential running mean with the start corrected, so that a constant stays that constant."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = past * mean + (1 - past) * value
        weight = past * weight + (1 - past)
        out.append(mean / weight)
    return out


def before_after(run_dir: Path) -> list[dict[str, Any]]:
    """The prompts answered both before and after training, in the order of the first file.

    Reads ``samples-before.jsonl`` and ``samples-after.jsonl`` (rows: prompt, completion, reward, answer);
    returns rows of prompt, answer, before, after, reward_before, reward_after.  InputError when one is missing.
    """
    both: list[dict[str, dict[str, Any]]] = []
    for name in ("samples-before.jsonl", "samples-after.jsonl"):
        rows = {row["prompt"]: row for row in read_rows(run_dir / name) if "prompt" in row}
        if not rows:
            raise InputError("RUN", str(run_dir), f"no samples in {name}", "give a run with a finished evaluation")
        both.append(rows)
    before, after = both
    return [
        {
            "prompt": prompt,
            "answer": row.get("answer"),
            "before": row.get("completion", ""),
            "after": after[prompt].get("completion", ""),
            "reward_before": row.get("reward"),
            "reward_after": after[prompt].get("reward"),
        }
        for prompt, row in before.items()
        if prompt in after
    ]


def before_after_table(rows: Sequence[dict[str, Any]], num_rows: int = 10, prompt_chars: int = 120) -> Table:
    """The first ``num_rows`` rows of :func:`before_after`; only the end of a long prompt is shown."""
    table = Table(title="the same prompts before and after training", show_lines=True)
    for title in ("prompt", "answer", "before", "after"):
        table.add_column(title, overflow="fold")
    table.add_column("reward", justify="right")
    for row in rows[:num_rows]:
        rewards = " -> ".join("-" if r is None else f"{r:g}" for r in (row["reward_before"], row["reward_after"]))
        answer = "" if row["answer"] is None else str(row["answer"])
        texts = (row["prompt"][-prompt_chars:], answer, row["before"], row["after"])
        table.add_row(*(Text(text) for text in texts), rewards)
    return table
