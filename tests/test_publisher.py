"""Laws of membership in pushes, with fakes on both sides: who is expelled, who completes, who catches up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.publisher import Publisher, Transport
from actors.roster import Member, Roster
from actors.start_probe import probe
from cluster.errors import DamagedError, DeadlineError, WorkerDiedError
from trainers.errors import VerificationError
from trainers.experience import WeightVersion

LIMIT_S = 20.0
TRANSPORTS: tuple[Transport, ...] = ("file", "group", "ipc")


class Side:
    """A worker group of one side: answers by method, fails where it was told to, and notes down who was asked."""

    def __init__(self, name: str, num_workers: int, world: World) -> None:
        self.name, self.num_workers, self.world = name, num_workers, world
        self.faults: dict[tuple[int, str], BaseException] = {}
        self.stalls: dict[tuple[int, str], asyncio.Event] = {}

    def __len__(self) -> int:
        return self.num_workers

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        what = args[0] if method == "weights_call" else method
        self.world.log.append((self.name, index, what, args))
        if (index, what) in self.stalls:
            await self.stalls[index, what].wait()
        if (index, what) in self.faults:
            raise self.faults[index, what]
        return self.world.answer(index, what, args)

    async def call_all(
        self, method: str, *args: Any, deadline_s: float, per_worker: list[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        first = per_worker or [()] * len(self)
        return [await self.call(i, method, *first[i], *args, deadline_s=deadline_s) for i in range(len(self))]


class World:
    """A learner of ``num_ranks``, generators, and what each generator has in memory."""

    def __init__(self, transport: Transport, num_generators: int, directory: Path, num_ranks: int = 1) -> None:
        self.log: list[tuple[str, int, str, tuple[Any, ...]]] = []
        self.serves: dict[int, str] = {}
        self.staged = ""
        self.learner, self.generators = Side("learner", num_ranks, self), Side("generator", num_generators, self)
        self.roster = Roster()
        self.expelled: list[str] = []
        self.roster.on_expel = lambda member: self.expelled.append(f"{member.name}: {member.reason}")
        self.members = [Member(i, f"generator-{i}") for i in range(num_generators)]
        for member in self.members:
            self.roster.admit(member)
        self.publisher = Publisher(
            self.learner, self.generators, self.roster, transport, directory, "float32", 1024, 1, LIMIT_S,  # type: ignore[arg-type]
        )  # fmt: skip

    def answer(self, index: int, what: str, args: tuple[Any, ...]) -> Any:
        if what in ("publish_file", "write_staged"):
            Path(args[1]).touch()
            return self.manifest(args[2] if what == "publish_file" else self.staged)
        if what == "stage_weights":
            self.staged = args[1]
            return self.manifest(args[1])
        if what == "load_weights":
            info, manifest = args
            if info["transport"] == "file" and not Path(info["path"]).exists():
                raise FileNotFoundError(info["path"])
            self.serves[index] = manifest["version"]
            return {"pause_s": 0.1, "num_after_load": 3, "num_at_arrival": 4}
        return ("127.0.0.1", 1) if what == "meeting_point" else []

    def manifest(self, version: str) -> dict[str, Any]:
        return {"version": version, "tensors": [], "fingerprints": {}}

    def asked(self, what: str) -> list[int]:
        return [index for _, index, w, _ in self.log if w == what]

    async def until(self, true: Callable[[], Any]) -> None:
        while not true():  # noqa: ASYNC110 - every fake step is a turn of the event loop
            await asyncio.sleep(0)


def v(step: int) -> WeightVersion:
    return WeightVersion(0, step)


def run(law: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await law()

    asyncio.run(bounded())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_generator_that_fails_is_expelled_by_name_and_the_others_have_the_version(
    transport: Transport, tmp_path: Path
) -> None:
    async def law() -> None:
        world = World(transport, 3, tmp_path)
        world.generators.faults[1, "load_weights"] = DamagedError("q_proj has another fingerprint")
        report = await world.publisher.push(v(4))
        assert world.serves == {0: "0.4", 2: "0.4"} and report.num_verified == 3
        assert world.expelled == ["generator-1: push of version 0.4: DamagedError: q_proj has another fingerprint"]
        await world.publisher.push(v(5))
        assert world.serves == {0: "0.5", 2: "0.5"} and len(world.expelled) == 1

    run(law)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_generator_that_is_expelled_in_a_push_holds_it_up_no_longer(transport: Transport, tmp_path: Path) -> None:
    async def law() -> None:
        world = World(transport, 2, tmp_path)
        world.generators.stalls[0, "load_weights"] = asyncio.Event()
        pushing = asyncio.create_task(world.publisher.push(v(1)))
        await world.until(lambda: 0 in world.asked("load_weights"))
        world.roster.expel(world.members[0], "no answer for 30 s")
        await pushing
        assert world.serves == {1: "0.1"} and world.expelled == ["generator-0: no answer for 30 s"]

    run(law)


def test_a_receiver_that_does_not_come_is_the_culprit_and_a_dead_learner_is_not_its_fault(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("group", 2, tmp_path)
        world.learner.faults[0, "send"] = DeadlineError("bucket 1", "group weights-to-generator-0, rank 0 of 2", 5.0)
        await world.publisher.push(v(1))
        assert len(world.expelled) == 2 and "waited 5 s for bucket 1 from group weights-to" in world.expelled[0]

        world = World("group", 2, tmp_path)
        world.learner.faults[0, "send"] = WorkerDiedError("learner[0] died in or before weights_call")
        with pytest.raises(WorkerDiedError, match=r"learner\[0\] died"):
            await world.publisher.push(v(1))
        assert world.expelled == [] and len(world.roster) == 2

    run(law)


def test_losing_and_adding_an_engine_rebuilds_no_other_group(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("group", 2, tmp_path, num_ranks=2)
        await world.publisher.push(v(1))
        assert world.asked("init_transfer") == [0, 1]
        world.roster.expel(world.members[1], "killed")
        joiner = Member(3, "generator-3")
        assert await world.publisher.catch_up(joiner) == "0.1"
        assert world.serves[3] == "0.1" and world.asked("init_transfer") == [0, 1], "it caught up by file"
        await world.publisher.push(v(2))
        assert world.asked("init_transfer") == [0, 1, 3]
        closed = [(rank, args[1]) for _, rank, what, args in world.log if what == "close_group"]
        assert closed == [(1, "weights-to-generator-1")]
        opened = [(rank, args[1]) for _, rank, what, args in world.log if what == "open_group"]
        assert opened[2:] == [(1, "weights-to-generator-3")]
        assert world.serves == {0: "0.2", 1: "0.1", 3: "0.2"}
        assert not list(tmp_path.iterdir())

    run(law)


@pytest.mark.parametrize("num_missed", [0, 1])  # pushes that begin and end while it loads, before the one that is on
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_joiner_is_admitted_only_at_the_version_that_the_others_serve(
    transport: Transport, num_missed: int, tmp_path: Path
) -> None:
    async def law() -> None:
        world = World(transport, 1, tmp_path)
        joiner = Member(5, "generator-5")
        joining = asyncio.create_task(world.publisher.catch_up(joiner))
        await world.publisher.push(v(1))
        world.generators.stalls[5, "load_weights"] = loading = asyncio.Event()
        await world.until(lambda: 5 in world.asked("load_weights"))
        if num_missed:
            await world.publisher.push(v(2))
        world.generators.stalls[0, "load_weights"] = pushing = asyncio.Event()
        third = asyncio.create_task(world.publisher.push(v(3)))
        await world.until(lambda: world.asked("load_weights")[-1] == 0)
        loading.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not joining.done() and joiner not in world.roster.members, "admitted in the middle of a push"
        pushing.set()
        await third
        assert await joining == "0.3"
        assert world.serves == {0: "0.3", 5: "0.3"} and joiner in world.roster.members
        await world.publisher.push(v(4))
        assert world.serves == {0: "0.4", 5: "0.4"}

    run(law)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pushes_that_follow_each_other_faster_than_a_joiner_loads_let_it_in(
    transport: Transport, tmp_path: Path
) -> None:
    async def law() -> None:
        world = World(transport, 1, tmp_path)
        await world.publisher.push(v(1))
        world.generators.stalls[5, "load_weights"] = first = asyncio.Event()
        joining = asyncio.create_task(world.publisher.catch_up(Member(5, "generator-5")))
        await world.until(lambda: 5 in world.asked("load_weights"))
        await world.publisher.push(v(2))  # the first one is not held up
        world.generators.stalls[5, "load_weights"] = second = asyncio.Event()
        first.set()
        await world.until(lambda: world.asked("load_weights").count(5) == 2)
        num_asked = len(world.asked("write_staged"))
        third = asyncio.create_task(world.publisher.push(v(3)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert world.asked("load_weights").count(0) == 2 and not third.done(), "it would be too late again"
        second.set()
        assert await joining == "0.2"
        await third
        assert world.serves == {0: "0.3", 5: "0.3"}
        # Rank 0 wrote while it pushed: asked later it would have answered after its next update.
        assert len(world.asked("write_staged")) == num_asked
        await world.publisher.push(v(4))
        assert len(list(tmp_path.iterdir())) == (transport == "file"), "files for joiners go with the next push"

    run(law)


def test_a_joiner_outlasts_an_update_that_is_longer_than_the_deadline_of_a_push(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("group", 1, tmp_path)
        await world.publisher.push(v(1))
        answer, errors = world.answer, [DeadlineError("weights_call", "learner[0]", 300.0)]

        def busy_once(index: int, what: str, args: tuple[Any, ...]) -> Any:
            if what == "write_staged" and errors:
                raise errors.pop()
            return answer(index, what, args)

        world.answer = busy_once  # type: ignore[method-assign]
        assert await world.publisher.catch_up(Member(5, "generator-5")) == "0.1"

    run(law)


def test_a_staggered_push_pauses_one_generator_at_a_time_and_a_failure_stops_nobody(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("file", 3, tmp_path)
        world.publisher.staggered = True
        world.generators.stalls[0, "load_weights"] = loading = asyncio.Event()
        world.generators.faults[1, "load_weights"] = DamagedError("q_proj")
        pushing = asyncio.create_task(world.publisher.push(v(1)))
        await world.until(lambda: 0 in world.asked("load_weights"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.asked("load_weights") == [0]
        loading.set()
        await pushing
        assert world.asked("load_weights") == [0, 1, 2] and world.serves == {0: "0.1", 2: "0.1"}

    run(law)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_joiner_that_cannot_load_is_not_admitted(transport: Transport, tmp_path: Path) -> None:
    async def law() -> None:
        world = World(transport, 1, tmp_path)
        await world.publisher.push(v(1))
        world.generators.faults[5, "load_weights"] = DamagedError("q_proj")
        with pytest.raises(DamagedError):
            await world.publisher.catch_up(Member(5, "generator-5"))
        assert len(world.roster) == 1

    run(law)


def test_the_first_samples_of_an_engine_have_the_time_of_a_start_and_not_that_of_a_push(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("file", 2, tmp_path)
        given: dict[str, set[float]] = {"probe": set(), "score": set()}

        async def answered(index: int, method: str, *args: Any, deadline_s: float) -> Any:
            given[method].add(deadline_s)
            return ([1, 2], np.array([-1.0, -2.0])) if method == "probe" else [np.array([-1.0, -2.5])]

        world.generators.call = world.learner.call = answered  # type: ignore[method-assign]
        found = await probe(world.publisher, [np.array([1], np.int32)], 2, 0, 0.3, 40 * LIMIT_S)
        assert found["mean_difference"] == 0.25
        assert given == {"probe": {40 * LIMIT_S}, "score": {40 * LIMIT_S}}

    run(law)


def test_a_push_without_members_is_complete_and_who_comes_next_catches_up_with_it(tmp_path: Path) -> None:
    async def law() -> None:
        world = World("file", 1, tmp_path)
        world.generators.faults[0, "load_weights"] = WorkerDiedError("generator[0] died in or before load_weights")
        report = await world.publisher.push(v(1))
        assert report.num_verified == 0 and report.pause_s == 0 and len(world.roster) == 0
        with pytest.raises(VerificationError, match=r"generator-0: push of version 0.1: WorkerDiedError: gen"):
            await probe(world.publisher, [], 4, 0, 0.1, 1.0)
        await world.publisher.push(v(2))
        assert await world.publisher.catch_up(Member(1, "generator-1")) == "0.2"

    run(law)
