"""``make ensemble-study``: over-optimisation of one reward model against that of an ensemble, at equal KL.

    python -m scripts.study --ensemble worst_case [--members 3] [--steps 12] [--kl-coef 0] [--quick]

Continues a directory in which ``make pipeline`` ran: its reward model is the first member, the others learn from the
same labels under other seeds (order, and which prompts are held out).  Then PPO, once a member: run i against member
i alone, and run i against all of them, from the same critic, prompts and seed.  In the first kind the ensemble is only
measured.  A stage that has ended is not run again; one that was cut off starts afresh.
Coste et al. 2023 (arXiv:2310.02743); with three members and 12 steps about 40 minutes on two cores.
May import: numpy, rich, scripts.{pipeline, stages}, launch.*, trainers.*.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.ensemble_plot import StudyRun, ensemble_plot
from launch.eval_report import plain
from launch.journal import read_rows
from scripts.pipeline import QUICK
from scripts.stages import StageError, Stages
from trainers.equal_kl import AtDistance, compare, mean_of

SINGLE, ENSEMBLE = "one reward model", "ensemble"
DISTANCES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)  # sqrt(nats)
UNIT = "standard deviations over SFT samples"
QUICK_STEPS = 4


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared."""

    combine: str
    uncertainty_coef: float | None
    num_members: int
    num_steps: int
    kl_coef: float
    quick: bool

    @property
    def combination(self) -> dict[str, Any]:
        """``ensemble`` of the reward model's entry."""
        extra = {} if self.uncertainty_coef is None else {"uncertainty_coef": self.uncertainty_coef}
        return {"combine": self.combine, **extra}

    def run_name(self, arm: str, seed: int) -> str:
        """Names everything that decides the run, so that another study takes none of its stages for its own."""
        coef = "" if self.uncertainty_coef is None else f"-{self.uncertainty_coef:g}"
        what = "single" if arm == SINGLE else f"{self.combine}{coef}"
        return f"es-{what}-of-{self.num_members}-beta-{self.kl_coef:g}-steps-{self.num_steps}-seed-{seed}"


def run_members(stages: Stages, study: Study) -> list[Path]:
    """The exports of all reward models; the first is the pipeline's."""
    directory = stages.directory
    own, sft = f"run.directory={directory}", only(directory, "sft/export/step-*")
    members = [only(directory, "reward/export/step-*")]
    for seed in range(1, study.num_members):
        name = f"reward-{seed}"
        stages.cleared(name, directory / name)
        members.append(
            stages.run(
                name,
                ["train", "cpu-pipeline-reward", own, f"run.name={name}", f"run.seed={seed}", f"model.path={sft}",
                 f"data.train.0.path={directory / 'label' / 'preferences.parquet'}",
                 *(QUICK["reward"] if study.quick else ())],
                f"{name}/export/step-*",
            )
        )  # fmt: skip
        shutil.rmtree(directory / name / "checkpoints", ignore_errors=True)  # as below
    return members


# Seven processes of SmolLM2 in float32 have to fit into 24 GB; how much a pass takes at once changes no gradient.
SMALL = ("learner.token_budget=512", "learner.logprob_chunk=256", "critic.token_budget=512",
         "reference.token_budget=1024")  # fmt: skip


def run_policies(stages: Stages, study: Study, members: Sequence[Path]) -> dict[str, list[Path]]:
    """PPO run folders of both arms, one a member each."""
    directory, data = stages.directory, stages.directory / "data"
    sft = only(directory, "sft/export/step-*")
    all_of_them = {"path": [str(m) for m in members], "normalize": True, "ensemble": study.combination}
    folders: dict[str, list[Path]] = {SINGLE: [], ENSEMBLE: []}
    for seed, member in enumerate(members):
        one = {"name": "proxy", "path": str(member), "normalize": True}
        entries = {
            SINGLE: [one, {"name": "ensemble", "weight": 0.0, **all_of_them}],
            ENSEMBLE: [{"name": "proxy", **all_of_them}],
        }
        for arm, models in entries.items():
            name = study.run_name(arm, seed)
            stages.cleared(name, directory / name)
            stages.run(
                name,
                ["train", "cpu-pipeline-ppo", f"run.directory={directory}", f"run.name={name}", f"run.seed={seed}",
                 f"model.path={sft}", f"prompts.train.path={data / 'train-prompts.jsonl'}",
                 f"prompts.eval.path={data / 'held-out-prompts.jsonl'}", f"reward_models={json.dumps(models)}",
                 f"critic.path={member}", f"algorithm.kl_coef={study.kl_coef}", "algorithm.measure_kl=true",
                 "algorithm.num_minibatches=1", "learner.optimizer.lr=1e-4", "critic.optimizer.lr=1e-4",
                 "run.groups_per_step=16", "generator.sampling.max_tokens=32", *SMALL,
                 *(QUICK["ppo"] if study.quick else ()), f"run.num_steps={study.num_steps}", "evaluation.every=0",
                 "checkpoint.export=false"],
                f"{name}/metrics.jsonl",
            )  # fmt: skip
            shutil.rmtree(directory / name / "checkpoints", ignore_errors=True)  # gigabytes that nobody resumes
            folders[arm].append(directory / name)
    return folders


def only(directory: Path, pattern: str) -> Path:
    """The last match.  StageError where the pipeline left none."""
    found = sorted(directory.glob(pattern))
    if not found:
        raise StageError(f"there is no {directory / pattern}; run `make pipeline` first")
    return found[-1]


def study_runs(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[StudyRun]]:
    """Every run in units of the SFT model's own spread, which is that of the samples of all runs' first step."""
    rows = {
        arm: [[r for r in read_rows(f / "metrics.jsonl") if r.get("objective/kl") is not None] for f in of_arm]
        for arm, of_arm in folders.items()
    }
    first = [runs[0] for of_arm in rows.values() for runs in of_arm if runs]
    if not first:
        raise StageError("no PPO run recorded objective/kl: nothing can be compared")

    def unit(values: Sequence[float], part: str, of: Sequence[Mapping[str, Any]]) -> np.ndarray:
        mean, std = (float(np.mean([row[f"rewards/{part}/{what}"] for row in of])) for what in ("mean", "std"))
        return (np.array(values) - mean) / (std or 1.0)

    runs: dict[str, list[StudyRun]] = {}
    for arm, of_arm in rows.items():
        starts = [recorded[0] for recorded in of_arm if recorded]
        runs[arm] = [
            StudyRun(
                np.array([max(float(row["objective/kl"]), 0.0) for row in recorded]),
                unit([row["rewards/gold/mean"] for row in recorded], "gold", first),
                unit([row["rewards/proxy/mean"] for row in recorded], "proxy", starts),
                np.array([row.get("disagreement/mean") for row in recorded], dtype=np.float64),  # None becomes NaN
            )
            for recorded in of_arm
            if recorded
        ]
    return runs


def report(runs: Mapping[str, Sequence[StudyRun]], console: Console) -> list[AtDistance]:
    """Print both tables and the verdict; the comparison at each distance."""
    ends = Table(title="at the last step, mean and 95 % interval over runs")
    for column in ("trained on", "runs", "KL, nats", "proxy", "gold", "gold at its best", "disagreement"):
        ends.add_column(column)
    for arm, of_arm in runs.items():
        last = [[r.kl[-1], r.proxy[-1], r.gold[-1], r.gold.max(), r.disagreement[-1]] for r in of_arm]
        ends.add_row(arm, str(len(of_arm)), *(str(mean_of(np.array(column))) for column in zip(*last, strict=True)))
    console.print(ends)
    found = compare([r.by_gold for r in runs[SINGLE]], [r.by_gold for r in runs[ENSEMBLE]], DISTANCES, 0.0)
    equal = Table(title="gold at equal KL")
    for column in ("sqrt(KL)", SINGLE, ENSEMBLE, "difference", "the ensemble's gold is"):
        equal.add_column(column)
    for at in found:
        if at.difference.n:
            difference = f"{at.difference} (n {at.difference.n})"
            equal.add_row(f"{at.d:g}", str(at.first), str(at.second), difference, at.verdict)
    console.print(equal)
    verdicts = {at.verdict for at in found if at.difference.n > 1}
    if "higher" in verdicts and "lower" not in verdicts:
        said = "the ensemble reaches higher gold at equal KL"
    elif "lower" in verdicts and "higher" not in verdicts:
        said = "the ensemble reaches LOWER gold at equal KL"
    elif len(verdicts & {"higher", "lower"}) == 2:
        said = "which of the two reaches higher gold depends on the KL"
    else:
        said = "the study does not tell the two apart: every interval of the difference contains 0"
    console.print(f"[bold]{said}[/bold]")
    return found


def run_study(directory: Path, study: Study, console: Console) -> None:
    """Run what is missing, draw and print.  StageError when a stage fails."""
    stages = Stages(directory, console)
    folders = run_policies(stages, study, run_members(stages, study))
    runs = study_runs(folders)
    found = report(runs, console)
    svg, png = ensemble_plot(runs, 0.0, directory / "ensemble-study.svg", UNIT)
    rows = {
        arm: [{"kl": r.kl.tolist(), "gold": r.gold.tolist(), "proxy": r.proxy.tolist(),
               "disagreement": r.disagreement.tolist()} for r in of_arm]
        for arm, of_arm in runs.items()
    }  # fmt: skip
    written = {"study": asdict(study), "at_equal_kl": found, "runs": rows}
    (directory / "ensemble-study.json").write_text(json.dumps(plain(written), indent=1) + "\n", encoding="utf-8")
    console.print(f"plot: {svg} and {png}; numbers: {directory / 'ensemble-study.json'}")
