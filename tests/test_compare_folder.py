"""A comparison's folder: what has ended is not run again, what was stopped goes on, nobody else's is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from compare_stub import Machine, config_of, prompts

from launch.compare_contents import contents_of
from launch.compare_folder import DONE, STAGES
from launch.compare_page import JSON, MARKDOWN, PLOT
from launch.compare_rows import OK
from launch.compare_stage import StageError, last_line, run_burnish
from launch.contents import BLOCK_BYTES, NUM_BLOCKS
from launch.run_folder import only_process_in
from trainers.errors import InputError


def test_what_ended_is_not_run_again_and_what_is_added_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo, grpo]")
    ran = list(machine.ran)
    assert ran == ["base", "label-seed-0", "dpo-seed-0", "dpo-seed-0-eval", "grpo-seed-0", "grpo-seed-0-eval"]
    rows = machine.compare("compare.algorithms=[dpo, grpo]")
    assert machine.ran == ran and {row.status for row in rows} == {OK}
    machine.compare("compare.algorithms=[grpo, ipo]", "compare.seeds=[0, 1]")
    assert machine.ran[len(ran) :] == [
        "ipo-seed-0", "ipo-seed-0-eval", "label-seed-1", "grpo-seed-1", "grpo-seed-1-eval", "ipo-seed-1",
        "ipo-seed-1-eval",
    ]  # fmt: skip


def test_a_run_whose_folders_are_removed_is_run_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo, grpo]")
    ran = len(machine.ran)
    for name in ("grpo-seed-0", "grpo-seed-0-eval"):
        shutil.rmtree(machine.folder / name)
    rows = machine.compare("compare.algorithms=[dpo, grpo]")
    assert machine.ran[ran:] == ["grpo-seed-0", "grpo-seed-0-eval"] and {row.status for row in rows} == {OK}


def test_what_judges_replied_outlives_a_stage_that_failed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fails={"dpo-seed-0-eval": "the budget endpoint.num_requests=9 is spent"})
    machine.compare("compare.algorithms=[dpo]")
    folder = machine.folder / "dpo-seed-0-eval"
    (folder / "replies" / "ab").mkdir(parents=True)
    (folder / "samples.parquet").touch()
    machine.fails.clear()
    machine.before = lambda stage: seen.append(sorted(p.name for p in folder.rglob("*")) if folder.exists() else [])
    seen: list[list[str]] = []
    machine.compare("compare.algorithms=[dpo]")
    assert seen == [["ab", "replies"]]


def test_checkpoints_and_models_go_unless_models_are_kept(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[grpo]")
    run = machine.folder / "grpo-seed-0"
    assert not (run / "checkpoints").exists() and not (run / "export").exists() and (run / "metrics.jsonl").exists()
    kept = Machine(tmp_path / "kept")
    kept.compare("compare.algorithms=[grpo]", "compare.keep_models=true")
    assert list((kept.folder / "grpo-seed-0" / "export").iterdir())


def test_a_run_that_fails_is_a_row_that_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fails={"dpo-seed-0": "out of memory"})
    rows = {row.name: row for row in machine.compare("compare.algorithms=[dpo, grpo]", "compare.seeds=[0, 1]")}
    assert "1 of 2 runs missing: seed 0: dpo-seed-0 failed: out of memory" in rows["dpo"].status
    assert rows["dpo"].seeds == (1,) and rows["grpo"].status == OK
    assert "out of memory" in (machine.folder / MARKDOWN).read_text()
    machine.fails.clear()
    before = len(machine.ran)
    rows = {row.name: row for row in machine.compare("compare.algorithms=[dpo, grpo]", "compare.seeds=[0, 1]")}
    assert machine.ran[before:] == ["dpo-seed-0", "dpo-seed-0-eval"] and rows["dpo"].status == OK


def test_without_labels_offline_methods_are_rows_that_say_so(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fails={"label-seed-0": "no such dataset"})
    rows = {row.name: row for row in machine.compare("compare.algorithms=[dpo, kto, grpo]")}
    for name in ("dpo", "kto"):
        assert "label-seed-0 failed: no such dataset" in rows[name].status and rows[name].measures is None
    assert rows["grpo"].status == OK and f"{name}-seed-0" not in machine.ran
    assert (machine.folder / PLOT).exists()


def test_kto_learns_from_the_same_scores_and_its_halves_weigh_alike(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[kto]")
    rows = [json.loads(line) for line in (machine.folder / "data/labelled-seed-0.jsonl").read_text().splitlines()]
    good = sum(row["label"] for row in rows)
    assert 0 < good < len(rows) == 64
    weight = machine.overrides["kto-seed-0"]["algorithm.desirable_weight"]
    assert float(weight) == pytest.approx((len(rows) - good) / good, rel=1e-3)
    own = Machine(tmp_path / "own")
    own.compare("compare.algorithms=[kto]", "compare.overrides.kto={algorithm.undesirable_weight: 2.0}")
    assert "algorithm.desirable_weight" not in own.overrides["kto-seed-0"]


def test_answers_of_equal_reward_teach_kto_nothing_and_its_row_says_so(tmp_path: Path) -> None:
    machine = Machine(tmp_path, score=lambda i: 1.0)
    (row,) = [row for row in machine.compare("compare.algorithms=[kto]") if row.name == "kto"]
    assert "got the same reward" in row.status


def test_a_stopped_run_resumes_from_its_checkpoint_and_one_without_starts_afresh(tmp_path: Path) -> None:
    machine = Machine(tmp_path, stops={"grpo-seed-0"})
    for has_checkpoint in (True, False):
        machine.has_checkpoint = has_checkpoint
        with pytest.raises(KeyboardInterrupt):
            machine.compare("compare.algorithms=[grpo]")
    assert machine.resumed == [False, True], "the second attempt resumes"
    machine.stops.clear()
    (machine.folder / "grpo-seed-0" / "checkpoints").rename(machine.folder / "grpo-seed-0" / "gone")
    rows = machine.compare("compare.algorithms=[grpo]")
    assert machine.resumed[2] is False and rows[-1].status == OK
    assert not (machine.folder / "grpo-seed-0" / "gone").exists()


def test_a_failed_run_goes_on_if_it_got_anywhere_and_else_starts_afresh(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fails={"grpo-seed-0": "out of memory"})
    machine.reaches = {"grpo-seed-0": "step-000004"}
    spent = []
    for newest in ("step-000004", "step-000008", "step-000008", "step-000008"):
        machine.reaches["grpo-seed-0"] = newest
        machine.compare("compare.algorithms=[grpo]")
        spent.append(json.loads((machine.folder / STAGES).read_text())["grpo-seed-0"]["seconds"])
    # From 4 on to 8; from 8 on, and nowhere; so afresh.
    assert machine.resumed == [False, True, True, False]
    assert 0 < spent[0] < spent[1] < spent[2], "what the attempts took that a run goes on from is its own"
    machine.fails.clear()
    rows = machine.compare("compare.algorithms=[grpo]")
    assert machine.resumed[-1] and rows[-1].status == OK


def test_the_seconds_of_a_run_whose_driver_was_killed_are_counted(tmp_path: Path) -> None:
    machine = Machine(tmp_path, stops={"grpo-seed-0"})
    with pytest.raises(KeyboardInterrupt):
        machine.compare("compare.algorithms=[grpo]")
    noted = json.loads((machine.folder / STAGES).read_text())
    noted["grpo-seed-0"] |= {"seconds": 5.0, "since": 1000.0}  # as it was while the command ran
    (machine.folder / STAGES).write_text(json.dumps(noted))
    log = machine.folder / "logs" / "grpo-seed-0.log"
    log.touch()
    os.utime(log, (1100.0, 1100.0))  # the last that it said
    machine.stops.clear()
    machine.compare("compare.algorithms=[grpo]")
    ended = json.loads((machine.folder / STAGES).read_text())["grpo-seed-0"]
    assert machine.resumed[-1] and ended["status"] == DONE and ended["seconds"] == 5.0 + 100.0 + machine.seconds


def test_a_run_that_still_goes_on_is_not_removed_under_its_feet(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fails={"grpo-seed-0": "out of memory"})
    machine.compare("compare.algorithms=[grpo]")
    run = machine.folder / "grpo-seed-0"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with only_process_in(run), pytest.raises(StageError, match=f"process {os.getpid()} on .* still works in {run}"):
        machine.compare("compare.algorithms=[grpo]")
    assert (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("compare.budget=32", "compare.budget"),
        ("rewards.0.function=bare_number", "rewards"),
        ("run.seed=5", "run.seed"),
        ("compare.overrides.dpo={algorithm.beta: 0.5}", "compare.overrides.dpo"),
        ("compare.overrides.eval={generator.max_num_seqs: 4}", "compare.overrides.eval"),
    ],
)
def test_the_folder_of_another_comparison_is_refused(override: str, field: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo]")
    ran = list(machine.ran)
    with pytest.raises(InputError, match="holds") as caught:
        machine.compare("compare.algorithms=[dpo]", override)
    assert caught.value.field == field and machine.ran == ran


@pytest.mark.parametrize(("which", "field"), [(0, "prompts.train"), (1, "prompts.eval")])
def test_other_prompts_behind_the_same_path_are_another_comparison(which: int, field: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo]")
    read, ran = (machine.folder / "data" / "held-out.jsonl").read_bytes(), list(machine.ran)
    machine.prompts = lambda: tuple(p[:-1] if i == which else p for i, p in enumerate(prompts()))  # type: ignore[assignment, return-value]
    with pytest.raises(InputError, match="another content") as caught:
        machine.compare("compare.algorithms=[dpo, ipo]")
    assert caught.value.field == field and machine.ran == ran
    assert (machine.folder / "data" / "held-out.jsonl").read_bytes() == read


def test_a_folder_that_was_begun_before_contents_were_kept_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo]")
    file = machine.folder / "comparison.json"
    known = json.loads(file.read_text())
    assert known.pop("contents").keys() == {"prompts.train", "prompts.eval", "model.path"}
    assert known["task"].pop("judges") == [], "a section that is newer than the folder"
    file.write_text(json.dumps(known))
    rows = machine.compare("compare.algorithms=[dpo, ipo]")
    assert {row.status for row in rows} == {OK} and "contents" in json.loads(file.read_text())


def test_contents_tell_another_model_and_another_reward_behind_the_same_path(tmp_path: Path) -> None:
    model, reward = tmp_path / "model", tmp_path / "mine.py"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytearray(5 * NUM_BLOCKS * BLOCK_BYTES)
    (model / "model.safetensors").write_bytes(weights)
    reward.write_text("def score(completions): return [0.0] * len(completions)")
    config = config_of(f"model.path={model}", f"rewards=[{{name: mine, function: '{reward}:score'}}]")
    first = contents_of(config, "train", "held out")
    assert first == contents_of(config, "train", "held out")
    weights[len(weights) // 3 : len(weights) // 2] = b"x" * (len(weights) // 2 - len(weights) // 3)  # in the middle
    (model / "model.safetensors").write_bytes(weights)
    reward.write_text("def score(completions): return [1.0] * len(completions)")
    changed = contents_of(config, "train", "held out")
    assert {key for key in first if first[key] != changed[key]} == {"model.path", "rewards.0.function"}


def test_an_algorithm_that_has_not_run_may_still_change(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.compare("compare.algorithms=[dpo]")
    machine.compare("compare.algorithms=[dpo, ipo]", "compare.overrides.ipo={algorithm.beta: 0.5}")
    assert machine.ran[-2:] == ["ipo-seed-0", "ipo-seed-0-eval"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.folder.mkdir()
    (machine.folder / "thesis.tex").write_text("everything")
    with pytest.raises(InputError, match="holds no comparison"):
        machine.compare("compare.algorithms=[dpo]")
    assert [file.name for file in machine.folder.iterdir()] == ["thesis.tex"]


def test_a_run_folder_can_be_read_at_any_time(tmp_path: Path) -> None:
    """After each evaluation the files hold what is known by then."""
    seen: list[int] = []
    machine = Machine(tmp_path)
    machine.before = lambda stage: seen.append(_num_measured(machine.folder))
    machine.compare("compare.algorithms=[grpo, rloo]")
    assert seen == [0, 1, 1, 2, 2] and _num_measured(machine.folder) == 3


def _num_measured(folder: Path) -> int:
    if not (folder / JSON).exists():
        return 0
    return sum(row["measures"] is not None for row in json.loads((folder / JSON).read_text())["rows"])


def test_a_command_runs_in_a_process_of_its_own_and_says_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_burnish(["recipes", "ls"], log, 60.0) > 0
    first, *rest = log.read_text().splitlines()
    assert first == "$ burnish recipes ls" and any(line.startswith("cpu-compare ") for line in rest)
    with pytest.raises(StageError, match="exit code 2: recipe = 'cpu-compar': .* did you mean cpu-compare"):
        run_burnish(["recipes", "show", "cpu-compar"], log, 60.0)
    with pytest.raises(StageError, match="was not done in 0.001 s"):
        run_burnish(["recipes", "ls"], log, 0.001)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Traceback", "RuntimeError: the cause", "burnish: run.name = 'x': taken; choose another"], "run.name = 'x'"),
        (["Traceback", "RuntimeError: the cause", "Exception ignored in", "bye"], "RuntimeError: the cause"),
        (["started", "", "Killed"], "Killed"),
        ([], "it printed nothing"),
    ],
)
def test_the_line_that_says_why_is_found_in_a_log(lines: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(lines))
    assert last_line(tmp_path / "log").startswith(said)
