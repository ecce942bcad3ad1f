"""What is written beside an exported reward model: its statistics, its report, and the report as a picture.

May import: matplotlib (in the function that draws), numpy, actors.reward_model, trainers.{calibration, reward_report}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.reward_model import STATS, RewardStats
from trainers.reward_report import RewardReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, PLOT = "reward_report.json", "reward_report.svg"
BLUE, ORANGE, GREY = "#1f5fa8", "#d1662b", "#8a8a8a"


def write_reward_files(folder: Path, report: RewardReport, reference_scores: np.ndarray, reference: str) -> RewardStats:
    """Write statistics, report and plot into ``folder``.

    Args:
        reference_scores: float32 [num] of the texts that scores are normalised by.
        reference: which texts these are, for readers.
    """
    scores = reference_scores.astype(np.float64)
    stats = RewardStats(float(scores.mean()), float(scores.std()), int(scores.size), reference)
    (folder / STATS).write_text(json.dumps(stats._asdict(), indent=2) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    draw(report, folder / PLOT)
    return stats


def draw(report: RewardReport, out: Path) -> None:
    """Reliability, scores, and accuracy by length difference, side by side (SVG)."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 3.9), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    reliability, scores, lengths = figure.subplots(1, 3)
    draw_reliability(reliability, report)
    draw_scores(scores, report)
    draw_lengths(lengths, report)
    with matplotlib.rc_context({"svg.hashsalt": "burnish", "svg.fonttype": "none"}):  # equal reports, equal bytes
        canvas.print_svg(str(out), metadata={"Date": None})


def draw_reliability(axes: Axes, report: RewardReport) -> None:
    """Predicted against observed preference."""
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    predicted = [b.predicted for b in report.bins]
    observed = [b.observed.value for b in report.bins]
    error = [[b.observed.value - b.observed.low for b in report.bins],
             [b.observed.high - b.observed.value for b in report.bins]]  # fmt: skip
    axes.errorbar(predicted, observed, yerr=error, color=BLUE, marker="o", capsize=3, label="held-out pairs")
    axes.set(title=f"Reliability (ECE {report.calibration_error:.3f})", xlabel="predicted P(preferred)",
             ylabel="preferred (95 % interval)", xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    axes.legend(loc="upper left", frameon=False)


def draw_scores(axes: Axes, report: RewardReport) -> None:
    """Scores of chosen and of rejected answers."""
    bins = np.histogram_bin_edges(np.concatenate([report.chosen, report.rejected]), bins=30)
    for values, colour, label in ((report.chosen, BLUE, "chosen"), (report.rejected, ORANGE, "rejected")):
        axes.hist(values, bins=bins.tolist(), color=colour, alpha=0.55, label=label)
    axes.set(title=f"Scores of {report.chosen.size} held-out pairs", xlabel="score", ylabel="answers")
    axes.legend(loc="upper left", frameon=False)


def draw_lengths(axes: Axes, report: RewardReport) -> None:
    """Accuracy by how much longer the chosen answer is."""
    accuracy = report.accuracy
    axes.axhspan(accuracy.low, accuracy.high, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(accuracy.value, color=GREY, linewidth=1, label=f"all pairs: {accuracy}")
    places = range(len(report.by_length))
    values = [b.accuracy.value for b in report.by_length]
    error = [[b.accuracy.value - b.accuracy.low for b in report.by_length],
             [b.accuracy.high - b.accuracy.value for b in report.by_length]]  # fmt: skip
    axes.errorbar(places, values, yerr=error, color=BLUE, marker="o", capsize=3, linestyle="none")
    axes.set_xticks(list(places), [_range(b.low, b.high) for b in report.by_length], fontsize=8)
    axes.set(title="Accuracy by length difference", xlabel="tokens by which the chosen answer is longer",
             ylabel="accuracy (95 % interval)", ylim=(0, 1))  # fmt: skip
    axes.legend(loc="lower left", frameon=False)


def _range(low: float, high: float) -> str:
    return f"{low:+.0f}" if low == high else f"{low:+.0f} to {high:+.0f}"
