"""Least-loaded dispatch with affinity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import Dispatcher


def test_equal_jobs_spread_evenly() -> None:
    dispatcher = Dispatcher(3)
    assert sorted(dispatcher.assign(10) for _ in range(6)) == [0, 0, 1, 1, 2, 2]


def test_a_prompt_returns_to_the_engine_that_knows_it() -> None:
    dispatcher = Dispatcher(2)
    first = dispatcher.assign(10, "p")
    dispatcher.done(first, 10)
    dispatcher.done(dispatcher.assign(10, "q"), 10)
    assert dispatcher.assign(10, "p") == first


def test_affinity_gives_way_to_a_queue() -> None:
    dispatcher = Dispatcher(2)
    # Loads by job: (10, 0), then (20, 0) because one job's lead is allowed, then the other engine takes over.
    assert [dispatcher.assign(10, "p") for _ in range(3)] == [0, 0, 1]


@given(st.integers(1, 5), st.lists(st.integers(1, 100), max_size=50))
def test_no_worker_is_ahead_of_the_idlest_by_more_than_one_job(num_workers: int, costs: list[int]) -> None:
    dispatcher = Dispatcher(num_workers)
    for cost in costs:
        dispatcher.assign(cost)
        assert max(dispatcher.loads) - min(dispatcher.loads) <= max(costs)


@given(st.integers(1, 4), st.lists(st.integers(1, 9), max_size=30))
def test_finished_work_leaves_no_load(num_workers: int, costs: list[int]) -> None:
    dispatcher = Dispatcher(num_workers)
    for worker, cost in [(dispatcher.assign(c, c), c) for c in costs]:
        dispatcher.done(worker, cost)
    assert dispatcher.loads == (0,) * num_workers


@given(st.lists(st.tuples(st.sampled_from("arhxj"), st.integers(0, 4), st.integers(1, 9)), max_size=60))
def test_only_workers_that_are_there_and_not_held_get_jobs(steps: list[tuple[str, int, int]]) -> None:
    dispatcher, there, held = Dispatcher(), set[int](), set[int]()
    for what, worker, cost in steps:
        if what == "a" and worker not in there:
            dispatcher.add(worker)
            there.add(worker)
        elif what == "x":
            dispatcher.remove(worker)
            there.discard(worker)
            held.discard(worker)
        elif what == "h":
            dispatcher.hold(worker)
            held |= {worker} & there
        elif what == "r":
            dispatcher.release(worker)
            held.discard(worker)
        elif what == "j" and there - held:
            assert dispatcher.assign(cost, cost) in there - held
        elif what == "j":
            with pytest.raises(LookupError):
                dispatcher.assign(cost)
        assert set(dispatcher.open) == there - held
    dispatcher.done(99, 5)  # of a worker that has gone
