"""The greedy completion that ReMax compares with: asked for once a group, scored, never trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_loop import DEADLINE_S, World, run
from test_spool import group as finished_group

from actors.experience_batch import ExperienceBatch
from launch.spool import UNTRAINED, encode_spool, read_spool
from trainers.algorithms import AlgorithmSettings
from trainers.errors import GroupFailedError
from trainers.experience import GroupRewards, RewardFailure
from trainers.greedy import greedy_request, together
from trainers.ledger import Ledger
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.metrics import check
from trainers.protocols import GeneratedGroup, GroupRequest, LearnerGroup, UpdateReport
from trainers.step_metrics import group_metrics

NAN = float("nan")
REMAX = AlgorithmSettings.model_validate({"name": "remax"})
NUM_TOKENS = 3  # of every completion of the world


class Greedy(World):
    """The world of the loop's tests; greedy completions have the rewards ``worth``, by position."""

    def __init__(self, worth: Mapping[int, float] | None = None, loses: Sequence[str] = ()) -> None:
        super().__init__()
        self.worth, self.loses = worth or {}, list(loses)
        self.scored: list[str] = []
        self.trained: list[LearnerGroup] = []

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        if request.group_id in self.loses:
            self.loses.remove(request.group_id)
            raise GroupFailedError(request.group_id, ("its generator died",))
        return await super().generate(request)

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        name = group.summary.group_id
        self.scored.append(name)
        if name.isdigit():
            return await super().score(group)
        reward = self.worth.get(int(name.partition("/")[0]), 0.5)
        failures = () if np.isfinite(reward) else ((0, RewardFailure("r", "timeout", "10 s")),)
        return GroupRewards(name, np.array([reward]), {"r": np.array([reward])}, failures)

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        self.trained += groups
        return await super().update(groups, step)

    def remax(self, num_steps: int, max_attempts: int = 2) -> TrainingLoop:
        plain = self.loop(num_steps)
        parts: LoopParts = plain.parts
        settings: LoopSettings = replace(plain.settings, greedy_baseline=True)
        return TrainingLoop(settings, parts, 0, plain.version, ledger=Ledger(max_attempts))


def test_every_prompt_is_answered_once_more_greedily_and_that_answer_is_scored_and_not_trained_on() -> None:
    world = Greedy({0: 0.25, 1: -1.0})
    run(world.remax(2))
    asked = [(r.group_id, r.greedy, r.num_samples) for r in world.requests]
    assert sorted(asked) == [
        entry for i in range(4) for entry in ((str(i), False, 2), (f"{i}/greedy", True, 1))
    ]  # fmt: skip
    assert sorted(world.scored) == sorted(name for name, _, _ in asked)
    assert world.batches == [["0", "1"], ["2", "3"]]
    assert [g.greedy_reward for g in world.trained] == [0.25, -1.0, 0.5, 0.5]
    assert all(g.summary.num_samples == 2 for g in world.trained)


def test_its_tokens_count_as_sampled_and_not_as_trained() -> None:
    plain, world = Greedy(), Greedy()
    run(plain.loop(1))
    run(world.remax(1))
    (_, without), (_, metrics) = plain.rows[0], world.rows[0]
    assert metrics["num_tokens"] == without["num_tokens"]
    assert metrics["groups/num_generated"] == metrics["groups/num_trained"] == 2
    assert metrics["baseline/greedy_reward"] == 0.5 and "baseline/greedy_reward" not in without
    check("baseline/greedy_reward")


def test_the_samples_are_those_of_a_run_without_a_greedy_completion() -> None:
    plain, world = Greedy(), Greedy()
    run(plain.loop(3))
    run(world.remax(3))
    seeds = {r.group_id: r.seeds for r in world.requests if not r.greedy}
    assert seeds == {r.group_id: r.seeds for r in plain.requests}


def test_without_a_reward_of_the_greedy_completion_its_group_is_masked_and_the_failure_counted() -> None:
    world = Greedy({1: NAN})
    run(world.remax(1))
    whole, masked = world.trained
    assert whole.rewards.valid.all() and not masked.rewards.valid.any()
    ((index, failure),) = masked.rewards.failures
    assert (index, failure.kind) == (0, "timeout") and failure.detail == "of the greedy completion: 10 s"
    np.testing.assert_array_equal(masked.rewards.parts["r"], [0.0, 1.0])
    metrics = world.rows[0][1]
    assert metrics["failures/num_samples_masked"] == 2 and metrics["failures/num_reward"] == 1
    assert metrics["reward"] == 0.5 and metrics["baseline/greedy_reward"] == 0.5
    rows = ExperienceBatch(world.trained, REMAX, 8).token_advantages()
    assert [bool(np.isfinite(row).all()) for row in rows] == [True, True, False, False]


def test_an_aborted_greedy_completion_is_no_baseline() -> None:
    world = Greedy()
    generate = world.generate

    async def aborting(request: GroupRequest) -> GeneratedGroup:
        found = await generate(request)
        reasons = ("abort",) * found.summary.num_samples
        return replace(found, summary=replace(found.summary, finish_reasons=reasons)) if request.greedy else found

    world.generate = aborting  # type: ignore[method-assign]
    run(world.remax(1))
    assert not any(g.rewards.valid.any() for g in world.trained)


@pytest.mark.parametrize("lost", ["1", "1/greedy"])
def test_when_either_is_lost_both_are_sampled_again_with_the_same_seeds(lost: str) -> None:
    world = Greedy(loses=[lost])
    run(world.remax(2))
    assert world.batches == [["0", "1"], ["2", "3"]], "every prompt once, in its order"
    again = [r for r in world.requests if r.group_id in ("1", "1/greedy")]
    assert len({(r.group_id, r.seeds) for r in again}) == 2
    assert {r.group_id for r in again[-2:]} == {"1", "1/greedy"}


def test_a_greedy_request_keeps_prompt_and_length_and_a_name_of_its_own() -> None:
    request = GroupRequest("7", World().at(0), 3, (11, 12, 13), 0.7, 64)
    found = greedy_request(request)
    assert (found.group_id, found.num_samples, found.seeds, found.greedy) == ("7/greedy", 1, (11,), True)
    assert (found.prompt, found.max_tokens) == (request.prompt, 64)


def test_of_two_that_belong_together_none_is_left_running() -> None:
    ended: list[str] = []

    async def endless(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise GroupFailedError("1", ("gone",))

    async def scenario() -> None:
        with pytest.raises(GroupFailedError):
            await together(endless("neighbour"), fails())
        task = asyncio.ensure_future(together(endless("first"), endless("second")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))
    assert sorted(ended) == ["first", "neighbour", "second"]


# --- in batches and checkpoints ---------------------------------------------------------------------


def test_a_group_that_came_without_it_is_refused_by_the_update() -> None:
    with pytest.raises(ValueError, match="group 7 came without the reward of its greedy completion"):
        ExperienceBatch([finished_group(7, False)], REMAX, 8).token_advantages()


def test_a_group_whose_samples_are_as_good_as_the_greedy_answer_has_no_gradient() -> None:
    world = Greedy({0: 0.0, 1: 1.0})
    run(world.remax(1))
    rows = ExperienceBatch(world.trained, REMAX, 8).token_advantages()
    assert [float(row[0]) for row in rows] == [0.0, 1.0, -1.0, 0.0]
    assert all(row.shape == (NUM_TOKENS,) and row.dtype == np.float32 for row in rows)


@pytest.mark.parametrize("reward", [None, 0.1 + 0.2, NAN])
def test_it_comes_back_from_a_checkpoint_bit_by_bit(tmp_path: Path, reward: float | None) -> None:
    spooled = replace(finished_group(7, False), greedy_reward=reward)
    (tmp_path / UNTRAINED).write_bytes(encode_spool([spooled], 10.0))
    (again,) = read_spool(tmp_path / UNTRAINED)
    if reward is None:
        assert again.greedy_reward is None
    else:
        np.testing.assert_array_equal(again.greedy_reward, reward)


def test_a_checkpoint_from_before_there_was_a_greedy_baseline_is_read(tmp_path: Path) -> None:
    content = encode_spool([finished_group(7, False)], 10.0)
    table = pa.ipc.open_file(content).read_all().drop_columns(["greedy_reward"])
    with pa.OSFile(str(tmp_path / UNTRAINED), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (again,) = read_spool(tmp_path / UNTRAINED)
    assert again.greedy_reward is None and again.summary.group_id == "7"


def test_the_metric_is_the_mean_over_prompts_that_have_one() -> None:
    groups = [replace(finished_group(i, False), greedy_reward=worth) for i, worth in enumerate((1.0, NAN, 0.0))]
    version = groups[0].summary.oldest_version
    assert group_metrics(groups, version)["baseline/greedy_reward"] == 0.5
