"""Real workers are killed in the middle of a run, which goes on: Ray, vLLM and DeepSpeed on a tiny model."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import psutil
import pytest
from test_end_to_end import RUN_S, Run, Start, check_lineage, start

from launch.cli import main

__all__ = ["start"]  # the fixture

DETECT_S = 60.0
NUM_STEPS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_S + 300)]

SETTINGS = (
    "evaluation.every=0", "checkpoint.every=0", "checkpoint.export=false",
    "learner.num_workers=1", "learner.zero_stage=0", f"health.detect_s={DETECT_S:g}",
)  # fmt: skip


def worker(run: Run, title: str) -> psutil.Process:
    """The process of one worker, by the name it has in process lists."""
    for process in psutil.Process(run.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, as those before it did
            if f"burnish-{title}" in " ".join(process.cmdline()):
                return process
    pytest.fail(f"no process is called {title}:\n{run.tail()}")


def event(run: Run, kind: str, **fields: Any) -> dict[str, Any]:
    return run.until("events.jsonl", lambda e: e["kind"] == kind and fields.items() <= e.items())


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_generator_that_is_killed_or_frozen_is_replaced_and_every_prompt_is_trained_once(
    start: Start, fault: signal.Signals
) -> None:
    run = start("killed", *SETTINGS, f"run.num_steps={NUM_STEPS}")
    run.until("metrics.jsonl", lambda row: row["step"] >= 2)
    victim = worker(run, "generator-1")
    at = time.time()
    os.kill(victim.pid, fault)
    died = event(run, "worker_died", worker="generator-1")
    assert died["time_unix"] - at < 1.5 * DETECT_S
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, NUM_STEPS, lambda step: 0)
    events = run.rows("events.jsonl")
    assert [e["worker"] for e in events if e["kind"] == "worker_died"] == ["generator-1"]
    assert not victim.is_running()


def test_a_replaced_generator_samples_again_and_dead_reward_workers_are_started_again(start: Start) -> None:
    run = start("replaced", *SETTINGS, "run.num_steps=5000", "algorithm.kl_coef=0.1")
    run.until("metrics.jsonl", lambda row: row["step"] >= 2)
    for title in ("generator-0", "reward_workers-0", "reference-0"):
        worker(run, title).kill()
    joined = event(run, "generator_joined", worker="generator-2")
    for role in ("generator", "reward_workers", "reference"):
        event(run, "worker_replaced", role=role)
    last = run.rows("metrics.jsonl")[-1]["step"]
    run.until("metrics.jsonl", lambda row: row["step"] >= last + 3)
    run.process.terminate()
    assert run.end() == 0, run.tail()
    steps = run.rows("metrics.jsonl")[-1]["step"]
    check_lineage(run.folder, steps, lambda step: 0)
    assert joined["num_generators"] == 2


def test_a_live_run_is_scaled_from_one_generator_to_three_to_two(start: Start) -> None:
    run = start("scaled", *SETTINGS, "run.num_steps=5000", "generator.num_workers=1")
    run.until("metrics.jsonl", lambda row: row["step"] >= 1)
    assert main(["scale", str(run.folder), "generators=3"]) == 0
    for index in (1, 2):
        event(run, "generator_joined", worker=f"generator-{index}")
    joined = run.rows("metrics.jsonl")[-1]["step"]
    run.until("metrics.jsonl", lambda row: row["step"] >= joined + 3)
    assert main(["scale", str(run.folder), "generators=2"]) == 0
    assert event(run, "generator_left")["worker"] == "generator-2"
    left = run.rows("metrics.jsonl")[-1]["step"]
    run.until("metrics.jsonl", lambda row: row["step"] >= left + 2)
    run.process.terminate()
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, run.rows("metrics.jsonl")[-1]["step"], lambda step: 0)
    assert not [e for e in run.rows("events.jsonl") if e["kind"] in ("worker_died", "start_failed")]


def test_a_generator_whose_engine_process_is_killed_is_replaced(start: Start) -> None:
    run = start("engine", *SETTINGS, "run.num_steps=5000", "generator.engine=beside")
    run.until("metrics.jsonl", lambda row: row["step"] >= 1)
    at = time.time()
    for child in worker(run, "generator-1").children(recursive=True):
        child.kill()
    assert event(run, "worker_died", worker="generator-1")["time_unix"] - at < 1.5 * DETECT_S
    event(run, "generator_joined", worker="generator-2")
    last = run.rows("metrics.jsonl")[-1]["step"]
    run.until("metrics.jsonl", lambda row: row["step"] >= last + 2)
    run.process.terminate()
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, run.rows("metrics.jsonl")[-1]["step"], lambda step: 0)
