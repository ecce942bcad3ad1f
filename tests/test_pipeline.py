"""``make pipeline`` on a tiny model: every step runs on what the one before it left, and the page stands alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = ("sft", "label", "reward", "ppo", "eval")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pipeline_runs_on_a_tiny_model_and_a_second_call_runs_no_step_again(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline"
    command = [sys.executable, "-m", "scripts.pipeline", "--quick", "--directory", str(directory)]
    environment = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    first = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    noted = json.loads((directory / "stages.json").read_text())
    assert tuple(noted) == STEPS and all(step["has_ended"] for step in noted.values())
    page = (directory / "pipeline.html").read_text()
    assert "noise ceiling" in page
    assert 'src="http' not in page
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert second.returncode == 0, second.stderr[-3000:]
    assert json.loads((directory / "stages.json").read_text()) == noted
