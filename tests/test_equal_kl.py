"""Laws of the comparison at equal KL, and of the script that runs it: nothing beyond what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from stage_stub import Machine, pipeline_of, run_quick

from launch.ensemble_plot import StudyRun, ensemble_plot
from launch.journal import read_rows
from launch.stages import StageError, Stages
from scripts import ensemble_study, study
from scripts.ensemble_study import ENSEMBLE, SINGLE, Study, study_runs
from trainers.equal_kl import MOVED, KLRun, compare, gold_curves, overall
from trainers.errors import InputError


def planted(alpha: float, beta: float, furthest: float, noise: float = 0.0, seed: int = 0) -> KLRun:
    """A run whose gold follows the law from d = 0 to ``furthest``."""
    d = np.linspace(0.0, furthest, 13)
    law = d * (alpha - beta * np.log(np.where(d > 0, d, 1.0)))
    return KLRun(d**2, law + noise * np.random.default_rng(seed).normal(size=d.size))


def test_a_planted_difference_is_found_and_only_where_both_were() -> None:
    worse = [planted(1.0, 0.6, 4.0, 0.05, i) for i in range(4)]
    better = [planted(1.2, 0.5, 2.5, 0.05, 10 + i) for i in range(4)]
    found = compare(worse, better, (1.0, 2.0, 3.0), 0.0)
    assert [at.verdict for at in found] == ["higher", "higher", "not told apart"]
    assert [at.difference.n for at in found] == [4, 4, 0] == [at.first.n for at in found]
    assert all(at.second.value - at.first.value == pytest.approx(at.difference.value) for at in found[:2])
    assert found[0].difference.value == pytest.approx(0.2, abs=0.1)
    swapped = compare(better, worse, (1.0, 2.0), 0.0)
    assert [at.verdict for at in swapped] == ["lower", "lower"]


def test_a_run_against_itself_differs_by_nothing() -> None:
    runs = [planted(1.0, 0.5, 3.0, 0.1, i) for i in range(3)]
    for at in compare(runs, runs, (0.5, 1.5), 0.0):
        assert at.difference.value == at.difference.low == at.difference.high == 0
        assert at.verdict == "not told apart"


def test_nothing_is_read_where_a_run_never_was_nor_off_the_rounding_of_its_start() -> None:
    d = np.array([0.0, MOVED / 2, 1.5, 2.0, 3.0])
    (curve,) = gold_curves([KLRun(d**2, d * 0.5)], (MOVED / 2, 0.5, 1.4, 1.5, 3.0, 3.1), 0.0)
    assert np.isfinite(curve).tolist() == [False, False, False, True, True, False]


def test_one_number_decides_over_the_distances_that_every_run_was_at() -> None:
    short = [planted(1.0, 0.6, 4.0, 0.05, i) for i in range(4)]
    better = [planted(1.2, 0.6, 2.2, 0.05, 10 + i) for i in range(4)]
    distances, difference = overall(short, better, (0.1, 1.0, 2.0, 3.0), 0.0)
    assert distances == (1.0, 2.0) and difference.n == 4
    each = [at.difference.value for at in compare(short, better, distances, 0.0)]
    assert difference.value == pytest.approx(np.mean(each)) and difference.low > 0
    still = KLRun(np.zeros(4), np.zeros(4))
    distances, nothing = overall([*short, still], [*better, planted(1, 0.5, 2)], (1.0, 2.0), 0.0)
    assert distances == () and nothing.n == 0


def test_one_pair_of_runs_tells_nothing_apart() -> None:
    (at,) = compare([planted(1.0, 0.6, 4.0)], [planted(9.0, 0.5, 4.0)], (2.0,), 0.0)
    assert at.difference.n == 1 and at.verdict == "not told apart"


def test_a_run_that_hardly_moved_has_no_curve_and_stops_no_other() -> None:
    still = KLRun(np.zeros(4), np.zeros(4))
    curves = gold_curves([still, planted(1.0, 0.5, 3.0)], (0.5, 1.0), 0.0)
    assert np.isnan(curves[0]).all() and np.isfinite(curves[1]).all()


def test_unequal_numbers_of_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 runs against 1"):
        compare([planted(1, 0.5, 2)] * 2, [planted(1, 0.5, 2)], (1.0,), 0.0)


# --- what the scripts read and draw -----------------------------------------------------------


def write_run(
    folder: Path, gold: list[float], disagreement: list[float] | None, kl: list[float] | None = None
) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "objective/kl": 0.5 * i - 0.001 if kl is None else kl[i], "rewards/gold/mean": g,
         "rewards/gold/std": 2.0, "rewards/proxy/mean": 1.0 + i, "rewards/proxy/std": 1.0}
        | ({} if disagreement is None else {"disagreement/mean": disagreement[i]})
        for i, g in enumerate(gold)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(read_rows(folder / "metrics.jsonl"))) == len(gold)
    return folder


def test_gold_is_in_units_of_the_first_step_of_all_runs(tmp_path: Path) -> None:
    folders = {
        SINGLE: [write_run(tmp_path / f"s{i}", [1.0, 3.0, 5.0, 2.0], None) for i in range(2)],
        ENSEMBLE: [write_run(tmp_path / f"e{i}", [3.0, 4.0, 6.0, 7.0], [0.1, 0.2, 0.3, 0.4]) for i in range(2)],
    }
    runs = study_runs(folders)
    np.testing.assert_allclose(runs[SINGLE][0].gold, [-0.5, 0.5, 1.5, 0.0])  # start 2, spread 2
    assert runs[SINGLE][0].kl[0] == 0 and np.isnan(runs[SINGLE][0].disagreement).all()
    np.testing.assert_allclose(runs[ENSEMBLE][1].proxy, [0.0, 1.0, 2.0, 3.0])
    found = ensemble_study.findings(runs)
    ensemble_study.report(runs, found, Console(quiet=True))
    assert [at.d for at in found.at_equal_kl] == list(ensemble_study.DISTANCES)
    assert found.distances == (1.0,) and found.difference.n == 2, "steps 2 to 4 lie between 0.7 and 1.2"


def test_the_steps_before_the_policy_moves_are_all_samples_of_the_start(tmp_path: Path) -> None:
    folders = {SINGLE: [write_run(tmp_path / "s", [1.0, 3.0, 5.0], None, kl=[0.0, 0.0, 1.0])],
               ENSEMBLE: [write_run(tmp_path / "e", [1.0, 3.0, 5.0], None, kl=[0.001, 1.0, 2.0])]}  # fmt: skip
    runs = study_runs(folders)
    np.testing.assert_allclose(runs[SINGLE][0].gold, (np.array([1.0, 3.0, 5.0]) - 5 / 3) / 2)
    np.testing.assert_allclose(runs[SINGLE][0].proxy, [-0.5, 0.5, 1.5])
    np.testing.assert_allclose(runs[ENSEMBLE][0].proxy, [0.0, 1.0, 2.0])


def test_a_study_in_which_nothing_can_be_compared_says_so() -> None:
    nowhere = np.full(4, np.nan)
    still = StudyRun(np.zeros(4), np.zeros(4), np.zeros(4), nowhere)
    run = StudyRun(np.array([0.0, 1.0, 4.0, 9.0]), np.arange(4.0), np.arange(4.0), nowhere)
    found = ensemble_study.findings({SINGLE: [run, still], ENSEMBLE: [run, run]})
    assert found.said.startswith("nothing can be compared") and found.distances == ()
    ensemble_study.report({SINGLE: [run, still], ENSEMBLE: [run, run]}, found, Console(quiet=True))


def test_the_study_is_drawn_and_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    def study_run(seed: int, beta: float) -> StudyRun:
        run = planted(1.0, beta, 3.0, 0.1, seed)
        return StudyRun(run.kl, run.gold, run.gold + 1, np.full(13, np.nan) if beta > 0.5 else run.kl)

    arms = {SINGLE: [study_run(i, 0.6) for i in range(3)], ENSEMBLE: [study_run(5 + i, 0.4) for i in range(3)]}
    svg, png = ensemble_plot(arms, 0.0, tmp_path / "study", "score")
    assert png.stat().st_size > 10_000
    again, _ = ensemble_plot(arms, 0.0, tmp_path / "again", "score")
    assert svg.read_bytes() == again.read_bytes()


def test_stages_of_unlike_studies_have_unlike_names() -> None:
    base = Study("worst_case", None, 3, 4, 12, 0.0, False)
    studies = [base, replace(base, combine="mean"), Study("mean_minus_variance", 0.5, 3, 4, 12, 0.0, False),
               replace(base, num_steps=9), replace(base, kl_coef=0.1), replace(base, num_members=2),
               replace(base, quick=True)]  # fmt: skip
    names = [s.run_name(ENSEMBLE, 1) for s in studies]
    assert len(set(names)) == len(names) and all(len(name) <= 64 for name in names)
    assert len({s.name for s in [*studies, replace(base, num_runs=5)]}) == len(studies) + 1
    assert base.run_name(SINGLE, 0) != base.run_name(ENSEMBLE, 0) == replace(base, num_runs=5).run_name(ENSEMBLE, 0)
    assert base.member_name(1) != replace(base, quick=True).member_name(1), "a tiny model would be taken for a member"


def test_without_the_pipeline_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="make pipeline"):
        ensemble_study.run_members(Stages(tmp_path, Console(quiet=True)), Study("mean", None, 2, 2, 4, 0.0, True))


@pytest.mark.parametrize(
    "arguments", [["--ensemble", "mean", "--members", "1"], ["--ensemble", "mean", "--runs", "1"], ["--quick"],
                  ["--uncertainty-coef", "1"], ["--deadline-s", "0"]]
)
def test_a_study_that_makes_no_sense_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    with pytest.raises(SystemExit):
        study.main()


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_ensemble_study_is_a_valid_configuration(quick: bool, tmp_path: Path) -> None:
    machine, chosen = Machine(), Study("mean_minus_variance", 0.5, 3, 4, 12, 0.0, quick)
    stages = machine.stages(pipeline_of(tmp_path / "pipeline"))
    members = ensemble_study.run_members(stages, chosen)
    folders = ensemble_study.run_policies(stages, chosen, members)
    configs = [machine.configs[name] for name in machine.ran]
    assert len(configs) == 2 + 8 and {arm: len(f) for arm, f in folders.items()} == {SINGLE: 4, ENSEMBLE: 4}
    assert [c.run.seed for c in configs] == [1, 2, 0, 0, 1, 1, 2, 2, 3, 3]
    assert configs[8].reward_models[0].path == str(members[0]), "a fourth run begins with the members anew"
    single, ensemble = configs[4:6]
    assert single.reward_models[0].path == str(members[1]) and single.reward_models[1].weight == 0
    assert ensemble.reward_models[0].paths == tuple(map(str, members))
    assert single.critic == ensemble.critic and single.run.num_steps == ensemble.run.num_steps == 12


def test_a_study_of_another_length_takes_no_run_of_the_one_before(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    machine.cut["study-best-of-n"] = ["samples.parquet"], None
    study.run_stages(machine.stages(directory), 16)
    with pytest.raises(InputError, match="stage study-beta-0: run.num_steps = '32': it was run with 16"):
        study.run_stages(machine.stages(directory), 32)
    assert len(machine.ran) == 1 + len(study.BETAS)


# --- end to end -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_study_runs_on_a_tiny_model_and_a_second_call_runs_no_stage_again(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline"

    call = partial(run_quick, directory)
    call("scripts.pipeline")
    call("scripts.study", "--ensemble", "worst_case")
    noted = json.loads((directory / "stages.json").read_text())
    call("scripts.study", "--ensemble", "worst_case")
    assert json.loads((directory / "stages.json").read_text()) == noted
    (results,) = directory.glob("ensemble-study-*/study.json")
    found = json.loads(results.read_text())
    assert found["findings"]["said"] and results.with_suffix(".svg").stat().st_size > 1000
    assert {arm: len(runs) for arm, runs in found["runs"].items()} == {SINGLE: 2, ENSEMBLE: 2}
    assert all(r["disagreement"][0] is not None for runs in found["runs"].values() for r in runs)
