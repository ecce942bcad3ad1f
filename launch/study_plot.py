"""The over-optimisation study as a picture and a table: proxy and gold against the distance from the start.

May import: matplotlib (in the function that draws), trainers.overoptimisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.overoptimisation import BEST_OF_N, RL, Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4488", "#E69F00", "#000000")  # told apart by colour-blind readers
MARKERS = "os^Dv*"  # and on a black-and-white print
GREY = "#444444"
PROXY_STROKE: dict[str, Any] = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}


@dataclass(frozen=True)
class StudyPoint:
    """One measured policy.  ``proxy`` and ``gold`` are read off one axis: give both in the same unit, for instance
    standard deviations over samples of the starting policy.  ``kl`` is nats a sequence; ``kl_coef`` is None for
    best-of-n and the beta of PPO for RL."""

    method: str
    kl: float
    proxy: float
    gold: float
    kl_coef: float | None = None


Series = tuple[str, float | None]  # method and kl_coef; (RL, None) is a law fitted through all RL points


def study_plot(
    points: Sequence[StudyPoint], fits: Mapping[Series, Fit], path: Path, unit: str = "score"
) -> tuple[Path, Path]:
    """Draw best-of-n (left) and RL (right, one colour a beta) into ``path`` as SVG and PNG; returns both files.

    Full lines and filled marks are gold, broken lines and open marks proxy, dotted lines the fitted laws.  A method
    without points has no panel; one file a suffix, whatever suffix ``path`` has.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    methods = [m for m in (BEST_OF_N, RL) if any(p.method == m for p in points)]
    if not methods:
        raise ValueError("study_plot: no points to draw")
    figure = Figure(figsize=(4.8 * len(methods), 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    first: Axes | None = None
    for place, method in enumerate(methods, start=1):
        axes = figure.add_subplot(1, len(methods), place, sharey=first)
        first = first or axes
        coefs = sorted({p.kl_coef for p in points if p.method == method}, key=lambda c: -1.0 if c is None else c)
        for number, coef in enumerate(coefs):
            series = [p for p in points if p.method == method and p.kl_coef == coef]
            _draw(axes, series, number, "" if coef is None else f"beta {coef:g}")
            if (method, coef) in fits:
                _draw_law(axes, fits[method, coef], series, COLOURS[number % len(COLOURS)])
        if coefs != [None] and (method, None) in fits:
            _draw_law(axes, fits[method, None], [p for p in points if p.method == method], GREY)
        axes.set_title(method, fontsize=11, loc="left")
        axes.set_xlabel("sqrt(KL from the SFT model), sqrt(nats)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if coefs != [None]:
            axes.legend(fontsize=8, frameon=False)
    assert first is not None
    first.set_ylabel(unit)
    meaning = [Line2D([], [], color=GREY, marker="o", label="gold"),
               Line2D([], [], color=GREY, marker="o", label="proxy", **PROXY_STROKE)]  # fmt: skip
    if fits:
        meaning.append(Line2D([], [], color=GREY, linestyle=":", linewidth=2.2, label="fitted law of gold"))
    figure.legend(handles=meaning, loc="outside lower center", ncols=3, fontsize=9, frameon=False, handlelength=4)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "burnish"}):  # the same points give the same bytes
        figure.savefig(svg, facecolor="white", metadata={"Date": None})
    figure.savefig(png, facecolor="white")
    return svg, png


def _draw(axes: Axes, points: Sequence[StudyPoint], number: int, label: str) -> None:
    ordered = sorted(points, key=lambda p: p.kl)
    d = np.sqrt([max(p.kl, 0.0) for p in ordered])
    stroke: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5,
    }  # fmt: skip
    axes.plot(d, [p.proxy for p in ordered], linewidth=1.2, **PROXY_STROKE, **stroke)
    axes.plot(d, [p.gold for p in ordered], linewidth=1.4, label=label, **stroke)


def _draw_law(axes: Axes, fit: Fit, points: Sequence[StudyPoint], colour: str) -> None:
    """The law over the range that was measured: it says nothing beyond."""
    kl = np.square(np.linspace(0, np.sqrt(max(0.0, *(p.kl for p in points), 0.0)), 200))
    axes.plot(np.sqrt(kl), fit.predict(kl), color=colour, linestyle=":", linewidth=2.2)


def fit_table(fits: Mapping[Series, Fit]) -> list[dict[str, Any]]:
    """One row a fit: method, kl_coef ("all" for RL points of every beta, None for best-of-n), alpha, beta, r_squared,
    num_points, and where gold peaks: peak_sqrt_kl and peak_gold (None where the law only rises)."""
    rows = []
    for (method, coef), fit in fits.items():
        peak = fit.peak
        rows.append(
            {
                "method": method,
                "kl_coef": "all" if method == RL and coef is None else coef,
                "alpha": fit.alpha,
                "beta": fit.beta,
                "r_squared": fit.r_squared,
                "num_points": fit.num_points,
                "peak_sqrt_kl": peak,
                "peak_gold": None if peak is None else float(fit.predict(peak**2)),
            }
        )
    return rows
