"""The algorithms side by side, as docs/algorithms.md shows them: made from the values that a run would have.

``python -m trainers.algorithm_table`` rewrites the table; a test compares them.
May import: trainers.{algorithms, presets}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainers.algorithms import AlgorithmSettings
from trainers.presets import PRESETS, Preset

PAGE = "docs/algorithms.md"
BEGIN = "<!-- begin of the table written by `python -m trainers.algorithm_table` -->"
END = "<!-- end of the table -->"

BASELINES = {
    "group_mean": "mean of the group", "leave_one_out": "mean of the group's others", "greedy": "greedy completion",
    "none": "none",
}  # fmt: skip
SCALES = {"std": "deviation of the group", "batch": "deviation of the batch's tokens", "none": "none"}
RATIOS = {"token": "token", "sequence": "completion, geometric mean", "sequence_token": "completion, gradient by token"}
AGGREGATIONS = {
    "token": "mean over tokens", "sequence": "mean over samples of token means",
    "constant": "sum / (samples x max_tokens)",
}  # fmt: skip


def markdown() -> str:
    """Two tables, a row an algorithm: its parts, then its definition."""
    kl = "KL, once `kl_coef` > 0"
    head = ("`algorithm.name`", "baseline", "scale", "ratio", "clip", "aggregation", kl, "sampling")
    rows = [_row(name, AlgorithmSettings.model_validate({"name": name}), preset) for name, preset in PRESETS.items()]
    meant = [(f"`{name}`", p.title, f"[{p.paper}](https://arxiv.org/abs/{p.paper})", p.definition)
             for name, p in PRESETS.items()]  # fmt: skip
    return f"{_table(head, rows)}\n{_table(('`algorithm.name`', 'algorithm', 'arXiv', 'in one line'), meant)}"


def _row(name: str, chosen: AlgorithmSettings, preset: Preset) -> tuple[str, ...]:
    clip = f"{chosen.clip_low:g} / {chosen.clip_high:g}"
    ratio = RATIOS[chosen.ratio]
    if chosen.correction.kind == "cispo":
        ratio, clip = "token, a constant weight", f"weight at most {chosen.correction.cap:g}"
    sampling = ["1 greedy completion a prompt besides"] if chosen.needs_greedy else []
    if preset.filtering.get("zero_variance"):
        sampling.append("groups without a spread are replaced")
    if preset.overlong_share:
        sampling.append(f"punished over the last {preset.overlong_share:.0%} of max_tokens")
    if chosen.learns_from_pairs:
        kl = f"in the loss, by the reference: beta {chosen.kl_coef:g}"
        sampling.append("best and worst of each group")
        aggregation = "mean over pairs of whole answers"
        return (f"`{name}`", "the other sample", "none", "none", "none", aggregation, kl, ", ".join(sampling))
    return (
        f"`{name}`",
        "critic (GAE)" if chosen.needs_critic else BASELINES[chosen.baseline],
        SCALES["batch" if chosen.needs_critic and chosen.ppo.whiten_advantages else chosen.scale],
        ratio,
        clip,
        AGGREGATIONS[chosen.aggregation],
        f"in the {chosen.kl_placement}, {chosen.kl_estimator}",
        ", ".join(sampling) or "groups of samples",
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(page: str) -> str:
    """``page`` with the tables between its two markers written anew; ValueError when a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: needs the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    target = Path(__file__).parent.parent / PAGE
    target.write_text(renewed(target.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}: {len(PRESETS)} algorithms")
