"""Fleets whose workers die, freeze, start and leave as they are told: what becomes of their work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fleet_fakes import LIMIT_S, SOON_S, FakeGroup, World, request, run, summary

from actors.membership import Recruiting
from actors.roster import Member
from actors.scorer_pools import ReferencePool, RewardPool
from cluster.errors import WorkerDiedError, WorkerError
from cluster.settings import HealthSettings
from trainers.errors import GroupFailedError, NoGeneratorError
from trainers.experience import GroupRewards
from trainers.protocols import GeneratedGroup, GroupRequest


def test_the_groups_of_a_dead_generator_are_sampled_elsewhere_with_the_same_seeds() -> None:
    async def law() -> None:
        world = World(2)
        world.gate.clear()
        asked = [world.ask(i) for i in range(4)]
        await world.until(lambda: len(world.sampled) == 4)
        of = {r.group_id: worker for worker, r in world.sampled}
        assert sorted(of.values()) == [0, 0, 1, 1]
        world.group.kill(1)
        await world.until(lambda: len(world.sampled) == 6)
        world.gate.set()
        groups = await asyncio.gather(*asked)
        assert [g.summary.group_id for g in groups] == ["0", "1", "2", "3"]
        assert {g.summary.generator for g in groups} == {"generator-0"}
        again = [r for worker, r in world.sampled[4:]]
        assert {r.group_id for r in again} == {name for name, worker in of.items() if worker == 1}
        for r in again:
            (first,) = [f for worker, f in world.sampled[:4] if f.group_id == r.group_id]
            assert r.seeds == first.seeds and first is r
        (died,) = world.kinds("worker_died")
        assert died["worker"] == "generator-1" and "died in generate" in died["reason"] and died["num_generators"] == 1
        assert len(world.kinds("group_reissued")) == 2 and world.group.ended == [1]

    run(law)


def test_a_finished_group_leaves_no_load_behind() -> None:
    async def law() -> None:
        world = World(2)
        assert [(await world.ask(i)).summary.generator for i in range(4)] == ["generator-0"] * 4

    run(law)


def test_a_silent_generator_is_held_then_expelled_and_its_groups_move_on() -> None:
    async def law() -> None:
        world = World(2, detect_s=0.4)
        world.open()
        world.group.frozen.add(0)
        asked = [world.ask(i) for i in range(2)]
        await world.until(lambda: world.kinds("worker_suspect"))
        held = [world.ask(i) for i in (10, 11, 12)]
        groups = await asyncio.gather(*asked, *held)
        assert {g.summary.generator for g in groups[2:]} == {"generator-1"}
        assert world.kinds("worker_died")[0]["worker"] == "generator-0"
        assert world.kinds("worker_died")[0]["silent_s"] >= 0.4
        given = {args[0].group_id for index, what, args in world.group.calls if (index, what) == (0, "generate")}
        assert len(given) == 1 and not given & {"10", "11", "12"}, "a suspect got new work"
        await world.fleet.close()

    run(law)


def test_a_group_that_kills_every_generator_fails_with_all_reasons_and_only_then() -> None:
    async def law() -> None:
        world = World(3, max_attempts=2)
        world.gate.clear()
        asked = world.ask(7)
        for tries in (1, 2):
            await world.until(lambda tries=tries: len(world.sampled) == tries)
            world.group.kill(world.sampled[-1][0])
        with pytest.raises(GroupFailedError, match=r"group 7 was tried 2 times: generator-\d: .*; generator-\d: "):
            await asked
        assert len(world.sampled) == 2 and len(world.fleet.roster) == 1

    run(law)


def test_what_a_generator_refuses_is_raised_and_costs_no_generator() -> None:
    async def law() -> None:
        world = World(2)

        async def refuse(index: int, method: str, asked: GroupRequest) -> Any:
            raise ValueError("the prompt is longer than the model")

        world.group.doing = refuse
        with pytest.raises(ValueError, match="longer than the model"):
            await world.ask(1)
        assert len(world.fleet.roster) == 2 and not world.events

    run(law)


def test_without_recruiting_the_last_death_fails_waiting_groups_with_its_reason() -> None:
    async def law() -> None:
        world = World(1)
        world.gate.clear()
        asked = world.ask(1)
        await world.until(lambda: world.sampled)
        world.group.kill(0)
        with pytest.raises(NoGeneratorError, match=r"died in generate; no generator is left: the last one went"):
            await asked

    run(law)


def test_a_replacement_works_only_after_it_caught_up_and_a_waiting_group_goes_to_it() -> None:
    async def law() -> None:
        world = World(1)
        world.open()
        caught_up = asyncio.Event()
        admit = world.catch_up

        async def slowly(member: Member) -> str:
            await caught_up.wait()
            return await admit(member)

        world.fleet._recruiting = Recruiting(
            world.hire, slowly, world.quiet.wait, world.vacated.append, node_of=lambda index: f"node-{index}"
        )  # type: ignore[arg-type]
        world.gate.clear()
        asked = world.ask(1)
        await world.until(lambda: world.sampled)
        world.group.kill(0)
        await world.until(lambda: world.kinds("group_reissued") and len(world.group) == 1)
        world.gate.set()
        await asyncio.sleep(SOON_S)
        assert not asked.done() and len(world.sampled) == 1, "it got work before it had the weights"
        caught_up.set()
        assert (await asked).summary.generator == "generator-1"
        kinds = [kind for kind, _ in world.events]
        assert kinds == ["worker_died", "group_reissued", "generator_joined", "worker_replaced"]
        assert world.kinds("worker_replaced")[0] | {"recover_s": 0} == {
            "role": "generator", "worker": "generator-0", "by": "generator-1", "recover_s": 0,
        }  # fmt: skip
        assert world.vacated == [0] and world.kinds("generator_joined")[0]["version"] == "0.7"
        assert world.kinds("generator_joined")[0]["node"] == "node-1"
        await world.fleet.close()

    run(law)


@pytest.mark.parametrize("fault", ["start", "catch_up"])
def test_a_start_that_fails_is_tried_again_and_too_many_end_a_fleet_that_has_nobody(fault: str) -> None:
    async def law(num_faults: int) -> World:
        world = World(1, max_attempts=3)
        world.open()
        world.group.bad_starts = num_faults if fault == "start" else 0
        world.bad_catch_ups = num_faults if fault == "catch_up" else 0
        world.group.kill(0)
        asked = world.ask(1)
        await asyncio.wait((asked,))
        await world.fleet.close()
        assert len(world.vacated) == 1 + num_faults
        if num_faults < 3:
            assert (await asked).summary.generator == f"generator-{1 + num_faults}"
        else:
            with pytest.raises(NoGeneratorError, match="3 starts in a row failed, the last: (Memory|Damaged)Error"):
                await asked
        return world

    pauses = [e["again_in_s"] for e in run(lambda: law(2)).kinds("start_failed")]
    assert pauses == [SOON_S, 2 * SOON_S]
    run(lambda: law(3))


def test_scaling_up_adds_members_and_scaling_down_drains_the_youngest_without_losing_a_group() -> None:
    async def law() -> None:
        world = World(1)
        world.open()
        world.fleet.scale(3)
        await world.until(lambda: len(world.fleet.roster) == 3)
        world.gate.clear()
        asked = [world.ask(i) for i in range(6)]
        await world.until(lambda: len(world.sampled) == 6)
        assert sorted(worker for worker, _ in world.sampled) == [0, 0, 1, 1, 2, 2]
        world.fleet.scale(1)
        await world.until(lambda: len(world.kinds("generator_leaving")) == 2)
        more = [world.ask(i) for i in range(6, 9)]
        await world.until(lambda: len(world.sampled) == 9)
        assert {worker for worker, _ in world.sampled[6:]} == {0}, "a leaving one got new work"
        assert len(world.fleet.roster) == 3, "it stays in pushes while it samples"
        world.quiet.clear()
        world.gate.set()
        groups = await asyncio.gather(*asked, *more)
        assert [g.summary.group_id for g in groups] == [str(i) for i in range(9)] and len(world.sampled) == 9
        await asyncio.sleep(SOON_S)
        assert not world.kinds("generator_left"), "it went in the middle of a push"
        world.quiet.set()
        await world.until(lambda: len(world.kinds("generator_left")) == 2)
        assert sorted(world.vacated) == [1, 2] == sorted(world.group.ended) and len(world.fleet.roster) == 1
        assert not world.kinds("worker_died") and not world.kinds("group_reissued")
        await world.fleet.close()

    run(law)


def test_what_the_end_of_a_leaving_generator_raises_costs_the_others_nothing() -> None:
    async def law() -> None:
        world = World(2)
        world.open()

        async def clumsy(index: int) -> None:
            world.group.end(index)
            raise RuntimeError("the engine is gone already")

        world.group.retire = clumsy  # type: ignore[method-assign]
        world.fleet.scale(1)
        await world.until(lambda: world.kinds("generator_left"))
        assert world.kinds("generator_left")[0]["error"] == "RuntimeError: the engine is gone already"
        assert world.vacated == [1] and (await world.ask(1)).summary.generator == "generator-0"
        await world.fleet.close()

    run(law)


def test_one_that_dies_while_it_leaves_is_not_replaced() -> None:
    async def law() -> None:
        world = World(2)
        world.open()
        world.gate.clear()
        asked = [world.ask(i) for i in range(2)]
        await world.until(lambda: len(world.sampled) == 2)
        world.fleet.scale(1)
        await world.until(lambda: world.kinds("generator_leaving"))
        world.group.kill(1)
        world.gate.set()
        assert {g.summary.generator for g in await asyncio.gather(*asked)} == {"generator-0"}
        await asyncio.sleep(SOON_S)
        assert len(world.group) == 1 and world.group.next_index == 2
        world.fleet.scale(2)
        await world.until(lambda: world.kinds("generator_joined"))
        assert not world.kinds("worker_replaced"), "nobody was to stand for it"
        await world.fleet.close()

    run(law)


def test_a_start_that_waits_for_a_place_is_taken_back_and_who_works_stays() -> None:
    async def law() -> None:
        world = World(1)
        room = asyncio.Event()

        async def hire() -> int:
            await room.wait()
            return world.group.add()

        world.hire = hire  # type: ignore[method-assign]
        world.open()
        world.fleet.scale(3)
        world.fleet.scale(1)
        room.set()
        await world.until(lambda: len(world.kinds("generator_left")) == 2)
        await asyncio.sleep(SOON_S)
        assert world.group.indices == (0,) and len(world.fleet.roster) == 1 and world.group.next_index == 3
        await world.fleet.close()

    run(law)


@pytest.mark.parametrize("num_fewer", [0, 1, 2])
def test_a_node_that_leaves_takes_its_members_with_it_and_those_that_are_still_wanted_start_elsewhere(
    num_fewer: int,
) -> None:
    async def law() -> None:
        world = World(3)
        world.open()
        world.gate.clear()
        asked = [world.ask(i) for i in range(3)]
        await world.until(lambda: len(world.sampled) == 3)
        world.fleet.lose([1, 2], "its node left", num_fewer)
        assert world.fleet.num_wanted == 3 - num_fewer
        world.gate.set()
        assert len(await asyncio.gather(*asked)) == 3
        await world.until(lambda: len(world.fleet.roster) == 3 - num_fewer)
        await asyncio.sleep(SOON_S)
        assert world.group.next_index == 3 + 2 - num_fewer, "somebody was started for nothing"
        assert 0 in world.group.alive and not world.kinds("generator_leaving"), "a healthy one had to go"
        assert [e["reason"] for e in world.kinds("worker_died")] == ["its node left"] * 2
        await world.fleet.close()

    run(law)


def test_a_start_on_a_node_that_leaves_is_made_elsewhere_and_waits_for_no_deadline() -> None:
    async def law() -> None:
        world = World(1)
        world.open()
        hanging, ready = asyncio.Event(), world.group.ready_at

        async def hang(index: int) -> None:
            if index == 1:
                hanging.set()
                await asyncio.Event().wait()
            await ready(index)

        world.group.ready_at = hang  # type: ignore[method-assign]
        world.fleet.scale(2)
        await hanging.wait()
        world.fleet.lose([1], "its node left")
        await world.until(lambda: len(world.fleet.roster) == 2)
        assert world.group.indices == (0, 2) and not world.kinds("start_failed") and world.vacated == [1]
        await world.fleet.close()

    run(law)


def test_what_a_lost_node_brought_is_wanted_no_more_when_its_members_were_found_dead_before() -> None:
    async def law() -> None:
        world = World(2)
        world.open()
        world.group.kill(1)
        with pytest.raises(WorkerDiedError):
            await world.group.ping(1, LIMIT_S)
        world.fleet._beats.failed(1, "no answer")
        world.fleet.lose([], "its node left", 1)
        assert world.fleet.num_wanted == 1
        await asyncio.sleep(SOON_S)
        await world.until(lambda: len(world.group) == 1)
        assert world.group.indices == (0,), "the one that works stays"
        await world.fleet.close()

    run(law)


def test_scaling_down_takes_back_a_start_that_is_going_on() -> None:
    async def law() -> None:
        world = World(1)
        world.open()
        never = asyncio.Event()

        async def hang(index: int) -> None:
            await never.wait()

        world.group.ready_at = hang  # type: ignore[method-assign]
        world.fleet.scale(2)
        await world.until(lambda: True)
        await asyncio.sleep(SOON_S)
        assert len(world.group) == 2
        world.fleet.scale(1)
        await world.until(lambda: world.kinds("generator_left"))
        await asyncio.sleep(3 * SOON_S)
        assert world.group.ended == [1] and not world.kinds("start_failed")
        assert world.group.next_index == 2
        await world.fleet.close()

    run(law)


# --- scorers --------------------------------------------------------------------------------------


class Scores:
    """Scoring workers of one role, which answer when they may."""

    def __init__(self, num_workers: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.group = FakeGroup("reference", num_workers, self.score)
        self.gate = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)

    async def score(self, index: int, method: str, payloads: list[Any], deadline_s: float) -> Any:
        self.arrived.release()
        await self.gate.wait()
        if method == "logprobs":
            return "", *(f"log-probs of {p}" for p in payloads)
        return GroupRewards(payloads[0], np.zeros(2), {}, ())

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def pool(self, kind: str) -> Callable[[str], Any]:
        health = HealthSettings(max_attempts=2)
        if kind == "reward":
            return lambda name: RewardPool(self.group, LIMIT_S, health, self.event).score(_generated(name))  # type: ignore[arg-type]
        pool = ReferencePool(self.group, LIMIT_S, 1000, health, self.event)  # type: ignore[arg-type]
        return lambda name: pool.logprobs(_generated(name))


def _generated(name: str) -> GeneratedGroup:
    return GeneratedGroup(summary(request(int(name)), 0), name)


@pytest.mark.parametrize("kind", ["reward", "reference"])
def test_a_dead_scorer_is_started_again_and_its_work_is_done_again(kind: str) -> None:
    async def law() -> None:
        scores = Scores(1)
        asked = asyncio.create_task(scores.pool(kind)("5"))
        await scores.arrived.acquire()
        scores.group.kill(0)
        await scores.arrived.acquire()
        scores.gate.set()
        found = await asked
        assert (found.group_id if kind == "reward" else found) == ("5" if kind == "reward" else "log-probs of 5")
        assert scores.kinds() == ["worker_died", "call_failed", "worker_replaced"] and scores.group.ended == [0]

    run(law)


@pytest.mark.parametrize("kind", ["reward", "reference"])
def test_work_that_kills_its_scorer_each_time_fails_after_the_stated_tries(kind: str) -> None:
    async def law() -> None:
        scores = Scores(1)
        asked = asyncio.create_task(scores.pool(kind)("5"))
        for _ in range(2):
            await scores.arrived.acquire()
            scores.group.kill(0)
        with pytest.raises(WorkerError, match="died"):
            await asked
        assert len(scores.group.calls) == 2

    run(law)


@pytest.mark.parametrize("kind", ["reward", "reference"])
def test_a_scorer_that_cannot_be_started_again_fails_its_work_with_the_reason(kind: str) -> None:
    async def law() -> None:
        scores = Scores(1)
        asked = asyncio.create_task(scores.pool(kind)("5"))
        await scores.arrived.acquire()
        scores.group.bad_starts = 2
        scores.group.kill(0)
        with pytest.raises(WorkerError, match="could not be started 2 times in a row, the last: MemoryError: no room"):
            await asked
        assert scores.kinds().count("start_failed") == 2

    run(law)


def test_a_worker_has_as_many_samples_as_it_has_room_for_and_the_others_wait_where_no_deadline_runs() -> None:
    async def law() -> None:
        scores = Scores(1)
        size = _generated("0").summary.num_samples
        pool = RewardPool(scores.group, LIMIT_S, HealthSettings(), scores.event, room=2 * size)  # type: ignore[arg-type]
        asked = [asyncio.create_task(pool.score(_generated(str(i)))) for i in range(5)]
        for _ in range(2):
            await scores.arrived.acquire()
        await asyncio.sleep(SOON_S)
        assert scores.arrived.locked(), "no third group is there"
        scores.gate.set()
        assert [r.group_id for r in await asyncio.gather(*asked)] == [str(i) for i in range(5)]

    run(law)


def test_groups_that_wait_for_room_go_to_the_worker_that_comes_back() -> None:
    async def law() -> None:
        scores = Scores(1)
        pool = RewardPool(scores.group, LIMIT_S, HealthSettings(), scores.event, room=1)  # type: ignore[arg-type]
        asked = [asyncio.create_task(pool.score(_generated(str(i)))) for i in range(3)]
        await scores.arrived.acquire()
        scores.group.kill(0)
        scores.gate.set()
        assert [r.group_id for r in await asyncio.gather(*asked)] == [str(i) for i in range(3)]
        assert scores.kinds().count("worker_died") == 1 == scores.kinds().count("worker_replaced")

    run(law)


def test_groups_that_die_with_one_worker_restart_it_once() -> None:
    async def law() -> None:
        scores = Scores(1)
        pool = RewardPool(scores.group, LIMIT_S, HealthSettings(), scores.event)  # type: ignore[arg-type]
        asked = [asyncio.create_task(pool.score(_generated(str(i)))) for i in range(5)]
        for _ in range(5):
            await scores.arrived.acquire()
        scores.group.kill(0)
        scores.gate.set()
        assert [r.group_id for r in await asyncio.gather(*asked)] == [str(i) for i in range(5)]
        assert scores.kinds().count("worker_died") == 1 == scores.kinds().count("worker_replaced")

    run(law)


def test_workers_that_end_with_their_run_are_no_deaths_although_a_call_is_under_way() -> None:
    """A batch is served to its end, even when all who asked for it were cancelled."""

    async def law() -> None:
        scores = Scores(1)
        pool = ReferencePool(scores.group, LIMIT_S, 1000, HealthSettings(), scores.event)  # type: ignore[arg-type]
        asked = asyncio.create_task(pool.logprobs(_generated("1")))
        await scores.arrived.acquire()
        asked.cancel()
        await pool.close()
        scores.group.kill(0)
        await asyncio.sleep(SOON_S)
        assert scores.events == [] and scores.group.ended == []

    run(law)


def test_a_pool_that_is_closed_starts_nobody_again() -> None:
    async def law() -> None:
        scores = Scores(1)
        pool = RewardPool(scores.group, LIMIT_S, HealthSettings(), scores.event)  # type: ignore[arg-type]
        starting, never = asyncio.Event(), asyncio.Event()

        async def hang(index: int) -> None:
            starting.set()
            await never.wait()

        scores.group.ready_at = hang  # type: ignore[method-assign]
        asked = asyncio.create_task(pool.score(_generated("1")))
        await scores.arrived.acquire()
        scores.group.kill(0)
        await starting.wait()
        await pool.close()
        asked.cancel()
        assert "worker_replaced" not in scores.kinds() and not scores.group.alive

    run(law)
