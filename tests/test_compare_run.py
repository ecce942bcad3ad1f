"""A comparison end to end, with real engines on the tiny model: offline, online and best-of-n, and once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVIRONMENT = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
SUMS: dict[str, Any] = {"procedural": "chain_sum", "args": {"min_terms": 2, "max_terms": 2, "min_digits": 1,
                                                            "max_digits": 1}}  # fmt: skip
RECIPE: dict[str, Any] = {
    "run": {"name": "tiny"},
    "compare": {"budget": 32, "groups_per_step": 4, "samples_per_prompt": 4, "best_of": [2, 4], "eval_samples": 2},
    "model": {"path": "builtin:tiny-llama", "max_length": 256, "dtype": "float32"},
    "prompts": {"train": {**SUMS, "size": 32}, "eval": {**SUMS, "size": 8}},
    # 16 random bytes hold one of these letters about half of the time, so groups have a spread to learn from.
    "rewards": [{"name": "has_letter", "function": "regex", "args": {"pattern": "[a-k]"}}],
    "generator": {"sampling": {"max_tokens": 16}, "max_num_seqs": 16, "kv_cache_gib": 0.25},
    "learner": {"zero_stage": 0, "token_budget": 1024, "optimizer": {"lr": 1e-3}},
    "reference": {"token_budget": 1024},
    "telemetry": {"wandb": "disabled"},
    "cluster": {"device": "cpu"},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_algorithms_are_compared_and_a_second_call_runs_nothing_again(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    folder = tmp_path / "compare"

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "launch.cli", "compare", str(recipe), "--directory", str(folder),
                   "--algorithms", "kto", "grpo", "best-of-n", *arguments]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=ENVIRONMENT)
        logs = "".join(log.read_text()[-2000:] for log in (folder / "logs").glob("*.log")) if done.returncode else ""
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs
        return done.stdout

    call()
    found = json.loads((folder / "compare.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["base", "kto", "grpo", "best_of_2", "best_of_4"]
    assert {row["status"] for row in rows.values()} == {"ok"}
    for row in rows.values():
        assert 0 <= row["measures"]["reward"]["value"] <= 1 and row["kl"]["value"] is not None
    for name in ("kto", "grpo"):
        cost = rows[name]["cost"]
        assert cost["num_labelled"] == 32 and cost["num_sampled_tokens"] > 32 and cost["seconds"] > 0
        assert cost["num_trained_tokens"] > cost["num_sampled_tokens"]
    means = [rows[name]["measures"]["reward"]["value"] for name in ("base", "best_of_2", "best_of_4")]
    assert means[0] < means[2] and means[1] <= means[2], "the best of four is chosen among those of the best of two too"
    for name in ("compare.md", "compare.svg", "compare.html"):
        assert (folder / name).stat().st_size > 500
    ended = json.loads((folder / "stages.json").read_text())
    assert call() and json.loads((folder / "stages.json").read_text()) == ended
