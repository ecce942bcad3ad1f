"""Every algorithm end to end, with real Ray, vLLM and DeepSpeed on the tiny model of one shipped recipe."""

from __future__ import annotations

import math

import pytest
from test_end_to_end import RUN_S, SMALL, Start, check_lineage, start, trajectories

from cluster.checkpoints import CheckpointStore
from launch.overrides import load_config
from trainers.presets import PRESETS

__all__ = ["start"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_S + 300)]

STEPS = 3
TWO_UPDATES = ("algorithm.num_minibatches=2", "algorithm.num_epochs=2", "model.dtype=float32")  # ratios leave 1
MORE = {  # what a name needs besides on this model
    "ppo": ("critic.optimizer.lr=0.01", "critic.zero_stage=0"),
    "dapo": ("filtering.max_refills=8",),  # random letters: about every tenth group has no spread
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_runs_to_its_end_from_one_recipe(start: Start, name: str) -> None:
    beta = () if name == "dapo" else ("algorithm.kl_coef=0.05",)  # which has none
    run = start(
        name, *SMALL, f"algorithm.name={name}", f"run.num_steps={STEPS}", *beta, *TWO_UPDATES, *MORE.get(name, ())
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    config = load_config(str(run.folder / "config.yaml")).config
    assert config.algorithm.name == name
    text = (run.folder / "config.yaml").read_text()
    assert (f"# preset {name}\n" in text) == (name != "grpo")
    rows = run.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if name != "dapo":  # whose dropped groups leave gaps in the stream of prompts
        check_lineage(run.folder, STEPS, lambda step: 0)
    for row in rows:
        assert math.isfinite(row["loss"]) and row["ratio/first_minibatch_max_deviation"] < 1e-3
        assert row["groups/num_trained"] == config.run.groups_per_step
        assert ("baseline/greedy_reward" in row) == (name == "remax")
        assert ("critic/loss" in row) == (name == "ppo") and ("kl" in row) == bool(beta)
    assert any(row.get("grad_norm", 0.0) > 0 for row in rows)
    for step in range(1, STEPS + 1):
        sampled = trajectories(run.folder, step)
        assert len(sampled) == config.run.groups_per_step * config.run.samples_per_prompt
        advantages = [row["advantage"] for row in sampled if row["advantage"] is not None]
        rewards = [row["reward"] for row in sampled]
        if name == "reinforce_plus_plus" and len(set(rewards)) > 1:
            assert min(advantages) < 0 < max(advantages)
        if name == "dapo":
            assert "rewards/overlong" in sampled[0]
            groups: dict[str, set[float]] = {}
            for row in sampled:
                groups.setdefault(row["group_id"], set()).add(row["reward"])
            assert all(len(found) > 1 for found in groups.values()), "a group without a spread was trained on"
    newest = CheckpointStore(run.folder / "checkpoints").latest()
    assert newest is not None and newest.step == STEPS


def test_a_remax_run_in_one_process_is_the_same_run_twice(start: Start) -> None:
    """Greedy completions included: rewards, baselines and what was learned depend on the seed and nothing else."""
    arguments = (*SMALL, "algorithm.name=remax", "run.num_steps=2", "cluster.backend=in_process", "model.dtype=float32",
                 "checkpoint.every=0", "checkpoint.export=false")  # fmt: skip
    first, second = (start(name, *arguments) for name in ("once", "twice"))
    for run in (first, second):
        assert run.end() == 0, run.tail()
    ours, theirs = first.rows("metrics.jsonl"), second.rows("metrics.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        for metric in ("reward", "baseline/greedy_reward", "num_tokens"):
            assert a[metric] == b[metric], metric
        for metric in ("loss", "grad_norm"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-3, abs=1e-6), metric
    for step in (1, 2):
        a, b = trajectories(first.folder, step), trajectories(second.folder, step)
        assert [row["completion_ids"] for row in a] == [row["completion_ids"] for row in b]
        assert [row["advantage"] for row in a] == [row["advantage"] for row in b]


@pytest.mark.parametrize("name", ["remax", "dapo"])
def test_what_samples_more_than_it_trains_on_is_killed_and_goes_on(start: Start, name: str) -> None:
    """Asynchronous, so that finished groups lie in the checkpoint: with their baseline, or among dropped ones."""
    arguments = (f"algorithm.name={name}", "run.max_staleness=1", "checkpoint.every=2", "evaluation.every=0")
    killed = start("killed", *arguments, "run.num_steps=5000")
    killed.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 2)
    killed.until("metrics.jsonl", lambda row: row["step"] >= 4)
    killed.kill()
    checkpoint = CheckpointStore(killed.folder / "checkpoints").latest()
    assert checkpoint is not None
    end = checkpoint.step + 3
    resumed = start("killed", *arguments, f"run.num_steps={end}", "--resume")
    assert resumed.end() == 0, resumed.tail()
    rows = resumed.rows("metrics.jsonl")
    assert [row["step"] for row in rows if row["step"] > 0] == list(range(1, end + 1))
    assert all(("baseline/greedy_reward" in row) == (name == "remax") for row in rows if row["step"] > 0)
    ids = [row["group_id"] for step in range(1, end + 1) for row in trajectories(resumed.folder, step)]
    samples = load_config("cpu-two-by-two").config.run.samples_per_prompt
    assert len(ids) == len(set(ids)) * samples, "a group was trained on twice"
