"""The accounting as a run sees it: watched workers and parts, the trace file, accounting.json and the table."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_loop import World

from actors.critic import CriticLearner
from actors.fleet import LearnerGang
from actors.generator import VLLMGenerator
from actors.learner import DeepSpeedLearner
from actors.reference import ReferenceModel
from actors.reward_model import RewardModel
from actors.reward_worker import RewardWorker
from actors.watched_parts import WatchedCritic, WatchedScorer
from actors.watched_workers import CAUSES, UNCOUNTED, WatchedWorkers
from cluster.layout import WorkerSlot
from launch.accountant import NAME, Accountant, bubble_table
from launch.trace_file import EARLIER, TraceFile
from trainers.accounting import Cause, evaluating
from trainers.algorithms import AlgorithmSettings
from trainers.bubbles import Setting
from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.ppo_lap import PPOLap, PPOState
from trainers.protocols import (
    CriticReport,
    GeneratedGroup,
    GroupRequest,
    LearnerGroup,
    PreparedBatch,
    PushReport,
    UpdateReport,
)
from trainers.time_ledger import Count, Entry

DEADLINE_S = 20.0
VERSION = WeightVersion(0, 3)
WORKERS = (VLLMGenerator, DeepSpeedLearner, CriticLearner, ReferenceModel, RewardModel, RewardWorker)
# Methods of a worker that its own rank calls, never the controller.
INNER = {"chosen", "everyone", "gradients", "laid_out", "learning_rate", "per_token", "score_everything",
         "score_groups", "shares", "tensor"}  # fmt: skip


@pytest.mark.parametrize("kind", WORKERS, ids=lambda kind: kind.__name__)
def test_every_method_of_a_worker_is_accounted_for_or_said_not_to_be(kind: type) -> None:
    methods = {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    assert methods - CAUSES.keys() - UNCOUNTED - INNER == set(), "give it a cause in actors/watched_workers.py"


# --- fakes: workers that take a step of the clock for each thing they do ----------------------------


class Clock:
    """Each look is a microsecond later, so nothing happens at once."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


class Worker:
    """Generator, scorer, learner rank or critic rank, according to who asks."""

    def __init__(self, meeting: asyncio.Barrier | None = None) -> None:
        self.meeting = meeting

    async def generate(self, request: GroupRequest) -> tuple[GroupSummary, None]:
        await asyncio.sleep(0)
        if request.group_id == "lost":
            raise RuntimeError("engine died")
        name, n = request.prompt.prompt_id, request.num_samples
        return GroupSummary(request.group_id, name, 2, (3,) * n, ("stop",) * n, VERSION, VERSION, "g", 0.0), None

    async def score(self, payload: list[Any], deadline_s: float) -> GroupRewards:
        await asyncio.sleep(0)
        return GroupRewards("0", np.arange(2.0), {"r": np.arange(2.0)})

    async def values(self, payloads: list[Any], deadline_s: float) -> tuple[Any, ...]:
        return {}, *payloads

    async def prepare(self, groups: Any, scores: Any, kl_coef: float) -> tuple[PreparedBatch, str]:
        return PreparedBatch(None, {}, {}, 0.0, 4), "targets"

    async def update(self, groups: Sequence[LearnerGroup], step: int, *more: Any) -> Any:
        if self.meeting is not None:
            await self.meeting.wait()
        return UpdateReport({}, {}, 0.0, 1) if len(more) > 1 else CriticReport({}, 0.0)

    async def load_weights(self, info: Any, manifest: dict[str, Any]) -> dict[str, float]:
        return {"pause_s": 1e-6}


def workers(
    accountant: Accountant, name: str, num: int = 1, meeting: asyncio.Barrier | None = None
) -> WatchedWorkers:
    slots = [WorkerSlot(name, i, 0, 0.0, 1.0, 1, ()) for i in range(num)]
    group = WatchedWorkers.launch(
        name, Worker, [{"meeting": meeting}] * num, placement=None, slots=slots, concurrency=8, start_deadline_s=5.0
    )
    group.watch(accountant.ledger)
    return group


def events(folder: Path) -> list[dict[str, Any]]:
    """As it is read after a kill: the bracket is the reader's."""
    text = (folder / "trace.json").read_text()
    found: list[dict[str, Any]] = json.loads(text if text.rstrip().endswith("]") else text + "]")
    return found


def tracks(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in found:
        if event["ph"] == "X":
            rows[names[event["pid"], event["tid"]]].append(event)
    return rows


class Generators:
    """Both in turns."""

    def __init__(self, group: WatchedWorkers) -> None:
        self.group, self.num = group, 0

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.num += 1
        index = (self.num - 1) % len(self.group)
        return GeneratedGroup(*await self.group.call_split(index, "generate", request, deadline_s=DEADLINE_S))


class Scorers:
    """The one there is."""

    def __init__(self, group: WatchedWorkers) -> None:
        self.group = group

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        rewards: GroupRewards = await self.group.call(0, "score", [group.payload], 1.0, deadline_s=DEADLINE_S)
        return rewards


class Parts(World):
    """The world of tests/test_loop.py with watched workers behind its generator, scorer, learner and critic."""

    def __init__(self, folder: Path, *, overlap: bool) -> None:
        super().__init__()
        meeting = asyncio.Barrier(2) if overlap else None
        self.accountant = Accountant(folder, Setting(), Clock())
        self.generators = workers(self.accountant, "generator", 2)
        self.scorers = workers(self.accountant, "reward_workers")
        self.learners = workers(self.accountant, "learner", 1, meeting)
        self.critics = workers(self.accountant, "critic", 1, meeting)
        algorithm = AlgorithmSettings.model_validate({"name": "ppo"})
        ledger = self.accountant.ledger
        critic = WatchedCritic(self.critics, DEADLINE_S, 1000, ledger)
        self.ppo = PPOLap(
            LearnerGang(self.learners, DEADLINE_S), critic, algorithm, PPOState.initial(algorithm), overlap
        )
        self.generator = Generators(self.generators)
        self.scorer = WatchedScorer(Scorers(self.scorers), ledger)

    async def push(self, version: WeightVersion) -> PushReport:
        await self.generators.call_all("load_weights", {}, {"version": str(version)}, deadline_s=DEADLINE_S)
        return await super().push(version)

    async def between(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        return self.accountant.settle()

    async def train(self, num_steps: int = 2) -> None:
        for group in (self.generators, self.scorers, self.learners, self.critics):
            await group.ready()
        parts = LoopParts(
            prompts=self, generator=self.generator, scorer=self.scorer, reference=None, learner=self, publisher=self,
            recorder=self, between_steps=self.between, on_update=lambda step, batch, report: None, ppo=self.ppo,
        )  # fmt: skip
        loop = TrainingLoop(LoopSettings(num_steps, 2, 2, 0, 1.0, 8, 0), parts, 0, WeightVersion(0, 0))
        await asyncio.wait_for(loop.run(), DEADLINE_S)
        self.accountant.close()


def run(folder: Path, *, overlap: bool) -> Parts:
    async def scenario() -> Parts:
        parts = Parts(folder, overlap=overlap)
        await parts.train()
        return parts

    return asyncio.run(scenario())


def test_a_run_leaves_a_track_for_every_worker_and_an_account_that_sums_to_the_wall_time(tmp_path: Path) -> None:
    parts = run(tmp_path, overlap=False)
    rows = tracks(events(tmp_path))
    assert sorted(rows) == ["critic-0", "generator-0", "generator-1", "learner-0", "reward_workers-0"]
    assert all(rows.values())
    report = json.loads((tmp_path / NAME).read_text())
    ledger = parts.accountant.ledger
    assert sorted(report["workers"]) == sorted(rows)
    for worker in report["workers"].values():
        assert sum(worker["causes_ns"].values()) == worker["wall_ns"]
        assert 0 < ledger.settled - ledger.begun - worker["wall_ns"] < 10_000, "it joined within ten looks at the clock"
    for name, cause in (("critic-0", "values"), ("generator-1", "generate"), ("reward_workers-0", "score")):
        assert any(e["name"] == cause for e in rows[name])
    assert {e["name"] for e in rows["generator-0"]} >= {"start", "generate", "pause", "wait: learner"}
    for row in rows.values():
        ends = [e["ts"] + e["dur"] for e in row]
        assert all(end <= e["ts"] + 1e-6 for end, e in zip(ends, row[1:], strict=False)), "slices of a track overlap"


def test_slices_say_what_they_were_about_and_counters_how_many_groups_and_which_version(tmp_path: Path) -> None:
    run(tmp_path, overlap=False)
    found = events(tmp_path)
    rows = tracks(found)
    generate = [e for e in rows["generator-0"] if e["name"] == "generate"]
    assert generate[0]["args"]["version"] == "0.3" and generate[0]["args"]["group"] == "0"
    assert [e["args"]["step"] for e in rows["critic-0"] if "step" in e["args"]] == [0, 1]
    counters = [e["args"] for e in found if e["ph"] == "C"]
    assert {"sampling": 2} in counters and {"sampling": 0} in counters and {"score": 1} in counters
    assert [c["step"] for c in counters if "step" in c] == [1, 1, 2, 2]


def learning(rows: dict[str, list[dict[str, Any]]], who: str) -> list[tuple[float, float]]:
    return [(e["ts"], e["ts"] + e["dur"]) for e in rows[who] if e["name"] == "learn" and "step" in e["args"]]


@pytest.mark.parametrize("overlap", [True, False])
def test_updates_of_policy_and_critic_overlap_in_the_trace_where_they_overlapped(overlap: bool, tmp_path: Path) -> None:
    run(tmp_path, overlap=overlap)
    rows = tracks(events(tmp_path))
    policy, critic = learning(rows, "learner-0"), learning(rows, "critic-0")
    assert len(policy) == len(critic) == 2
    for (a, b), (c, d) in zip(policy, critic, strict=True):
        assert (max(a, c) < min(b, d)) == overlap
    waits = [e["name"] for e in rows["learner-0"]]
    assert ("wait: critic" in waits) or overlap


def test_what_is_sampled_and_scored_for_an_evaluation_is_no_stage_of_a_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        parts = Parts(tmp_path, overlap=False)
        await parts.generators.ready()
        await parts.scorers.ready()
        request = _request("eval-0-0")
        with evaluating():
            async with asyncio.TaskGroup() as tasks:
                made = tasks.create_task(parts.generator.generate(request))
            await parts.scorer.score(made.result())
        assert parts.accountant.ledger._stages == []
        await parts.scorer.score(made.result())  # of a step again
        assert len(parts.accountant.ledger._stages) == 1
        parts.accountant.close()
        totals = parts.accountant.ledger.totals
        assert (Cause.EVALUATE, "") in totals["generator-0"] and (Cause.GENERATE, "") not in totals["generator-0"]
        assert (Cause.EVALUATE, "") in totals["reward_workers-0"] and (Cause.SCORE, "") in totals["reward_workers-0"]

    asyncio.run(scenario())


def test_an_attempt_that_failed_is_found_again_in_the_next_one_and_its_error_arrives(tmp_path: Path) -> None:
    async def scenario() -> None:
        parts = Parts(tmp_path, overlap=False)
        with pytest.raises(RuntimeError, match="engine died"):
            await parts.generator.generate(_request("lost"))
        assert set(parts.accountant.ledger._lost) == {"lost"}
        assert parts.accountant.ledger._in_flight["sampling"] == 0

    asyncio.run(scenario())


def _request(group: str) -> GroupRequest:
    return GroupRequest(group, Prompt("p", np.array([1, 2], np.int32), "prompt"), 2, (1, 2), 1.0, 8)


def test_a_call_of_a_worker_that_left_is_made_and_not_accounted_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        parts = Parts(tmp_path, overlap=False)
        parts.accountant.ledger.leave("generator-0")
        assert (await parts.generator.generate(_request("0"))).summary.group_id == "0"
        assert not parts.accountant.ledger.is_present("generator-0")

    asyncio.run(scenario())


def test_a_worker_that_is_added_ended_or_started_again_is_accounted_for_while_it_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        accountant = Accountant(tmp_path, Setting(0, False), Clock())
        ledger, group = accountant.ledger, workers(accountant, "generator")
        await group.ready()
        index = group.add({}, group.slot(0))
        await group.ready_at(index)
        group.end(0)
        assert [ledger.is_present(f"generator-{i}") for i in (0, 1)] == [False, True]
        accountant.settle(final=True)
        before = ledger.totals["generator-1"][Cause.START, ""]
        await group.restart(index, group.slot(index))
        assert ledger.is_present("generator-1")
        await group.call(index, "load_weights", {}, {"version": "0.1"}, deadline_s=5.0)
        accountant.settle(final=True)
        found = ledger.totals["generator-1"]
        assert 0 < before < found[Cause.START, ""] and found[Cause.PAUSE, ""] > 0

    asyncio.run(scenario())


def test_an_unwatched_group_works_as_before() -> None:
    async def scenario() -> None:
        group = WatchedWorkers.launch(
            "generator", Worker, [{}], placement=None, slots=[WorkerSlot("generator", 0, 0, 0.0, 1.0, 1, ())],
            start_deadline_s=5.0,
        )  # fmt: skip
        await group.ready()
        assert await group.call(0, "load_weights", {}, {}, deadline_s=5.0) == {"pause_s": 1e-6}

    asyncio.run(scenario())


# --- the files --------------------------------------------------------------------------------------


def entry(start: int, end: int, **keys: Any) -> Entry:
    return Entry("generator-0", Cause.GENERATE, "", start, end, keys)


def test_after_every_write_the_file_is_json_but_for_its_bracket(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path, begun=1000)
    assert len(json.loads((tmp_path / "trace.json").read_text() + "]")) == 1
    for i in range(3):
        trace.write([entry(1000 * i + 1000, 1000 * i + 1500, group=str(i))], [], {"generator-0": "generator"})
        found = events(tmp_path)
        assert len([e for e in found if e["ph"] == "X"]) == i + 1
    assert (found[-1]["ts"], found[-1]["dur"], found[-1]["args"]) == (2.0, 0.5, {"group": "2"})
    trace.close()
    assert len(json.loads((tmp_path / "trace.json").read_text())) == len(found)


def test_the_size_of_the_trace_is_bounded_and_the_newest_part_knows_the_tracks(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path, begun=0, limit_bytes=2000)
    for i in range(100):
        trace.write([entry(i, i + 1)], [Count(i, "version", "step", i)], {"generator-0": "generator"})
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3 * 2000
    assert sorted(file.name for file in tmp_path.iterdir()) == [EARLIER, "trace.json"]
    rows = tracks(events(tmp_path))
    assert rows["generator-0"][-1]["ts"] == 99 / 1e3
    earlier = json.loads((tmp_path / EARLIER).read_text())
    assert [e["args"]["step"] for e in earlier if e["ph"] == "C"][-1] + 1 == next(
        e["args"]["step"] for e in events(tmp_path) if e["ph"] == "C"
    )


def test_a_resumed_run_keeps_the_trace_of_the_start_before_it(tmp_path: Path) -> None:
    first = TraceFile(tmp_path, begun=0)
    first.write([entry(0, 7)], [], {"generator-0": "generator"})  # and killed
    TraceFile(tmp_path, begun=0).close()
    assert len(json.loads((tmp_path / EARLIER).read_text() + "]")) == 4
    assert len(events(tmp_path)) == 1


def test_a_full_disk_costs_events_and_leaves_what_is_there_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    trace = TraceFile(tmp_path, begun=0)
    trace.write([entry(0, 7)], [], {"generator-0": "generator"})
    before, write = len(events(tmp_path)), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))  # the last bytes of the disk
    trace.write([entry(8, 9)], [], {"generator-0": "generator"})
    monkeypatch.setattr(os, "write", write)
    assert len(events(tmp_path)) == before
    trace.write([entry(10, 11)], [], {"generator-0": "generator"})
    assert len(events(tmp_path)) == before + 1


def test_the_table_shows_every_role_its_largest_losses_and_what_would_help(tmp_path: Path) -> None:
    assert bubble_table(tmp_path) is None
    run(tmp_path, overlap=False)
    table = bubble_table(tmp_path)
    assert table is not None
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    report = json.loads((tmp_path / NAME).read_text())
    for row in report["roles"]:
        assert 0 <= row["useful_fraction"] <= 1
        assert row["useful_fraction"] + sum(loss["fraction"] for loss in row["losses"]) == pytest.approx(1.0)
        line = next(line for line in captured.get().splitlines() if line.startswith(f"│ {row['role']} "))
        assert row["help"] in line and row["losses"][0]["cause"] in line
    narrow = Console(width=80)
    with narrow.capture() as captured:
        narrow.print(table)
    cells = "".join(line.split("│")[6].replace(" ", "") for line in captured.get().splitlines() if line.startswith("│"))
    assert all(row["help"].replace(" ", "") in cells for row in report["roles"]), "names of settings are cut"
