"""``make pipeline``: SFT -> pairs labelled by a planted noisy human -> reward model -> PPO -> evaluation -> one page.

    python -m scripts.pipeline [--directory runs/pipeline] [--deadline-s 3600] [--quick]

``--quick`` does everything once on a tiny random model, to see that it runs: those numbers mean nothing.
Each step is a ``burnish`` command that is printed before it runs; a step that has ended is not run again.
May import: numpy, pyarrow, rich, transformers (inside a function), scripts.staged, launch.*, trainers.*.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.eval_page import write_page
from launch.journal import read_rows
from launch.pipeline_page import Pipeline, page_sections, summary
from launch.planted_task import LABEL_RECIPE, QUICK
from launch.recipe_files import locate_recipe, parse_yaml
from launch.stages import Stages
from scripts.staged import add_deadline, answer
from trainers.calibration import proportion
from trainers.comparisons import ComparisonTable
from trainers.planted import ceiling, gold, prompts


def write_prompts(folder: Path) -> tuple[Path, Path]:
    """(train, held-out) prompt files; written anew each time, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train-prompts.jsonl", folder / "held-out-prompts.jsonl"
    for file, texts in zip(files, prompts(), strict=True):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return files


def run_stages(stages: Stages, extra: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    """Every stage's result: exports of sft, reward and ppo, the preferences, the evaluation's report."""
    directory = stages.directory
    train, held_out = write_prompts(directory / "data")
    for name in ("sft", "label", "reward", "ppo", "eval"):
        stages.refuse_strange(name)
    own = f"run.directory={directory}"
    brief = ("evaluation.every=32", "checkpoint.every=0")  # it takes minutes
    sft = stages.run(
        "sft", ["train", "cpu-sft", own, "run.name=sft", *brief, *extra.get("sft", ())], "sft/export/step-*"
    )
    label = stages.run(
        "label", ["label", LABEL_RECIPE, own, f"model.path={sft}", f"prompts.train.path={train}",
         *extra.get("label", ())],
        "label/preferences.parquet",
    )  # fmt: skip
    reward = stages.run(
        "reward", ["train", "cpu-pipeline-reward", own, f"model.path={sft}", f"data.train.0.path={label}",
         *extra.get("reward", ())],
        "reward/export/step-*",
    )  # fmt: skip
    ppo = stages.run(
        "ppo",
        ["train", "cpu-pipeline-ppo", own, f"model.path={sft}", f"prompts.train.path={train}",
         f"prompts.eval.path={held_out}", f"reward_models.0.path={reward}", *extra.get("ppo", ())],
        "ppo/export/step-*",
    )  # fmt: skip
    report = stages.run(
        "eval",
        ["eval", "cpu-pipeline-eval", own, f"model.path={ppo}", f"base.path={sft}",
         f"prompts.train.path={held_out}", f"reward_models.0.path={reward}", *extra.get("eval", ())],
        "eval/eval.json",
    )  # fmt: skip
    return {"sft": sft, "label": label, "reward": reward, "ppo": ppo, "eval": report}


def noise_ceiling(directory: Path, tokenizer_folder: Path, noise: float) -> tuple[float, Any]:
    """(best expected accuracy on the reward model's own held-out pairs, how often the gold itself agrees).

    Both are of the very pairs that the reward model was judged on.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    table = ComparisonTable(directory / "reward" / "data" / "held_out.arrow")
    chosen, rejected = [], []
    for comparison in (table[i] for i in range(len(table))):
        golds = [gold(tokenizer.decode(ids, skip_special_tokens=True)) for ids in comparison.completion_ids]
        for better, worse in comparison.pairs:
            chosen.append(golds[better])
            rejected.append(golds[worse])
    won = np.sign(np.array(chosen) - np.array(rejected))
    agreed = float((won > 0).sum() + 0.5 * (won == 0).sum())
    return ceiling(chosen, rejected, noise), proportion(agreed, len(chosen))


def label_noise() -> float:
    """Temperature of the planted human, from the recipe that labels."""
    recipe: Mapping[str, Any] = parse_yaml(locate_recipe(LABEL_RECIPE)[1])
    return float(recipe["label"]["pair"]["args"]["noise"])


def show(rows: Iterable[tuple[str, str]], console: Console) -> None:
    table = Table(title="The pipeline, end to end", show_lines=False)
    table.add_column("what")
    table.add_column("measured")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> int:
    """Run what is missing, write the page; exit code 1 when a stage failed, 2 when something was refused."""
    parser = argparse.ArgumentParser(prog="pipeline")
    parser.add_argument("--directory", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    add_deadline(parser)
    arguments = parser.parse_args()
    return answer("pipeline", lambda: pipeline(arguments.directory.absolute(), arguments.quick, arguments.deadline_s))


def pipeline(directory: Path, quick: bool, deadline_s: float) -> None:
    """Run what is missing, write the page.  StageError when a stage fails, InputError when one is refused."""
    console, started = Console(), time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    stages = Stages(directory, console, deadline_s, keep_checkpoints=True)
    found = run_stages(stages, QUICK if quick else {})
    best, gold_agrees = noise_ceiling(directory, found["sft"], label_noise())
    left = Pipeline(
        seconds=stages.seconds,
        sft=list(read_rows(directory / "sft" / "metrics.jsonl")),
        label=json.loads((directory / "label" / "summary.json").read_text()),
        reward=list(read_rows(directory / "reward" / "metrics.jsonl")),
        reward_report=json.loads((found["reward"] / "reward_report.json").read_text()),
        reward_plot=(found["reward"] / "reward_report.svg").read_text(),
        ppo=list(read_rows(directory / "ppo" / "metrics.jsonl")),
        alarms=[e for e in read_rows(directory / "ppo" / "events.jsonl") if e.get("kind") == "alarm"],
        evaluation=json.loads(found["eval"].read_text()),
        samples=found["eval"].with_name("samples.parquet"),
        ceiling=best,
        gold_agrees=gold_agrees,
    )
    page = directory / "pipeline.html"
    write_page(page, "From SFT to PPO: one pipeline", page_sections(left))
    show(summary(left), console)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"[bold]{minutes:.1f} minutes; the page: {page}[/bold]")


if __name__ == "__main__":
    sys.exit(main())
