"""A learner or critic rank dies: both start again from the newest checkpoint, and the generators stay."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_async_run
import test_publisher
from test_async_run import LONG
from test_end_to_end import RUN_S, Run, Start, check_lineage, start, trajectories
from test_faults import event, worker
from test_ppo import PPO

from actors.generator_fleet import GeneratorFleet
from actors.roster import Member
from actors.vllm_engine import SampleRequest
from actors.vllm_in_process import InProcessEngine
from cluster.checkpoints import CheckpointStore
from cluster.errors import DeadlineError, WorkerDiedError, WorkerError
from cluster.settings import HealthSettings
from launch import restart
from launch.journal import read_rows
from launch.overrides import load_config
from launch.restart import Loss, Restarts, dead_ranks, find_loss, lost_rank, train_on
from launch.resuming import earlier_attempts
from launch.spool import UNTRAINED, read_spool
from launch.telemetry import Telemetry
from trainers.errors import InputError, VerificationError
from trainers.experience import WeightVersion

__all__ = ["start"]  # the fixture

LIMIT_S = 30.0  # for a whole law; the waits in it are for events
RANKS = {"learner": 2, "critic": 1}


def bounded(law: Callable[[], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with asyncio.timeout(LIMIT_S):
            return await law()

    return asyncio.run(whole())


# --- which failures restart, and how often -------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),  # the peers of a dead rank raise before its death is known
        WorkerDiedError("critic[0] died in or before values"),
        DeadlineError("update", "learner[0]", 1800.0),
        WorkerError("a payload is lost"),
    ],
)
def test_a_rank_that_has_ended_is_behind_whatever_the_loop_failed_with(error: Exception) -> None:
    assert lost_rank(error, {("critic", 0): "killed"}, RANKS) == Loss("critic", 0, "killed")


@pytest.mark.parametrize("source", ["learner[1]", "critic[0]"])
def test_a_rank_that_does_not_answer_its_own_call_is_lost(source: str) -> None:
    error = DeadlineError("update", source, 1800.0)
    assert str(lost_rank(error, {}, RANKS)) == source


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"), ArithmeticError("loss is NaN"), WorkerError("reward_workers[0] died"),
        WorkerDiedError("reference[0] died in or before logprobs"),
        DeadlineError("score", "reward_models.0[0]", 900.0), DeadlineError("update", "learner[2]", 1.0),
        DeadlineError("bucket 1", "group weights-to-generator-0, rank 0 of 2", 300.0),
    ],
)  # fmt: skip
def test_what_would_come_again_restarts_nobody(error: Exception) -> None:
    assert lost_rank(error, {}, RANKS) is None


def test_restarts_are_limited_only_while_they_bring_the_run_no_further() -> None:
    restarts = Restarts(max_attempts=2)
    assert restarts.lost(7) and restarts.lost(5), "it came back and was lost before it was where it had been"
    assert not restarts.lost(7), "the third time in a row"
    assert restarts.lost(8), "further than ever"
    assert restarts.lost(8) and not restarts.lost(8)
    assert Restarts(1).lost(0), "before the first step"


def test_recovery_is_counted_from_the_loss_and_failed_starts_belong_to_it() -> None:
    now = [100.0]
    restarts = Restarts(3, clock=lambda: now[0])
    restarts.lost(4)
    now[0] = 130.0
    restarts.lost(4)  # the start failed
    now[0] = 145.0
    assert restarts.back() == 45.0
    now[0] = 200.0
    restarts.lost(9)
    now[0] = 201.0
    assert restarts.back() == 1.0


class Ranks:
    """Stands for the worker group of one role."""

    in_process = False

    def __init__(self, states: Sequence[str]) -> None:
        self.states = dict(enumerate(states))  # "alive", "dead", "silent" or, when asked for it, "bad start"

    def __len__(self) -> int:
        return len(self.states)

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(self.states)

    def end(self, index: int) -> None:
        del self.states[index]

    async def ready(self) -> None:
        if "bad start" in self.states.values():
            raise WorkerError("rank 0 cannot listen on 127.0.0.1:1: the port was taken meanwhile")

    async def ping(self, index: int, deadline_s: float) -> None:
        if self.states[index] == "dead":
            raise WorkerDiedError(f"rank {index} died")
        if self.states[index] == "silent":
            await asyncio.sleep(deadline_s)
            raise DeadlineError("ping", f"learner[{index}]", deadline_s)


@pytest.mark.parametrize(
    ("learner", "critic", "deadline_s", "dead"),
    [
        (["silent", "dead"], ["silent"], 10 * LIMIT_S, {("learner", 1)}),  # the others wait in a collective for it
        (["alive", "silent"], ["dead"], 10 * LIMIT_S, {("critic", 0)}),
        (["alive", "alive"], ["alive"], 10 * LIMIT_S, set()),
        (["alive", "silent"], ["alive"], 0.01, set()),  # a peer raised and left it in a collective
    ],
)
def test_ranks_are_asked_until_one_is_known_dead(
    learner: list[str], critic: list[str], deadline_s: float, dead: set[tuple[str, int]]
) -> None:
    groups: Any = {"learner": Ranks(learner), "critic": Ranks(critic)}
    assert bounded(lambda: dead_ranks(groups, deadline_s)).keys() == dead


def test_a_rank_that_missed_its_deadline_is_lost_without_a_minute_of_asking_and_a_death_that_is_known_comes_first(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "NAMED_DEADLINE_S", 0.01)
    late = DeadlineError("update", "learner[0]", 45.0)
    frozen: Any = {"learner": Ranks(["silent", "silent"]), "critic": Ranks(["alive"])}
    found = bounded(lambda: find_loss(late, frozen))
    assert found == Loss("learner", 0, str(late))
    killed: Any = {"learner": Ranks(["silent", "dead"]), "critic": Ranks(["alive"])}
    assert bounded(lambda: find_loss(late, killed)) == Loss("learner", 1, "rank 1 died")


# --- coming back, with fakes ----------------------------------------------------------------------

PEER = RuntimeError("Connection closed by peer")  # a lap that ends with it has lost the learner's rank 0


class FakeRun:
    """A run whose loop does what it is told: each of ``laps`` is (steps that it reaches, what it ends with)."""

    def __init__(
        self, folder: Path, laps: Sequence[tuple[int, BaseException | None]], saved: Sequence[int] = ()
    ) -> None:
        self.config = load_config("cpu-two-by-two", ["health.max_attempts=2"]).config
        self.folder, self.laps, self.log = folder, list(laps), list[str]()
        self.version, self.first_step, self.saver = WeightVersion(0, 0), 0, None
        self.loop = SimpleNamespace(step=0, stopping=False)
        self.kinds: list[tuple[str, dict[str, Any]]] = []
        self.telemetry = SimpleNamespace(event=self.event, go_back=self.go_back)
        self.fleet = SimpleNamespace(
            trained={"learner": Ranks(["alive", "alive"])}, take_ranks=self.take_ranks,
            publisher=SimpleNamespace(disconnect=lambda: self.log.append("disconnect")),
            generator=SimpleNamespace(abort=self.abort), ranks=SimpleNamespace(relaunch=self.relaunch),
        )  # fmt: skip
        self.starts: list[str] = []  # states of the rank of each further start; "alive" after them
        self.started = asyncio.Event()
        self.hold: asyncio.Event | None = None
        store = CheckpointStore(folder / "checkpoints", keep=9)
        for step in saved:
            store.begin(step)
            store.commit(step, {})

    async def train(self) -> None:
        step, error = self.laps.pop(0)
        self.log.append(f"train from {self.first_step} as {self.version}")
        self.loop.step = step
        if error is PEER:
            self.fleet.trained = {"learner": Ranks(["dead", "silent"])}
        if error is not None:
            raise error

    def go_on_from(self, checkpoint: Any, incarnation: int) -> None:
        self.first_step = 0 if checkpoint is None else checkpoint.step
        self.version = WeightVersion(incarnation + 1, self.first_step)

    def go_back(self, step: int | None) -> int:
        self.log.append(f"rows after {step}")
        return 3

    async def restore(self) -> None:
        self.log.append(f"push {self.version}")

    async def abort(self, deadline_s: float) -> None:
        self.log.append("abort")

    async def relaunch(self, groups: dict[str, Ranks]) -> dict[str, Ranks]:
        assert not len(groups["learner"]), "ranks that hold the lost state still run"
        self.started.set()
        if self.hold is not None:
            await self.hold.wait()
        return {"learner": Ranks([self.starts.pop(0) if self.starts else "alive"])}

    def take_ranks(self, groups: dict[str, Any]) -> None:
        self.fleet.trained = groups
        self.log.append("new ranks")

    def event(self, kind: str, **fields: Any) -> None:
        self.kinds.append((kind, fields))


def test_a_lost_rank_sends_the_run_back_to_its_newest_checkpoint_and_the_generators_get_its_weights(
    tmp_path: Path,
) -> None:
    run = FakeRun(tmp_path, [(7, PEER), (12, None)], saved=[3, 6])
    now = iter([10.0, 32.5])
    bounded(lambda: train_on(run, lambda: next(now)))  # type: ignore[arg-type]
    assert [e for e in run.log if e != "abort"] == [
        "train from 0 as 0.0", "disconnect", "rows after 6", "new ranks", "push 1.6", "train from 6 as 1.6",
    ]  # fmt: skip
    assert run.log.index("abort") < run.log.index("push 1.6"), "what runs under lost weights would meet others"
    (died, lost), (kind, back) = run.kinds
    assert (died, lost["role"], lost["rank"]) == ("rank_died", "learner", 0)
    assert (kind, back["role"], back["rank"], back["step"]) == ("learner_restarted", "learner", 0, 6)
    assert (back["reached"], back["version"], back["recover_s"], back["num_superseded"]) == (7, "1.6", 22.5, 3)


def test_without_a_checkpoint_it_begins_again_with_another_incarnation(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(2, PEER), (4, PEER), (12, None)])
    bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert [e for e in run.log if e.startswith(("train", "rows"))] == [
        "train from 0 as 0.0", "rows after None", "train from 0 as 1.0", "rows after None", "train from 0 as 2.0",
    ]  # fmt: skip


def test_an_error_of_the_update_itself_ends_the_run_as_it_was_raised(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, ArithmeticError("loss is NaN"))], saved=[6])
    with pytest.raises(ArithmeticError, match="loss is NaN"):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert run.kinds == [] and len(run.log) == 1


def test_what_burnish_raises_on_purpose_ends_the_run_whoever_is_lost(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, VerificationError("generator-0 missed a push"))], saved=[6])
    run.fleet.trained = {"learner": Ranks(["dead"])}
    with pytest.raises(VerificationError):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert run.kinds == []


def test_a_run_that_is_being_stopped_starts_nobody_again(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, PEER)], saved=[6])
    run.loop.stopping = True
    with pytest.raises(RuntimeError, match="Connection closed"):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert run.kinds == []


def test_ranks_that_are_lost_without_progress_end_the_run_with_the_reason(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, PEER), (7, PEER), (6, PEER)], saved=[6])
    with pytest.raises(WorkerError, match=r"learner\[0\] was lost again, 2 restarts after step 7 .*: rank 0 died"):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert [kind for kind, _ in run.kinds] == ["rank_died", "learner_restarted"] * 2 + ["rank_died"]


def test_a_start_that_fails_is_tried_again_and_counts(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, PEER), (12, None)], saved=[6])
    run.starts = ["bad start"]
    bounded(lambda: train_on(run))  # type: ignore[arg-type]
    assert [kind for kind, _ in run.kinds] == ["rank_died", "start_failed", "learner_restarted"]
    assert run.kinds[1][1]["reason"].startswith("WorkerError: rank 0 cannot listen")
    assert run.log[-1] == "train from 6 as 2.6", "what a failed start may have pushed is another incarnation"

    run = FakeRun(tmp_path, [(7, PEER)])
    run.starts = ["bad start"] * 2
    with pytest.raises(WorkerError, match="2 restarts after step 7"):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, [(7, PEER)], saved=[3, 6])
    (tmp_path / "checkpoints" / "step-000006" / "MANIFEST.json").write_text("{}")
    with pytest.raises(InputError, match="step 3 is intact"):
        bounded(lambda: train_on(run))  # type: ignore[arg-type]


def test_sigterm_while_ranks_start_ends_the_run_at_once_at_its_checkpoint(tmp_path: Path) -> None:
    async def law() -> FakeRun:
        run = FakeRun(tmp_path, [(7, PEER)], saved=[6])
        run.hold = asyncio.Event()
        training = asyncio.create_task(train_on(run))  # type: ignore[arg-type]
        await run.started.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await training
        return run

    run = bounded(law)
    assert [kind for kind, _ in run.kinds] == ["rank_died", "stopping", "stopped"]
    assert run.kinds[-1][1]["step"] == 6 and len(run.laps) == 0


def test_an_incarnation_of_a_restart_is_not_used_again_by_a_resume(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, load_config("cpu-two-by-two", ["telemetry.wandb=disabled"]).config.telemetry)
    t.event("ready", version="0.0")
    t.event("learner_restarted", version="1.6")
    t.close()
    assert earlier_attempts(tmp_path)[0] == 1


def test_rows_after_the_checkpoint_are_set_aside_and_recorded_again(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, load_config("cpu-two-by-two", ["telemetry.wandb=disabled"]).config.telemetry)
    for step in range(6):
        t.step(step, {"reward": float(step)})
    assert t.go_back(3) == 2
    t.event("learner_restarted")
    t.step(4, {"reward": 40.0})
    assert t.value(4, "reward") == 40.0
    assert t.go_back(None) == 5
    t.step(0, {"reward": 7.0})
    t.close()
    assert [r["reward"] for r in read_rows(tmp_path / "metrics.jsonl")] == [7.0]
    superseded = [r["reward"] for r in read_rows(tmp_path / "metrics.superseded.jsonl")]
    assert superseded == [4.0, 5.0, 0.0, 1.0, 2.0, 3.0, 40.0]
    last = list(read_rows(tmp_path / "events.jsonl"))[-1]
    assert last["step"] == 3, "the last recorded step is the checkpoint's"


# --- generators that stay ---------------------------------------------------------------------------


@pytest.mark.parametrize("transport", test_publisher.TRANSPORTS)
def test_another_learner_meets_every_generator_anew_and_who_joins_waits_for_its_push(
    transport: test_publisher.Transport, tmp_path: Path
) -> None:
    async def law() -> None:
        world = test_publisher.World(transport, 2, tmp_path)
        await world.publisher.push(WeightVersion(0, 7))
        met = len(world.asked("init_transfer"))
        (tmp_path / ".weights-0.8.safetensors.partial").touch()
        world.publisher.disconnect()
        joiner = Member(2, "generator-2")
        joining = asyncio.create_task(world.publisher.catch_up(joiner))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not joining.done() and 2 not in world.serves
        world.publisher.learner = test_publisher.Side("learner", 1, world)  # type: ignore[assignment]
        await world.publisher.push(WeightVersion(1, 6))
        assert world.serves == {0: "1.6", 1: "1.6"} and world.expelled == []
        assert len(world.asked("init_transfer")) == 2 * met
        assert await joining == "1.6" and world.serves[2] == "1.6"
        assert not list(tmp_path.glob(".weights-*")), "what a dead rank had half written"

    bounded(law)


class Generators:
    """A worker group of generators that can be told to give up."""

    name, in_process, start_deadline_s = "generator", False, 1.0

    def __init__(self, faults: dict[int, BaseException]) -> None:
        self.faults, self.told = faults, list[int]()

    @property
    def indices(self) -> tuple[int, ...]:
        return (0, 1, 2)

    def __len__(self) -> int:
        return 3

    def end(self, index: int) -> None: ...

    async def call(self, index: int, method: str, *, deadline_s: float) -> None:
        assert method == "abort"
        if index in self.faults:
            raise self.faults[index]
        self.told.append(index)


def test_every_generator_gives_up_what_it_samples_and_one_that_cannot_be_told_is_expelled() -> None:
    async def law() -> None:
        group = Generators({1: WorkerDiedError("generator[1] died"), 2: DeadlineError("abort", "generator[2]", 1.0)})
        fleet = GeneratorFleet(group, LIMIT_S, HealthSettings())  # type: ignore[arg-type]
        await fleet.abort(LIMIT_S)
        assert group.told == [0] and [member.index for member in fleet.roster.members] == [0]

    bounded(law)


class FakeLLM:
    """As much of vLLM's engine as samples that never end need; its next step still has what was aborted."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.added, self.stepped = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.fails = False

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.requests.append(request_id)
        self.loop.call_soon_threadsafe(self.added.set)

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.requests = [r for r in self.requests if r not in request_ids]

    def step(self) -> list[Any]:
        time.sleep(0.001)  # a step takes time, and the thread that makes it may not spin
        self.num_steps += 1
        self.loop.call_soon_threadsafe(self.stepped.set)
        return [SimpleNamespace(finished=True, request_id=name) for name in self.aborted]

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> None:
        if self.fails and method == "update_weights":
            raise DeadlineError("bucket 1, version 0.8", "group weights-to-generator-0, rank 1 of 2", 5.0)


class Sampling:
    """An engine that is stepped by its thread, around a fake."""

    def __init__(self) -> None:
        self.llm = FakeLLM()
        self.engine = engine = object.__new__(InProcessEngine)
        engine._engine, engine._commands, engine._wake = self.llm, deque(), threading.Condition()  # type: ignore[assignment]
        engine._waiting, engine._closed, engine._failure, engine.version = {}, False, None, "0.0"
        engine._is_whole = True
        engine._thread = threading.Thread(target=engine._run, daemon=True)
        engine._thread.start()

    async def ask(self, name: str) -> asyncio.Task[Any]:
        request = SampleRequest(name, [1], 1.0, 4, 0, (), "")
        self.llm.added.clear()
        task = asyncio.create_task(self.engine.sample(request))
        await self.llm.added.wait()
        return task

    async def step(self) -> None:
        self.llm.stepped.clear()
        await self.llm.stepped.wait()


@pytest.fixture
def plain_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.vllm_in_process.engine_prompt", lambda request: None)
    monkeypatch.setattr("actors.vllm_in_process.sampling_params", lambda request: None)


@pytest.mark.usefixtures("plain_requests")
def test_an_engine_that_gives_up_tells_whoever_waits_and_goes_on() -> None:
    async def law() -> None:
        sampling = Sampling()
        first = [await sampling.ask("a/0/0"), await sampling.ask("a/1/0")]
        await sampling.engine.abort()
        for waiting in first:
            with pytest.raises(RuntimeError, match="given up"):
                await waiting
        assert sampling.llm.aborted == ["a/0/0", "a/1/0"]
        later = await sampling.ask("b/0/1")
        await sampling.step()
        await sampling.engine.check()
        assert not later.done(), "what is asked for afterwards is not given up"
        later.cancel()
        sampling.engine.close()

    bounded(law)


@pytest.mark.usefixtures("plain_requests")
def test_an_engine_with_half_a_version_samples_nothing_until_it_has_a_whole_one() -> None:
    async def law() -> None:
        sampling = Sampling()
        waiting = await sampling.ask("a/0/0")
        await sampling.step()
        sampling.llm.fails = True
        with pytest.raises(DeadlineError, match="bucket 1"):
            await sampling.engine.update_weights({}, "0.8")
        stood_at = sampling.llm.num_steps
        await sampling.engine.rpc("burnish_fingerprints")  # it answers
        assert sampling.llm.num_steps == stood_at and sampling.engine.version == "0.0"
        sampling.llm.fails = False
        await sampling.engine.update_weights({}, "1.6")
        await sampling.step()
        assert sampling.engine.version == "1.6" and not waiting.done()
        waiting.cancel()
        sampling.engine.close()

    bounded(law)


# --- whole runs: a rank is killed -------------------------------------------------------------------

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
