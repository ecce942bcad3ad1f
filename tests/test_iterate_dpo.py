"""Iterated DPO: every command of every round is valid and takes what the one before it left; the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_equal_kl import recorded, valid

from scripts import iterate_dpo
from scripts.iterate_dpo import Plan, Round, planted, run_rounds, table_rows
from scripts.stages import StageError, Stages

ENVIRONMENT = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def rounds_of(tmp_path: Path, plan: Plan, number: int) -> list[Round]:
    return run_rounds(Stages(tmp_path, Console(quiet=True)), plan, number)


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_a_valid_configuration_and_takes_what_the_one_before_left(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = recorded(tmp_path, monkeypatch)
    rounds = rounds_of(tmp_path, planted(tmp_path, quick), 2)
    assert [command[0] for command in commands] == ["label", "train", "eval"] * 2
    label, train, judged, label_2, train_2, judged_2 = [valid(command) for command in commands]
    start = str(tmp_path / "sft" / "export" / "step-000001")
    assert label.model.path == train.model.path == judged.base.path == judged_2.base.path == start
    assert train.algorithm.name == "dpo" and train.data.eval is None
    assert train.data.train[0].path == str(rounds[0].pairs) == str(tmp_path / "dpo-1-label" / "preferences.parquet")
    policy = str(tmp_path / "dpo-1-train" / "export" / "step-000001")
    assert judged.model.path == label_2.model.path == train_2.model.path == policy
    assert train_2.data.train[0].path == str(rounds[1].pairs) and train_2.reference is None
    assert (label.run.seed, label_2.run.seed) == (1, 2), "a round would draw the samples of the one before"
    assert judged_2.model.path == str(rounds[1].policy)


def test_own_recipes_any_model_and_the_first_policy_as_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = recorded(tmp_path, monkeypatch)
    keys = {"train": ["algorithm.loss=ipo"]}
    plan = Plan("builtin:tiny-llama", {"label": "cpu-judge-label", "train": "gpu-8x-dpo"}, "start", keys)
    rounds = rounds_of(tmp_path, plan, 2)
    configs = [valid(command) for command in commands]
    assert [command[0] for command in commands] == ["label", "train"] * 2 and rounds[1].report is None
    assert [c.reference.path for c in configs[1::2]] == ["builtin:tiny-llama"] * 2
    assert [c.algorithm.loss for c in configs[1::2]] == ["ipo"] * 2
    assert configs[3].model.path == str(rounds[0].policy)


def test_without_the_pipeline_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="make pipeline"):
        planted(tmp_path, True)


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--label", "cpu-judge-label"], ["--model", "m", "--label", "x"], ["--model", "m", "--quick"],
     ["--model", "m", "--label", "x", "--train", "y", "--set", "eval:run.seed=1"],
     ["--model", "m", "--label", "x", "--train", "y", "--set", "train"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["iterate_dpo", "--directory", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        iterate_dpo.main()
    assert end.value.code == 2


def test_the_table_has_a_row_a_round_and_a_hole_where_a_number_is_missing(tmp_path: Path) -> None:
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 9}
    files: dict[str, Any] = {
        "summary.json": {"num_rows": 12},
        "eval.json": {
            "gold": "truth", "win_by": "proxy", "win_rate": {"truth": {"raw": estimate}},
            "models": {"policy": {"rewards": {"truth": {"mean": estimate}}}},
        },
    }  # fmt: skip
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    metrics = [{"eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.0}, {"eval/rewards/accuracies": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    shared = (1, tmp_path / "preferences.parquet", tmp_path / "metrics.jsonl", tmp_path)
    with_eval, without = table_rows([Round(*shared, tmp_path / "eval.json"), Round(*shared, None)])
    assert with_eval == {
        "round": 1, "num_pairs": 12, "held_out_accuracy": 0.75, "held_out_margin": 0.0, "win_rate": estimate,
        "reward": estimate, "kl": None,
    }  # fmt: skip
    assert without["win_rate"] is None and without["num_pairs"] == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rounds_run_on_a_tiny_model_and_a_second_call_runs_no_stage_again(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline"

    def call(*arguments: str) -> None:
        command = [sys.executable, "-m", *arguments, "--quick", "--directory", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    call("scripts.pipeline")
    call("scripts.iterate_dpo", "--rounds", "1")
    seconds = json.loads((directory / "stages.json").read_text())
    call("scripts.iterate_dpo", "--rounds", "2")
    after = json.loads((directory / "stages.json").read_text())
    assert {name: after[name] for name in seconds} == seconds and len(after) == len(seconds) + 3
    first, second = json.loads((directory / "iterate-dpo.json").read_text())
    assert (first["round"], second["round"]) == (1, 2) and first["num_pairs"] > 0
    assert first["win_rate"]["n"] > 0 and first["kl"]["value"] is not None
