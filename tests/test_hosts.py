"""Two hosts, one of which is cut off in the middle of a run: in network namespaces, with real Ray, vLLM and DeepSpeed.

The run goes on, what the lost host was sampling is sampled again, and when the host comes back it is adopted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_async_run import LONG, MAX_STALENESS
from test_async_run import check_lineage as check_stale_lineage
from test_end_to_end import REPOSITORY, RUN_S, Run, check_lineage

from scripts.hosts import Host, Network, RayNodes, lacking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * RUN_S)]

RAY_TIMEOUT_S = 100.0  # by which a node that was cut off knows that it is given up; Ray's is a minute
NUM_STEPS = 40
PACED_S = 8.0  # of a step, while ``paced`` is there: the run is not to end before its host is back
HOLD_S = 10.0  # more than a step
LATE = 1.5  # deadlines are kept up to this factor on a busy machine

REWARD = '''
import time
from pathlib import Path

def letters(completions, paced):
    if Path(paced).exists():
        time.sleep({pace})
    return [float(any(letter in "abcdefghijk" for letter in text)) for text in completions]
'''

COMMON = (
    "learner.num_workers=1", "learner.zero_stage=0", "evaluation.every=0", "checkpoint.every=0",
    "checkpoint.export=false", f"run.num_steps={NUM_STEPS}", "reward_workers.timeout_s=120",
)  # fmt: skip


@dataclass
class World:
    """Host a with the head of a Ray and the run's driver, host b with a Ray node."""

    folder: Path
    a: Host
    b: Host
    runs: list[Run] = field(default_factory=list)

    def start_ray(self, **settings: str) -> None:
        """On both hosts, with settings of Ray's head."""
        environment = {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
        self.ray = RayNodes(self.a, os.environ | environment | settings, self.folder)
        for host in (self.a, self.b):
            self.ray.start(host, num_cpus=2)

    @property
    def paced(self) -> Path:
        return self.folder / "paced"

    def train(self, name: str, max_staleness: int, *overrides: str) -> Run:
        """Start a run of the tiny recipe on a, whose steps take PACED_S while ``paced`` is there."""
        code = self.folder / "reward.py"
        code.write_text(REWARD.format(pace=PACED_S * (max_staleness + 1)))  # so many steps are under way at once
        recipe = yaml.safe_load((REPOSITORY / "launch" / "recipes" / "cpu-two-by-two.yaml").read_text())
        recipe["rewards"] = [{"function": f"{code}:letters", "args": {"paced": str(self.paced)}}]
        path, log = self.folder / "recipe.yaml", self.folder / f"{name}.log"
        path.write_text(yaml.safe_dump(recipe))
        place = (f"run.name={name}", f"run.directory={self.folder}", f"cluster.address={self.ray.address}")
        command = [sys.executable, "-m", "launch.cli", "train", str(path), *place, "cluster.num_nodes=2", *overrides]
        with log.open("wb") as out:
            run = Run(self.folder / name, self.a.start(command, out, self.ray.env, self.folder), log)
        self.runs.append(run)
        return run

    def worker(self, title: str) -> psutil.Process:
        """The process of a worker on b, by the name it has in process lists."""
        for process in self.b.processes():
            if f"burnish-{title}" in " ".join(process.cmdline()):
                return process
        pytest.fail(f"no process of host b is called {title}:\n{self.runs[-1].tail()}")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    why = lacking()
    if why:
        pytest.skip(f"THE TWO-HOST TESTS DID NOT RUN: {why}")
    with Network() as network:
        yield World(tmp_path, network.host("a"), network.host("b"))


def event(run: Run, kind: str, **fields: Any) -> dict[str, Any]:
    return run.until("events.jsonl", lambda e: e["kind"] == kind and fields.items() <= e.items())


def steps(run: Run, at_least: int) -> int:
    """The last recorded step, once it is ``at_least`` that."""
    run.until("metrics.jsonl", lambda row: row["step"] >= at_least)
    return int(run.rows("metrics.jsonl")[-1]["step"])


def until(true: Callable[[], bool], what: str, deadline_s: float, run: Run) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if true():
            return
        try:
            run.process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail(f"waited {deadline_s:g} s for {what}:\n{run.tail()}")


def heal(world: World, run: Run, victim: psutil.Process, num_generators: int) -> str:
    """Mend the cable, start Ray on b anew as a supervisor would, and wait for a generator there.  Its name."""
    left = event(run, "node_left", address=world.b.address)
    world.b.heal()
    assert not psutil.wait_procs([victim], timeout=RAY_TIMEOUT_S)[1], "what was given up when it was cut off lives on"
    world.b.end()  # Ray's own agents take their time
    world.ray.start(world.b, num_cpus=2)
    joined = event(run, "node_joined", address=world.b.address)
    assert joined["node"] != left["node"], "Ray never takes a dead node back"
    assert event(run, "node_adopted", node=joined["node"])["num_generators"] == 1
    came = run.until(
        "events.jsonl", lambda e: e["kind"] == "generator_joined" and e["time_unix"] > joined["time_unix"]
    )
    assert came["num_generators"] == num_generators and came["node"] == joined["node"]
    assert world.worker(came["worker"]).is_running()
    return str(came["worker"])


def finish(world: World, run: Run, name: str) -> None:
    """A few more steps with the new generator, then as fast as it goes to the end."""
    steps(run, steps(run, 1) + 3)
    world.paced.unlink()
    assert run.end() == 0, run.tail()
    assert [e["kind"] for e in run.rows("events.jsonl")][-1] == "finished"
    spent = json.loads((run.folder / "accounting.json").read_text())["workers"][name]["causes_ns"]
    assert spent.get("generate", 0) > 0 and spent.get("push", 0) > 0, f"{name} took no part: {spent}"


def test_a_host_that_is_cut_off_in_mid_rollout_is_done_without_and_adopted_when_it_comes_back(world: World) -> None:
    detect_s = 30.0
    world.start_ray()  # its own checks take a minute: the heartbeats are faster
    run = world.train("rollout", MAX_STALENESS, *LONG, *COMMON, f"health.detect_s={detect_s}", "health.adopt_up_to=3")
    event(run, "ready")
    steps(run, 2)
    world.paced.touch()
    victim = world.worker("generator-1")
    # Frozen, it keeps the groups that it is given: after one more step, or when no step ends without it, it has some.
    os.kill(victim.pid, signal.SIGSTOP)
    last, end = steps(run, 2), time.monotonic() + HOLD_S
    until(lambda: time.monotonic() > end or steps(run, 2) > last, "a step", RUN_S, run)
    world.b.cut()
    at = time.time()
    os.kill(victim.pid, signal.SIGCONT)

    died = event(run, "worker_died", worker="generator-1")
    assert died["time_unix"] - at < LATE * detect_s, died
    assert died["reason"], died
    again = event(run, "group_reissued", worker="generator-1")
    assert again["reason"] == died["reason"]
    steps(run, steps(run, 2) + 3)  # it goes on with the other one
    event(run, "worker_replaced", role="generator", worker="generator-1")

    finish(world, run, heal(world, run, victim, num_generators=3))
    check_stale_lineage(run.folder, NUM_STEPS)
    assert {e["group_id"] for e in run.rows("events.jsonl") if e["kind"] == "group_lost"} == set()


def test_a_host_that_is_cut_off_in_mid_push_is_left_out_of_it_and_adopted_when_it_comes_back(world: World) -> None:
    deadline_s = 20.0
    world.start_ray(RAY_health_check_failure_threshold="3")  # sooner than by default, later than the push
    run = world.train(
        "push", 0, *COMMON, "push.backend=nccl", "model.dtype=float32", f"push.deadline_s={deadline_s}",
        "health.detect_s=120", "health.replace=false", "health.adopt_up_to=2",
    )  # fmt: skip
    event(run, "ready")
    steps(run, 2)
    world.paced.touch()
    victim = world.worker("generator-1")
    world.b.limit(kbit_per_s=1000)  # the 460 kB of a version take four seconds
    sent = [world.b.num_bytes()]

    def in_mid_push() -> bool:
        sent.append(world.b.num_bytes())
        return sent[-1] - sent[max(0, len(sent) - 80)] > 150_000  # nothing else is so large

    until(in_mid_push, "a push to host b", RUN_S, run)
    world.b.cut()
    at = time.time()
    died = event(run, "worker_died", worker="generator-1")
    assert died["time_unix"] - at < LATE * 2 * deadline_s, died
    assert "push of version" in died["reason"] and "Deadline" in died["reason"], died
    assert died["num_generators"] == 1
    last = steps(run, 1)
    steps(run, last + 3)
    world.b.limit(None)

    finish(world, run, heal(world, run, victim, num_generators=2))
    check_lineage(run.folder, NUM_STEPS, lambda step: 0)
    versions = [e["version"] for e in run.rows("events.jsonl") if e["kind"] == "generator_joined"]
    assert len(versions) == 1, "replaced by nobody, joined by one"
