"""Plots of an evaluation, as SVG documents.

May import: matplotlib (in the functions that draw), numpy, trainers.{calibration, reward_report, win_rate},
launch.{eval_page, reward_files}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.eval_page import figure_svg
from launch.reward_files import BLUE, GREY, ORANGE, draw_lengths, draw_reliability, draw_scores
from trainers.calibration import Estimate
from trainers.reward_report import RewardReport
from trainers.win_rate import WinRate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE)
MAX_POINTS = 2000  # of a scatter plot: an SVG holds every one
BAR = 0.36


def win_plot(rates: Mapping[str, WinRate]) -> str:
    """Raw and length-controlled win rates with their intervals."""
    figure, axes = _figure(6.4, 1.2 + 0.7 * len(rates))
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
    for shift, colour, label, marker in ((0.12, BLUE, "win rate", "o"), (-0.12, ORANGE, "at equal length", "s")):
        chosen = [r.raw if label == "win rate" else r.length_controlled for r in rates.values()]
        _with_intervals(axes, chosen, [i + shift for i in range(len(chosen))], colour, label, marker)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rates) - 0.4), xlabel="share of pairs the policy wins, ties as half")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure_svg(figure)


def best_of_n_plot(bounds: Sequence[float], rates: Mapping[str, Sequence[Estimate]]) -> str:
    """Win rate of the best of n by each of ``rates`` over the bound on its KL, ``bounds``, nats."""
    figure, axes = _figure(6.4, 3.6)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    for (name, found), colour in zip(rates.items(), COLOURS, strict=False):
        values = [rate.value for rate in found]
        axes.errorbar(bounds, values, yerr=_reach(found), color=colour, marker="o", capsize=3, label=name)
    axes.set(ylim=(0, 1), xlabel="KL from the policy, nats, at most", ylabel="win rate, ties as half")
    axes.legend(frameon=False, fontsize=8)
    return figure_svg(figure)


def length_plot(sides: Mapping[str, tuple[np.ndarray, np.ndarray]], reward: str) -> str:
    """Reward against length of every sample; ``sides``: model -> (lengths, rewards)."""
    figure, axes = _figure(6.4, 3.6)
    for (who, (lengths, rewards)), colour in zip(sides.items(), COLOURS, strict=False):
        there = np.flatnonzero(np.isfinite(rewards))[:MAX_POINTS]
        axes.scatter(lengths[there], rewards[there], s=10, alpha=0.5, color=colour, label=who, linewidths=0)
    axes.set(xlabel="length, tokens", ylabel=reward)
    axes.legend(frameon=False, fontsize=8)
    return figure_svg(figure)


def suite_plot(sides: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Pass and flip rates of every suite, models side by side; ``sides``: model -> measure -> rate."""
    measures = [m for m in next(iter(sides.values())) if not m.endswith("/unclear")]
    figure, axes = _figure(6.4, 1.0 + 0.45 * len(measures))
    for number, (who, found) in enumerate(sides.items()):
        places = [i + (number - (len(sides) - 1) / 2) * BAR for i in range(len(measures))]
        colour = COLOURS[number % len(COLOURS)]
        values = [0.0 if math.isnan(found[m].value) else found[m].value for m in measures]
        axes.barh(places, values, height=BAR, color=colour, alpha=0.45, label=who)
        _with_intervals(axes, [found[m] for m in measures], places, colour, "", "")
    axes.set_yticks(range(len(measures)), measures)
    axes.set(xlim=(0, 1), xlabel="share (95 % interval)")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    return figure_svg(figure)


def calibration_plot(who: str, calibration: Mapping[str, Any]) -> str:
    """Reliability of one policy's sequence probabilities."""
    figure, axes = _figure(4.2, 3.8)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    bins = calibration["reliability"]
    axes.errorbar(
        [b.predicted for b in bins], [b.observed.value for b in bins], yerr=_reach([b.observed for b in bins]),
        color=BLUE, marker="o", capsize=3,
    )  # fmt: skip
    error = calibration["expected_calibration_error"]
    axes.set(title=f"{who}, error {error:.3g}, n={calibration['n']}", xlabel="probability of the answer",
             ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    return figure_svg(figure)


def reward_model_plots(report: RewardReport) -> tuple[str, ...]:
    """Reliability, scores, and accuracy by length difference."""
    drawn = []
    for draw in (draw_reliability, draw_scores, draw_lengths):
        figure, axes = _figure(4.4, 3.6)
        draw(axes, report)
        drawn.append(figure_svg(figure))
    return tuple(drawn)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)  # draws without a display
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above."""
    return [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]


def _with_intervals(
    axes: Axes, estimates: Sequence[Estimate], places: Sequence[float], colour: str, label: str, marker: str
) -> None:
    """Points with horizontal intervals; an estimate without a value has none."""
    there = [(e, place) for e, place in zip(estimates, places, strict=True) if not math.isnan(e.value)]
    if there:
        chosen = [e for e, _ in there]
        axes.errorbar(
            [e.value for e in chosen], [place for _, place in there], xerr=_reach(chosen), color=colour, label=label,
            marker=marker, linestyle="none", capsize=3,
        )  # fmt: skip
