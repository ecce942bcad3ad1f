"""Generators stay while ranks start again: they meet the new learner, give up what they sample, and begin anew."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_publisher
from test_restart import LIMIT_S, bounded

from actors.generator_fleet import GeneratorFleet
from actors.roster import Member
from actors.vllm_engine import SampleRequest
from actors.vllm_in_process import InProcessEngine
from cluster.errors import DeadlineError, WorkerDiedError
from cluster.settings import HealthSettings
from trainers.experience import WeightVersion


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
