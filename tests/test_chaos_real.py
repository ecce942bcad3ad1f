"""Chaos on the real engines: the short schedule in every run of the tests, the quick one in `make test-full`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos import QUICK

SHORT_S, QUICK_S = 600.0, 2400.0


def chaos(directory: Path, schedule: str, deadline_s: float) -> dict[str, Any]:
    """The report of ``python -m scripts.chaos``, which has to pass."""
    command = [sys.executable, "-m", "scripts.chaos", schedule, "--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    logs = "".join(log.read_text(errors="replace")[-3000:] for log in directory.glob("*.log"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:] + logs
    found: dict[str, Any] = json.loads((directory / "report.json").read_text())
    assert found["passed"] and (directory / "report.md").stat().st_size > 0
    return found


@pytest.mark.timeout(SHORT_S + 60)
def test_a_short_schedule_of_faults_is_survived_and_every_prompt_is_trained_on_once(tmp_path: Path) -> None:
    found = chaos(tmp_path / "chaos", "--short", SHORT_S)
    assert {kind for kind, row in found["kinds"].items() if row["num"] == 1} == {"kill_generator", "kill_reward_worker"}
    for row in found["kinds"].values():
        assert row["detected_s"]["max"] <= row["recovered_s"]["max"]
    (count,) = found["prompts"].values()
    assert count["num_prompts"] == 64 and count["num_epochs"] >= 4 and count["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(QUICK_S + 60)
def test_a_quick_schedule_of_ten_kinds_of_faults_is_survived(tmp_path: Path) -> None:
    found = chaos(tmp_path / "chaos", "--quick", QUICK_S)
    assert found["kinds"].keys() == set(QUICK)
    resumed = {kind for kind, row in found["kinds"].items() if row["num_resumed"]}
    assert {"terminate_driver", "kill_everything"} <= resumed <= {"terminate_driver", "kill_everything", "kill_learner"}
    (run,) = found["runs"]
    assert run["problem"] is None and run["num_orphans"] == 0
    (count,) = found["prompts"].values()
    assert count["num_superseded"] > 0 and count["problems"] == []
