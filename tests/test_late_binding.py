"""Groups wait outside the generators for the first who is free: for who is fast, and for who has only just come."""

from __future__ import annotations

import asyncio

import pytest
from fleet_fakes import World, run
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import Dispatcher
from trainers.errors import NoGeneratorError

SEATS = 2  # of each generator; a group has two samples, so two groups are given to it


def test_a_generator_is_given_twice_as_many_samples_as_it_decodes_at_once_and_the_rest_waits() -> None:
    async def law() -> None:
        world = World(2, SEATS)
        world.gate.clear()
        asked = [world.ask(i) for i in range(9)]
        await world.until(lambda: len(world.sampled) == 4)
        assert sorted(worker for worker, _ in world.sampled) == [0, 0, 1, 1]
        world.gate.set()
        groups = await asyncio.gather(*asked)
        assert [g.summary.group_id for g in groups] == [str(i) for i in range(9)]
        assert [r.group_id for _, r in world.sampled] == [str(i) for i in range(9)], "in their order"

    run(law)


def test_who_joins_is_given_what_waits_and_not_only_what_comes_later() -> None:
    async def law() -> None:
        world = World(1, SEATS)
        world.open()
        world.gate.clear()
        asked = [world.ask(i) for i in range(6)]
        await world.until(lambda: len(world.sampled) == 2)
        world.fleet.scale(2)
        await world.until(lambda: len(world.sampled) == 4)
        assert [worker for worker, _ in world.sampled] == [0, 0, 1, 1]
        world.gate.set()
        await asyncio.gather(*asked)
        await world.fleet.close()

    run(law)


def test_a_group_that_is_larger_than_any_room_has_a_generator_for_itself() -> None:
    async def law() -> None:
        world = World(2, SEATS)
        world.gate.clear()
        asked = [world.ask(i, num_samples=9) for i in range(3)]
        await world.until(lambda: len(world.sampled) == 2)
        assert sorted(worker for worker, _ in world.sampled) == [0, 1]
        world.gate.set()
        assert len(await asyncio.gather(*asked)) == 3

    run(law)


def test_what_a_dead_generator_had_goes_to_the_others_as_they_have_room() -> None:
    async def law() -> None:
        world = World(2, SEATS)
        world.gate.clear()
        asked = [world.ask(i) for i in range(6)]
        await world.until(lambda: len(world.sampled) == 4)
        world.group.kill(1)
        await world.until(lambda: world.kinds("group_reissued"))
        world.gate.set()
        groups = await asyncio.gather(*asked)
        assert {g.summary.generator for g in groups} == {"generator-0"}
        assert [g.summary.group_id for g in groups] == [str(i) for i in range(6)]

    run(law)


def test_who_waits_in_the_line_is_told_when_the_last_generator_has_gone_and_who_gives_up_holds_nobody_up() -> None:
    async def law() -> None:
        world = World(1, SEATS)
        world.gate.clear()
        asked = [world.ask(i) for i in range(5)]
        await world.until(lambda: len(world.sampled) == 2)
        asked[2].cancel()  # the head of the line
        world.group.kill(0)
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(ended[2], asyncio.CancelledError)
        assert all(isinstance(ended[i], NoGeneratorError) for i in (0, 1, 3, 4))

    run(law)


@given(st.integers(1, 3), st.integers(1, 6), st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=60))
def test_no_worker_has_more_than_its_room_but_for_one_large_job(
    num_workers: int, room: int, steps: list[tuple[bool, int]]
) -> None:
    dispatcher = Dispatcher(num_workers, room)
    running: list[tuple[int, int]] = []
    for begins, size in steps:
        if begins and dispatcher.with_room(size):
            running.append((dispatcher.assign(10 * size, size=size), size))
        elif begins:
            with pytest.raises(LookupError, match="no worker takes jobs"):
                dispatcher.assign(1, size=size)
        elif running:
            worker, ended = running.pop(0)
            dispatcher.done(worker, 10 * ended, ended)
        for worker in range(num_workers):
            sizes = [size for at, size in running if at == worker]
            assert sum(sizes) <= room or len(sizes) == 1
