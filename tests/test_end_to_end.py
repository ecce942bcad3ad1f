"""Whole runs with real Ray, vLLM and DeepSpeed on a tiny model: to the end, killed and resumed, stopped, serial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.checkpoints import CheckpointStore
from launch.journal import read_rows
from launch.overrides import load_config
from launch.prepare import prepare
from launch.prompts import PromptStream
from launch.train import _Run, earlier_attempts
from trainers.experience import WeightVersion

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "cpu-two-by-two"
RUN_S = 300.0  # a whole tiny run; about 40 s on two idle cores
POLL_S = 0.1

pytestmark = pytest.mark.timeout(2 * RUN_S + 300)

# One generator, one rank, no partitioning: the smallest Ray run, and what fits into one process.
SMALL = ("generator.num_workers=1", "learner.num_workers=1", "learner.zero_stage=0", "evaluation.every=0")


@dataclass
class Run:
    """One `burnish train` in a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    children: list[psutil.Process] = field(default_factory=list)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(read_rows(self.folder / name))

    def until(self, name: str, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first row of a file that ``found`` accepts; fails when the run ends or the deadline passes before."""
        deadline = time.monotonic() + RUN_S
        while time.monotonic() < deadline:
            for row in self.rows(name):
                if found(row):
                    return row
            try:
                self.process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(f"the run ended with {self.process.returncode} before it was in {name}:\n{self.tail()}")
        pytest.fail(f"waited {RUN_S:g} s for a row of {name}:\n{self.tail()}")

    def end(self) -> int:
        """Exit code, once the run has ended by itself."""
        return self.process.wait(RUN_S)

    def kill(self) -> None:
        """What a power cut does to the driver; its Ray is left behind."""
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(30)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts runs below ``tmp_path``; whatever is left of them at the end is ended."""
    started: list[Run] = []

    def start_run(name: str, *arguments: str) -> Run:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
        log = tmp_path / f"{name}-{len(started)}.log"
        place = (f"run.name={name}", f"run.directory={tmp_path}")
        command = [sys.executable, "-m", "launch.cli", "train", RECIPE, *place, *arguments]
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=tmp_path)
        started.append(Run(tmp_path / name, process, log))
        return started[-1]

    yield start_run
    for run in started:
        left = run.children
        if run.process.poll() is None:
            left = [*psutil.Process(run.process.pid).children(recursive=True), *left]
            run.process.kill()
            run.process.wait(30)
        for child in left:
            if child.is_running():
                child.kill()
        psutil.wait_procs(left, timeout=30)


def trajectories(folder: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "trajectories" / f"step-{step:06d}.parquet").to_pylist()
    return rows


def check_lineage(folder: Path, num_steps: int, incarnation_of: Callable[[int], int]) -> None:
    """Steps 1..num_steps are recorded once, and trained on each prompt of the stream exactly once, in its order.

    Every token was sampled under the weights of the step before; ``incarnation_of`` says which start they were from.
    """
    assert [r["step"] for r in read_rows(folder / "metrics.jsonl") if r["step"] > 0] == list(range(1, num_steps + 1))
    config = load_config(str(folder / "config.yaml")).config
    prepared = prepare(config)
    stream = PromptStream(prepared.train, config.run.seed, config.prompts.shuffle)
    num_groups, num_samples = config.run.groups_per_step, config.run.samples_per_prompt
    for step in range(1, num_steps + 1):
        rows = trajectories(folder, step)
        positions = [int(row["group_id"]) for row in rows]
        first = (step - 1) * num_groups
        assert positions == [p for p in range(first, first + num_groups) for _ in range(num_samples)]
        for row, position in zip(rows, positions, strict=True):
            assert row["prompt_ids"] == stream.at(position).token_ids.tolist()
            assert sum(span["num_tokens"] for span in row["version_spans"]) == len(row["completion_ids"])
            versions = {(span["incarnation"], span["step"]) for span in row["version_spans"]}
            assert versions == {(incarnation_of(step), step - 1)}


def check_accounting(folder: Path, text: str, workers: set[str]) -> dict[str, Any]:
    """accounting.json; the trace (its ``text``) has a track for each of ``workers``, and each one's causes sum up."""
    events = json.loads(text)
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(tracks.values()) == workers
    assert {tracks[e["pid"], e["tid"]] for e in events if e["ph"] == "X"} == workers
    report: dict[str, Any] = json.loads((folder / "accounting.json").read_text())
    assert report["workers"].keys() == workers
    walls = [worker["wall_ns"] for worker in report["workers"].values()]
    for worker in report["workers"].values():
        assert sum(worker["causes_ns"].values()) == worker["wall_ns"]
    assert max(walls) - min(walls) < 5e9, "all were launched together and ended together"
    return report


def test_the_two_by_two_recipe_runs_to_its_end(start: Start) -> None:
    run = start("whole", "algorithm.kl_coef=0.1")
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, 3, lambda step: 0)
    names = {*(f"{role}-{i}" for role in ("generator", "learner") for i in (0, 1)), "reward_workers-0", "reference-0"}
    report = check_accounting(run.folder, (run.folder / "trace.json").read_text(), names)
    for row in report["roles"]:
        assert row["useful_fraction"] > 0, row
    assert {"wait for generator", "push"} <= {loss["cause"] for row in report["roles"] for loss in row["losses"]}
    assert run.rows("metrics.jsonl")[-1]["accounting/learner/learn_fraction"] > 0
    assert "where the time went" in run.log.read_text(errors="replace")
    rows = {row["step"]: row for row in run.rows("metrics.jsonl")}
    assert abs(rows[1]["kl"]) < 1e-3, "the policy is the reference before its first update"
    assert rows[3]["kl"] > rows[1]["kl"]
    assert rows[1]["ratio/first_minibatch_max_deviation"] < 1e-3 and rows[1]["clip_ratio/region_mean"] == 0
    assert {"eval/accuracy"} <= rows[0].keys() & rows[3].keys()
    (ready,) = [e for e in run.rows("events.jsonl") if e["kind"] == "ready"]
    assert ready["num_verified"] > 0 and ready["num_arrival_verified"] > 0
    assert [row["role"] for row in ready["layout"]].count("learner") == 2
    assert [row["role"] for row in ready["layout"]].count("generator") == 2
    assert [row["role"] for row in ready["layout"]].count("reference") == 1
    newest = CheckpointStore(run.folder / "checkpoints").latest()
    assert newest is not None and newest.step == 3
    assert newest.metadata["prompts"]["position"] == 12
    assert list((run.folder / "wandb").glob(f"offline-run-*-{newest.metadata['wandb_id']}"))
    for name in ("config.yaml", "samples-before.jsonl", "samples-after.jsonl", "reward.png"):
        assert (run.folder / name).stat().st_size > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = run.folder / "export" / "step-000003"
    exported, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    initial = AutoModelForCausalLM.from_pretrained(prepare(load_config(RECIPE).config).model_path)
    moved = [not a.equal(b) for a, b in zip(exported.parameters(), initial.parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(export).chat_template


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_trains_every_prompt_once(start: Start) -> None:
    killed = start("killed", "run.num_steps=5000", "evaluation.every=0", "checkpoint.every=3")
    killed.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 3)
    killed.until("metrics.jsonl", lambda row: row["step"] >= 5)
    killed.kill()
    check_accounting(
        killed.folder, (killed.folder / "trace.json").read_text() + "]",
        {"generator-0", "generator-1", "learner-0", "learner-1", "reward_workers-0"},
    )  # fmt: skip
    recorded = killed.rows("metrics.jsonl")[-1]["step"]
    checkpoint = CheckpointStore(killed.folder / "checkpoints").latest()
    assert checkpoint is not None and 3 <= checkpoint.step <= recorded
    end = checkpoint.step + 4

    # Fewer ranks and fewer generators, and ZeRO 2 where there was another stage.
    fewer = ("learner.num_workers=1", "learner.zero_stage=2", "generator.num_workers=1")
    resumed = start("killed", f"run.num_steps={end}", "evaluation.every=0", "checkpoint.every=3", *fewer, "--resume")
    assert resumed.end() == 0, resumed.tail()
    check_lineage(resumed.folder, end, lambda step: 0 if step <= checkpoint.step else 1)
    events = resumed.rows("events.jsonl")
    ids = [e["wandb_id"] for e in events if e["kind"] == "recording"]
    assert len(ids) == 2 and ids[0] == ids[1]
    assert len(list((resumed.folder / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
    (event,) = [e for e in events if e["kind"] == "resumed"]
    assert event["step"] == checkpoint.step and event["version"] == f"1.{checkpoint.step}"
    superseded = [row["step"] for row in resumed.rows("metrics.superseded.jsonl")]
    assert superseded == list(range(checkpoint.step + 1, recorded + 1))
    last = CheckpointStore(resumed.folder / "checkpoints").latest()
    assert last is not None and last.step == end
    assert last.metadata["incarnation"] == 1 and last.metadata["prompts"]["position"] == 4 * end
    tokens = [row["num_tokens"] for row in resumed.rows("metrics.jsonl")]
    assert tokens == sorted(tokens)


def test_sigterm_stops_with_a_checkpoint_and_the_same_run_in_one_process_trains_the_same(start: Start) -> None:
    grace = f"checkpoint.grace_s={RUN_S}"
    run = start("stopped", *SMALL, "run.num_steps=5000", "checkpoint.every=0", grace)
    run.until("metrics.jsonl", lambda row: row["step"] >= 3)
    children = psutil.Process(run.process.pid).children(recursive=True)
    run.process.terminate()
    assert run.end() == 0, run.tail()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, "Ray or a worker outlived the run"
    rows = run.rows("metrics.jsonl")
    kinds = [e["kind"] for e in run.rows("events.jsonl")]
    assert "stopping" in kinds and kinds[-1] == "stopped" and "failed" not in kinds
    checkpoint = CheckpointStore(run.folder / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step == rows[-1]["step"]
    assert not (run.folder / "export").exists()

    twin = start("twin", *SMALL, "run.num_steps=2", "cluster.backend=in_process")
    assert twin.end() == 0, twin.tail()
    check_lineage(twin.folder, 2, lambda step: 0)
    for step in (1, 2):
        ours, theirs = trajectories(twin.folder, step), trajectories(run.folder, step)
        for name in ("group_id", "seed", "prompt_ids", "completion_ids", "reward"):
            assert [row[name] for row in ours] == [row[name] for row in theirs], f"{name} of step {step}"
    first, reference = twin.rows("metrics.jsonl")[0], rows[0]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "num_tokens"):
        assert first[name] == reference[name]
    for name in ("loss", "entropy", "grad_norm"):
        assert first[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5)


def test_weights_reach_a_generator_over_a_process_group_under_zero_2(start: Start) -> None:
    run = start(
        "pushed", "generator.num_workers=1", "learner.zero_stage=2", "push.backend=nccl", "run.num_steps=2",
        "evaluation.every=0", "model.dtype=float32", "push.bucket_bytes=65536",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, 2, lambda step: 0)
    (ready,) = [e for e in run.rows("events.jsonl") if e["kind"] == "ready"]
    assert ready["num_verified"] > 0
    for row in run.rows("metrics.jsonl"):
        assert row["push/num_bytes"] == 460032
        # What the generator sampled with is what the learner holds, before and after an update.
        assert row["sampling/sampling_logp_difference/max"] < 1e-4


# --- resuming, without a run --------------------------------------------------------------------


def resumed_run(folder: Path, events: list[dict[str, Any]]) -> _Run:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    resolved = load_config(RECIPE, [f"run.directory={folder.parent}", f"run.name={folder.name}"])
    return _Run(resolved, prepare(resolved.config), folder, None, Console())


def test_a_run_killed_before_its_first_checkpoint_begins_again_as_the_same_wandb_run(tmp_path: Path) -> None:
    events = [{"kind": "recording", "wandb_id": "abcd"}, {"kind": "ready", "version": "0.0"}]
    run = resumed_run(tmp_path / "again", events)
    assert run.first_step == 0 and run.is_resumed
    assert run.wandb_id == "abcd"
    assert run.version == WeightVersion(1, 0), "samples of 0.0 may be recorded already"


def test_an_incarnation_that_no_checkpoint_knows_is_not_used_again(tmp_path: Path) -> None:
    events = [{"kind": "ready", "version": v} for v in ("0.0", "1.6", "2.6")]
    assert resumed_run(tmp_path / "often", events).version.incarnation == 3
    assert earlier_attempts(tmp_path / "new") == (-1, None)
