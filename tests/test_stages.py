"""Stages of an experiment: what is taken, what is refused, what goes on, and how one that is late is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from stage_stub import Machine, pipeline_of

from launch.compare_stage import LateError, StageError, interrupt_on_signals, run_burnish
from launch.stages import Made, Noted, Stages, difference
from scripts.staged import answer
from trainers.errors import InputError

EXPORT = "export/step-*"


def train(stages: Stages, *overrides: str, name: str = "sft", recipe: str = "cpu-sft") -> Path:
    arguments = ["train", recipe, f"run.directory={stages.directory}", f"run.name={name}", *overrides]
    return stages.run(name, arguments, f"{name}/{EXPORT}")


def label(stages: Stages, model: Path, *overrides: str, name: str = "label") -> Path:
    arguments = ["label", "cpu-pipeline-label", f"run.directory={stages.directory}", f"run.name={name}",
                 f"model.path={model}", *overrides]  # fmt: skip
    return stages.run(name, arguments, f"{name}/preferences.parquet")


# --- what is taken, what is refused -----------------------------------------------------------


def test_a_stage_that_ended_is_not_run_again(tmp_path: Path) -> None:
    machine = Machine()
    first = train(machine.stages(tmp_path), "run.num_steps=2")
    again = machine.stages(tmp_path)
    assert train(again, "run.num_steps=2") == first == tmp_path / "sft" / "export" / "step-000007"
    assert machine.ran == ["sft"] and again.seconds == {"sft": 1.5}


def test_a_stage_that_another_process_works_on_is_refused_and_others_are_not(tmp_path: Path) -> None:
    machine, other, tried = Machine(), Machine(), list[str]()

    def meanwhile(arguments: Sequence[str], log: Path | None, deadline_s: float) -> float:
        with pytest.raises(InputError, match=f"process {os.getpid()} on .* works on it; wait until it has ended") as it:
            train(other.stages(tmp_path))
        tried.append(it.value.field)
        train(other.stages(tmp_path), name="reward", recipe="cpu-sft")
        return machine.run(arguments, log, deadline_s)

    train(Stages(tmp_path, Console(quiet=True), run=meanwhile))
    assert tried == ["stage sft"] and machine.ran == ["sft"] and other.ran == ["reward"]
    assert train(other.stages(tmp_path)).is_dir() and other.ran == ["reward"], "it is free again, and has ended"
    assert machine.stages(tmp_path).seconds.keys() == {"sft", "reward"}


def test_stages_that_are_noted_at_once_are_all_noted(tmp_path: Path) -> None:
    names = [f"stage-{i}" for i in range(8)]

    def work(name: str) -> None:
        stages = Stages(tmp_path, Console(quiet=True), run=lambda *_: 1.0)
        (tmp_path / name / "export" / "step-000001").mkdir(parents=True)
        for _ in range(5):
            stages._note(name, Noted(1.0, True, None))

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, names))
    assert Stages(tmp_path, Console(quiet=True)).seconds.keys() == set(names)


@pytest.mark.parametrize(
    ("before", "now", "what", "old", "new"),
    [
        (["run.seed=0", "run.num_steps=16"], ["run.seed=0", "run.num_steps=32"], "run.num_steps", "16", "32"),
        ([], ["reference.path=/start"], "reference.path", None, "/start"),
        (["cluster.backend=in_process"], [], "cluster.backend", "in_process", None),
        (["run.seed=1", "run.seed=2"], ["run.seed=2", "run.seed=1"], "run.seed", "2", "1"),
    ],
)
def test_the_first_argument_that_differs_is_named(
    before: list[str], now: list[str], what: str, old: object, new: object
) -> None:
    assert difference(Made(("train", "r", *before)), Made(("train", "r", *now))) == (what, old, new)


def test_another_order_of_the_same_keys_is_no_difference() -> None:
    assert difference(Made(("train", "r", "a=1", "b=2")), Made(("train", "r", "b=2", "a=1"))) is None


def test_a_result_of_other_arguments_is_refused_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    machine = Machine()
    train(machine.stages(tmp_path), "run.num_steps=16")
    with pytest.raises(InputError) as refused:
        train(machine.stages(tmp_path), "run.num_steps=32")
    assert str(refused.value) == (
        f"stage sft: run.num_steps = '32': it was run with 16; restore it, give another --directory, or remove "
        f"{tmp_path / 'sft'} to run the stage again"
    )
    assert machine.ran == ["sft"]
    (tmp_path / "sft").rename(tmp_path / "gone")
    train(machine.stages(tmp_path), "run.num_steps=32")
    assert machine.ran == ["sft", "sft"] and machine.configs["sft"].run.num_steps == 32


def test_a_directory_without_digests_is_taken_as_it_is(tmp_path: Path) -> None:
    machine, directory = Machine(), pipeline_of(tmp_path / "pipeline")
    assert train(machine.stages(directory), "run.num_steps=99") == directory / "sft" / "export" / "step-000001"
    label(machine.stages(directory), directory / "sft" / "export" / "step-000001", name="fresh")
    again = machine.stages(directory)
    assert label(again, directory / "sft" / "export" / "step-000001", name="fresh").is_file()
    assert machine.ran == ["fresh"] and again.seconds == {"sft": 3, "label": 2, "reward": 1, "ppo": 4, "fresh": 1.5}


def test_a_directory_that_was_moved_is_the_same(tmp_path: Path) -> None:
    machine, old, new = Machine(), tmp_path / "old", tmp_path / "new"
    label(machine.stages(old), train(machine.stages(old)))
    old.rename(new)
    label(machine.stages(new), train(machine.stages(new)))
    assert machine.ran == ["sft", "label"]


def test_what_was_made_from_another_run_of_a_stage_is_refused(tmp_path: Path) -> None:
    machine = Machine()
    label(machine.stages(tmp_path), train(machine.stages(tmp_path)))
    for overrides in ([], ["run.seed=5"]):
        (tmp_path / "sft" / "export" / "step-000007").rmdir()
        (tmp_path / "sft" / "export").rmdir()
        (tmp_path / "sft" / "metrics.jsonl").unlink()
        (tmp_path / "sft").rmdir()
        model = train(machine.stages(tmp_path), *overrides)
        if not overrides:
            label(machine.stages(tmp_path), model)  # the same once more
    with pytest.raises(InputError, match="stage label: input = 'sft': it was run with what another run of it left"):
        label(machine.stages(tmp_path), model)
    assert machine.ran == ["sft", "label", "sft", "sft"]


def test_another_text_of_the_users_own_recipe_is_another_setting_and_a_comment_is_none(tmp_path: Path) -> None:
    from launch.recipe_files import copy_recipe

    machine, recipe = Machine(), copy_recipe("cpu-sft", tmp_path / "my.yaml")
    stages = machine.stages(tmp_path / "runs")
    train(stages, recipe=str(recipe))
    recipe.write_text("# A word.\n" + recipe.read_text())
    train(stages, recipe=str(recipe))
    recipe.write_text(recipe.read_text() + "\nreward_workers: {}\n")
    with pytest.raises(InputError, match=r"recipe = .*my.yaml': it was run with another text of it"):
        train(stages, recipe=str(recipe))
    assert machine.ran == ["sft"]


def test_a_folder_that_no_stage_made_is_refused_and_left_alone(tmp_path: Path) -> None:
    machine, mine = Machine(), tmp_path / "sft" / "checkpoints" / "step-000002"
    mine.mkdir(parents=True)
    with pytest.raises(InputError, match=r"stage sft = .*: is there and .*stages.json knows of no stage that made it"):
        train(machine.stages(tmp_path))
    assert mine.is_dir() and not machine.ran


def test_a_damaged_file_of_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('{"sft": {"seconds"')
    with pytest.raises(InputError, match=r"stages.json': is damaged"):
        Machine().stages(tmp_path)


# --- what goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StageError("exit code 1"), LateError("late"), KeyboardInterrupt(), None])
def test_a_training_run_that_was_cut_off_goes_on_from_its_checkpoint(
    error: BaseException | None, tmp_path: Path
) -> None:
    machine = Machine()
    machine.cut["sft"] = ["checkpoints/step-000002"], error
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StageError):
        train(machine.stages(tmp_path))
    stopped = machine.stages(tmp_path)
    assert stopped.seconds == {}, "a stage that left nothing has not ended"
    assert train(stopped).is_dir() and machine.resumed == ["sft"] and stopped.seconds["sft"] >= 1.5
    assert not (tmp_path / "sft" / "checkpoints").exists(), "gigabytes that nobody resumes"
    train(machine.stages(tmp_path))
    assert machine.ran == ["sft", "sft"]


def test_checkpoints_of_a_stage_that_ended_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    train(Machine().stages(tmp_path, keep_checkpoints=True))
    assert (tmp_path / "sft" / "checkpoints" / "step-000007").is_dir()


def test_without_a_checkpoint_a_training_run_starts_afresh_with_whatever_arguments(tmp_path: Path) -> None:
    machine = Machine()
    machine.cut["sft"] = ["trajectories"], StageError("exit code 1")
    with pytest.raises(StageError, match="sft: exit code 1: burnish train cpu-sft"):
        train(machine.stages(tmp_path))
    train(machine.stages(tmp_path), "run.num_steps=3")
    assert not machine.resumed and not (tmp_path / "sft" / "trajectories").exists()


def test_what_was_learned_so_far_under_other_arguments_is_neither_gone_on_with_nor_removed(tmp_path: Path) -> None:
    machine = Machine()
    machine.cut["sft"] = ["checkpoints/step-000002"], KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train(machine.stages(tmp_path))
    with pytest.raises(InputError, match="stage sft: run.num_steps = '3': it was run with None"):
        train(machine.stages(tmp_path), "run.num_steps=3")
    assert (tmp_path / "sft" / "checkpoints" / "step-000002").is_dir()


@pytest.mark.parametrize("has_records", [True, False])
def test_a_labelling_run_goes_on_with_its_records(has_records: bool, tmp_path: Path) -> None:
    machine = Machine()
    machine.cut["label"] = ["label.json"] if has_records else ["config.yaml"], KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        label(machine.stages(tmp_path), Path("/sft"))
    label(machine.stages(tmp_path), Path("/sft"))
    assert machine.resumed == ["label"] * has_records


# --- how one that is late is ended ------------------------------------------------------------


def test_the_deadline_is_the_one_given_and_a_late_stage_says_how_to_give_it_longer(tmp_path: Path) -> None:
    machine = Machine()
    machine.cut["sft"] = [], LateError("was not done in 7 s")
    with pytest.raises(StageError, match=r"sft: was not done in 7 s: burnish train .*; --deadline-s gives it longer"):
        train(machine.stages(tmp_path, deadline_s=7.0))
    assert machine.deadlines == {7.0}


def stand_in(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell script in the place of the interpreter that runs burnish."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\ncd {folder}\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_late_command_is_told_to_stop_and_may_save_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "trap 'echo saved > told; kill $!; exit 0' INT\nsleep 300 &\nwait", monkeypatch)
    with pytest.raises(LateError, match="was not done in 5 s$"):
        run_burnish(["train", "r"], None, 5.0)
    assert (tmp_path / "told").read_text() == "saved\n"


def test_a_command_that_does_not_stop_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "trap '' INT\nsleep 300 &\necho $! > child\nwait", monkeypatch)
    with pytest.raises(LateError):
        run_burnish(["train", "r"], None, 5.0, grace_s=0.1)
    child, until = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < until, "the child outlived the command"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def own_handlers() -> Iterator[None]:
    # Under nohup SIGHUP is ignored, and that would be respected.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_script_tells_the_stage_first(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "trap 'echo saved > told; kill $!; exit 0' INT"
    wait = "until [ -e awaited ]; do sleep 0.05; done"
    stand_in(tmp_path, f"{told}\n{wait}\nkill -{number.value} {os.getpid()}\nsleep 300 &\nwait", monkeypatch)

    class Awaited(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            (tmp_path / "awaited").touch()
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Awaited)

    def work() -> None:
        run_burnish(["train", "r"], None, 60.0)

    assert answer("study", work) == 130
    assert (tmp_path / "told").read_text() == "saved\n"
    assert capsys.readouterr().err == "study: stopped; the same command goes on from here\n"


@pytest.mark.usefixtures("own_handlers")
def test_a_script_that_is_to_outlive_its_terminal_does() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_script_says_in_one_line_what_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise InputError("stage sft", 1, "reason", "remedy")

    def failed() -> None:
        raise StageError("sft: exit code 1")

    assert (answer("study", refused), answer("study", failed), answer("study", lambda: None)) == (2, 1, 0)
    assert capsys.readouterr().err == "study: stage sft = 1: reason; remedy\nstudy: sft: exit code 1\n"


def test_what_is_noted_of_a_stage_can_be_read(tmp_path: Path) -> None:
    train(Machine().stages(tmp_path), "run.num_steps=2")
    noted = json.loads((tmp_path / "stages.json").read_text())["sft"]
    assert noted["has_ended"] and noted["seconds"] == 1.5 and len(noted["digest"]) == 32
    assert "run.num_steps=2" in noted["arguments"] and "run.directory=<directory>" in noted["arguments"]
