"""The ``burnish`` command.  Imports nothing heavy: ``burnish --help`` answers at once.

Exit codes: 0 done, 1 the run failed, 2 refused (one line says field, value, reason and remedy),
130 ended by a second Ctrl-C.
May import: the standard library, launch.iterate_command; everything else inside the commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from launch.iterate_command import add_iterate

if TYPE_CHECKING:
    from launch.overrides import ResolvedConfig

REFUSED, FAILED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value arguments that stand after an option.
    if rest and hasattr(arguments, "overrides") and all("=" in r and not r.startswith("-") for r in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 0
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        print("burnish: ended at once; the last checkpoint is intact", file=sys.stderr)
        return 130
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        print(f"burnish: {error}", file=sys.stderr)
        return code


def _code_of(error: Exception) -> int | None:
    """The exit code of an error whose one line says it all; None: its traceback is wanted."""
    from cluster.errors import ShortfallError
    from launch.compare_stage import StageError
    from trainers.errors import EndpointError, InputError

    if isinstance(error, InputError | ShortfallError):
        return REFUSED
    return FAILED if isinstance(error, EndpointError | StageError) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="burnish", description="Distributed RLHF: Ray, vLLM and DeepSpeed in one loop."
    )
    parser.add_argument("--version", action="version", version=f"burnish {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe")
    _recipe_arguments(train)
    train.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    train.set_defaults(command=_train)

    label = commands.add_parser("label", help="sample candidates from a policy and write preferences")
    _recipe_arguments(label)
    label.add_argument("--resume", action="store_true", help="go on with the run of this name where it was")
    label.set_defaults(command=_label)

    selection = commands.add_parser("select", help="sample n answers a prompt and keep the best ones as an SFT set")
    _recipe_arguments(selection)
    selection.add_argument("--resume", action="store_true", help="go on with the run of this name where it was")
    selection.set_defaults(command=_select)

    answering = commands.add_parser("answer", help="answer prompts with the best of n samples")
    _recipe_arguments(answering)
    answering.add_argument("--prompt", help="answer this one; default: every prompt of prompts.train")
    answering.add_argument("--resume", action="store_true", help="go on with the run of this name where it was")
    answering.set_defaults(command=_answer)

    serving = commands.add_parser("serve", help="answer requests over HTTP with the best of n samples")
    _recipe_arguments(serving)
    serving.set_defaults(command=_serve)

    revision = commands.add_parser("revise", help="have answers criticised and revised by a constitution")
    _recipe_arguments(revision)
    revision.add_argument("--resume", action="store_true", help="go on with the run of this name where it was")
    revision.set_defaults(command=_revise)

    validate = commands.add_parser("validate", help="check a recipe, its model, data, rewards and this cluster")
    _recipe_arguments(validate)
    validate.add_argument("--config-only", action="store_true", help="check the configuration alone")
    validate.set_defaults(command=_validate)

    evaluation = commands.add_parser("eval", help="judge a policy against its base: win rate, KL, diversity, suites")
    _recipe_arguments(evaluation)
    evaluation.set_defaults(command=_eval)

    comparison = commands.add_parser("compare", help="many algorithms on one task and budget: a table and a plot")
    _recipe_arguments(comparison)
    comparison.add_argument("--algorithms", nargs="+", metavar="NAME", help="who is compared, see docs/compare.md")
    comparison.add_argument("--seeds", metavar="N,N", help="each algorithm runs once with each")
    comparison.add_argument("--budget", metavar="N", help="answers that one run may have sampled and labelled")
    comparison.add_argument("--directory", metavar="DIR", help="its folder; what ended in it is not run again")
    comparison.add_argument("--page", metavar="FILE", help="a Markdown file whose section of results is written too")
    comparison.set_defaults(command=_compare)

    add_iterate(commands)

    recipes = commands.add_parser("recipes", help="list, show or copy the recipes that come with Burnish")
    actions = recipes.add_subparsers(title="actions", metavar="ACTION", required=True)
    actions.add_parser("ls", help="names and what they are").set_defaults(command=_recipes_ls)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name")
    show.set_defaults(command=_recipes_show)
    copy = actions.add_parser("cp", help="copy one, to change it")
    copy.add_argument("name")
    copy.add_argument("target", nargs="?", default=".")
    copy.set_defaults(command=_recipes_cp)

    averaging = commands.add_parser("average", help="one reward model of several: the mean of their weights")
    averaging.add_argument("out", help="folder to write")
    averaging.add_argument("members", nargs="+", metavar="MEMBER", help="folders of models that began with one base")
    averaging.add_argument("--reference", help="JSONL or Parquet of prompt and completion: statistics of their scores")
    averaging.add_argument("--plain", action="store_true", help="no chat template around their plain-text prompts")
    averaging.set_defaults(command=_average)

    merging = commands.add_parser("merge", help="a LoRA adapter and its base as one model")
    merging.add_argument("adapter", help="its folder: adapter/ of an export, learner/ of a checkpoint, or peft's")
    merging.add_argument("out", help="folder to write")
    merging.add_argument("--base", help="folder of the base model; default: the one that the adapter names")
    merging.add_argument(
        "--base-checked", action="store_true", help="--base is the adapter's own, though the adapter calls it otherwise"
    )
    merging.add_argument(
        "--quantization", choices=("none", "nf4", "fp4", "int8"), default=None,
        help="what the base is quantised with and dequantised from; default: what the adapter was trained on",
    )  # fmt: skip
    merging.set_defaults(command=_merge)

    scaling = commands.add_parser("scale", help="change the number of generators of a live run")
    scaling.add_argument("run", help="a run folder")
    scaling.add_argument("assignments", nargs="+", metavar="generators=N", help="how many it is to have")
    scaling.set_defaults(command=_scale)

    inspect = commands.add_parser("inspect", help="tables of samples and metrics of a run")
    inspect.add_argument("run", help="a run folder")
    inspect.add_argument("--step", type=int, default=None, help="whose samples to show; default: the last")
    inspect.add_argument("--rows", type=int, default=8, help="samples to show")
    inspect.set_defaults(command=_inspect)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe (burnish recipes ls)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance run.num_steps=100")
    parser.add_argument(
        "--print-config", action="store_true", help="print every value and where it came from, and stop"
    )


def _version() -> str:
    try:
        return version("burnish")
    except PackageNotFoundError:
        return "(not installed)"


def _console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console()


def _resolved(arguments: argparse.Namespace, command: str | None = None) -> ResolvedConfig | None:
    """The recipe with its overrides, one that ``command`` runs; None when it was only to be printed."""
    from launch.overrides import expect_command, load_config, print_config

    resolved = load_config(arguments.recipe, arguments.overrides)
    if not arguments.print_config:
        if command is not None:
            expect_command(resolved.config, command, arguments.recipe)
        return resolved
    print_config(resolved)
    return None


def _train(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "train")
    if resolved is None:
        return 0
    from launch.tuning_config import TuningConfig

    if isinstance(resolved.config, TuningConfig):
        from launch.tune import tune

        tune(resolved, arguments.resume, _console())
        return 0
    from launch.train import train

    train(resolved, arguments.resume, _console())
    return 0


def _label(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "label")
    if resolved is None:
        return 0
    from launch.label import label

    label(resolved.config, _console(), arguments.resume)
    return 0


def _select(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "select")
    if resolved is None:
        return 0
    from launch.select import select_answers

    select_answers(resolved.config, _console(), arguments.resume)
    return 0


def _answer(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "answer")
    if resolved is None:
        return 0
    from launch.select import answer_one, answer_prompts

    if arguments.prompt is None:
        answer_prompts(resolved.config, _console(), arguments.resume)
    else:
        answer_one(resolved.config, arguments.prompt, _console(), arguments.resume)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "serve")
    if resolved is None:
        return 0
    from launch.serve import serve

    serve(resolved.config, _console())
    return 0


def _revise(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "revise")
    if resolved is None:
        return 0
    from launch.revise import revise_answers

    revise_answers(resolved.config, _console(), arguments.resume)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments, "eval")
    if resolved is None:
        return 0
    from launch.evaluate import evaluate_models

    evaluate_models(resolved.config, _console())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    # What the options say is written as the keys they stand for, behind those that were given as keys.
    names = arguments.algorithms or []
    keys = [*arguments.overrides, *(name for name in names if "=" in name)]
    names = [part for name in names if "=" not in name for part in name.split(",") if part]
    given = {"algorithms": ", ".join(names), "seeds": arguments.seeds, "budget": arguments.budget}
    for name, value in given.items():
        if value:
            keys.append(f"compare.{name}={value}" if name == "budget" else f"compare.{name}=[{value}]")
    if arguments.directory is not None:
        place = Path(arguments.directory).absolute()
        keys += [f"run.name={place.name}", f"run.directory={place.parent}"]
    arguments.overrides = keys
    resolved = _resolved(arguments, "compare")
    if resolved is None:
        return 0
    from launch.compare import compare
    from launch.compare_page import num_missing
    from launch.compare_stage import interrupt_on_signals

    page = None if arguments.page is None else Path(arguments.page)
    interrupt_on_signals()
    return FAILED if num_missing(compare(resolved.config, _console(), page)) else 0


def _validate(arguments: argparse.Namespace) -> int:
    resolved = _resolved(arguments)
    if resolved is None:
        return 0
    from launch.compare_config import CompareConfig

    if arguments.config_only:
        if isinstance(resolved.config, CompareConfig):  # its runs have configurations too
            from launch.compare_plan import make_plan
            from launch.compare_prepare import folder_of

            make_plan(resolved.config, folder_of(resolved.config))
        print(f"{arguments.recipe}: the configuration is valid")
        return 0
    from launch.validate import validate

    return validate(resolved.config, _console(), arguments.recipe)


def _recipes_ls(arguments: argparse.Namespace) -> int:
    from launch.recipe_files import describe_recipe, list_recipes

    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {describe_recipe(name)}")
    return 0


def _recipes_show(arguments: argparse.Namespace) -> int:
    from launch.recipe_files import read_recipe

    print(read_recipe(arguments.name), end="")
    return 0


def _recipes_cp(arguments: argparse.Namespace) -> int:
    from launch.recipe_files import copy_recipe

    print(copy_recipe(arguments.name, arguments.target))
    return 0


def _average(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from launch.average import average

    for line in average(arguments.members, Path(arguments.out), arguments.reference, not arguments.plain):
        print(line)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from launch.merge import merge_adapter

    lines = merge_adapter(
        arguments.adapter, Path(arguments.out), arguments.base, arguments.quantization, arguments.base_checked
    )
    for line in lines:
        print(line)
    return 0


def _scale(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from launch.scale import parse_scale, scale

    print(scale(Path(arguments.run), parse_scale(arguments.assignments)))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from launch.inspect_run import inspect_run

    inspect_run(Path(arguments.run), _console(), arguments.step, arguments.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
