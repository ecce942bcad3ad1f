"""The comparison as a picture: reward against KL from the base model, one mark an algorithm, with 95 % intervals.

Colours are told apart by colour-blind readers, marks on a black-and-white print: open ones learned offline, filled ones
online, and stars on a line are best-of-n.
May import: matplotlib (in the function that draws), launch.{compare_methods, compare_rows, eval_page}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.compare_methods import METHODS
from launch.compare_rows import Row
from launch.eval_page import figure_svg
from trainers.calibration import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "os^Dv<>XPd"
GREY = "#666666"


def compare_svg(rows: Sequence[Row], unit: str, gold: bool = False) -> str | None:
    """An SVG document, the same bytes for the same rows; None where nothing was measured.

    Args:
        unit: of the reward.
        gold: the reward that stands for the truth is drawn, not the one that was learned from.
    """
    drawn = [row for row in rows if row.is_drawn]
    if not drawn:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    FigureCanvasSVG(figure)  # draws without a display
    axes = figure.add_subplot()
    _best_of(axes, [row for row in drawn if row.kind in ("base", "search")], gold)
    for row in drawn:
        if row.kind in ("offline", "online"):
            _point(axes, row, gold)
    axes.set_xscale("function", functions=(_root, np.square))  # best-of-n would be squeezed into a corner otherwise
    furthest = max(row.kl.high if np.isfinite(row.kl.high) else row.kl.value for row in drawn if row.kl is not None)
    axes.set_xlim(0, 1.05 * furthest or 1.0)
    axes.set_xlabel("KL from the base model, nats an answer (square-root scale)")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure_svg(figure)


def _root(values: Any) -> np.ndarray:
    return np.asarray(np.sqrt(np.maximum(values, 0.0)))


def _height(row: Row, gold: bool) -> Estimate:
    assert row.measures is not None
    found = row.measures.gold if gold else row.measures.reward
    assert found is not None
    return found


def _point(axes: Axes, row: Row, gold: bool) -> None:
    assert row.kl is not None
    peers = [name for name, method in METHODS.items() if method.kind == row.kind]
    place = peers.index(row.name)  # the same mark in every comparison
    colour, is_open = COLOURS[place % len(COLOURS)], row.kind == "offline"
    reward = _height(row, gold)
    axes.errorbar(
        [max(row.kl.value, 0.0)], [reward.value], xerr=_reach(row.kl, 0.0), yerr=_reach(reward),
        fmt=MARKERS[place % len(MARKERS)], color=colour, markerfacecolor="white" if is_open else colour, markersize=7,
        capsize=2, linewidth=1.1, label=row.title,
    )  # fmt: skip


def _best_of(axes: Axes, rows: Sequence[Row], gold: bool) -> None:
    """From the base model, which is the best of one, on."""
    found = sorted(((row.kl.value, row) for row in rows if row.kl is not None), key=lambda pair: pair[0])
    for kl, row in found:
        assert row.kl is not None
        is_base, reward = row.kind == "base", _height(row, gold)
        axes.errorbar(
            [kl], [reward.value], xerr=_reach(row.kl, 0.0), yerr=_reach(reward), fmt="s" if is_base else "*",
            color=GREY, markersize=6 if is_base else 10, capsize=2, linewidth=1.1, label=row.title if is_base else None,
            clip_on=not is_base,  # it stands on the edge
        )  # fmt: skip
        if not is_base:
            axes.annotate(str(row.settings["per_answer"]), (kl, reward.value), xytext=(6, -11),
                          textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
    if any(row.kind == "search" for _, row in found):
        heights = [_height(row, gold).value for _, row in found]
        axes.plot([kl for kl, _ in found], heights, color=GREY, linestyle="--", linewidth=1.0,
                  label="best-of-n")  # fmt: skip


def _reach(estimate: Estimate, floor: float = -np.inf) -> list[list[float]]:
    """Lengths of the error bars below and above; none where there is no interval."""
    if not (np.isfinite(estimate.low) and np.isfinite(estimate.high)):
        return [[0.0], [0.0]]
    value = max(estimate.value, floor)
    return [[max(0.0, value - max(estimate.low, floor))], [max(0.0, estimate.high - value)]]
