"""The command line: quick, and every answer on one screen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch.cli import main
from launch.config import TelemetrySettings
from launch.recipe_files import list_recipes, read_recipe
from launch.telemetry import Telemetry
from launch.trajectory_files import trajectory_table
from trainers.experience import GroupRewards, Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion

REPOSITORY = Path(__file__).resolve().parent.parent
HELP_S = 0.5  # interpreter included


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=True
    )


def test_help_answers_in_half_a_second() -> None:
    took = []
    for _ in range(3):
        started = time.perf_counter()
        shown = run("-m", "launch.cli", "--help").stdout
        took.append(time.perf_counter() - started)
    for command in ("train", "validate", "recipes", "inspect"):
        assert command in shown
    assert min(took) < HELP_S, took


def test_the_command_imports_neither_torch_nor_ray_nor_pydantic() -> None:
    code = "import sys, launch.cli; print(*sorted(sys.modules), sep='\\n')"
    loaded = set(run("-c", code).stdout.split())
    assert not loaded & {"torch", "ray", "vllm", "deepspeed", "transformers", "pydantic", "numpy", "rich", "yaml"}


def test_checking_a_configuration_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from launch.cli import main; assert main(['validate', 'gpu-8x-grpo', '--config-only']) == 0; "
        "print(*sorted(sys.modules), sep='\\n')"
    )
    loaded = set(run("-c", code).stdout.split())
    assert not loaded & {"torch", "ray", "vllm", "deepspeed", "transformers"}


def test_print_config_shows_where_every_value_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cpu-demo", "run.seed=7", "--print-config"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "seed: 7 # command line" in lines
    assert "groups_per_step: 8 # recipe cpu-demo.yaml" in lines
    assert "max_staleness: 0 # default" in lines


def test_recipes_are_listed_shown_and_copied_but_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out
    for name in list_recipes():
        assert name in listed
    assert main(["recipes", "show", "cpu-demo"]) == 0
    assert capsys.readouterr().out == read_recipe("cpu-demo")
    assert main(["recipes", "cp", "cpu-demo", str(tmp_path)]) == 0
    assert (tmp_path / "cpu-demo.yaml").read_text() == read_recipe("cpu-demo")
    assert main(["validate", str(tmp_path / "cpu-demo.yaml"), "--config-only"]) == 0
    capsys.readouterr()
    assert main(["recipes", "cp", "cpu-demo", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_command_without_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: burnish" in capsys.readouterr().out


def small_run(folder: Path) -> None:
    """A run folder of two steps, made by the recorder itself."""
    telemetry = Telemetry(folder, {"run": {"name": "small"}}, TelemetrySettings(wandb="disabled"))
    prompt = Prompt("p", np.array([1, 2], np.int32), "1 + 1 =", "1 + 1 =", {})
    for step in (1, 2):
        samples = tuple(
            Trajectory(i, i, np.array([5], np.int32), np.zeros(1, np.float32), f"answer {step}.{i}", "stop",
                       (VersionSpan(WeightVersion(0, step - 1), 1),))
            for i in range(2)
        )  # fmt: skip
        group = TrajectoryGroup("0", prompt, samples)
        rewards = GroupRewards("0", np.array([0.0, 1.0]), {"accuracy": np.array([0.0, 1.0])}, (), 0.0)
        table = trajectory_table([group], [rewards], {"0": np.array([-1.0, 1.0])})
        pq.write_table(table, folder / "trajectories" / f"step-{step:06d}.parquet")
        telemetry.step(step, {"reward": 0.25 * step, "kl": 0.5})
    telemetry.close()


def test_inspect_shows_metrics_samples_and_events_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_run(tmp_path / "small")
    assert main(["inspect", str(tmp_path / "small")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("metrics (2 steps recorded)", "0.25", "0.5", "samples, step 2", "answer 2.1", "recording"):
        assert part in shown
    assert main(["inspect", str(tmp_path / "small"), "--step", "1", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "answer 1.0" in shown and "answer 1.1" not in shown


def test_inspect_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_validate_prints_layout_and_checks_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    assert main(["validate", "cpu-two-by-two"]) == 0
    shown = capsys.readouterr().out
    for part in ("layout", "generator", "learner", "preflight", "host memory", "a port to meet at"):
        assert part in shown


def test_validate_says_every_problem_in_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = ["cluster.num_nodes=2", "learner.token_budget=1000000000", "push.backend=ipc"]
    assert main(["validate", "cpu-two-by-two", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, field in zip(lines, ("cluster.num_nodes", "learner.token_budget", "push.backend"), strict=True):
        assert line.startswith(f"burnish: {field} = ") and "; " in line
