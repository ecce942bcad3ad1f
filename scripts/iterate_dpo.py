"""``make iterate-dpo``: iterated DPO.  Each round samples from the policy, has the answers labelled and trains on them.

    python -m scripts.iterate_dpo [--directory runs/pipeline] [--rounds 3] [--quick]
    python -m scripts.iterate_dpo --model M --label RECIPE --train RECIPE [--eval RECIPE] --directory DIR

    round r:  burnish label: fresh answers of policy r, preferred by function, reward model or judge
              --> burnish train, algorithm.name dpo, from policy r and with it (or the first one) as the reference
              --> burnish eval: policy r + 1 against the first one

Without --model it is the planted task of ``make pipeline``, from its SFT model.  Own recipes keep everything but
names, folders, the model, the seed of the samples and the data that a round hands on; --set gives further keys.  Each
stage is a ``burnish`` command; one that has ended is not run again, one that was cut off starts afresh.
Xu et al. 2023 (arXiv:2312.16682), Yuan et al. 2024 (arXiv:2401.10020).
May import: rich, scripts.{ensemble_study, iterate, pipeline, stages}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from scripts.ensemble_study import only
from scripts.iterate import estimate_at, shown_estimate
from scripts.pipeline import LABEL_RECIPE, QUICK, TINY
from scripts.stages import StageError, Stages

STAGES = ("label", "train", "eval")
NUM_PROMPTS, NUM_JUDGED = 240, 96  # of the planted task: labelled in each round, four answers each; judged at its end
QUICK_TRAIN = (*TINY, "run.num_steps=2", "run.batch_size=4", "evaluation.size=4")


@dataclass(frozen=True)
class Plan:
    """What every round does."""

    model: str  # the first policy
    recipes: Mapping[str, str]  # of each stage; without eval nothing is judged
    reference: Literal["previous", "start"] = "previous"
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)  # further key=value of each stage


@dataclass(frozen=True)
class Round:
    """What a round leaves: files and folders."""

    number: int
    pairs: Path
    metrics: Path  # of the training run
    policy: Path
    report: Path | None  # of `burnish eval`


def planted(directory: Path, quick: bool) -> Plan:
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
        for stage, extra in (("label", QUICK["label"]), ("train", QUICK_TRAIN), ("eval", QUICK["eval"])):
            keys[stage] += extra
    recipes = {"label": LABEL_RECIPE, "train": "cpu-dpo", "eval": "cpu-pipeline-eval"}
    return Plan(str(only(directory, "sft/export/step-*")), recipes, keys=keys)


def run_rounds(stages: Stages, plan: Plan, num_rounds: int) -> list[Round]:
    """Every round.  StageError when a stage fails."""
    policy, rounds = plan.model, []
    for number in range(1, num_rounds + 1):
        pairs = _run(stages, plan, number, "label", policy, [f"run.seed={number}"], "preferences.parquet")
        data = json.dumps([{"name": f"round-{number}", "path": str(pairs)}])
        learned = [f"data.train={data}"]
        if plan.reference == "start":  # else it is model.path, the policy before the round
            learned.append(f"reference.path={plan.model}")
        trained = _run(stages, plan, number, "train", policy, learned, "export/step-*")
        policy = str(trained)
        metrics = stages.directory / _name(number, "train") / "metrics.jsonl"
        report = None
        if "eval" in plan.recipes:
            report = _run(stages, plan, number, "eval", policy, [f"base.path={plan.model}"], "eval.json")
        rounds.append(Round(number, pairs, metrics, trained, report))
    return rounds


def _name(number: int, stage: str) -> str:
    return f"dpo-{number}-{stage}"


def _run(
    stages: Stages, plan: Plan, number: int, stage: str, model: str, arguments: Sequence[str], result: str
) -> Path:
    name, directory = _name(number, stage), stages.directory
    folder = directory / name
    stages.cleared(name, folder)
    own = [stage, plan.recipes[stage], f"run.directory={directory}", f"run.name={name}", f"model.path={model}"]
    found = stages.run(name, [*own, *arguments, *plan.keys.get(stage, ())], f"{name}/{result}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes that nobody resumes
    return found


def table_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row a round: what was labelled, what training made of it, and ``eval.json`` with its intervals."""
    rows = []
    for one in rounds:
        summary = json.loads(one.pairs.with_name("summary.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in one.metrics.read_text(encoding="utf-8").splitlines()]
        report = {} if one.report is None else json.loads(one.report.read_text(encoding="utf-8"))
        decides = report.get("gold") or report.get("win_by")
        rows.append(
            {
                "round": one.number,
                "num_pairs": summary["num_rows"],
                "held_out_accuracy": _last(lines, "eval/rewards/accuracies"),
                "held_out_margin": _last(lines, "eval/rewards/margins"),
                "win_rate": estimate_at(report, "win_rate", str(decides), "raw"),
                "reward": estimate_at(report, "models", "policy", "rewards", str(decides), "mean"),
                "kl": estimate_at(report, "kl_from_base", "sequence"),
            }
        )
    return rows


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return values[-1] if values else None


def _plan(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    """What the command line asks for.  StageError where the planted task is not there."""
    given = {stage: getattr(arguments, stage) for stage in STAGES if getattr(arguments, stage) is not None}
    if arguments.model is None:
        if given:
            parser.error(f"--{next(iter(given))}: own recipes need --model, the first policy")
        plan = planted(arguments.directory, arguments.quick)
    else:
        if arguments.quick:
            parser.error("--quick: of the planted task only; leave out --model")
        if missing := [stage for stage in STAGES[:2] if stage not in given]:
            parser.error(f"--{missing[0]}: with --model give recipes for --label and --train")
        is_folder = not arguments.model.startswith("builtin:")
        plan = Plan(str(Path(arguments.model).absolute()) if is_folder else arguments.model, given)
    keys = {stage: list(plan.keys.get(stage, ())) for stage in STAGES}
    for entry in arguments.set:
        stage, colon, key = entry.partition(":")
        if not colon or stage not in plan.recipes or "=" not in key:
            parser.error(f"--set {entry}: write STAGE:key=value, with STAGE one of {', '.join(plan.recipes)}")
        keys[stage].append(key)
    return Plan(plan.model, plan.recipes, arguments.reference, keys)


def main() -> int:
    """Run what is missing and print the table; exit code 1 when a stage failed."""
    parser = argparse.ArgumentParser(prog="iterate_dpo")
    parser.add_argument("--directory", type=Path, default=Path("runs/pipeline"), help="of all stages' folders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="the first policy; default: the SFT model of make pipeline")
    for stage in STAGES:
        parser.add_argument(f"--{stage}", metavar="RECIPE", help=f"of burnish {stage}; with --model")
    parser.add_argument("--reference", choices=("previous", "start"), default="previous",
                        help="the policy before the round, or the first one")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="STAGE:KEY=VALUE",
                        help="a key of a stage's recipe")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: at least one")
    arguments.directory, console = arguments.directory.absolute(), Console()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    try:
        plan = _plan(arguments, parser)
        rows = table_rows(run_rounds(Stages(arguments.directory, console), plan, arguments.rounds))
    except StageError as error:
        print(f"iterate_dpo: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1
    target = arguments.directory / "iterate-dpo.json"
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = Table(title="iterated DPO, held-out prompts, against the first policy")
    for column in ("round", "pairs", "accuracy", "margin", "win rate", "reward", "KL, nats"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else shown_estimate(v) for v in row.values()))
    console.print(table)
    console.print(f"numbers: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
