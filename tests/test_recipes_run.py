"""Shipped two-core recipes run to their end as they are, but for a tiny model and less of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stand_in import StandIn, between
from test_end_to_end import REPOSITORY, RUN_S

from launch.journal import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(RUN_S + 60)]
TINY = "model.path=builtin:tiny-llama"
FEW = ("prompts.train.size=8",)
SAMPLED = ("sampling.max_tokens=8",)
STEPS = 2
TRAINED = (f"run.num_steps={STEPS}", "evaluation.every=1", "telemetry.wandb=disabled")
RL = (*TRAINED, "prompts.train.size=16", "prompts.eval.size=8", "generator.sampling.max_tokens=8",
      "run.groups_per_step=2", "run.samples_per_prompt=4")  # fmt: skip
PAIRS = (*TRAINED, "run.batch_size=8", "data.train.0.args.num=24", "data.eval.args.num=8")


def says(text: str) -> str:
    """Of two answers the one with more letters; of one its letters, up to ten."""
    if "[Answer B]" in text:
        a, b = between(text, "[Answer A]\n", "\n\n[Answer B]"), text.partition("[Answer B]\n")[2].rpartition("\n\n")[0]
        return "[[A]]" if letters(a) > letters(b) else "[[B]]" if letters(a) < letters(b) else "[[C]]"
    mark = 1 + min(9, letters(between(text, "[Answer]\n", "\n\nMark each")))
    return f"helpful: {mark}\nhonest: {mark}\nharmless: 10"


def letters(text: str) -> int:
    return sum(c.isalpha() for c in text)


def run(folder: Path, command: str, recipe: str, *overrides: str) -> Path:
    """The run folder of one command, which ended well."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "launch.cli", command, recipe, TINY, f"run.directory={folder}", *overrides]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / recipe


def metrics(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "metrics.jsonl"))


@pytest.mark.parametrize("recipe", ["cpu-demo", "cpu-online-dpo", "cpu-lora-grpo", "cpu-ppo"])
def test_a_recipe_that_samples_trains_evaluates_and_exports(recipe: str, tmp_path: Path) -> None:
    folder = run(tmp_path, "train", recipe, *RL)
    rows = metrics(folder)
    assert rows[-1]["step"] == STEPS and any("eval/reward" in row for row in rows)
    assert list((folder / "export").glob(f"step-*{STEPS}/**/*.safetensors"))


@pytest.mark.parametrize("recipe", ["cpu-dpo", "cpu-lora-dpo", "cpu-reward"])
def test_a_recipe_that_learns_from_preferences_starts_at_ln_2_and_exports(recipe: str, tmp_path: Path) -> None:
    folder = run(tmp_path, "train", recipe, *PAIRS)
    rows = metrics(folder)
    first = next(row for row in rows if "loss" in row)
    assert rows[-1]["step"] == STEPS and first["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert list((folder / "export").glob(f"step-*{STEPS}/**/*.safetensors"))


def test_the_recipe_with_a_judge_as_the_reward_trains_on_its_marks(tmp_path: Path) -> None:
    with StandIn(says) as server:
        folder = run(tmp_path, "train", "cpu-judge-grpo", *RL, f"judges.0.endpoint.base_url={server.url}")
    row = metrics(folder)[-1]
    assert row["rewards/judge_harmless/mean"] == 1.0 and 0 <= row["rewards/judge_honest/mean"] <= 1
    assert "rewards/accuracy/mean" in row and row["failures/num_reward"] == 0


def test_the_recipe_with_a_judge_as_labeller_writes_pairs_that_it_prefers(tmp_path: Path) -> None:
    with StandIn(says) as server:
        url = f"label.judge.endpoint.base_url={server.url}"
        folder = run(tmp_path, "label", "cpu-judge-label", *FEW, *SAMPLED, url)
    pairs = pq.read_table(folder / "preferences.parquet").to_pylist()
    assert pairs and all(letters(_text(p["chosen"])) > letters(_text(p["rejected"])) for p in pairs)
    assert len({p["principle"] for p in pairs}) > 1


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def test_the_recipe_of_constitutional_revision_leaves_its_record_of_every_round(tmp_path: Path) -> None:
    brief = ("revise.critique_max_tokens=8", "revise.revision_max_tokens=8")
    folder = run(tmp_path, "revise", "cpu-revise", *FEW, *SAMPLED, *brief)
    records = list(read_rows(next(folder.glob("re*.jsonl"))))
    assert len(records) == 8
    for record in records:  # so small a model may fail to revise, which is said
        assert record["original"] and len(record["principles"]) == 1
        assert (record["revisions"][0] is None) == (record["failure"] is not None)


def test_the_recipe_of_rejection_sampling_keeps_one_answer_a_prompt(tmp_path: Path) -> None:
    more = ("select.threshold=null", "select.drop_truncated=false", "sampling.num_candidates=4")
    folder = run(tmp_path, "select", "cpu-rejection", *FEW, *SAMPLED, *more)
    kept = pq.read_table(folder / "sft.parquet").to_pylist()
    assert 0 < len(kept) <= 8 and len({str(row["prompt"]) for row in kept}) == len(kept)


def test_the_recipe_of_best_of_n_says_what_choosing_gains_and_costs(tmp_path: Path) -> None:
    few = ("prompts.train.size=8", "prompts.eval.size=8", "eval.num_prompts=6", "eval.best_of_n.n=[1,4,16]",
           "generator.sampling.max_tokens=8")  # fmt: skip
    folder = run(tmp_path, "eval", "cpu-best-of-n", *few)
    (report,) = folder.glob("*.json")
    sizes = json.loads(report.read_text())["best_of_n"]["sizes"]
    assert [round(sizes[n]["kl_bound"], 3) for n in ("1", "4", "16")] == [0.0, 0.636, 1.835]
    for rewards in (size["rewards"] for size in sizes.values()):
        assert rewards["bare"]["n"] == rewards["accuracy"]["n"] == 6 and 0 <= rewards["bare"]["value"] <= 1
    assert sizes["1"]["rewards"]["bare"]["value"] <= sizes["16"]["rewards"]["bare"]["value"]
