"""Admission: a pure state machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.staleness import AdmissionGate


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
