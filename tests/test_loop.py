"""The loop, with fakes where timing and faults are the subject."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.protocols import GeneratedGroup, GroupRequest, LearnerGroup, PushReport, UpdateReport

DEADLINE_S = 20.0


class World:
    """Every part in one fake, writing down what happens."""

    def __init__(self, delays: Sequence[int] = (), fail: str = "") -> None:
        self.log: list[str] = []
        self.batches: list[list[str]] = []
        self.requests: list[GroupRequest] = []
        self.version = WeightVersion(0, 0)
        self.delays, self.fail = delays, fail
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.position = 0
        self.hold: asyncio.Event | None = None
        self.asked = asyncio.Event()

    def take(self, n: int) -> list[tuple[int, Prompt]]:
        first, self.position = self.position, self.position + n
        return [
            (p, Prompt(f"p{p % 4}", np.array([1, 2], np.int32), f"prompt {p % 4}")) for p in range(first, first + n)
        ]

    def occurrence(self, position: int) -> int:
        return position // 4

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.requests.append(request)
        self.asked.set()
        self.log.append(f"generate {request.group_id} under {self.version.step}")
        if self.fail == "generate":
            raise RuntimeError("engine died")
        if self.hold is not None:
            await self.hold.wait()
        for _ in range(self.delays[int(request.group_id) % len(self.delays)] if self.delays else 0):
            await asyncio.sleep(0)
        n = request.num_samples
        summary = GroupSummary(
            request.group_id, request.prompt.prompt_id, 2, (3,) * n, ("stop",) * n, self.version, self.version, "g", 0.0
        )
        return GeneratedGroup(summary, None)

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        totals = np.arange(group.summary.num_samples, dtype=np.float64)
        return GroupRewards(group.summary.group_id, totals, {"r": totals})

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        self.log.append(f"update {step}")
        self.batches.append([g.summary.group_id for g in groups])
        if self.fail == "update":
            raise ArithmeticError("loss is NaN")
        return UpdateReport({"loss": 0.0}, {}, 0.0, 1)

    async def save(self, directory: str) -> None: ...

    async def push(self, version: WeightVersion) -> PushReport:
        self.log.append(f"push {version.step}")
        self.version = version
        return PushReport(version, 1, 0.0, 0.0, 1)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, metrics))

    def event(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...

    async def between(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        self.log.append(f"between {step}{' last' if last else ''}")
        return {}

    def loop(self, num_steps: int = 3, first_step: int = 0) -> TrainingLoop:
        parts = LoopParts(
            prompts=self, generator=self, scorer=self, reference=None, learner=self, publisher=self, recorder=self,
            between_steps=self.between, on_update=lambda step, batch, report: None,
        )  # fmt: skip
        self.position = first_step * 2
        settings = LoopSettings(num_steps, 2, 2, 0, 1.0, 8, 0)
        return TrainingLoop(settings, parts, first_step, WeightVersion(0, first_step))


def run(loop: TrainingLoop) -> None:
    asyncio.run(asyncio.wait_for(loop.run(), DEADLINE_S))


def test_a_lap_is_generate_update_push_and_the_next_one_samples_new_weights() -> None:
    world = World()
    run(world.loop(2))
    assert world.log == [
        "between 0", "generate 0 under 0", "generate 1 under 0", "update 0", "push 1", "between 1",
        "generate 2 under 1", "generate 3 under 1", "update 1", "push 2", "between 2 last",
    ]  # fmt: skip


@pytest.mark.parametrize("delays", [(0, 9), (9, 0), (3, 1, 7, 2)])
def test_the_batch_does_not_depend_on_who_finished_first(delays: tuple[int, ...]) -> None:
    world = World(delays)
    run(world.loop(3))
    assert world.batches == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_two_prompts_never_share_a_stream_and_a_repeated_one_draws_anew() -> None:
    world = World()
    run(world.loop(4))
    seeds = [s for r in world.requests for s in r.seeds]
    assert len(set(seeds)) == len(seeds)


def test_the_same_position_issued_again_has_the_same_seeds() -> None:
    first, second = World(), World()
    run(first.loop(2))
    run(second.loop(2, first_step=1))
    again = {r.group_id: r.seeds for r in second.requests}
    assert {r.group_id: r.seeds for r in first.requests if r.group_id in again} == again


@pytest.mark.parametrize(("fail", "error"), [("generate", RuntimeError), ("update", ArithmeticError)])
def test_the_first_failure_ends_the_run_with_its_own_error(fail: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(World(fail=fail).loop())


def test_a_stop_while_sampling_returns_at_once_and_trains_nothing_more() -> None:
    world = World()
    loop = world.loop()

    async def scenario() -> None:
        world.hold = asyncio.Event()  # never set: the group would sample for ever
        task = asyncio.create_task(loop.run())
        await asyncio.wait_for(world.asked.wait(), DEADLINE_S)
        loop.stop()
        await asyncio.wait_for(task, DEADLINE_S)

    asyncio.run(scenario())
    assert loop.step == 0
    assert world.batches == []


def test_every_step_is_recorded_once_with_its_metrics() -> None:
    world = World()
    run(world.loop(3))
    assert [step for step, _ in world.rows] == [1, 2, 3]
    metrics = world.rows[-1][1]
    assert metrics["reward"] == 0.5
    assert metrics["staleness/max"] == 0.0
    assert metrics["num_tokens"] == 3 * 2 * 2 * (2 + 3)
