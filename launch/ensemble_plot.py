"""The ensemble study as a picture: gold, proxy and disagreement over the distance from the start, by what was trained.

May import: matplotlib (in the function that draws), numpy, launch.study_plot, trainers.equal_kl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.study_plot import COLOURS, MARKERS
from trainers.equal_kl import KLRun, gold_curves, mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_DRAWN = 60  # points of a curve


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One PPO run, a point a step: KL in nats a sequence; gold and proxy in one unit; disagreement of the members."""

    kl: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray
    disagreement: np.ndarray  # NaN where it was not measured

    @property
    def by_gold(self) -> KLRun:
        return KLRun(self.kl, self.gold)


def ensemble_plot(arms: Mapping[str, Sequence[StudyRun]], start: float, path: Path, unit: str) -> tuple[Path, Path]:
    """Draw into ``path`` as SVG and PNG; returns both files.

    Left: gold of every policy, and the mean of the runs' laws with its 95 % interval over runs, where all of them were.
    Middle: the proxy that was trained on.  Right: the disagreement of the ensemble's members on the same samples.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    gold, proxy, apart = figure.subplots(1, 3)
    for number, (name, runs) in enumerate(arms.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        _points(gold, runs, [r.gold for r in runs], colour, marker, name)
        _band(gold, runs, start, colour)
        _points(proxy, runs, [r.proxy for r in runs], colour, marker, name)
        _points(apart, runs, [r.disagreement for r in runs], colour, marker, name)
    titles = "gold, with 95 % interval over runs", "proxy: what each was trained on", "disagreement of the members"
    for axes, title in zip((gold, proxy, apart), titles, strict=True):
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("sqrt(KL from the SFT model), sqrt(nats)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    gold.set_ylabel(unit)
    apart.set_ylabel("reward")
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "burnish"}):  # the same runs give the same bytes
        figure.savefig(svg, facecolor="white", metadata={"Date": None})
    figure.savefig(png, facecolor="white")
    return svg, png


def _points(
    axes: Axes, runs: Sequence[StudyRun], values: Sequence[np.ndarray], colour: str, marker: str, label: str
) -> None:
    for number, (run, heights) in enumerate(zip(runs, values, strict=True)):
        if np.isfinite(heights).any():
            d = np.sqrt(np.maximum(run.kl, 0.0))
            axes.plot(d, heights, marker, color=colour, markersize=4, alpha=0.45, linestyle="none",
                      label=label if number == 0 and label else None)  # fmt: skip


def _band(axes: Axes, runs: Sequence[StudyRun], start: float, colour: str) -> None:
    """Where all runs were: elsewhere the mean would jump, and the interval of two runs is wider than any picture."""
    reach = [run.by_gold.reach for run in runs]
    least, largest = (max((r[0] for r in reach if r), default=0.0), min((r[1] for r in reach if r), default=0.0))
    if None in reach or least >= largest:
        return
    d = np.linspace(least, largest, NUM_DRAWN)
    curves = gold_curves([r.by_gold for r in runs], [float(x) for x in d], start)
    found = [mean_of(curves[:, i]) for i in range(d.size)]
    axes.plot(d, [e.value for e in found], color=colour, linewidth=1.8)
    low, high = ([getattr(e, end) if e.n > 1 else np.nan for e in found] for end in ("low", "high"))
    axes.fill_between(d, low, high, color=colour, alpha=0.18, linewidth=0)
