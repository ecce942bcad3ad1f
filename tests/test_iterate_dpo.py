"""Iterated DPO: every command of every round is valid and takes what the one before it left; the table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stage_stub import ESTIMATE, Machine, pipeline_of, run_quick

from launch import iterate_dpo
from launch.cli import main
from launch.compare_stage import LateError
from launch.iterate_dpo import DPOPlan, Round, check, planted, run_rounds, table_rows
from launch.recipe_files import read_recipe
from launch.stages import StageError
from trainers.errors import InputError

TINY = "builtin:tiny-llama"


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_a_valid_configuration_and_takes_what_the_one_before_left(
    quick: bool, tmp_path: Path
) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    plan = planted(directory, quick)
    check(plan, directory, 2)
    assert not machine.ran, "a check runs nothing"
    rounds = run_rounds(machine.stages(directory), plan, 2)
    assert list(machine.commands.values()) == ["label", "train", "eval"] * 2
    label, train, judged, label_2, train_2, judged_2 = machine.configs.values()
    start = str(directory / "sft" / "export" / "step-000001")
    assert label.model.path == train.model.path == judged.base.path == judged_2.base.path == start
    assert train.algorithm.name == "dpo" and train.data.eval is None
    assert train.data.train[0].path == str(rounds[0].pairs) == str(directory / "dpo-1-label" / "preferences.parquet")
    policy = str(directory / "dpo-1-train" / "export" / "step-000007")
    assert judged.model.path == label_2.model.path == train_2.model.path == policy
    assert train_2.data.train[0].path == str(rounds[1].pairs) and train_2.reference is None
    assert (label.run.seed, label_2.run.seed) == (1, 2), "a round would draw the samples of the one before"
    assert judged_2.model.path == str(rounds[1].policy)


def test_own_recipes_any_model_and_the_first_policy_as_the_reference(tmp_path: Path) -> None:
    machine, keys = Machine(), {"train": ["algorithm.loss=ipo"]}
    plan = DPOPlan(TINY, {"label": "cpu-judge-label", "train": "gpu-8x-dpo"}, keys, "start")
    check(plan, tmp_path, 2)
    rounds = run_rounds(machine.stages(tmp_path), plan, 2)
    configs = list(machine.configs.values())
    assert list(machine.commands.values()) == ["label", "train"] * 2 and rounds[1].report is None
    assert [c.reference.path for c in configs[1::2]] == [TINY] * 2
    assert [c.algorithm.loss for c in configs[1::2]] == ["ipo"] * 2
    assert configs[3].model.path == str(rounds[0].policy)


def test_a_label_recipe_with_an_output_of_its_own_leaves_the_pairs_where_the_round_looks(tmp_path: Path) -> None:
    machine, keys = Machine(), {"label": []}
    recipe = tmp_path / "label.yaml"
    recipe.write_text(read_recipe("cpu-judge-label") + "\noutput:\n  path: /elsewhere.jsonl\n  format: jsonl\n")
    run_rounds(machine.stages(tmp_path / "runs"), DPOPlan(TINY, {"label": str(recipe), "train": "cpu-dpo"}, keys), 1)
    output = machine.configs["dpo-1-label"].output
    assert (output.path, output.format) == (None, "parquet")


def test_rounds_with_another_reference_take_nothing_of_those_before(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    plan = planted(directory, False)
    run_rounds(machine.stages(directory), plan, 2)
    with pytest.raises(InputError, match=r"stage dpo-1-train: reference.path = .*: it was run with None; .*remove "):
        run_rounds(machine.stages(directory), replace(plan, reference="start"), 2)
    assert len(machine.ran) == 6
    shutil.rmtree(directory / "dpo-1-train")  # the remedy, followed halfway
    with pytest.raises(InputError, match="stage dpo-1-eval: input = 'dpo-1-train'"):
        run_rounds(machine.stages(directory), replace(plan, reference="start"), 2)
    assert machine.ran[6:] == ["dpo-1-train"]


def test_a_round_that_took_too_long_goes_on_where_it_was(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    machine.cut["dpo-1-train"] = ["checkpoints/step-000004"], LateError("was not done in 3600 s")
    plan = planted(directory, False)
    with pytest.raises(StageError, match="dpo-1-train: was not done in 3600 s"):
        run_rounds(machine.stages(directory), plan, 1)
    run_rounds(machine.stages(directory), plan, 1)
    assert machine.ran == ["dpo-1-label", "dpo-1-train", "dpo-1-train", "dpo-1-eval"]
    assert machine.resumed == ["dpo-1-train"]


def test_without_the_pipeline_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="make pipeline"):
        planted(tmp_path, True)


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--label", "cpu-judge-label"], ["--model", "m", "--label", "x"], ["--model", "m", "--quick"],
     ["--model", "m", "--label", "x", "--train", "y", "--set", "eval:run.seed=1"],
     ["--model", "m", "--label", "x", "--train", "y", "--set", "train"],
     ["--model", "m", "--label", "cpu-judge-label", "--train", "cpu-sft"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["iterate", "dpo", "--directory", str(tmp_path / "runs"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("burnish: --") and not (tmp_path / "runs").exists()


def test_what_the_options_say_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(iterate_dpo, "iterate", lambda *given: seen.append(given))
    directory = pipeline_of(tmp_path / "pipeline")
    given = ["--reference", "start", "--set", "train:algorithm.loss=ipo"]
    assert main(["iterate", "dpo", "--directory", str(directory), *given]) == 0
    ((plan, num_rounds, stages, _),) = seen
    assert (plan.reference, num_rounds, stages.directory) == ("start", 3, directory)
    assert plan.keys["train"] == ["data.eval=null", "algorithm.loss=ipo"]


def test_the_table_has_a_row_a_round_and_a_hole_where_a_number_is_missing(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "summary.json": {"num_rows": 12},
        "eval.json": {
            "gold": "truth", "win_by": "proxy", "win_rate": {"truth": {"raw": ESTIMATE}},
            "models": {"policy": {"rewards": {"truth": {"mean": ESTIMATE}}}},
        },
    }  # fmt: skip
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    metrics = [{"eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.0}, {"eval/rewards/accuracies": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    shared = (1, tmp_path / "preferences.parquet", tmp_path / "metrics.jsonl", tmp_path)
    with_eval, without = table_rows([Round(*shared, tmp_path / "eval.json"), Round(*shared, None)])
    assert with_eval == {
        "round": 1, "num_pairs": 12, "held_out_accuracy": 0.75, "held_out_margin": 0.0, "win_rate": ESTIMATE,
        "reward": ESTIMATE, "kl": None,
    }  # fmt: skip
    assert without["win_rate"] is None and without["num_pairs"] == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rounds_run_on_a_tiny_model_and_a_second_call_runs_no_stage_again(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline"

    call = partial(run_quick, directory)
    call("scripts.pipeline")
    call("launch.cli", "iterate", "dpo", "--rounds", "1")
    seconds = json.loads((directory / "stages.json").read_text())
    call("launch.cli", "iterate", "dpo", "--rounds", "2")
    after = json.loads((directory / "stages.json").read_text())
    assert {name: after[name] for name in seconds} == seconds and len(after) == len(seconds) + 3
    first, second = json.loads((directory / "iterate-dpo.json").read_text())
    assert (first["round"], second["round"]) == (1, 2) and first["num_pairs"] > 0
    assert first["win_rate"]["n"] > 0 and first["kl"]["value"] is not None
