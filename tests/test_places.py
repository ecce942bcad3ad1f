"""Places of a role: each is taken once, those of the layout first, and only on nodes that are alive."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DeadlineError
from cluster.layout import WorkerSlot
from cluster.places import Places

SLOTS = [WorkerSlot("generator", i, i % 2, 1.0, 4.0, 4, (i,)) for i in range(3)]


class Cluster:
    """Stands for a placement: two nodes of the layout, which may die, and room for more workers."""

    def __init__(self, room: int) -> None:
        self.room, self.dead = room, set[int]()
        self.grown: set[int] = set()
        self.nodes: dict[str, bool] = {}  # adopted ones: whether they are alive
        self.bound: dict[int, str | None] = {}

    def is_alive(self, node_id: str) -> bool:
        return self.nodes[node_id]

    def stands(self, slot: WorkerSlot) -> bool:
        return slot.node not in self.dead

    async def grow(self, slot: WorkerSlot, deadline_s: float, node_id: str | None = None) -> None:
        if len(self.grown) == self.room:
            raise DeadlineError("1 GPUs", "the Ray cluster", deadline_s)
        assert slot.index not in self.grown
        self.grown.add(slot.index)
        self.bound[slot.index] = node_id

    def shrink(self, slot: WorkerSlot) -> None:
        self.grown.remove(slot.index)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["take", "back", "die"]), max_size=30), st.integers(0, 3))
def test_a_place_has_one_worker_and_no_place_is_on_a_dead_node(steps: list[str], room: int) -> None:
    cluster = Cluster(room)
    places = Places(SLOTS, cluster, 1.0)  # type: ignore[arg-type]
    taken = {slot.index: slot for slot in SLOTS}
    for step in steps:
        if step == "die" and taken:
            cluster.dead.add(next(iter(taken.values())).node)
        elif step == "back" and taken:
            places.give_back(taken.pop(min(taken)))
        elif step == "take":
            free = [s for s in SLOTS if s.index not in taken and s.node not in cluster.dead]
            try:
                slot = asyncio.run(places.take())
            except DeadlineError:
                assert not free and len(cluster.grown) == room
                continue
            assert slot.index not in taken and (slot in free if free else slot.index in cluster.grown)
            taken[slot.index] = slot
    assert cluster.grown == {index for index in taken if index >= len(SLOTS)}


def test_in_this_process_there_is_always_room_and_a_new_place_is_like_the_others() -> None:
    places = Places(SLOTS, None, 1.0)
    new = asyncio.run(places.take())
    assert (new.role, new.index, new.gpus, new.threads, new.cpu_ids) == ("generator", 3, 1.0, 4, ())
    places.give_back(new)
    assert asyncio.run(places.take()).index == 4


def test_no_room_is_said_in_time_and_costs_nothing() -> None:
    cluster = Cluster(0)
    with pytest.raises(DeadlineError, match="waited 1 s for 1 GPUs"):
        asyncio.run(Places(SLOTS, cluster, 1.0).take())  # type: ignore[arg-type]


def test_places_of_an_adopted_node_are_on_it_while_it_is_alive_and_are_used_again_until_it_goes() -> None:
    cluster = Cluster(9)
    places = Places(SLOTS, cluster, 1.0)  # type: ignore[arg-type]
    cluster.nodes["b"] = True
    places.adopt("b", 1)
    slot = asyncio.run(places.take())
    assert cluster.bound[slot.index] == "b" and slot.cpu_ids == () and slot.index == 3
    assert cluster.bound[asyncio.run(places.take()).index] is None, "it had one place"
    places.give_back(slot)
    assert slot.index not in cluster.grown
    assert asyncio.run(places.take()) == slot and cluster.bound[slot.index] == "b", "whoever died there comes back"
    places.give_back(slot)
    cluster.nodes["b"] = False
    assert cluster.bound[asyncio.run(places.take()).index] is None, "no place on a dead node"
    places.forget("b")
    cluster.nodes.clear()
    assert asyncio.run(places.take()).index != slot.index


def test_a_place_that_was_not_granted_or_whose_node_left_meanwhile_is_not_lost_or_given_twice() -> None:
    cluster = Cluster(0)
    places = Places(SLOTS, cluster, 1.0)  # type: ignore[arg-type]
    cluster.nodes["b"] = True
    places.adopt("b", 1)
    with pytest.raises(DeadlineError):
        asyncio.run(places.take())
    cluster.room = 9
    slot = asyncio.run(places.take())
    assert cluster.bound[slot.index] == "b"
    places.forget("b")
    places.give_back(slot)
    cluster.nodes.clear()
    assert asyncio.run(places.take()).index > slot.index


def test_who_waits_for_room_on_a_node_that_is_gone_is_given_another_place_at_once() -> None:
    class Waiting(Cluster):
        async def grow(self, slot: WorkerSlot, deadline_s: float, node_id: str | None = None) -> None:
            if node_id is not None:
                waits.set()
                await asyncio.Event().wait()
            await super().grow(slot, deadline_s, node_id)

    async def law() -> None:
        cluster.nodes["b"] = True  # Ray does not know yet
        places.adopt("b", 1)
        taking = asyncio.create_task(places.take())
        await waits.wait()
        places.forget("b")
        slot = await taking
        assert cluster.grown == {slot.index} and cluster.bound[slot.index] is None
        places.adopt("b", 1)
        waits.clear()
        taking = asyncio.create_task(places.take())
        await waits.wait()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking

    waits, cluster = asyncio.Event(), Waiting(9)
    places = Places(SLOTS, cluster, 1.0)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(law(), 10))
