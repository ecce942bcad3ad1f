"""``make iterate``: iterated RLHF.  Each round labels the policy's own samples and retrains the reward model on them.

    python -m scripts.iterate [--directory runs/pipeline] [--rounds 2] [--quick]

    SFT, pairs, reward model 0, policy 1 (make pipeline)
    round r:  fresh pairs of policy r, on training and on held-out prompts --> reward model r, from the SFT model, half
              of its prompts from round r and half from all earlier pairs, with as many steps as reward model 0
              --> accuracy of reward models r - 1 and r on the held-out fresh pairs --> policy r + 1, from the SFT model

A reward model is only good where it was trained, and a policy leaves that place: Ziegler et al. 2019
(arXiv:1909.08593, section 2.2) and Bai et al. 2022 (arXiv:2204.05862, section 4.5) therefore collect on the current
policy.  Each stage is a ``burnish`` command; one that has ended is not run again, one that was cut off starts afresh.
May import: rich, scripts.{ensemble_study, pipeline, stages}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.ensemble_study import only
from scripts.pipeline import LABEL_RECIPE, QUICK, TINY
from scripts.stages import StageError, Stages

NUM_TRAIN, NUM_HELD_OUT = 240, 80  # prompts that are labelled anew in each round, four answers each
NUM_JUDGED = 96  # held-out prompts on which the policy is compared with the SFT model
QUICK_ROUNDS = 1
QUICK_HELD_OUT = (*TINY, "model.max_length=128", "sampling.max_tokens=8", "run.num_prompts=12")


@dataclass(frozen=True, slots=True)
class Round:
    """What a round leaves: files and folders."""

    number: int
    policy: Path
    before: Path  # reward model that the policy was trained with
    after: Path  # reward model retrained on the policy's samples
    report: Path  # of `burnish eval`


def run_rounds(stages: Stages, num_rounds: int, quick: bool) -> list[Round]:
    """Every round from what ``make pipeline`` left.  StageError when a stage fails."""
    directory = stages.directory
    sft, policy = only(directory, "sft/export/step-*"), only(directory, "ppo/export/step-*")
    before = only(directory, "reward/export/step-*")
    pairs, rounds = [only(directory, "label/preferences.parquet")], []
    for number in range(1, num_rounds + 1):
        one = _Round(stages, number, quick)
        held_out = one.label("held-out", policy, "held-out-prompts.jsonl", NUM_HELD_OUT)
        pairs.append(one.label("label", policy, "train-prompts.jsonl", NUM_TRAIN))
        after = one.reward(sft, pairs)
        report = one.judge(policy, sft, before, after, held_out)
        rounds.append(Round(number, policy, before, after, report))
        if number < num_rounds:
            policy, before = one.ppo(sft, after), after
    return rounds


class _Round:
    """The stages of one round."""

    def __init__(self, stages: Stages, number: int, quick: bool) -> None:
        self.stages, self.number, self.quick = stages, number, quick
        self.directory = stages.directory

    def label(self, what: str, policy: Path, prompts: str, num_prompts: int) -> Path:
        """Pairs of the policy's samples, labelled by the planted human."""
        extra = QUICK_HELD_OUT if self.quick else ()
        return self._run(
            what, "label", LABEL_RECIPE, f"model.path={policy}",
            [f"prompts.train.path={self.directory / 'data' / prompts}", f"run.num_prompts={num_prompts}",
             f"run.seed={self.number}", *extra],
            "preferences.parquet",
        )  # fmt: skip

    def reward(self, sft: Path, pairs: Sequence[Path]) -> Path:
        """A new reward model: half of what it sees is of this round."""
        old = len(pairs) - 1
        data = [
            {"name": f"round-{i}", "path": str(path), "weights": 0.5 if i == old else 0.5 / old}
            for i, path in enumerate(pairs)
        ]
        extra = QUICK["reward"] if self.quick else ()
        return self._run(
            "reward", "train", "cpu-pipeline-reward", f"model.path={sft}",
            [f"data.train={json.dumps(data)}", *extra], "export/step-*",
        )  # fmt: skip

    def judge(self, policy: Path, sft: Path, before: Path, after: Path, held_out: Path) -> Path:
        """Both reward models on the same fresh pairs, and the policy against the SFT model by gold."""
        models = [{"name": name, "path": str(path), "normalize": True} for name, path in
                  (("proxy", after), ("before", before))]  # fmt: skip
        extra = QUICK["eval"] if self.quick else ()
        return self._run(
            "eval", "eval", "cpu-pipeline-eval", f"model.path={policy}",
            [f"base.path={sft}", f"prompts.train.path={self.directory / 'data' / 'held-out-prompts.jsonl'}",
             f"reward_models={json.dumps(models)}", f"eval.preferences={held_out}", f"eval.num_prompts={NUM_JUDGED}",
             *extra],
            "eval.json",
        )  # fmt: skip

    def ppo(self, sft: Path, reward: Path) -> Path:
        """The next policy."""
        data, extra = self.directory / "data", QUICK["ppo"] if self.quick else ()
        return self._run(
            "ppo", "train", "cpu-pipeline-ppo", f"model.path={sft}",
            [f"prompts.train.path={data / 'train-prompts.jsonl'}",
             f"prompts.eval.path={data / 'held-out-prompts.jsonl'}", f"reward_models.0.path={reward}", *extra],
            "export/step-*",
        )  # fmt: skip

    def _run(self, what: str, command: str, recipe: str, model: str, arguments: Sequence[str], result: str) -> Path:
        name = f"round-{self.number}-{what}"
        folder = self.directory / name
        self.stages.cleared(name, folder)
        own = [command, recipe, f"run.directory={self.directory}", f"run.name={name}", model]
        found = self.stages.run(name, [*own, *arguments], f"{name}/{result}")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes that nobody resumes
        return found


def table_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row a round: numbers of its ``eval.json`` with their intervals."""
    rows = []
    for one in rounds:
        report = json.loads(one.report.read_text(encoding="utf-8"))
        models = report["reward_models"]
        rows.append(
            {
                "round": one.number,
                "num_pairs": models["before"].get("report", {}).get("num_comparisons"),
                "accuracy_before": estimate_at(models["before"], "report", "accuracy"),
                "accuracy_after": estimate_at(models["proxy"], "report", "accuracy"),
                "win_rate_by_gold": estimate_at(report, "win_rate", "gold", "raw"),
                "kl": estimate_at(report, "kl_from_base", "sequence"),
            }
        )
    return rows


def estimate_at(report: Mapping[str, Any], *keys: str) -> dict[str, float] | None:
    """The estimate below ``keys``; None where it is not there."""
    found: Any = report
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) and "value" in found else None


def shown_estimate(value: Any) -> str:
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    numbers = (value.get(key) for key in ("value", "low", "high"))
    shown = ["?" if number is None else f"{number:.3g}" for number in numbers]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def main() -> int:
    """Run what is missing and print the table; exit code 1 when a stage failed."""
    parser = argparse.ArgumentParser(prog="iterate")
    parser.add_argument("--directory", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model: does everything run?")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: at least one")
    directory, console = arguments.directory.absolute(), Console()
    try:
        num_rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
        rows = table_rows(run_rounds(Stages(directory, console), num_rounds, arguments.quick))
    except StageError as error:
        print(f"iterate: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1
    (directory / "iterate.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = Table(title="reward model on the policy's own samples, held-out prompts")
    for column in ("round", "pairs", "accuracy before", "accuracy after", "win rate over SFT by gold", "KL, nats"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(shown_estimate(value) for value in row.values()))
    console.print(table)
    console.print(f"numbers: {directory / 'iterate.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
