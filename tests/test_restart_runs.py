"""A learner or critic rank of a whole run is killed: both start again from the newest checkpoint, generators stay."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import test_async_run
from test_async_run import LONG
from test_end_to_end import RUN_S, Run, Start, check_lineage, start, trajectories
from test_faults import event, worker
from test_ppo import PPO

from cluster.checkpoints import CheckpointStore
from launch.spool import UNTRAINED, read_spool

__all__ = ["start"]  # a fixture

COMMON = ("evaluation.every=0", "checkpoint.export=false", "checkpoint.keep=99")


def kill(run: Run, title: str) -> dict[str, int]:
    """Kill one rank; the generators' pids before it."""
    pids = {name: worker(run, name).pid for name in ("generator-0", "generator-1")}
    os.kill(worker(run, title).pid, signal.SIGKILL)
    return pids


def check_restart(run: Run, pids: dict[str, int], role: str, rank: int) -> dict[str, Any]:
    """The event of the restart; nobody but the ranks was started again, and the run ended by itself."""
    back = event(run, "learner_restarted")
    assert {name: worker(run, name).pid for name in pids} == pids
    assert run.end() == 0, run.tail()
    events = run.rows("events.jsonl")
    (died,) = [e for e in events if e["kind"] == "rank_died"]
    assert (died["role"], died["rank"]) == (role, rank) == (back["role"], back["rank"])
    assert not [e for e in events if e["kind"] in ("worker_died", "generator_joined", "start_failed", "failed")]
    assert events[-1]["kind"] == "finished"
    assert 0 < back["recover_s"] < RUN_S and back["version"] == f"1.{back['step']}"
    superseded = [row["step"] for row in run.rows("metrics.superseded.jsonl")]
    assert len(superseded) == back["num_superseded"] and superseded == sorted(superseded)
    last = CheckpointStore(run.folder / "checkpoints").latest()
    assert last is not None and last.metadata["incarnation"] == 1
    assert last.metadata["ledger"]["entries"] == [], "at the end nothing is left over"
    assert last.metadata["ledger"]["counts"] == {"trained": 4 * last.step, "dropped": 0, "failed": 0}
    return back


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S + 300)
def test_a_learner_rank_is_killed_and_the_generators_get_the_weights_of_the_checkpoint_over_new_groups(
    start: Start,
) -> None:
    run = start(
        "rank", *COMMON, "run.num_steps=12", "checkpoint.every=3", "learner.zero_stage=2", "push.backend=nccl",
        "model.dtype=float32", "push.bucket_bytes=65536",
    )  # fmt: skip
    run.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 3)
    run.until("metrics.jsonl", lambda row: row["step"] >= 4)
    back = check_restart(run, kill(run, "learner-1"), "learner", 1)
    assert back["step"] >= 3
    check_lineage(run.folder, 12, lambda step: 0 if step <= back["step"] else 1)
    for row in run.rows("metrics.jsonl"):
        assert row["sampling/sampling_logp_difference/max"] < 1e-4, "what was sampled with is what the learner holds"


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S + 300)
def test_an_asynchronous_run_loses_its_learner_and_trains_what_was_spooled_and_every_position_once(
    start: Start,
) -> None:
    run = start("async", *COMMON, *LONG, "run.num_steps=14", "checkpoint.every=3", "checkpoint.keep=10")
    run.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 3)
    run.until("metrics.jsonl", lambda row: row["step"] >= 5)
    back = check_restart(run, kill(run, "learner-0"), "learner", 0)
    test_async_run.check_lineage(run.folder, 14)
    assert Path(back["checkpoint"]).is_dir()
    spool = Path(back["checkpoint"]) / UNTRAINED  # none when the learner was waiting for every group there was
    spooled = {g.summary.group_id for g in read_spool(spool)} if spool.exists() else set()
    old: set[str] = set()
    for step in range(back["step"] + 1, 15):
        for row in trajectories(run.folder, step):
            for span in row["version_spans"]:
                if span["incarnation"] == 0:
                    assert span["step"] <= back["step"]
                    old.add(row["group_id"])
    assert old == spooled, "trajectories newer than the checkpoint that were not spooled with it, or lost ones"


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S + 300)
def test_without_a_checkpoint_a_killed_critic_takes_both_models_back_to_the_beginning(start: Start) -> None:
    run = start(
        "critic", *COMMON, *PPO, "run.num_steps=6", "checkpoint.every=0", "learner.num_workers=1",
        "learner.zero_stage=0", "critic.zero_stage=0", "model.dtype=float32",
    )  # fmt: skip
    run.until("metrics.jsonl", lambda row: row["step"] >= 2)
    first = run.rows("metrics.jsonl")[0]
    back = check_restart(run, kill(run, "critic-0"), "critic", 0)
    assert back["step"] == 0 and back["checkpoint"] == "none: from the beginning"
    check_lineage(run.folder, 6, lambda step: 1)
    again = run.rows("metrics.jsonl")[0]
    for name in ("reward", "completions/mean_length", "critic/value_mean"):
        assert again[name] == pytest.approx(first[name]), "the same weights sample the same"
