"""Iterated RLHF: every command of every round is valid and takes what the one before it left; the table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from stage_stub import ESTIMATE, Machine, pipeline_of, run_quick

from launch import iterate_rlhf
from launch.cli import main
from launch.iterate_rlhf import RLHFPlan, Round, check, iterate, planted, run_rounds, table_rows
from launch.iterate_rounds import shown_estimate
from launch.stages import StageError, Stages
from trainers.errors import InputError

ROUND = ("held-out", "label", "reward", "policy", "judge")
TINY = "builtin:tiny-llama"
OWN = {"label": "cpu-judge-label", "reward": "gpu-8x-reward", "policy": "cpu-pipeline-ppo"}


def own(**other: str) -> list[str]:
    """The options of own recipes."""
    return ["--model", TINY, *(f"--{stage}={recipe}" for stage, recipe in (OWN | other).items())]




@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_a_valid_configuration_and_takes_what_the_one_before_left(
    quick: bool, tmp_path: Path
) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    plan = planted(directory, quick)
    check(plan, directory, 2)
    assert not machine.ran, "a check runs nothing"
    rounds = run_rounds(machine.stages(directory), plan, 2)
    assert machine.ran == [f"round-{number}-{stage}" for number in (1, 2) for stage in ROUND]
    held, label, reward, policy, judged, held_2, _, reward_2, policy_2, judged_2 = machine.configs.values()
    assert held.prompts.train.path.endswith("held-out-prompts.jsonl")
    assert label.prompts.train.path.endswith("train-prompts.jsonl") and label.model == held.model
    assert [d.weights for d in reward.data.train] == [0.5, 0.5] and reward.model.path == judged.base.path
    assert [d.weights for d in reward_2.data.train] == [0.25, 0.25, 0.5]
    assert judged.eval.preferences == str(directory / "round-1-held-out" / "preferences.parquet")
    assert {m.name: m.path for m in judged.reward_models} == {
        "proxy": str(rounds[0].after), "before": str(directory / "reward" / "export" / "step-000001"),
    }  # fmt: skip
    assert policy.reward_models[0].path == str(rounds[0].after) == judged_2.reward_models[1].path
    assert held_2.model.path == str(rounds[0].policy) == str(directory / "round-1-policy" / "export" / "step-000007")
    assert policy_2.reward_models[0].path == str(rounds[1].after) and policy_2.model.path == reward.model.path
    assert [judged.model.path, judged_2.model.path] == [str(r.policy) for r in rounds], "each round's own policy"


def test_own_recipes_any_start_and_no_earlier_reward_model(tmp_path: Path) -> None:
    machine = Machine()
    plan = RLHFPlan(TINY, OWN, {"policy": ["run.num_steps=3"]})
    check(plan, tmp_path, 2)
    rounds = run_rounds(machine.stages(tmp_path), plan, 2)
    stages = ("label", "reward", "policy")
    assert machine.ran == [f"round-{number}-{stage}" for number in (1, 2) for stage in stages]
    label, reward, policy, label_2, reward_2, policy_2 = machine.configs.values()
    assert label.model.path == reward.model.path == policy_2.model.path == TINY
    assert [d.weights for d in reward.data.train] == [1.0] and [d.weights for d in reward_2.data.train] == [0.5, 0.5]
    assert label_2.model.path == str(rounds[0].policy) and rounds[0].before is None
    assert (policy.run.num_steps, rounds[1].report) == (3, None)
    assert rounds[1].before == rounds[0].after


def test_where_the_first_round_begins_can_be_said(tmp_path: Path) -> None:
    machine = Machine()
    recipes = OWN | {"held-out": "cpu-judge-label", "eval": "cpu-pipeline-eval"}
    plan = RLHFPlan(TINY, recipes, {}, "/policy", "/reward", "/pairs.parquet")
    run_rounds(machine.stages(tmp_path), plan, 1)
    assert machine.configs["round-1-label"].model.path == machine.configs["round-1-held-out"].model.path == "/policy"
    assert machine.configs["round-1-reward"].data.train[0].path == "/pairs.parquet"
    models = machine.configs["round-1-judge"].reward_models
    assert (models[1].path, models[1].weight) == ("/reward", 0.0), "the old one is measured and decides nothing"


def test_what_the_options_say_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(iterate_rlhf, "iterate", lambda *given: seen.append(given))
    monkeypatch.chdir(tmp_path)
    recipes = {"label": "l", "held-out": "h", "reward": "r", "policy": "p", "eval": "e"}
    chosen = ["--model", "sft", *(f"--{stage}={recipe}" for stage, recipe in recipes.items())]
    given = ["--first-policy", "/p", "--set", "held-out:run.num_prompts=9", "--rounds", "5", "--deadline-s", "7"]
    assert main(["iterate", "rlhf", *chosen, *given, "--directory", "d"]) == 0
    ((plan, num_rounds, stages, _),) = seen
    assert (plan.model, plan.recipes, plan.first_policy) == (str(tmp_path / "sft"), recipes, "/p")
    assert plan.first_reward is None and plan.keys["held-out"] == ["run.num_prompts=9"]
    assert (num_rounds, stages.directory, stages._deadline_s) == (5, tmp_path / "d", 7.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds = 0"),
        (["--deadline-s", "0"], "--deadline-s = 0.0"),
        (["--reward", "r"], "--reward = 'r': own recipes need a model"),
        (["--first-policy", "p"], "--first-policy = 'p': the planted task has its own"),
        (["--model", TINY, "--label", "l", "--reward", "r"], "--policy = None"),
        (["--model", TINY, "--quick"], "--quick = True"),
        ([*own(), "--held-out", "h"], "--held-out = 'h'"),
        ([*own(), "--set", "eval:run.seed=1"], "--set = 'eval:run.seed=1'"),
        ([*own(), "--set", "policy:run.sed=1"], "stage round-1-policy: run.sed = '1': there is no such key"),
        (own(reward="cpu-sft"), "--reward = 'cpu-sft': its algorithm.name is sft, which trains no reward model"),
        (own(policy="cpu-dpo"), "stage round-1-policy: reward_models.0.path"),
        (own(label="cpu-demo"), "stage round-1-label: recipe = 'cpu-demo': trains, and `burnish label` does not"),
        (own(policy="cpu-dmo"), "stage round-1-policy: recipe = 'cpu-dmo'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_made(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["iterate", "rlhf", "--directory", str(tmp_path / "runs"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("burnish: ") and said in line
    assert not (tmp_path / "runs").exists()


def test_without_the_pipeline_it_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iterate", "rlhf", "--directory", str(tmp_path), "--quick"]) == 1
    assert "run `make pipeline` first" in capsys.readouterr().err
    with pytest.raises(StageError, match="make pipeline"):
        planted(tmp_path, True)


def test_rounds_of_a_tiny_model_are_not_taken_for_rounds_of_the_real_one(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    run_rounds(machine.stages(directory), planted(directory, True), 1)
    with pytest.raises(InputError, match=r"stage round-1-held-out: run.num_prompts = '80': it was run with 12"):
        run_rounds(machine.stages(directory), planted(directory, False), 1)
    assert len(machine.ran) == len(ROUND)


def test_more_rounds_go_on_where_fewer_ended_and_the_table_has_a_row_of_each(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    for num_rounds in (1, 2):
        iterate(planted(directory, False), num_rounds, machine.stages(directory), Console(quiet=True))
    assert machine.ran == [f"round-{number}-{stage}" for number in (1, 2) for stage in ROUND]
    first, second = json.loads((directory / "iterate.json").read_text())
    assert (first["round"], second["round"]) == (1, 2) and first["win_rate"] == ESTIMATE


def test_the_table_has_a_hole_where_a_number_is_missing(tmp_path: Path) -> None:
    report = {
        "gold": "gold", "reward_models": {"before": {"report": {"num_comparisons": 9, "accuracy": ESTIMATE}},
                                          "proxy": {"report": {"num_comparisons": 9}}},
        "win_rate": {"gold": {"raw": ESTIMATE}}, "kl_from_base": {"sequence": ESTIMATE | {"low": None}},
    }  # fmt: skip
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(report))
    row, empty = table_rows([Round(1, "p", None, tmp_path, tmp_path, made) for made in (file, None)])
    assert row["accuracy_before"] == ESTIMATE and row["accuracy_after"] is None and row["num_pairs"] == 9
    assert [shown_estimate(v) for v in row.values()] == [
        "1", "9", "0.7 [0.6, 0.8]", "", "0.7 [0.6, 0.8]", "0.7 [?, 0.8]"
    ]  # fmt: skip
    assert list(empty.values()) == [1, None, None, None, None, None]


def test_the_stages_of_a_plan_have_a_deadline_of_their_own_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Stages] = []
    monkeypatch.setattr(iterate_rlhf, "iterate", lambda plan, rounds, stages, console: seen.append(stages))
    pipeline_of(tmp_path / "pipeline")
    for arguments in ([], own()):
        main(["iterate", "rlhf", "--directory", str(tmp_path / "pipeline"), *arguments])
    assert [stages._deadline_s for stages in seen] == [3600.0, 86_400.0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_rounds_run_on_a_tiny_model_and_a_second_call_runs_no_stage_again(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline"

    call = partial(run_quick, directory)
    call("scripts.pipeline")
    call("launch.cli", "iterate", "rlhf")
    noted = json.loads((directory / "stages.json").read_text())
    assert {f"round-2-{stage}" for stage in ROUND} <= noted.keys()
    call("launch.cli", "iterate", "rlhf")
    assert json.loads((directory / "stages.json").read_text()) == noted
    rows = json.loads((directory / "iterate.json").read_text())
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert row["accuracy_before"]["n"] > 0 and row["accuracy_after"]["n"] > 0
        assert row["win_rate"]["n"] > 0 and row["kl"]["value"] is not None

    def of(stage: str) -> dict[str, Any]:
        found = yaml.safe_load((directory / stage / "config.yaml").read_text())
        assert isinstance(found, dict)
        return found

    policy, reward = (str(next((directory / f"round-1-{what}" / "export").iterdir())) for what in ("policy", "reward"))
    assert of("round-2-label")["model"]["path"] == policy, "the second round labels what the first one trained"
    assert of("round-2-policy")["reward_models"][0]["path"].startswith(str(directory / "round-2-reward"))
    models = json.loads((directory / "round-2-judge" / "eval.json").read_text())["reward_models"]
    assert set(models) == {"proxy", "before"} and reward in (directory / "round-2-judge" / "config.yaml").read_text()
    steps = [json.loads(line) for line in (directory / "round-2-policy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row.get("reward") is not None] == [1, 2], "the last round trains, too"
