"""Online DPO end to end, with real Ray, vLLM and DeepSpeed on the tiny model: its pairs, its metrics, its restarts."""

from __future__ import annotations

import math

import pytest
from test_end_to_end import RUN_S, SMALL, Start, start, trajectories

from cluster.checkpoints import CheckpointStore

__all__ = ["start"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_S + 300)]

STEPS = 3


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_best_and_the_worst_of_each_group_are_trained_on_and_nothing_else(start: Start, loss: str) -> None:
    run = start(
        loss, *SMALL, "algorithm.name=online_dpo", f"algorithm.loss={loss}", f"run.num_steps={STEPS}",
        "model.dtype=float32",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    for row in run.rows("metrics.jsonl"):
        step = row["step"]
        groups: dict[str, list[dict[str, float]]] = {}
        for sample in trajectories(run.folder, step):
            groups.setdefault(sample["group_id"], []).append(sample)
        num_ties = 0
        for samples in groups.values():
            rewards = [s["reward"] for s in samples]
            moved = {i: s["advantage"] for i, s in enumerate(samples) if s["advantage"]}
            if len(set(rewards)) == 1:
                num_ties += 1
                assert not moved
            else:
                assert set(moved) == {rewards.index(max(rewards)), rewards.index(min(rewards))}
                assert moved[rewards.index(max(rewards))] == -moved[rewards.index(min(rewards))] > 0
        assert row["pairs/num_ties"] == num_ties and row["pairs/num"] == len(groups) - num_ties
        assert math.isfinite(row["loss"]) and row["objective/scores_margin"] == 1.0
        if step == 1:  # the policy is its reference, up to the rounding of two implementations
            assert row["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 25.0, rel=1e-2)
            assert abs(row["rewards/margins"]) < 1e-2
    assert any(row.get("grad_norm", 0.0) > 0 for row in run.rows("metrics.jsonl"))


def test_an_asynchronous_run_is_killed_and_goes_on_from_its_checkpoint(start: Start) -> None:
    arguments = ("algorithm.name=online_dpo", "run.max_staleness=1", "checkpoint.every=2", "evaluation.every=0")
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
    assert all("pairs/num" in row and "correction/truncated_fraction" not in row for row in rows if row["step"] > 0)
