"""Stands in for the commands of an experiment: checks each one's configuration and leaves what it would leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.overrides import expect_command, load_config
from launch.stages import Stages

ESTIMATE = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 9}
EVALUATION = {
    "gold": "truth", "win_by": "proxy", "win_rate": {"truth": {"raw": ESTIMATE}},
    "models": {"policy": {"rewards": {"truth": {"mean": ESTIMATE}}}},
    "kl_from_base": {"sequence": ESTIMATE | {"low": None}},
    "reward_models": {"proxy": {"report": {"num_comparisons": 9, "accuracy": ESTIMATE}}, "before": {}},
}  # fmt: skip


class Machine:
    """Runs stages in no time.  ``cut``: stage -> (what it leaves in its folder, the error that ends it)."""

    seconds = 1.5  # of every stage

    def __init__(self) -> None:
        self.cut: dict[str, tuple[list[str], BaseException | None]] = {}
        self.ran: list[str] = []
        self.commands: dict[str, str] = {}
        self.configs: dict[str, Any] = {}
        self.resumed: list[str] = []
        self.deadlines: set[float] = set()

    def stages(self, directory: Path, **given: Any) -> Stages:
        """As a new process would make them."""
        return Stages(directory, Console(quiet=True), run=self.run, **given)

    def run(self, arguments: Sequence[str], log: Path | None, deadline_s: float) -> float:
        command, recipe, *rest = arguments
        given = [key for key in rest if key != "--resume"]
        config = load_config(recipe, given).config
        expect_command(config, command, recipe)
        name = config.run.name
        folder = Path(config.run.directory) / name
        self.ran.append(name)
        self.commands[name], self.configs[name] = command, config
        self.resumed += [name] if len(rest) > len(given) else []
        self.deadlines.add(deadline_s)
        assert folder.exists() == (name in self.resumed[-1:]), "burnish would refuse the folder"
        if name in self.cut:
            left, error = self.cut.pop(name)
            for path in left:
                (folder / path).mkdir(parents=True, exist_ok=True)
            if error is not None:
                raise error
            return self.seconds
        folder.mkdir(parents=True, exist_ok=True)
        if command == "label":
            (folder / "preferences.parquet").touch()
            (folder / "summary.json").write_text(json.dumps({"num_rows": 12}))
        elif command == "eval":
            (folder / "eval.json").write_text(json.dumps(EVALUATION))
        else:
            rows = [{"eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.0}, {"eval/rewards/accuracies": 0.75}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            for kind in ("export", "checkpoints"):
                (folder / kind / "step-000007").mkdir(parents=True, exist_ok=True)
        return self.seconds


def pipeline_of(directory: Path) -> Path:
    """What ``make pipeline`` leaves in its folder, without a word of how it was made."""
    for name in ("sft/export/step-000001", "reward/export/step-000001", "ppo/export/step-000001", "label", "data"):
        (directory / name).mkdir(parents=True)
    (directory / "label" / "preferences.parquet").touch()
    (directory / "stages.json").write_text('{"sft": 3.0, "label": 2.0, "reward": 1.0, "ppo": 4.0}')
    return directory


def run_quick(directory: Path, *arguments: str) -> None:
    """``python -m *arguments`` in its quick form, with the real engines, in ``directory``."""
    command = [sys.executable, "-m", *arguments, "--quick", "--directory", str(directory)]
    environment = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
