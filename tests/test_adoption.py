"""Nodes that join and leave: what is added for them and given up with them, and who acts on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.adoption import Adoption, Room, capacity
from cluster.layout import NodeSupply
from launch.adopting import NodeWatch
from launch.overrides import load_config
from trainers.errors import InputError

NODES = ("start", "b", "c", "d")


# --- the decision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "gpus", "each", "number"),
    [(8, 0, 0.0, 1), (0, 0, 0.0, 0), (8, 8, 4.0, 2), (8, 7, 4.0, 1), (8, 3, 4.0, 0), (8, 2, 0.25, 8), (8, 1, 0.3, 3)],
)
def test_a_node_holds_workers_by_its_gpus_or_one_with_all_its_cores(
    cpus: int, gpus: int, each: float, number: int
) -> None:
    assert capacity(NodeSupply("n", cpus, gpus), each) == number


def test_a_node_that_joins_gets_workers_once_it_is_admitted_and_not_before() -> None:
    adoption = Adoption(["start"], 9)
    nodes = {"start": Room(4, 1), "b": Room(2)}
    first = adoption.look(nodes, 1)
    assert (first.joined, first.added, first.left) == (("b",), {}, {})
    adoption.admit("b")
    assert adoption.look(nodes, 1).added == {"b": 2}
    assert adoption.look(nodes, 3).added == {}, "they are wanted already, and have no place yet"
    assert adoption.look({"start": Room(4, 1), "b": Room(2, 2)}, 3).added == {}


def test_the_room_of_a_node_of_the_start_is_left_alone() -> None:
    adoption = Adoption(["start"], 9)
    adoption.admit("start")  # nobody does
    assert Adoption(["start"], 9).look({"start": Room(8, 1)}, 1).added == {}


def test_workers_that_wait_for_a_place_take_the_room_first() -> None:
    adoption = Adoption(["start"], 9)
    nodes = {"start": Room(1, 1), "b": Room(4)}
    adoption.look(nodes, 4)
    adoption.admit("b")
    assert adoption.look(nodes, 4).added == {"b": 1}, "three of the four are for those that are wanted already"


def test_without_a_maximum_nodes_come_and_go_and_nothing_is_added() -> None:
    adoption = Adoption(["start"], None)
    assert adoption.look({"start": Room(1, 1), "b": Room(4)}, 1).joined == ("b",)
    adoption.admit("b")
    assert adoption.look({"start": Room(1, 1), "b": Room(4)}, 1).added == {}
    assert adoption.look({"start": Room(1, 1)}, 1).left == {"b": 0}


def test_a_number_that_was_asked_for_is_not_raised_for_nodes_that_are_there_nor_lowered_with_them() -> None:
    adoption = Adoption(["start"], 3)
    nodes = {"start": Room(1, 1), "b": Room(2)}
    adoption.look(nodes, 1)
    adoption.admit("b")
    assert adoption.look(nodes, 1).added == {"b": 2}
    adoption.settle()
    assert adoption.look({"start": Room(1, 1), "b": Room(2, 1)}, 2).added == {}
    assert adoption.look({"start": Room(1, 1)}, 2).left == {"b": 0}


class Cluster:
    """Nodes, and workers that are placed where they are wanted, some of them late."""

    def __init__(self, maximum: int, num_wanted: int) -> None:
        self.adoption, self.wanted = Adoption(["start"], maximum), num_wanted
        self.sizes, self.held = {"start": 9}, Counter({"start": num_wanted})
        self.maximum, self.number = maximum, 0

    def join(self, size: int) -> None:
        self.number += 1
        self.sizes[f"n{self.number}"] = size

    def leave(self) -> None:
        for name in list(self.sizes)[1:2]:
            del self.sizes[name]
            self.held.pop(name, None)

    def look(self) -> None:
        before = self.wanted
        found = self.adoption.look({n: Room(size, self.held[n]) for n, size in self.sizes.items()}, before)
        for name in found.joined:
            self.adoption.admit(name)
        self.wanted += sum(found.added.values()) - sum(found.left.values())
        for name, number in found.added.items():
            assert number <= self.sizes[name] - self.held[name], "more than the node has room for"
        assert self.wanted <= max(self.maximum, before), "above the maximum"

    def place(self) -> None:
        """One worker that is wanted and has no place gets one: on a node with room, else crowded at the start."""
        if self.held.total() < self.wanted:
            free = [n for n, size in self.sizes.items() if n != "start" and self.held[n] < size]
            self.held[free[0] if free else "start"] += 1


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["join", "leave", "look", "place"]), max_size=40),
    st.lists(st.integers(0, 3), min_size=40, max_size=40), st.integers(1, 8), st.integers(1, 3),
)  # fmt: skip
def test_workers_never_exceed_room_or_maximum_and_what_was_added_for_a_node_goes_with_it(
    moves: list[str], sizes: list[int], maximum: int, num_wanted: int
) -> None:
    cluster = Cluster(maximum, num_wanted)
    for move, size in zip(moves, sizes, strict=False):
        cluster.join(size) if move == "join" else getattr(cluster, move)()
    while len(cluster.sizes) > 1:
        cluster.leave()
    cluster.look()
    assert cluster.wanted == num_wanted, "nodes that came and went changed the number that was asked for"


# --- acting on it -------------------------------------------------------------------------------


class Workers:
    def __init__(self) -> None:
        self.place = {0: "start", 1: "start"}

    @property
    def indices(self) -> Sequence[int]:
        return tuple(self.place)


class Fleet:
    """Stands for a fleet and its places, and remembers what it is told."""

    def __init__(self) -> None:
        self.workers, self.num_wanted = Workers(), 2
        self.told: list[tuple[Any, ...]] = []

    def scale(self, number: int) -> None:
        self.num_wanted = number
        self.told.append(("scale", number))

    def lose(self, indices: list[int], reason: str, num_fewer: int) -> None:
        for index in indices:
            del self.workers.place[index]
        self.num_wanted -= num_fewer
        self.told.append(("lose", indices, reason, num_fewer))

    def adopt(self, node: str, number: int) -> None:
        self.told.append(("adopt", node, number))
        for _ in range(number):
            self.workers.place[max(self.workers.place) + 1] = node

    def forget(self, node: str) -> None:
        self.told.append(("forget", node))


class World:
    def __init__(self, maximum: int | None, unfit: str = "") -> None:
        self.fleet, self.why, self.events = Fleet(), unfit, list[tuple[str, dict[str, Any]]]()
        self.nodes = [NodeSupply("start", 4, 2, "10.0.0.1")]
        self.judged: list[str] = []
        self.watch = NodeWatch(
            self.fleet, self.fleet, tuple(self.nodes), maximum, 1.0, lambda i: self.fleet.workers.place[i],  # type: ignore[arg-type]
            self.unfit, lambda kind, **fields: self.events.append((kind, fields)), lambda: list(self.nodes),
        )  # fmt: skip

    async def unfit(self, node: NodeSupply) -> str:
        self.judged.append(node.node_id)
        return self.why

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def looks(self, number: int) -> None:
        async def law() -> None:
            for _ in range(number):
                await self.watch.look()
                await asyncio.gather(*self.watch._judging)

        asyncio.run(law())


def test_a_node_that_joins_is_judged_adopted_and_scaled_onto_and_leaves_with_what_it_brought() -> None:
    world = World(maximum=3)
    world.nodes.append(NodeSupply("b", 4, 4, "10.0.0.2"))
    world.looks(3)
    assert world.fleet.told == [("adopt", "b", 1), ("scale", 3)], "up to the maximum, to the node, and once"
    assert world.kinds() == ["node_joined", "node_adopted"]
    assert world.events[0][1] == {"node": "b", "address": "10.0.0.2", "num_cpus": 4, "num_gpus": 4, "num_nodes": 2}
    del world.nodes[1]
    world.looks(2)
    assert world.fleet.told[2:] == [("forget", "b"), ("lose", [2], "its node 10.0.0.2 left the Ray cluster", 1)]
    assert world.events[2:] == [
        ("node_left", {"node": "b", "address": "10.0.0.2", "num_generators": 1, "num_nodes": 1})
    ]


def test_a_node_that_is_not_like_the_others_is_refused_with_its_reason_and_asked_once() -> None:
    world = World(maximum=9, unfit="torch = 2.12: versions differ between nodes")
    world.nodes.append(NodeSupply("b", 4, 4, "10.0.0.2"))
    world.looks(3)
    assert world.kinds() == ["node_joined", "node_refused"] and world.judged == ["b"] and world.fleet.told == []
    assert world.events[1][1]["reason"] == "torch = 2.12: versions differ between nodes"


@pytest.mark.parametrize(("maximum", "gpus"), [(None, 4), (9, 0)])
def test_a_node_that_cannot_or_may_not_be_used_is_only_told_of(maximum: int | None, gpus: int) -> None:
    world = World(maximum)
    world.nodes.append(NodeSupply("b", 4, gpus))
    world.looks(2)
    assert world.kinds() == ["node_joined"] and world.judged == [] and world.fleet.told == []


def test_a_lost_node_of_the_start_takes_its_workers_and_not_their_number() -> None:
    world = World(None)
    world.nodes[:] = [NodeSupply("b", 4, 0)]
    world.looks(1)
    (lost,) = [call for call in world.fleet.told if call[0] == "lose"]
    assert lost[1] == [0, 1] and lost[3] == 0


def test_whoever_scales_by_hand_settles_the_number() -> None:
    world = World(maximum=4)
    world.nodes.append(NodeSupply("b", 4, 4))
    world.looks(2)
    assert world.fleet.num_wanted == 4
    world.watch.scale(3)
    assert world.watch.num_wanted == 3
    world.looks(2)
    assert world.fleet.num_wanted == 3, "raised again by the node that it was lowered on"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["health.adopt_up_to=1"], "below generator.num_workers=2"),
        (["health.adopt_up_to=4", "cluster.colocate=true"], "shares the GPU of a learner rank"),
        (["health.adopt_up_to=4", "cluster.backend=in_process", "learner.num_workers=1"], "one process has no nodes"),
        (["health.adopt_up_to=0"], "at least 1"),
    ],
)
def test_a_recipe_that_cannot_adopt_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        load_config("cpu-two-by-two", overrides)
    assert refused.value.field == "health.adopt_up_to"
