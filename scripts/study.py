"""``make study``: over-optimisation of a learned reward, at several KL coefficients and by best-of-n.

    python -m scripts.study [--directory runs/pipeline] [--steps 16] [--deadline-s 3600]
    python -m scripts.study --ensemble worst_case [--members 3]     another study: scripts/ensemble_study.py

The SFT model and the reward model are those of ``make pipeline``, which must have run in that directory.  Gold and
proxy of every PPO step are of that step's own samples; both are shown in standard deviations over samples of the SFT
model, less its mean.  Gao, Schulman and Hilton 2022 (arXiv:2210.10760).
May import: numpy, pyarrow, rich, scripts.{ensemble_study, staged}, launch.*, trainers.overoptimisation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from launch.journal import read_rows
from launch.stages import Stages, only
from launch.study_plot import Series, StudyPoint, fit_table, study_plot
from scripts.ensemble_study import QUICK_STEPS, STEPS, Study, run_study
from scripts.staged import add_deadline, answer
from trainers.ensembles import Combination
from trainers.overoptimisation import BEST_OF_N, RL, Fit, bon_estimate, fit

BETAS = (0.0, 0.02, 0.1, 0.5)
NUM_SAMPLES = 32  # of each prompt, for best-of-n
BEST_OF = (1, 2, 4, 8, 16, 32)
UNIT = "standard deviations over SFT samples"


def run_stages(stages: Stages, steps: int) -> tuple[Path, dict[float, Path]]:
    """(samples of the SFT model with both rewards, PPO run folders by beta)."""
    directory = stages.directory
    own = f"run.directory={directory}"
    sft = only(directory, "sft/export/step-*")
    reward = only(directory, "reward/export/step-*")
    data = directory / "data"
    samples = stages.run(
        "best-of-n",
        ["eval", "cpu-pipeline-eval", own, "run.name=study-best-of-n", f"model.path={sft}", "base.path=null",
         f"prompts.train.path={data / 'held-out-prompts.jsonl'}", f"reward_models.0.path={reward}",
         "eval.num_prompts=40", f"eval.num_samples={NUM_SAMPLES}"],
        "study-best-of-n/samples.parquet",
    )  # fmt: skip
    folders = {}
    for beta in BETAS:
        name = f"study-beta-{beta:g}"
        stages.run(
            name,
            ["train", "cpu-pipeline-ppo", own, f"run.name={name}", f"model.path={sft}",
             f"prompts.train.path={data / 'train-prompts.jsonl'}",
             f"prompts.eval.path={data / 'held-out-prompts.jsonl'}", f"reward_models.0.path={reward}",
             f"algorithm.kl_coef={beta}", "algorithm.measure_kl=true", f"run.num_steps={steps}",
             "run.groups_per_step=16", "algorithm.num_minibatches=1", "learner.optimizer.lr=1e-4",
             "critic.optimizer.lr=1e-4", "generator.sampling.max_tokens=32", "evaluation.every=0",
             "checkpoint.export=false"],
            f"{name}/metrics.jsonl",
        )  # fmt: skip
        folders[beta] = directory / name
    return samples, folders


def measured_points(samples: Path, folders: dict[float, Path]) -> list[StudyPoint]:
    """Every policy in units of the SFT model's own spread."""
    table = pq.read_table(samples)
    proxy = np.asarray(table["rewards/proxy"], dtype=np.float64).reshape(-1, NUM_SAMPLES)
    gold = np.asarray(table["rewards/gold"], dtype=np.float64).reshape(-1, NUM_SAMPLES)

    def unit(value: float, of: np.ndarray) -> float:
        return float((value - of.mean()) / of.std())

    points = [
        StudyPoint(BEST_OF_N, best.kl, unit(best.proxy, proxy), unit(best.gold, gold))
        for best in bon_estimate(proxy, gold, BEST_OF)
    ]
    for beta, folder in folders.items():
        for row in read_rows(folder / "metrics.jsonl"):
            if row.get("objective/kl") is not None:
                found = row["rewards/proxy/mean"], row["rewards/gold/mean"]
                kl = max(float(row["objective/kl"]), 0.0)
                points.append(StudyPoint(RL, kl, unit(found[0], proxy), unit(found[1], gold), beta))
    return points


def law_fits(points: list[StudyPoint]) -> dict[Series, Fit]:
    """The best-of-n law, and one RL law for each beta that moved away from the start."""
    fits: dict[Series, Fit] = {}
    for method, beta in dict.fromkeys((p.method, p.kl_coef) for p in points):
        own = [p for p in points if (p.method, p.kl_coef) == (method, beta)]
        moved = [p for p in own if p.kl > 0]
        if len({p.kl for p in moved}) >= 3:
            fits[method, beta] = fit(method, [p.kl for p in own], [p.gold for p in own], start=0.0)
    return fits


def ensemble_study(arguments: argparse.Namespace, directory: Path, console: Console) -> None:
    """Run what is missing, draw and print.  StageError when a stage fails, InputError when one is refused."""
    coef = arguments.uncertainty_coef
    if coef is None and arguments.ensemble == "mean_minus_variance":
        coef = 0.5
    quick = arguments.quick
    chosen = Study(
        arguments.ensemble, coef, 2 if quick else arguments.members, 2 if quick else arguments.runs,
        arguments.steps or (QUICK_STEPS if quick else STEPS), arguments.kl_coef, quick,
    )  # fmt: skip
    run_study(directory, chosen, console, arguments.deadline_s)


def main() -> int:
    """Run what is missing, draw, print the fits; exit code 1 when a stage failed, 2 when something was refused."""
    parser = argparse.ArgumentParser(prog="study")
    parser.add_argument("--directory", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--steps", type=int, help=f"PPO steps of each run; default: 16, with --ensemble {STEPS}")
    add_deadline(parser)
    ensemble = parser.add_argument_group("one reward model against an ensemble")
    ensemble.add_argument("--ensemble", choices=get_args(Combination), help="how the members become one reward")
    ensemble.add_argument("--uncertainty-coef", type=float, help="with mean_minus_variance; default: 0.5")
    ensemble.add_argument("--members", type=int, default=3, help="reward models")
    ensemble.add_argument("--runs", type=int, default=4, help="runs of each kind; they give the interval")
    ensemble.add_argument("--kl-coef", type=float, default=0.0, help="beta of every run")
    ensemble.add_argument("--quick", action="store_true", help="two tiny members, few steps: does everything run?")
    arguments = parser.parse_args()
    directory, console = arguments.directory.absolute(), Console()
    if arguments.members < 2:
        parser.error(f"--members={arguments.members}: an ensemble has at least two")
    if arguments.runs < 2:
        parser.error(f"--runs={arguments.runs}: one pair of runs has no interval")
    if arguments.uncertainty_coef is not None and arguments.ensemble != "mean_minus_variance":
        parser.error(f"--uncertainty-coef has no meaning with --ensemble={arguments.ensemble}")
    if arguments.ensemble is not None:
        return answer("study", lambda: ensemble_study(arguments, directory, console))
    if arguments.quick:
        parser.error("--quick goes with --ensemble")
    return answer("study", lambda: study(arguments, directory, console))


def study(arguments: argparse.Namespace, directory: Path, console: Console) -> None:
    """Run what is missing, draw and print.  StageError when a stage fails, InputError when one is refused."""
    samples, folders = run_stages(Stages(directory, console, arguments.deadline_s), arguments.steps or 16)
    points = measured_points(samples, folders)
    fits = law_fits(points)
    svg, png = study_plot(points, fits, directory / "overoptimisation.svg", UNIT)
    rows = fit_table(fits)
    (directory / "overoptimisation.json").write_text(
        json.dumps({"fits": rows, "points": [[p.method, p.kl_coef, p.kl, p.proxy, p.gold] for p in points]}, indent=1)
    )
    table = Table(title="R = d (alpha - beta c(d)), d = sqrt(KL)")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    console.print(f"plot: {svg} and {png}")


if __name__ == "__main__":
    sys.exit(main())
