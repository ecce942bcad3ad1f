"""``burnish iterate dpo``.  Each round samples from the policy, has the answers labelled and trains on them.

    round r:  burnish label: fresh answers of policy r, preferred by function, reward model or judge
              --> burnish train, algorithm.name dpo, from policy r and with it (or the first one) as the reference
              --> burnish eval: policy r + 1 against the first one

Without own recipes it is the planted task of ``make pipeline``, from its SFT model.  Own recipes keep everything but
names, folders, the model, the seed of the samples and the data that a round hands on.
Xu et al. 2023 (arXiv:2312.16682), Yuan et al. 2024 (arXiv:2401.10020).
May import: rich, launch.{iterate_rounds, journal, planted_task, stages}, trainers.errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from launch.iterate_rounds import (
    Checked,
    Plan,
    Runner,
    deciding,
    estimate_at,
    report_of,
    run_stage,
    write_rows,
)
from launch.journal import read_rows
from launch.planted_task import LABEL_RECIPE, QUICK
from launch.stages import Stages, only
from trainers.errors import InputError

STAGES = ("label", "train", "eval")
REQUIRED = ("label", "train")
NUM_PROMPTS, NUM_JUDGED = 240, 96  # of the planted task: labelled in each round, four answers each; judged at its end
COLUMNS = ("round", "pairs", "accuracy", "margin", "win rate", "reward", "KL, nats")


@dataclass(frozen=True)
class DPOPlan(Plan):
    """``model``: the first policy.  Without a recipe of ``eval`` nothing is judged."""

    reference: Literal["previous", "start"] = "previous"


@dataclass(frozen=True)
class Round:
    """What a round leaves: files and folders."""

    number: int
    pairs: Path
    metrics: Path  # of the training run
    policy: Path
    report: Path | None  # of `burnish eval`


def planted(directory: Path, quick: bool) -> DPOPlan:
    """The task of ``make pipeline``.  StageError where it has not run."""
    data = directory / "data"
    reward = only(directory, "reward/export/step-*")
    keys = {
        "label": [f"prompts.train.path={data / 'train-prompts.jsonl'}", f"run.num_prompts={NUM_PROMPTS}"],
        "train": ["data.eval=null"],  # held out is a tenth of the round's own prompts
        "eval": [f"prompts.train.path={data / 'held-out-prompts.jsonl'}", f"reward_models.0.path={reward}",
                 f"eval.num_prompts={NUM_JUDGED}"],
    }  # fmt: skip
    if quick:
        for stage, extra in (("label", "label"), ("train", "dpo"), ("eval", "eval")):
            keys[stage] += QUICK[extra]
    recipes = {"label": LABEL_RECIPE, "train": "cpu-dpo", "eval": "cpu-pipeline-eval"}
    return DPOPlan(str(only(directory, "sft/export/step-*")), recipes, keys)


def check(plan: DPOPlan, directory: Path, num_rounds: int) -> None:
    """InputError where a configuration of a round is wrong; nothing is run."""
    checked = Checked(directory)
    run_rounds(checked, plan, min(num_rounds, 2))  # the later ones differ by numbers alone
    algorithm = checked.configs[_name(1, "train")].algorithm.name
    if algorithm != "dpo":
        raise InputError("--train", plan.recipes["train"], f"its algorithm.name is {algorithm}, which learns from no "
                         "preferences", "give a recipe with algorithm.name: dpo")  # fmt: skip


def run_rounds(stages: Runner, plan: DPOPlan, num_rounds: int) -> list[Round]:
    """Every round.  StageError when a stage fails, InputError where one was run with other arguments."""
    policy, rounds = plan.model, []
    for number in range(1, num_rounds + 1):
        pairs = _run(stages, plan, number, "label", policy, [f"run.seed={number}"], "preferences.parquet")
        data = json.dumps([{"name": f"round-{number}", "path": str(pairs)}])
        learned = [f"data.train={data}"]
        if plan.reference == "start":  # else it is model.path, the policy before the round
            learned.append(f"reference.path={plan.model}")
        trained = _run(stages, plan, number, "train", policy, learned, "export/step-*")
        policy = str(trained)
        report = None
        if "eval" in plan.recipes:
            report = _run(stages, plan, number, "eval", policy, [f"base.path={plan.model}"], "eval.json")
        metrics = stages.directory / _name(number, "train") / "metrics.jsonl"
        rounds.append(Round(number, pairs, metrics, trained, report))
    return rounds


def _name(number: int, stage: str) -> str:
    return f"dpo-{number}-{stage}"


def _run(
    stages: Runner, plan: Plan, number: int, stage: str, model: str, arguments: Sequence[str], result: str
) -> Path:
    return run_stage(stages, plan, _name(number, stage), stage, model, arguments, result)


def table_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row a round: what was labelled, what training made of it, and ``eval.json`` with its intervals."""
    rows = []
    for one in rounds:
        summary = json.loads(one.pairs.with_name("summary.json").read_text(encoding="utf-8"))
        lines = list(read_rows(one.metrics))
        report = report_of(one.report)
        decides = deciding(report)
        rows.append(
            {
                "round": one.number,
                "num_pairs": summary["num_rows"],
                "held_out_accuracy": _last(lines, "eval/rewards/accuracies"),
                "held_out_margin": _last(lines, "eval/rewards/margins"),
                "win_rate": estimate_at(report, "win_rate", decides, "raw"),
                "reward": estimate_at(report, "models", "policy", "rewards", decides, "mean"),
                "kl": estimate_at(report, "kl_from_base", "sequence"),
            }
        )
    return rows


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return values[-1] if values else None


def iterate(plan: DPOPlan, num_rounds: int, stages: Stages, console: Console) -> None:
    """Run what is missing, write and print the table.  See :func:`run_rounds` for what is raised."""
    check(plan, stages.directory, num_rounds)
    rows = table_rows(run_rounds(stages, plan, num_rounds))
    title = "iterated DPO, held-out prompts, against the first policy"
    write_rows(rows, stages.directory / "iterate-dpo.json", title, COLUMNS, console)
