"""``make ensemble-study``: over-optimisation of one reward model against that of an ensemble, at equal KL.

    python -m scripts.study --ensemble worst_case [--members 3] [--runs 4] [--steps 20] [--kl-coef 0] [--quick]

Continues a directory in which ``make pipeline`` ran: its reward model is the first member, the others learn from the
same labels under other seeds (order, and which prompts are held out).  Then PPO in pairs of runs: one against a single
member (run i against member i modulo their number), one against all of them, from the same critic, prompts and seed.
In the first kind the ensemble is only measured.  A stage that has ended is not run again; one that was cut off goes on
from its newest checkpoint, or starts afresh.  Coste et al. 2023 (arXiv:2310.02743).
May import: numpy, rich, launch.*, trainers.*.
"""

from __future__ import annotations

import json
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
from launch.planted_task import QUICK
from launch.stages import DEADLINE_S, StageError, Stages, only
from trainers.calibration import Estimate
from trainers.equal_kl import MOVED, AtDistance, compare, mean_of, overall, verdict

SINGLE, ENSEMBLE = "one reward model", "ensemble"
DISTANCES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)  # sqrt(nats)
UNIT = "standard deviations over SFT samples"
STEPS, QUICK_STEPS = 20, 4  # gold begins to fall after a dozen


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared."""

    combine: str
    uncertainty_coef: float | None
    num_members: int
    num_runs: int  # of each kind
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
        return f"es-{self._of('single' if arm == SINGLE else self._combined)}-seed-{seed}"

    def member_name(self, seed: int) -> str:
        return f"reward-{seed}" + ("-quick" if self.quick else "")

    @property
    def name(self) -> str:
        """Of the folder of its results."""
        return f"ensemble-study-{self._of(self._combined)}-runs-{self.num_runs}"

    @property
    def _combined(self) -> str:
        return self.combine + ("" if self.uncertainty_coef is None else f"-{self.uncertainty_coef:g}")

    def _of(self, what: str) -> str:
        quick = "-quick" if self.quick else ""
        return f"{what}-of-{self.num_members}-beta-{self.kl_coef:g}-steps-{self.num_steps}{quick}"


def run_members(stages: Stages, study: Study) -> list[Path]:
    """The exports of all reward models; the first is the pipeline's."""
    directory = stages.directory
    own, sft = f"run.directory={directory}", only(directory, "sft/export/step-*")
    members = [only(directory, "reward/export/step-*")]
    for seed in range(1, study.num_members):
        name = study.member_name(seed)
        members.append(
            stages.run(
                name,
                ["train", "cpu-pipeline-reward", own, f"run.name={name}", f"run.seed={seed}", f"model.path={sft}",
                 f"data.train.0.path={directory / 'label' / 'preferences.parquet'}",
                 *(QUICK["reward"] if study.quick else ())],
                f"{name}/export/step-*",
            )
        )  # fmt: skip
    return members


# Seven processes of SmolLM2 in float32 have to fit into 24 GB; how much a pass takes at once changes no gradient.
SMALL = ("learner.token_budget=512", "learner.logprob_chunk=256", "critic.token_budget=512",
         "reference.token_budget=1024")  # fmt: skip


def run_policies(stages: Stages, study: Study, members: Sequence[Path]) -> dict[str, list[Path]]:
    """PPO run folders of both arms, in pairs."""
    directory, data = stages.directory, stages.directory / "data"
    sft = only(directory, "sft/export/step-*")
    all_of_them = {"path": [str(m) for m in members], "normalize": True, "ensemble": study.combination}
    folders: dict[str, list[Path]] = {SINGLE: [], ENSEMBLE: []}
    for seed in range(study.num_runs):
        member = members[seed % len(members)]
        one = {"name": "proxy", "path": str(member), "normalize": True}
        entries = {
            SINGLE: [one, {"name": "ensemble", "weight": 0.0, **all_of_them}],
            ENSEMBLE: [{"name": "proxy", **all_of_them}],
        }
        for arm, models in entries.items():
            name = study.run_name(arm, seed)
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
            folders[arm].append(directory / name)
    return folders


def study_runs(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[StudyRun]]:
    """Every run in units of the SFT model's own spread: that of the samples of steps before the policy moved."""
    rows = {
        arm: [[r for r in read_rows(f / "metrics.jsonl") if r.get("objective/kl") is not None] for f in of_arm]
        for arm, of_arm in folders.items()
    }
    first = [row for of_arm in rows.values() for recorded in of_arm for row in _unmoved(recorded)]
    if not first:
        raise StageError("no PPO run recorded objective/kl: nothing can be compared")

    def unit(values: Sequence[float], part: str, of: Sequence[Mapping[str, Any]]) -> np.ndarray:
        mean, std = (float(np.mean([row[f"rewards/{part}/{what}"] for row in of])) for what in ("mean", "std"))
        return (np.array(values) - mean) / (std or 1.0)

    runs: dict[str, list[StudyRun]] = {}
    for arm, of_arm in rows.items():
        starts = [row for recorded in of_arm for row in _unmoved(recorded)]
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


def _unmoved(recorded: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of the SFT model's own samples: the first, and those that follow while only the critic learns."""
    return [row for i, row in enumerate(recorded) if i == 0 or float(row["objective/kl"]) <= MOVED**2]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the study says."""

    said: str
    difference: Estimate  # of gold, ensemble less single, over ``distances``; it alone decides
    distances: tuple[float, ...]  # sqrt(nats) that every run was at
    at_equal_kl: tuple[AtDistance, ...]


def findings(runs: Mapping[str, Sequence[StudyRun]]) -> Findings:
    """Of runs of both arms, in pairs."""
    single, ensemble = ([run.by_gold for run in runs[arm]] for arm in (SINGLE, ENSEMBLE))
    distances, difference = overall(single, ensemble, DISTANCES, 0.0)
    if difference.n < 2:
        said = "nothing can be compared: there is no distance that every run was at, or only one pair of runs"
    else:
        said = {
            "higher": "the ensemble reaches higher gold at equal KL",
            "lower": "the ensemble reaches LOWER gold at equal KL",
            "not told apart": "the study does not tell the two apart: the interval of the difference contains 0",
        }[verdict(difference)]
    return Findings(said, difference, distances, tuple(compare(single, ensemble, DISTANCES, 0.0)))


def report(runs: Mapping[str, Sequence[StudyRun]], found: Findings, console: Console) -> None:
    """Print both tables and the verdict."""
    ends = Table(title="at the last step, mean and 95 % interval over runs")
    for column in ("trained on", "runs", "KL, nats", "proxy", "gold", "disagreement"):
        ends.add_column(column)
    for arm, of_arm in runs.items():
        last = [[r.kl[-1], r.proxy[-1], r.gold[-1], r.disagreement[-1]] for r in of_arm]
        ends.add_row(arm, str(len(of_arm)), *(str(mean_of(np.array(column))) for column in zip(*last, strict=True)))
    console.print(ends)
    equal = Table(title="gold at equal KL")
    for column in ("sqrt(KL)", SINGLE, ENSEMBLE, "difference", "the ensemble's gold is"):
        equal.add_column(column)
    for at in found.at_equal_kl:
        if at.difference.n:
            difference = f"{at.difference} (n {at.difference.n})"
            equal.add_row(f"{at.d:g}", str(at.first), str(at.second), difference, at.verdict)
    console.print(equal)
    if found.distances:
        where = f"mean over sqrt(KL) {found.distances[0]:g} to {found.distances[-1]:g}, where every run was"
        console.print(f"difference of gold, {where}: {found.difference} (n {found.difference.n})")
    console.print(f"[bold]{found.said}[/bold]")


def run_study(directory: Path, study: Study, console: Console, deadline_s: float = DEADLINE_S) -> None:
    """Run what is missing, draw and print.  StageError when a stage fails, InputError when one is refused."""
    stages = Stages(directory, console, deadline_s)
    folders = run_policies(stages, study, run_members(stages, study))
    runs = study_runs(folders)
    found = findings(runs)
    report(runs, found, console)
    target = directory / study.name
    svg, png = ensemble_plot(runs, 0.0, target / "study.svg", UNIT)
    rows = {
        arm: [{"kl": r.kl.tolist(), "gold": r.gold.tolist(), "proxy": r.proxy.tolist(),
               "disagreement": r.disagreement.tolist()} for r in of_arm]
        for arm, of_arm in runs.items()
    }  # fmt: skip
    written = {"study": asdict(study), "findings": found, "runs": rows}
    (target / "study.json").write_text(json.dumps(plain(written), indent=1) + "\n", encoding="utf-8")
    console.print(f"plot: {svg} and {png}; numbers: {target / 'study.json'}")
