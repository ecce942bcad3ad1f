"""``burnish iterate rlhf``.  Each round retrains the reward model on the policy's own samples, and the policy on it.

    round r:  burnish label: fresh pairs of policy r, on training and on held-out prompts
              --> burnish train: reward model r from the start model, half of its prompts from this round and half from
                  all earlier pairs
              --> burnish train: policy r + 1, from the start model, against reward model r
              --> burnish eval: policy r + 1 against the start model; reward models r - 1 and r on the held-out pairs

A reward model is only good where it was trained, and a policy leaves that place: Ziegler et al. 2019
(arXiv:1909.08593, section 2.2) and Bai et al. 2022 (arXiv:2204.05862, section 4.5) therefore collect on the current
policy.  The last round trains a policy like every other one: it is what the rounds are made for.
Without own recipes it is the planted task of ``make pipeline``: its SFT model is the start, and policy 1, reward model
0 and the first pairs are its own.
May import: rich, launch.{config, iterate_rounds, planted_task, stages}, trainers.errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.config import RunConfig
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
from launch.planted_task import LABEL_RECIPE, QUICK
from launch.stages import Stages, only
from trainers.errors import InputError

STAGES = ("label", "held-out", "reward", "policy", "eval")
REQUIRED = ("label", "reward", "policy")
NEW, OLD = "proxy", "before"  # names of the two reward models in `burnish eval`
# Of the planted task.  Prompts that are labelled anew in each round, four answers each; and those of the evaluation.
NUM_TRAIN, NUM_HELD_OUT, NUM_JUDGED = 240, 80, 96
COLUMNS = ("round", "held-out pairs", "accuracy before", "accuracy after", "win rate", "KL, nats")


@dataclass(frozen=True)
class RLHFPlan(Plan):
    """``model``: the start of every reward model and policy, and what policies are judged against.

    Without a recipe of ``eval`` nothing is judged, without one of ``held-out`` the reward models are not.
    """

    first_policy: str | None = None  # that of the first round's samples; default: model
    first_reward: str | None = None  # the reward model that the first policy was trained with
    first_pairs: str | None = None  # what that reward model learned from


@dataclass(frozen=True, slots=True)
class Round:
    """What a round leaves: files and folders."""

    number: int
    sampled: str  # the policy whose answers were labelled
    before: Path | None  # the reward model before
    after: Path  # the reward model that was retrained
    policy: Path  # the one that was trained against it
    report: Path | None  # of `burnish eval`


def planted(directory: Path, quick: bool) -> RLHFPlan:
    """The task of ``make pipeline``.  StageError where it has not run."""
    sft, policy = only(directory, "sft/export/step-*"), only(directory, "ppo/export/step-*")
    reward, pairs = only(directory, "reward/export/step-*"), only(directory, "label/preferences.parquet")
    train, held_out = (directory / "data" / f"{which}-prompts.jsonl" for which in ("train", "held-out"))
    keys = {
        "label": [f"prompts.train.path={train}", f"run.num_prompts={NUM_TRAIN}"],
        "held-out": [f"prompts.train.path={held_out}", f"run.num_prompts={NUM_HELD_OUT}"],
        "reward": [],
        "policy": [f"prompts.train.path={train}", f"prompts.eval.path={held_out}"],
        "eval": [f"prompts.train.path={held_out}", f"eval.num_prompts={NUM_JUDGED}"],
    }
    if quick:
        tiny = {"label": "few", "held-out": "few", "reward": "reward", "policy": "ppo", "eval": "eval"}
        for stage, extra in tiny.items():
            keys[stage] += QUICK[extra]
    recipes = {"label": LABEL_RECIPE, "held-out": LABEL_RECIPE, "reward": "cpu-pipeline-reward",
               "policy": "cpu-pipeline-ppo", "eval": "cpu-pipeline-eval"}  # fmt: skip
    return RLHFPlan(str(sft), recipes, keys, str(policy), str(reward), str(pairs))


def check(plan: RLHFPlan, directory: Path, num_rounds: int) -> None:
    """InputError where a configuration of a round is wrong; nothing is run."""
    checked = Checked(directory)
    run_rounds(checked, plan, min(num_rounds, 2))  # the later ones differ by numbers alone
    algorithm = checked.configs[_name(1, "reward")].algorithm.name
    if algorithm != "reward":
        raise InputError("--reward", plan.recipes["reward"], f"its algorithm.name is {algorithm}, which trains no "
                         "reward model", "give a recipe with algorithm.name: reward")  # fmt: skip
    config = checked.configs[_name(1, "policy")]
    if not isinstance(config, RunConfig):
        raise InputError("--policy", plan.recipes["policy"], f"its algorithm.name is {config.algorithm.name}, which "
                         "learns from no reward", "give a recipe of ppo, grpo or a relative")  # fmt: skip


def run_rounds(stages: Runner, plan: RLHFPlan, num_rounds: int) -> list[Round]:
    """Every round.  StageError when a stage fails, InputError where one was run with other arguments."""
    policy = plan.first_policy or plan.model
    before = None if plan.first_reward is None else Path(plan.first_reward)
    pairs, rounds = [] if plan.first_pairs is None else [Path(plan.first_pairs)], []
    for number in range(1, num_rounds + 1):
        one = _Round(stages, plan, number)
        held_out = one.label("held-out", policy) if {"held-out", "eval"} <= plan.recipes.keys() else None
        pairs.append(one.label("label", policy))
        after = one.reward(pairs)
        trained = one.policy(after)
        report = one.judge(trained, before, after, held_out) if "eval" in plan.recipes else None
        rounds.append(Round(number, policy, before, after, trained, report))
        policy, before = str(trained), after
    return rounds


class _Round:
    """The stages of one round."""

    def __init__(self, stages: Runner, plan: RLHFPlan, number: int) -> None:
        self.stages, self.plan, self.number = stages, plan, number

    def label(self, stage: str, policy: str) -> Path:
        """Pairs of the policy's samples."""
        return self._run(stage, policy, [f"run.seed={self.number}"], "preferences.parquet")

    def reward(self, pairs: Sequence[Path]) -> Path:
        """A new reward model: half of what it sees is of this round."""
        old = len(pairs) - 1
        shares = [*[0.5 / old] * old, 0.5] if old else [1.0]
        data = [{"name": f"pairs-{i}", "path": str(path), "weights": share}
                for i, (path, share) in enumerate(zip(pairs, shares, strict=True))]  # fmt: skip
        return self._run("reward", self.plan.model, [f"data.train={json.dumps(data)}"], "export/step-*")

    def policy(self, reward: Path) -> Path:
        """The next policy."""
        return self._run("policy", self.plan.model, [f"reward_models.0.path={reward}"], "export/step-*")

    def judge(self, policy: Path, before: Path | None, after: Path, held_out: Path | None) -> Path:
        """The new policy against the start model, and both reward models on the same fresh pairs."""
        models: list[dict[str, Any]] = [{"name": NEW, "path": str(after), "normalize": True}]
        if before is not None:
            models.append({"name": OLD, "path": str(before), "weight": 0.0})  # only measured
        given = [f"base.path={self.plan.model}", f"reward_models={json.dumps(models)}"]
        if held_out is not None:
            given.append(f"eval.preferences={held_out}")
        return self._run("eval", str(policy), given, "eval.json")

    def _run(self, stage: str, model: str, arguments: Sequence[str], result: str) -> Path:
        return run_stage(self.stages, self.plan, _name(self.number, stage), stage, model, arguments, result)


def _name(number: int, stage: str) -> str:
    # The evaluation is of the policy that the round trained; folders called round-1-eval are of the one before it.
    return f"round-{number}-{'judge' if stage == 'eval' else stage}"


def table_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row a round: numbers of its ``eval.json`` with their intervals."""
    rows = []
    for one in rounds:
        report = report_of(one.report)
        new = report.get("reward_models", {}).get(NEW, {})
        rows.append(
            {
                "round": one.number,
                "num_pairs": new.get("report", {}).get("num_comparisons"),
                "accuracy_before": estimate_at(report, "reward_models", OLD, "report", "accuracy"),
                "accuracy_after": estimate_at(new, "report", "accuracy"),
                "win_rate": estimate_at(report, "win_rate", deciding(report), "raw"),
                "kl": estimate_at(report, "kl_from_base", "sequence"),
            }
        )
    return rows


def iterate(plan: RLHFPlan, num_rounds: int, stages: Stages, console: Console) -> None:
    """Run what is missing, write and print the table.  See :func:`run_rounds` for what is raised."""
    check(plan, stages.directory, num_rounds)
    rows = table_rows(run_rounds(stages, plan, num_rounds))
    title = "iterated RLHF, held-out prompts: reward models on the policy's samples, the new policy against the start"
    write_rows(rows, stages.directory / "iterate.json", title, COLUMNS, console)
