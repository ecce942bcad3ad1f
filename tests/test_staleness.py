"""Admission: a pure state machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.staleness import AdmissionGate, Choice, choose_batch


def test_a_synchronous_run_samples_one_step_under_each_version() -> None:
    gate = AdmissionGate(max_staleness=0, groups_per_step=3)
    for _ in range(3):
        gate.admit()
    assert gate.free_slots == 0
    for _ in range(3):
        gate.accept()
    assert gate.free_slots == 0, "accepted groups hold their slots until the learner has finished the lap"
    gate.advance()
    assert gate.free_slots == 3


def test_a_failed_group_gives_its_slot_back() -> None:
    gate = AdmissionGate(0, 2)
    gate.admit()
    gate.admit()
    gate.give_back()
    assert gate.free_slots == 1


def test_no_slot_is_handed_out_twice() -> None:
    gate = AdmissionGate(0, 1)
    gate.admit()
    with pytest.raises(ValueError, match="no slot"):
        gate.admit()


def test_a_resumed_gate_starts_where_a_fresh_one_would_be() -> None:
    assert AdmissionGate(0, 4, version=7).free_slots == 4


@given(st.integers(0, 4), st.integers(1, 5), st.lists(st.sampled_from("aAgv"), max_size=200))
def test_the_bound_holds_whatever_happens(max_staleness: int, groups_per_step: int, events: list[str]) -> None:
    gate = AdmissionGate(max_staleness, groups_per_step)
    for event in events:
        if event == "a" and gate.free_slots:
            gate.admit()
        elif event == "A" and gate.running:
            gate.accept()
        elif event == "g" and gate.running:
            gate.give_back()
        elif event == "v" and gate.accepted >= (gate.version + 1) * groups_per_step:
            gate.advance()
        assert gate.accepted + gate.running <= (max_staleness + gate.version + 1) * groups_per_step


def test_nothing_is_admitted_that_no_lap_would_train_on() -> None:
    gate = AdmissionGate(max_staleness=5, groups_per_step=2, version=3, num_finished=1, num_steps=4)
    assert gate.free_slots == 1
    assert AdmissionGate(5, 2, 3, 1).free_slots == 11


# --- the batch ------------------------------------------------------------------------------------


def test_with_staleness_0_the_batch_is_the_steps_groups_in_stream_order_whoever_finished_first() -> None:
    running, finished = {4: 2, 5: 2, 6: 2}, {}
    for position in (6, 4):
        assert not choose_batch(2, 0, 3, running, finished).batch
        finished[position] = running.pop(position)
    assert choose_batch(2, 0, 3, running, finished) == Choice()
    finished[5] = running.pop(5)
    assert choose_batch(2, 0, 3, running, finished) == Choice(batch=(4, 5, 6))


def test_what_finished_first_is_trained_first_while_nobody_is_at_the_bound() -> None:
    assert choose_batch(0, 1, 2, {0: 0}, {3: 0, 1: 0, 2: 0}).batch == (1, 3)


def test_only_a_group_at_its_bound_is_waited_for_and_it_goes_before_all_others() -> None:
    running, finished = {0: 0}, {5: 1, 4: 1}
    assert choose_batch(1, 1, 2, running, finished) == Choice(at_bound=(0,))
    assert choose_batch(1, 2, 2, running, finished) == Choice(batch=(4, 5))
    assert choose_batch(1, 1, 2, {}, finished | {0: 0}) == Choice(batch=(0, 5))


def test_a_group_past_its_bound_or_too_many_at_it_are_a_mistake_of_admission() -> None:
    with pytest.raises(ValueError, match="-1 laps before"):
        choose_batch(2, 1, 1, {0: 0}, {1: 2})
    with pytest.raises(ValueError, match="a batch holds 1"):
        choose_batch(1, 1, 1, {0: 0}, {1: 0})


def test_young_groups_do_not_crowd_out_more_old_ones_than_the_lap_at_their_bound_can_hold() -> None:
    """Four old groups and two laps of two: both must be old ones, although two young ones finished before."""
    finished = {8: 1, 9: 1, 4: 0, 1: 0, 7: 0}
    assert choose_batch(2, 3, 2, {0: 0}, finished).batch == (1, 4)
    assert choose_batch(2, 4, 2, {0: 0}, finished).batch == (8, 9)
    assert choose_batch(2, 3, 2, {0: 0, 1: 0, 7: 0}, {8: 1, 9: 1, 4: 0}) == Choice(at_bound=(0, 1, 7))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("aaafffgr"), st.integers(0, 30)), max_size=300),
)
def test_both_bounds_hold_in_every_schedule_and_no_schedule_gets_stuck(
    max_staleness: int, groups_per_step: int, events: list[tuple[str, int]]
) -> None:
    """A learner that trains as soon as it may; r: killed and resumed with its finished groups."""
    gate = AdmissionGate(max_staleness, groups_per_step)
    running: dict[int, int] = {}
    finished: dict[int, int] = {}
    admitted = 0

    def learn() -> None:
        nonlocal admitted
        while batch := choose_batch(gate.version, max_staleness, groups_per_step, running, finished).batch:
            assert len(batch) == groups_per_step
            for position in batch:
                assert gate.version - finished.pop(position) <= max_staleness
            gate.advance()

    def act(event: str, pick: int) -> None:
        nonlocal gate, admitted
        if event == "a" and gate.free_slots:
            gate.admit()
            running[admitted] = gate.version
            admitted += 1
        elif event == "f" and running:
            position = sorted(running)[pick % len(running)]
            finished[position] = running.pop(position)
            gate.accept()
        elif event == "g" and running:
            running.pop(sorted(running)[pick % len(running)])
            gate.give_back()
        elif event == "r":
            running.clear()
            gate = AdmissionGate(max_staleness, groups_per_step, gate.version, len(finished))
        learn()

    for event, pick in events:
        act(event, pick)
    version = gate.version
    for _ in range(2 * (max_staleness + 1) * groups_per_step):  # as many as may be under way, and as many again
        act("a", 0)
        act("f", 0)
    assert gate.version > version, "with groups coming in the learner always goes on"


def test_a_straggler_is_waited_for_at_its_bound_and_never_left_behind() -> None:
    """Everyone else is fast: the straggler still runs when the learner reaches its bound, and joins that batch."""
    finished: dict[int, int] = {}
    trained_at: dict[int, int] = {}
    gate, straggler, position = AdmissionGate(max_staleness=2, groups_per_step=2), {0: 0}, 1
    gate.admit()
    waited = False
    while 0 not in trained_at:
        while gate.free_slots:
            gate.admit()
            gate.accept()
            finished[position] = gate.version
            position += 1
        choice = choose_batch(gate.version, 2, 2, straggler, finished)
        if choice.at_bound:
            assert gate.version == 2 and not waited
            waited, finished[0] = True, straggler.pop(0)
            gate.accept()
            continue
        for trained in choice.batch:
            trained_at[trained] = gate.version
            del finished[trained]
        gate.advance()
    assert waited and trained_at[0] == 2
