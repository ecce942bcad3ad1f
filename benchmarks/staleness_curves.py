"""Reward curves of stale runs at max_staleness 0, 1, 4 and 16, with and without correction.

    python -m benchmarks.staleness_curves [--study letters] [--seeds 0,1,2] [--directory runs/staleness] [--quick]

    letters      a tiny random model at a high learning rate: seven runs a seed, a minute each
    arithmetic   the recipe cpu-demo: seven runs a seed, each somewhat longer than `make demo`, 45 minutes a seed

A run that has ended is not run again, so a study can be stopped and gone on with.  Writes the figure
docs/figures/staleness-STUDY.svg and the section ``staleness-STUDY`` of docs/benchmarks.md; with ``--quick`` everything
runs once, for two steps on the tiny model, and nothing is written there.
May import: numpy, rich, matplotlib (in the function that draws), benchmarks.page, launch.*, scripts.staged,
trainers.calibration.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.page import PAGE, markdown_table, replace_section
from benchmarks.process import ROOT
from launch.journal import read_rows
from launch.plots import smooth
from launch.stages import Stages
from scripts.staged import add_deadline, answer
from trainers.calibration import t_quantile

FIGURES = ROOT / "docs" / "figures"
STALENESS, QUICK_STALENESS = (0, 1, 4, 16), (0, 1)
ALWAYS = ("checkpoint.every=0", "checkpoint.export=false", "telemetry.progress=false", "telemetry.wandb=disabled")
TAIL = 16  # last steps whose training reward is averaged
COLOURS = ("#000000", "#0072B2", "#E69F00", "#D55E00")  # told apart by colour-blind readers
HELD_OUT = "held-out reward at the end"
COLUMNS = ("max_staleness", "correction", "seeds", "lag, steps", HELD_OUT,
           f"reward, last {TAIL} steps", "95 % interval over seeds")  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A task on which staleness is tried.  ``says``: what it is, for the page."""

    recipe: str
    num_steps: int
    overrides: tuple[str, ...]
    says: str
    is_judged_greedily: bool = True  # else the held-out reward, that of the likeliest answers, says nothing


STUDIES = {
    "letters": Study(
        "cpu-two-by-two", 96,
        (
            f"rewards.0.function={ROOT / 'benchmarks' / 'letters.py'}:half", "rewards.0.args={}",
            "generator.num_workers=1", "learner.num_workers=1", "learner.zero_stage=0", "model.dtype=float32",
            "learner.optimizer.lr=1e-3", "run.samples_per_prompt=8", "generator.max_num_seqs=64",
            "learner.token_budget=224",  # small packs are slow ones: what was sampled waits for the learner
        ),
        "A tiny random model, half of whose characters are to be letters from a to k",
        is_judged_greedily=False,
    ),
    "arithmetic": Study("cpu-demo", 32, (), "SmolLM2-135M-Instruct, the recipe `cpu-demo`"),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Variant:
    """One curve; without staleness there is nothing to correct."""

    max_staleness: int
    is_corrected: bool

    @property
    def name(self) -> str:
        return f"k{self.max_staleness}" + ("" if self.is_corrected or not self.max_staleness else "-uncorrected")

    @property
    def correction(self) -> str:
        """In the table."""
        return "none needed" if not self.max_staleness else "token_truncate" if self.is_corrected else "none"

    def overrides(self) -> list[str]:
        """Stale runs have a core for the generator and one for the learner, which work at the same time."""
        kind = "auto" if self.is_corrected else "none"
        own_cores = str(self.max_staleness > 0).lower()
        return [f"run.max_staleness={self.max_staleness}", f"algorithm.correction.kind={kind}",
                f"cluster.own_cores={own_cores}"]  # fmt: skip


def variants(staleness: Sequence[int]) -> list[Variant]:
    """Every staleness with correction, and every one above 0 without."""
    return [Variant(k, corrected) for k in staleness for corrected in (True, False) if k or corrected]


@dataclass(frozen=True)
class Curve:
    """What one run's metrics say."""

    steps: list[int]
    rewards: list[float]  # of the trained samples, by step
    held_out: float  # reward at the end; NaN where it was not measured
    lag: float  # mean of staleness/mean


def read_curve(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """Of the rows of metrics.jsonl."""
    trained = [row for row in rows if row.get("reward") is not None]
    held_out = [row["eval/reward"] for row in rows if row.get("eval/reward") is not None]
    return Curve(
        [row["step"] for row in trained], [row["reward"] for row in trained],
        held_out[-1] if held_out else float("nan"),
        statistics.fmean(row["staleness/mean"] for row in trained),
    )  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval) by Student's t; NaN for the second of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def table_rows(curves: Mapping[Variant, Sequence[Curve]]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS."""
    rows = []
    for variant, found in sorted(curves.items(), key=lambda item: (item[0].max_staleness, not item[0].is_corrected)):
        tails = [statistics.fmean(curve.rewards[-TAIL:]) for curve in found]
        mean, half = interval(tails)
        spread = f"{mean - half:.3f} to {mean + half:.3f}" if np.isfinite(half) else "one seed"
        rows.append((
            str(variant.max_staleness), variant.correction, str(len(found)),
            f"{statistics.fmean(curve.lag for curve in found):.1f}",
            f"{statistics.fmean(curve.held_out for curve in found):.3f}", f"{mean:.3f}", spread,
        ))  # fmt: skip
    return rows


def draw(curves: Mapping[Variant, Sequence[Curve]], path: Path) -> None:
    """Smoothed reward by step into ``path`` (SVG): with correction on the left, without on the right.

    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    panels: Any = figure.subplots(1, 2, sharey=True)
    colour_of = dict(zip(sorted({v.max_staleness for v in curves}), COLOURS))
    for axes, is_corrected in zip(panels, (True, False)):
        for variant in sorted(curves):
            if variant.max_staleness and variant.is_corrected != is_corrected:
                continue
            found, colour = curves[variant], colour_of[variant.max_staleness]
            steps = found[0].steps[: min(len(curve.steps) for curve in found)]
            values = np.array([smooth(curve.rewards)[: len(steps)] for curve in found])
            axes.plot(steps, values.mean(axis=0), color=colour, linewidth=1.8, label=str(variant.max_staleness))
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.set_title("with correction" if is_corrected else "without correction", fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training reward, smoothed")
    panels[0].legend(title="max_staleness", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "burnish"}):  # the same curves give the same bytes
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run_all(
    stages: Stages, study: Study, staleness: Sequence[int], seeds: Sequence[int], num_steps: int
) -> dict[Variant, list[Curve]]:
    """Every run that is missing; the curves of all."""
    curves: dict[Variant, list[Curve]] = {}
    more = [*study.overrides, *ALWAYS, f"run.num_steps={num_steps}", f"evaluation.every={num_steps}"]
    for seed in seeds:  # whole seeds first: a study that is stopped early still compares
        for variant in variants(staleness):
            name = f"{variant.name}-seed{seed}"
            metrics = stages.run(
                name,
                ["train", study.recipe, f"run.directory={stages.directory}", f"run.name={name}", f"run.seed={seed}",
                 *variant.overrides(), *more],
                f"{name}/metrics.jsonl",
            )  # fmt: skip
            curves.setdefault(variant, []).append(read_curve(list(read_rows(metrics))))
    return curves


def without(cells: Sequence[str]) -> tuple[str, ...]:
    """``cells`` of a row without that of the held-out reward."""
    return tuple(cell for cell, column in zip(cells, COLUMNS, strict=True) if column != HELD_OUT)


def text_of(name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], num_steps: int) -> str:
    """The section of the page."""
    return "\n\n".join([
        f"{STUDIES[name].says}, {num_steps} steps.",
        markdown_table(columns, rows),
        "![Training reward by step at max_staleness 0, 1, 4, 16, with correction and without]"
        f"(figures/staleness-{name}.svg)",
    ])  # fmt: skip


def main() -> int:
    """Run what is missing, draw, print, write; exit code 1 when a run failed, 2 when one was refused."""
    parser = argparse.ArgumentParser(prog="staleness_curves")
    parser.add_argument("--study", choices=sorted(STUDIES), default="letters")
    parser.add_argument("--directory", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--seeds", default="0,1,2", help="run.seed of each run")
    parser.add_argument("--quick", action="store_true", help="the tiny model, two steps: does it run?")
    add_deadline(parser)
    arguments = parser.parse_args()
    return answer("staleness_curves", lambda: draw_curves(arguments))


def draw_curves(arguments: argparse.Namespace) -> None:
    """Run what is missing, draw, print, write.  StageError when a run fails, InputError when one is refused."""
    name = "letters" if arguments.quick else arguments.study
    study, console = STUDIES[name], Console()
    seeds, steps, staleness = [int(s) for s in arguments.seeds.split(",")], study.num_steps, STALENESS
    if arguments.quick:
        seeds, steps, staleness = [0], 2, QUICK_STALENESS
    figure = FIGURES / f"staleness-{name}.svg"
    with tempfile.TemporaryDirectory(prefix="burnish-staleness-") as scratch:
        directory = Path(scratch) if arguments.quick else arguments.directory.absolute() / name
        directory.mkdir(parents=True, exist_ok=True)
        curves = run_all(Stages(directory, console, arguments.deadline_s), study, staleness, seeds, steps)
        draw(curves, directory / figure.name if arguments.quick else figure)
    rows, columns = table_rows(curves), COLUMNS
    if not study.is_judged_greedily:
        rows, columns = [without(row) for row in rows], without(COLUMNS)
    table = Table(*columns, title="stale runs")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not arguments.quick:
        PAGE.write_text(replace_section(PAGE.read_text(), text_of(name, columns, rows, steps), f"staleness-{name}"))
        console.print(f"written: {figure.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
