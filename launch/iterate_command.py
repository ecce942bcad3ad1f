"""``burnish iterate dpo`` and ``burnish iterate rlhf``: their options, and the plan that these say.

May import: the standard library; everything else inside the commands.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.iterate_dpo import DPOPlan
    from launch.iterate_rlhf import RLHFPlan

PIPELINE = Path("runs/pipeline")
OWN_DEADLINE_S = 86_400.0  # for a stage of own recipes; the planted task's take minutes
RECIPES = {
    "label": "samples a policy and prefers",
    "held-out": "the same on held-out prompts, with --eval: the reward models are judged on its pairs",
    "train": "learns from the pairs, algorithm.name: dpo",
    "reward": "trains a reward model, algorithm.name: reward",
    "policy": "trains a policy against the first of its reward_models",
    "eval": "judges the trained policy; default: nothing does",
}


def add_iterate(commands: Any) -> None:
    """The parsers of both commands, below ``commands`` of argparse."""
    iterate = commands.add_parser("iterate", help="in rounds: label the policy's own answers, train on them, judge")
    kinds = iterate.add_subparsers(title="what is iterated", metavar="KIND", required=True)

    dpo = kinds.add_parser("dpo", help="preference learning: each round's policy learns from its own labelled answers")
    _arguments(dpo, ("label", "train", "eval"), 3, "the first policy")
    dpo.add_argument("--reference", choices=("previous", "start"), default="previous",
                     help="the policy before the round, or the first one")  # fmt: skip
    dpo.set_defaults(command=_dpo)

    rlhf = kinds.add_parser("rlhf", help="a reward model retrained on the policy's own samples, and a policy on it")
    _arguments(rlhf, ("label", "held-out", "reward", "policy", "eval"), 2, "where every model starts")
    for name, what in (("policy", "whose samples the first round labels; default: --model"),
                       ("reward", "folder of the reward model it was trained with"),
                       ("pairs", "file of the pairs which that one learned from")):  # fmt: skip
        rlhf.add_argument(f"--first-{name}", metavar="PATH", help=what)
    rlhf.set_defaults(command=_rlhf)


def _arguments(parser: argparse.ArgumentParser, stages: Sequence[str], num_rounds: int, model: str) -> None:
    parser.add_argument("--directory", type=Path, metavar="DIR",
                        help=f"of all stages' folders; default: {PIPELINE}, with --model runs/iterate-...")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=num_rounds, metavar="N", help=f"default: {num_rounds}")
    parser.add_argument("--model", help=f"{model}; default: the SFT model of make pipeline")
    for stage in stages:
        parser.add_argument(f"--{stage}", metavar="RECIPE", help=f"with --model: {RECIPES[stage]}")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE:KEY=VALUE",
                        help=f"a key of a stage's recipe; stages: {', '.join(stages)}")  # fmt: skip
    parser.add_argument("--deadline-s", type=float, metavar="S", help="seconds that one stage may take before it is "
                        f"told to stop; default: 3600, with --model {OWN_DEADLINE_S:.0f}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")


def _dpo(arguments: argparse.Namespace) -> int:
    from launch import iterate_dpo
    from launch.iterate_dpo import DPOPlan

    def make() -> DPOPlan:
        given = _given(arguments, iterate_dpo.STAGES, iterate_dpo.REQUIRED)
        if given is None:
            plan = iterate_dpo.planted(arguments.directory, arguments.quick)
        else:
            plan = DPOPlan(_place(arguments.model), given)
        keys = _keys(arguments.set, plan.recipes, plan.keys)
        return DPOPlan(plan.model, plan.recipes, keys, arguments.reference)

    return _run(arguments, "dpo", make, iterate_dpo.iterate)


def _rlhf(arguments: argparse.Namespace) -> int:
    from launch import iterate_rlhf
    from launch.iterate_rlhf import RLHFPlan
    from trainers.errors import InputError

    def make() -> RLHFPlan:
        given = _given(arguments, iterate_rlhf.STAGES, iterate_rlhf.REQUIRED)
        firsts = [getattr(arguments, f"first_{name}") for name in ("policy", "reward", "pairs")]
        if given is None:
            for name, first in zip(("policy", "reward", "pairs"), firsts, strict=True):
                if first is not None:
                    raise InputError(f"--first-{name}", first, "the planted task has its own", "give --model, too")
            plan = iterate_rlhf.planted(arguments.directory, arguments.quick)
            firsts = [plan.first_policy, plan.first_reward, plan.first_pairs]
        else:
            if "held-out" in given and "eval" not in given:
                raise InputError("--held-out", given["held-out"], "nothing judges reward models on its pairs",
                                 "give --eval, too")  # fmt: skip
            firsts = [None if first is None else _place(first) for first in firsts]
            plan = RLHFPlan(_place(arguments.model), given)
        return RLHFPlan(plan.model, plan.recipes, _keys(arguments.set, plan.recipes, plan.keys), *firsts)

    return _run(arguments, "rlhf", make, iterate_rlhf.iterate)


def _run(arguments: argparse.Namespace, kind: str, make: Any, iterate: Any) -> int:
    from rich.console import Console

    from launch.compare_stage import interrupt_on_signals
    from launch.stages import DEADLINE_S, Stages
    from trainers.errors import InputError

    if arguments.rounds < 1:
        raise InputError("--rounds", arguments.rounds, "nothing would be done", "give 1 or more")
    own = arguments.model is not None
    default = Path(f"runs/iterate-{kind}") if own else PIPELINE
    arguments.directory = (arguments.directory or default).absolute()
    deadline_s = arguments.deadline_s or (OWN_DEADLINE_S if own else DEADLINE_S)
    if arguments.deadline_s is not None and not arguments.deadline_s > 0:
        raise InputError("--deadline-s", arguments.deadline_s, "no stage would end", "give seconds above 0")
    plan: DPOPlan | RLHFPlan = make()
    interrupt_on_signals()
    console = Console()
    iterate(plan, arguments.rounds, Stages(arguments.directory, console, deadline_s), console)
    return 0


def _given(
    arguments: argparse.Namespace, stages: Sequence[str], required: Sequence[str]
) -> dict[str, str] | None:
    """Own recipes by stage; None for the planted task."""
    from trainers.errors import InputError

    found = {stage: getattr(arguments, stage.replace("-", "_")) for stage in stages}
    given = {stage: recipe for stage, recipe in found.items() if recipe is not None}
    if arguments.model is None:
        if given:
            stage, recipe = next(iter(given.items()))
            raise InputError(f"--{stage}", recipe, "own recipes need a model to begin with", "give --model, too")
        return None
    if arguments.quick:
        raise InputError("--quick", True, "makes the planted task tiny, and --model is given", "leave one of them out")
    if missing := [stage for stage in required if stage not in given]:
        raise InputError(f"--{missing[0]}", None, "with --model every stage needs a recipe",
                         f"give {', '.join(f'--{stage}' for stage in missing)}")  # fmt: skip
    return given


def _keys(
    entries: Sequence[str], recipes: Mapping[str, str], keys: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Those of the plan, and behind them what ``--set`` says."""
    from trainers.errors import InputError

    found = {stage: list(keys.get(stage, ())) for stage in recipes}
    for entry in entries:
        stage, colon, key = entry.partition(":")
        if not colon or stage not in found or "=" not in key:
            raise InputError("--set", entry, "is not of the form STAGE:key=value",
                             f"name one of the stages {', '.join(found)}")  # fmt: skip
        found[stage].append(key)
    return found


def _place(path: str) -> str:
    """A folder or file as the stages are given it: from anywhere."""
    return path if path.startswith("builtin:") else str(Path(path).expanduser().absolute())
