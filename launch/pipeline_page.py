"""The page of the whole pipeline: what each step learned, what it cost, and what the policy says now.

May import: matplotlib (in the functions that draw), pyarrow, launch.eval_page, launch.eval_plots, trainers.calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from launch.eval_page import Cell, Sample, Section, Table, figure_svg
from trainers.calibration import Estimate

NUM_SAMPLES = 12
BLUE, ORANGE, GREEN = "#1f5fa8", "#d1662b", "#2f7d46"
TITLES = {
    "sft": "SFT: the model learns to write reviews",
    "label": "pairs, preferred by the planted human",
    "reward": "reward model on the noisy pairs",
    "ppo": "PPO against the reward model",
    "eval": "the policy against the SFT model",
}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the steps left behind."""

    seconds: Mapping[str, float]  # of each step
    sft: Rows  # metrics.jsonl of each run
    label: Mapping[str, Any]
    reward: Rows
    reward_report: Mapping[str, Any]
    reward_plot: str  # SVG
    ppo: Rows
    alarms: Rows
    evaluation: Mapping[str, Any]  # eval.json
    samples: Path  # samples.parquet of the evaluation
    ceiling: float  # best expected accuracy on the held-out pairs
    gold_agrees: Estimate  # accuracy of the gold reward itself on them


def summary(pipeline: Pipeline) -> list[tuple[str, str]]:
    """(what, measured) lines for the terminal and the head of the page."""
    accuracy, num_pairs = _estimate(pipeline.reward_report["accuracy"]), pipeline.reward_report["num_pairs"]
    wins, kl = pipeline.evaluation["win_rate"], pipeline.evaluation["kl_from_base"]
    lines = [
        ("SFT, held-out nats per token", " -> ".join(f"{v:.3f}" for v in _ends(pipeline.sft, "eval/loss"))),
        ("pairs labelled", str(pipeline.label["num_rows"])),
        ("reward model, held-out accuracy", f"{accuracy} over {num_pairs} pairs of {accuracy.n} prompts"),
        ("noise ceiling on these pairs", f"{pipeline.ceiling:.3f} (the gold itself: {pipeline.gold_agrees})"),
        ("below the ceiling", f"{pipeline.ceiling - accuracy.value:.3f}"),
        ("below the gold on the same labels", f"{pipeline.gold_agrees.value - accuracy.value:.3f}"),
        ("reward model, calibration error", f"{pipeline.reward_report['expected_calibration_error']:.3f}"),
    ]
    for name in sorted(wins):
        rate = _estimate(wins[name]["raw"])
        lines.append((f"win rate over SFT by {name}", f"{rate} over {rate.n} prompts"))
    lines.append(("KL from SFT, nats a sequence", str(_estimate(kl["sequence"]))))
    return [*lines, ("seconds, all steps", f"{sum(pipeline.seconds.values()):.0f}")]


def page_sections(pipeline: Pipeline) -> list[Section]:
    """All sections in reading order."""
    steps = tuple((name, TITLES.get(name, ""), f"{s:.0f}") for name, s in pipeline.seconds.items())
    return [
        Section(
            "Result",
            "A 135M model is fine-tuned on short reviews, a planted noisy human prefers between pairs of its samples, "
            "a reward model learns these preferences, and PPO raises the learned reward under a KL penalty. The gold "
            "reward is the human without noise: it is only measured, never trained on. So the page can say how much of "
            "what the reward model likes is real.",
            Table(("what", "measured"), tuple(summary(pipeline))),
        ),
        Section("Steps", "", Table(("step", "what it does", "seconds"), steps)),
        Section("SFT", "Cross-entropy on completion tokens, EOS included.", plots=(_curves(
            pipeline.sft, (("loss", "training"), ("eval/loss", "held out")), "nats per token"),)),
        Section(
            "Reward model",
            "Accuracy on pairs of prompts that were not trained on. The labels are noisy: no scorer can be expected "
            f"to agree with more than {pipeline.ceiling:.3f} of them. These labels are one draw: the gold itself "
            f"agrees with {pipeline.gold_agrees.value:.3f}, so {pipeline.ceiling - pipeline.gold_agrees.value:.3f} of "
            "the distance to the ceiling is luck that no reward model can mend.",
            plots=(_curves(pipeline.reward, (("loss", "Bradley-Terry loss"), ("accuracy", "training accuracy")), ""),
                   pipeline.reward_plot),
        ),
        Section(
            "PPO",
            "The proxy is the reward model's score, in standard deviations of its held-out scores; the gold is in its "
            "own points. KL is from the SFT model, in nats a sequence.",
            plots=(
                _curves(pipeline.ppo, (("rewards/proxy/mean", "proxy"),), "proxy"),
                _curves(pipeline.ppo, (("rewards/gold/mean", "gold, training prompts"),
                                       ("eval/gold/mean", "gold, held-out prompts")), "gold"),
                _curves(pipeline.ppo, (("objective/kl", "KL from SFT"),), "nats a sequence"),
                _curves(pipeline.ppo, (("critic/explained_variance", "critic: explained variance"),), ""),
                _curves(pipeline.ppo, (("completions/mean_length", "completion length"),), "tokens"),
            ),
        ),
        _alarms(pipeline.alarms),
        _judgement(pipeline.evaluation),
        Section("Samples", "The same held-out prompt and seed: SFT before, PPO after.", samples=_samples(pipeline)),
    ]  # fmt: skip


def _alarms(alarms: Rows) -> Section:
    if not alarms:
        return Section("Alarms", "No alarm went off during PPO.")
    rows = tuple((str(a["name"]), str(a.get("step")), str(a.get("meaning", ""))) for a in alarms)
    return Section("Alarms", "", Table(("alarm", "step", "what it means"), rows))


def _judgement(evaluation: Mapping[str, Any]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for name, rate in evaluation["win_rate"].items():
        rows.append((f"win rate by {name}", _estimate(rate["raw"])))
        rows.append((f"win rate by {name}, at equal length", _estimate(rate["length_controlled"])))
    for key, label in (("sequence", "a sequence"), ("token", "a token")):
        rows.append((f"KL from SFT, nats {label}", _estimate(evaluation["kl_from_base"][key])))
    for who, side in evaluation["models"].items():
        rows += [(f"{who}: {name}, mean", _estimate(found["mean"])) for name, found in side["rewards"].items()]
    text = "Held-out prompts; a tie counts half; intervals at 95 %. More instruments: eval/eval.html beside this page."
    return Section("Evaluation", text, Table(("instrument", "value"), tuple(rows)))


def _samples(pipeline: Pipeline) -> tuple[Sample, ...]:
    rows = pq.read_table(pipeline.samples).to_pylist()
    sides = {who: [r for r in rows if r["model"] == who] for who in ("policy", "base")}
    pairs = list(zip(sides["base"], sides["policy"], strict=True))
    every = max(1, len(pairs) // NUM_SAMPLES)
    return tuple(
        Sample(
            before["prompt"], before["completion"], after["completion"],
            f"gold {before['rewards/gold']:.2g} -> {after['rewards/gold']:.2g}, "
            f"proxy {before['rewards/proxy']:.2g} -> {after['rewards/proxy']:.2g}",
        )
        for before, after in pairs[::every][:NUM_SAMPLES]
    )  # fmt: skip


def _curves(rows: Rows, series: Sequence[tuple[str, str]], unit: str) -> str:
    """SVG of metrics over steps; a metric that was not recorded has no line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, label), colour in zip(series, (BLUE, ORANGE, GREEN), strict=False):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    return figure_svg(figure)


def _ends(rows: Rows, name: str) -> tuple[float, float]:
    values = [float(row[name]) for row in rows if row.get(name) is not None] or [math.nan]
    return values[0], values[-1]


def _estimate(found: Mapping[str, Any]) -> Estimate:
    """An Estimate as it stands in JSON, where null is NaN."""
    numbers = {name: math.nan if found[name] is None else float(found[name]) for name in ("value", "low", "high")}
    return Estimate(n=int(found["n"]), **numbers)
