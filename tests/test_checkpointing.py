"""Laws of saving beside training, with ranks that write when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.state_saving import SaveBegun, SaveOutcome
from cluster.checkpoints import CheckpointStore
from cluster.errors import DeadlineError
from launch import checkpointing
from launch.checkpointing import Checkpointer
from launch.overrides import load_config
from trainers.errors import InputError

WAIT_S = 30.0
FULL = "[Errno 28] No space left on device"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - bounded by the story's deadline
        await asyncio.sleep(0)


class Ranks:
    """Two ranks of one role; a save of theirs ends when ``end`` was called for that rank."""

    def __init__(self, role: str) -> None:
        self.role, self.workers = role, ("rank 0", "rank 1")
        self.directory, self.answers = Path(), dict[int, SaveOutcome | BaseException]()
        self.writing = [False, False]

    async def begin_save(self, directory: str) -> list[SaveBegun]:
        assert not any(self.writing), "a rank was asked to save while it was writing"
        self.directory, self.answers, self.writing = Path(directory), {}, [True, True]
        return [SaveBegun(0.25, 100), SaveBegun(0.25, 200)]

    async def save_outcome(self, rank: int) -> SaveOutcome | None:
        assert self.writing[rank], "an outcome was asked for twice"
        answer = self.answers.get(rank)
        if isinstance(answer, BaseException):
            raise answer
        self.writing[rank] = answer is None
        return answer

    def end(self, *ranks: int, error: str | None = None) -> None:
        for rank in ranks:
            if error is None:
                self.directory.mkdir(exist_ok=True)
                (self.directory / f"rank-{rank}").write_text(f"{self.role} {rank}")
            self.answers[rank] = SaveOutcome({}, 0.1, error)


class Events:
    """A recorder."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, step: int, metrics: Any) -> None: ...

    def event(self, kind: str, **fields: Any) -> None:
        self.rows.append({"kind": kind, **fields})

    def phase(self, name: str, done: int, total: int) -> None: ...

    @property
    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.rows]


class Bench:
    """A store, two roles, a checkpointer."""

    def __init__(self, folder: Path, wait_s: float = WAIT_S, **store: Any) -> None:
        self.events, self.learner, self.critic = Events(), Ranks("learner"), Ranks("critic")
        self.store = CheckpointStore(folder, keep=9, **store)
        roles = {"learner": self.learner, "critic": self.critic}
        self.saver = Checkpointer(self.store, roles, self.events, wait_s)

    def end_all(self) -> None:
        self.learner.end(0, 1)
        self.critic.end(0, 1)

    async def only(self, writers: str) -> None:
        """Return when the checkpointer knows that these alone still write."""
        await until(lambda: self.saver._flight is not None and self.saver._flight.writers == writers)

    def intact(self) -> int | None:
        """Step of the newest checkpoint, its bytes verified."""
        found = CheckpointStore(self.store.directory).latest()
        return None if found is None else found.step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(checkpointing, "POLL_S", 0.001)

    def run(story: Callable[[Bench], Awaitable[Any]], **kwargs: Any) -> Bench:
        async def whole() -> Bench:
            bench = Bench(tmp_path, **kwargs)
            await asyncio.wait_for(story(bench), WAIT_S)
            return bench

        return asyncio.run(whole())

    return run


def test_training_goes_on_while_the_ranks_write_and_the_last_one_commits(run: Any) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.saver.save(7, {"a": 1}, files={"ledger/x": b"frontier"}, score=0.5)
        assert bench.intact() is None and bench.saver.saved_step == -1
        assert list(bench.saver.metrics()) == ["time/checkpoint_stop_s"]
        bench.learner.end(0, 1)
        bench.critic.end(1)
        await bench.only("critic[0]")
        assert bench.intact() is None, "a rank has not ended"
        bench.critic.end(0)
        await bench.saver.settle()
        assert bench.intact() == bench.saver.saved_step == 7
        metrics = bench.saver.metrics()
        assert metrics.pop("time/checkpoint_s") > 0 and metrics == {"checkpoint/num_bytes": 600.0}
        assert bench.saver.metrics() == {}

    bench = run(story)
    found = bench.store.load(7)
    assert found.metadata == {"a": 1} and found.score == 0.5
    assert (found.path / "ledger" / "x").read_bytes() == b"frontier"
    assert (found.path / "critic" / "rank-1").read_text() == "critic 1"
    (event,) = bench.events.rows
    assert (event["kind"], event["step"], event["num_bytes"]) == ("checkpoint", 7, 600)


def test_what_changes_after_the_save_began_is_not_in_it(run: Any) -> None:
    async def story(bench: Bench) -> None:
        frontier = {"position": 1, "drawn": [3]}
        await bench.saver.save(1, frontier)
        frontier["position"] = 2
        frontier["drawn"].append(4)  # type: ignore[attr-defined]
        bench.end_all()
        await bench.saver.settle()

    assert run(story).store.load(1).metadata == {"position": 1, "drawn": [3]}


def test_a_second_save_waits_for_the_first_and_says_for_whom(run: Any) -> None:
    async def story(bench: Bench) -> None:
        await bench.saver.save(1, {})
        bench.learner.end(0, 1)
        bench.critic.end(0)
        await bench.only("critic[1]")
        second = asyncio.create_task(bench.saver.save(2, {}))
        await until(lambda: "checkpoint_waits" in bench.events.kinds)
        assert not second.done()
        bench.critic.end(1)
        assert await second
        bench.end_all()
        await bench.saver.settle()

    bench = run(story)
    assert bench.events.kinds == ["checkpoint_waits", "checkpoint", "checkpoint"]
    assert bench.events.rows[0] | {"step": 2, "behind": 1, "on": "critic[1]"} == bench.events.rows[0]
    assert bench.store.steps() == [1, 2]


def test_after_the_deadline_the_second_save_is_left_out_and_the_first_may_still_end(run: Any) -> None:
    async def story(bench: Bench) -> None:
        await bench.saver.save(1, {})
        bench.critic.end(0, 1)
        bench.learner.end(1)
        await bench.only("learner[0]")
        assert not await bench.saver.save(2, {})
        failed = bench.events.rows[-1]
        assert failed["kind"] == "checkpoint_failed" and failed["step"] == 2 and failed["intact"] == "none"
        assert failed["reason"] == "learner[0] did not end writing that of step 1 within 0.05 s"
        await bench.saver.settle()
        assert bench.events.rows[-1]["step"] == 1 and "learner[0] did not end" in bench.events.rows[-1]["reason"]
        bench.learner.end(0)
        await until(lambda: bench.saver.saved_step == 1)
        await bench.saver.save(3, {})
        bench.end_all()
        await until(lambda: bench.saver.saved_step == 3)

    assert run(story, wait_s=0.05).store.steps() == [1, 3]


def test_a_full_disk_costs_the_checkpoint_once_every_rank_has_ended_and_the_next_save_succeeds(run: Any) -> None:
    async def story(bench: Bench) -> None:
        await bench.saver.save(1, {})
        bench.end_all()
        await bench.saver.settle()
        await bench.saver.save(2, {})
        bench.learner.end(0, error=FULL)
        await until(lambda: not bench.learner.writing[0])
        assert bench.learner.directory.parent.is_dir(), "removed under the hands of those that still write"
        bench.learner.end(1)
        bench.critic.end(0, 1)
        await bench.saver.settle()
        assert bench.intact() == bench.saver.saved_step == 1
        assert not list(bench.store.directory.glob(".*")), "what was half written takes space"
        await bench.saver.save(3, {})
        bench.end_all()
        await bench.saver.settle()
        assert bench.intact() == 3

    failed = run(story).events.rows[1]
    assert (failed["kind"], failed["step"], failed["intact"]) == ("checkpoint_failed", 2, "step 1")
    assert failed["reason"] == f"learner[0]: {FULL}"


@pytest.mark.parametrize("when", ["begin", "commit"])
def test_a_disk_that_is_full_for_the_driver_costs_the_checkpoint_too(
    run: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async def story(bench: Bench) -> None:
        def full(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(bench.store, when, full)
            assert await bench.saver.save(1, {}) == (when == "commit")
            bench.end_all() if when == "commit" else None
            await bench.saver.settle()
        assert not list(bench.store.directory.glob(".*"))
        await bench.saver.save(2, {})
        bench.end_all()
        await bench.saver.settle()

    bench = run(story)
    assert bench.events.kinds == ["checkpoint_failed", "checkpoint"] and FULL in bench.events.rows[0]["reason"]


def test_a_rank_that_does_not_answer_is_not_taken_for_a_full_disk(run: Any) -> None:
    async def story(bench: Bench) -> None:
        await bench.saver.save(1, {})
        bench.learner.answers[0] = DeadlineError("save_outcome", "learner[0]", 1.0)
        with pytest.raises(DeadlineError, match=r"learner\[0\]"):
            await bench.saver.settle()
        await bench.saver.close()

    assert run(story).events.kinds == []


def test_what_is_in_flight_when_the_run_goes_back_does_not_become_the_newest(run: Any) -> None:
    async def story(bench: Bench) -> None:
        await bench.saver.save(1, {})
        bench.end_all()
        await bench.saver.settle()
        await bench.saver.save(2, {})
        bench.saver.abandon()
        bench.end_all()
        await bench.saver.settle()

    bench = run(story)
    assert bench.store.steps() == [1] and bench.events.kinds == ["checkpoint"]
    assert not list(bench.store.directory.glob(".*"))


def test_what_a_killed_run_left_is_removed_at_the_next_start_and_cannot_be_written_to(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.store.begin(1)
    first.store.commit(1, {})
    left = first.store.begin(2)
    (left / "half").write_text("x")
    second = Bench(tmp_path)
    assert second.events.rows == [{"kind": "checkpoint_leftovers", "removed": [left.name]}]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert second.store.begin(2) != left, "a rank that outlived the run would write into it"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.keep_best=1"], "needs best_metric"),
        (["checkpoint.best_metric=eval/rewrad"], "eval/rewrad.*metrics"),
        (["checkpoint.keep_best=1", "checkpoint.best_metric=eval/reward", "evaluation.every=4", "checkpoint.every=6"],
         "multiple"),
        (["checkpoint.grace_s=0"], "grace_s"),
    ],
)  # fmt: skip
def test_a_retention_that_could_not_work_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config("cpu-demo", overrides)


