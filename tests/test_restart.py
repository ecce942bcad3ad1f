"""A learner or critic rank dies: which failures restart it and its like, how often, and what the run goes back to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checkpoints import CheckpointStore
from cluster.errors import DeadlineError, WorkerDiedError, WorkerError
from launch import restart
from launch.journal import read_rows
from launch.overrides import load_config
from launch.restart import Loss, Restarts, dead_ranks, find_loss, lost_rank, train_on
from launch.resuming import earlier_attempts
from launch.telemetry import Telemetry
from trainers.errors import InputError, VerificationError
from trainers.experience import WeightVersion

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
