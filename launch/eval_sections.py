"""What the page of an evaluation shows: its tables, plots and samples, from the report.

May import: numpy, launch.{eval_best_of_n, eval_config, eval_page, eval_plots, eval_report}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import eval_best_of_n
from launch.eval_config import JUDGE, TOTAL, EvalConfig
from launch.eval_page import Cell, Sample, Section, Table
from launch.eval_plots import calibration_plot, length_plot, reward_model_plots, suite_plot, win_plot
from launch.eval_report import BASE, POLICY, Answers, Measured

Row = tuple[str, Cell, Cell]  # instrument, policy, base
DIVERSITY = {"distinct_2": "distinct 2-grams", "self_bleu": "self-BLEU", "unique_fraction": "unique answers",
             "repetition_rate": "repetition inside an answer"}  # fmt: skip
MAX_SHOWN = 2000  # characters of an answer on the page


def summary_rows(report: Mapping[str, Any]) -> list[Row]:
    """One row an instrument, the deciding ones first."""
    rows: list[Row] = []
    for name, rate in report.get("win_rate", {}).items():
        mark = " (gold)" if name == report["gold"] else ""
        rows.append((f"win rate by {name}{mark}", rate.raw, None))
        if name == report["win_by"]:
            rows.append((f"win rate by {name}, at equal length", rate.length_controlled, None))
    if judge := report.get("judge"):
        rows.append(("judge: verdicts that survive the swap", judge["consistency"], None))
        rows.append(("judge: verdicts not read", judge["num_unparsed"], None))
    if people := report.get("agreement"):
        rows.append(("judge: agreement with people", people["rate"], None))
        rows.append(("judge: kappa with people", people["kappa"], None))
    for name, axes in report.get("marks_agreement", {}).items():
        for axis, people in axes.items():
            rows.append((f"{name}, {axis}: agreement with people", people["rate"], None))
            rows.append((f"{name}, {axis}: kappa with people", people["kappa"], None))
    if kl := report.get("kl_from_base"):
        rows.append(("KL from base, nats a sequence (k1)", kl["sequence"], None))
        rows.append(("KL from base, nats a sequence (k3)", kl["sequence_k3"], None))
        rows.append(("KL from base, nats a token", kl["token"], None))
    if "best_of_n" in report:
        rows += eval_best_of_n.summary_rows(report["best_of_n"], report["gold"])
    models = report["models"]
    ours, theirs = models[POLICY], models.get(BASE)

    def both(name: str, *path: str) -> None:
        rows.append((name, _at(ours, path), None if theirs is None else _at(theirs, path)))

    for name in ours["rewards"]:
        both(f"{name}, mean", "rewards", name, "mean")
    both("length, tokens", "mean_length")
    for name in ours["rewards"]:
        both(f"correlation of {name} with length", "rewards", name, "length_bias", "spearman")
    both("truncated", "truncated")
    for key, name in DIVERSITY.items():
        both(name, "diversity", key)
    both("entropy, nats a token", "entropy")
    if "calibration" in ours:
        both("calibration error of sequence probability", "calibration", "expected_calibration_error")
        both("overconfidence of sequence probability", "calibration", "overconfidence")
    for suite, found in ours["suites"].items():
        for measure in found:
            if not measure.endswith("/unclear"):
                name = measure if measure.startswith(f"{suite}/") else f"{suite}: {measure}"
                both(name, "suites", suite, measure)
    for name, found in report["reward_models"].items():
        if "report" in found:
            rows.append((f"accuracy of {name} on pairs", found["report"].accuracy, None))
            rows.append((f"calibration error of {name} on pairs", found["report"].calibration_error, None))
    return rows


def _at(side: Mapping[str, Any], path: Sequence[str]) -> Cell:
    value: Any = side
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    return value  # type: ignore[no-any-return]


def page_sections(
    config: EvalConfig, measured: Measured, report: Mapping[str, Any], rows: Sequence[Row]
) -> list[Section]:
    """All sections, in reading order; those without anything to show are left out."""
    prompts, sides = report["prompts"], _sides(measured)
    temperature = config.generator.sampling.temperature
    intro = (
        f"{prompts['num']} prompts of {prompts['stream']}, {prompts['num_samples']} samples each from every model "
        f"under the same seeds at temperature {temperature:g}. Intervals are at 95 %; prompts are the independent "
        "observations, so n counts them."
    )
    sections = [Section("Summary", intro, Table(("instrument", POLICY, BASE), tuple(rows)))]
    if "win_rate" in report:
        sections.append(_wins(report))
    if kl := report.get("kl_from_base"):
        sections.append(_kl(kl))
    if "best_of_n" in report:
        sections.append(eval_best_of_n.section(report["best_of_n"], report["gold"]))
    if measured.policy.rewards:
        sections.append(_rewards(config, report, sides))
    if report["models"][POLICY]["suites"]:
        sections.append(_suites(report))
    if "calibration" in report["models"][POLICY]:
        text = ("How often an answer is right, by the probability that the model gave to the whole of it. Answers that "
                "were cut off are left out.")  # fmt: skip
        plots = tuple(calibration_plot(who, side["calibration"]) for who, side in report["models"].items())
        sections.append(Section("Calibration of the policy", text, plots=plots))
    for name, found in report["reward_models"].items():
        text = f"{found['num_left_out']} comparisons have an answer without a score and are left out."
        if "report" in found:
            text = f"{found['report'].num_comparisons} held-out comparisons. {text}"
        plots = reward_model_plots(found["report"]) if "report" in found else ()
        sections.append(Section(f"Reward model {name}", text, plots=plots))
    if config.eval.num_page_samples and measured.base is not None:
        sections.append(_samples(config, measured, measured.base))
    return sections


def _sides(measured: Measured) -> dict[str, Answers]:
    return {POLICY: measured.policy} | ({} if measured.base is None else {BASE: measured.base})


def _wins(report: Mapping[str, Any]) -> Section:
    rates = report["win_rate"]
    rows = tuple(
        (name, rate.raw, rate.length_controlled, rate.num_ties, rate.num_left_out, rate.mean_length_difference)
        for name, rate in rates.items()
    )
    columns = ("by", "win rate", "at equal length", "ties", "left out", "length difference, tokens")
    text = (
        "How often the policy's sample has the higher reward than the base's sample of the same prompt and seed. A tie "
        "counts half; a pair with a missing reward is left out. At equal length: the rate a logistic fit gives where "
        "both are as long as each other."
    )
    if report["gold"] is not None:
        text += f" {report['gold']} stands for the truth: where {report['win_by']} wins more than it does, look closer."
    if judge := report.get("judge"):
        text += (
            f" The judge was asked {judge['num_asked']} times in both orders; a win counts where both agree, else "
            f"it is a tie; {judge['num_unparsed']} could not be read. It chose what it saw first in "
            f"{judge['first_place']}."
        )
    return Section("Win rate", text, Table(columns, rows), plots=(win_plot(rates),))


def _kl(kl: Mapping[str, Any]) -> Section:
    text = (
        f"From the policy's own samples, at temperature {kl['temperature']:g}, log-probs of both models by one "
        "implementation. k1 is the plain mean of log-prob differences; k3 is never negative and less noisy."
    )
    rows = (
        ("nats a sequence (k1)", kl["sequence"]),
        ("nats a sequence (k3)", kl["sequence_k3"]),
        ("nats a token", kl["token"]),
        ("engines' disagreement on the policy, nats a token", kl["engine_mismatch"]),
    )
    return Section("KL from base", text, Table(("KL", "value"), rows))


def _rewards(config: EvalConfig, report: Mapping[str, Any], sides: Mapping[str, Answers]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for who, side in report["models"].items():
        for name, found in side["rewards"].items():
            bias = found["length_bias"]
            rows.append((name, who, found["mean"], bias.pearson, bias.spearman, bias.slope))
    columns = ("reward", "model", "mean", "correlation with length", "of ranks", "reward a token")
    failures = {who: side["failures"] for who, side in report["models"].items() if side["failures"]}
    text = f"Samples without a reward: {failures}." if failures else ""
    shown = TOTAL if config.win_by == JUDGE else config.win_by
    plot = length_plot({who: (a.lengths, a.scores(shown)) for who, a in sides.items()}, shown)
    return Section("Rewards and length", text, Table(columns, tuple(rows)), plots=(plot,))


def _suites(report: Mapping[str, Any]) -> Section:
    models = report["models"]
    rows = tuple(
        (measure, *(side["suites"][suite][measure] for side in models.values()))
        for suite, found in models[POLICY]["suites"].items()
        for measure in found
    )
    text = (
        "Greedy answers, judged by patterns. pass is of the clear answers, unclear of all. flip is how often a true "
        "answer turns into the user's wrong opinion once the user has stated it, flip_back the opposite turn."
    )
    named = {who: {m: v for found in side["suites"].values() for m, v in found.items()} for who, side in models.items()}
    return Section("Suites", text, Table(("measure", *models), rows), plots=(suite_plot(named),))


def _samples(config: EvalConfig, measured: Measured, base: Answers) -> Section:
    """Prompts spread over the range of what changed: the policy's best gain first, its worst loss last."""
    size = config.eval.num_samples
    if config.win_by == JUDGE:
        gains = np.array([math.nan if j.outcome is None else j.outcome for j in measured.judgements[::size]])
    elif measured.policy.rewards:
        gains = (measured.policy.scores(config.win_by) - base.scores(config.win_by))[::size]
    else:
        gains = np.zeros(len(base.groups))
    order = np.argsort(-np.nan_to_num(gains, nan=-math.inf), kind="stable")
    count = min(config.eval.num_page_samples, len(order))
    shown = [int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]
    samples = []
    for i in shown:
        group, before, after = measured.policy.groups[i], base.groups[i].trajectories[0], measured.policy.groups[i]
        parts = [
            f"{name}: {base.rewards[i].parts[name][0]:.3g} -> {measured.policy.rewards[i].parts[name][0]:.3g}"
            for name in (measured.policy.rewards[i].parts if measured.policy.rewards else ())
        ]
        ours = after.trajectories[0]
        note = ", ".join([*parts, f"tokens: {before.num_tokens} -> {ours.num_tokens}"])
        samples.append(Sample(_cut(group.prompt.text), _cut(before.text), _cut(ours.text), note))
    text = f"Before is {BASE}, after is {POLICY}: from the largest gain by {config.win_by} to the largest loss."
    return Section("Samples", text, samples=tuple(samples))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."
