"""The ledger: legal steps only, and every position consumed exactly once whatever is killed when."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.ledger import Dropped, Failed, Finished, IllegalTransition, InFlight, Ledger, Pending, Trained

G = 2  # groups a step


def ledger_with(**states: str) -> Ledger:
    """``p0="finished"``: positions in these states, issued at version 0."""
    ledger = Ledger(max_attempts=2)
    for name, state in states.items():
        position = int(name[1:])
        ledger.issue(position, "generator-0", 0, 1.5)
        if state in ("finished", "trained"):
            ledger.finish(position)
        if state == "trained":
            ledger.train([position], 4)
        if state == "dropped":
            ledger.drop(position, "no spread")
        if state == "failed":
            assert ledger.lose(position, "engine died")
            ledger.issue(position, "generator-1", 3, 2.5)
            assert not ledger.lose(position, "engine died again")
    return ledger


def test_an_entry_says_where_since_when_and_at_which_version() -> None:
    ledger = ledger_with(p1="running", p2="finished", p3="trained", p4="dropped", p5="failed")
    assert ledger.entry(0) == Pending()
    assert ledger.entry(1) == InFlight("generator-0", 1.5, 0, 1)
    ledger.move(1, "scorers", 9.0)
    assert ledger.entry(1) == InFlight("scorers", 9.0, 0, 1)
    assert ledger.entry(2) == Finished(0, 1)
    assert ledger.entry(3) == Trained(4)
    assert ledger.entry(4) == Dropped("no spread")
    assert ledger.entry(5) == Failed(2, "engine died again")
    assert ledger.entry(99) == Pending()


STEPS: dict[str, Callable[[Ledger], Any]] = {
    "issue": lambda ledger: ledger.issue(1, "g", 0, 0.0),
    "move": lambda ledger: ledger.move(1, "g", 0.0),
    "finish": lambda ledger: ledger.finish(1),
    "lose": lambda ledger: ledger.lose(1, "r"),
    "withdraw": lambda ledger: ledger.withdraw(1),
    "drop": lambda ledger: ledger.drop(1, "r"),
    "train": lambda ledger: ledger.train([1], 0),
}
LEGAL = {
    "pending": {"issue"},
    "running": {"move", "finish", "lose", "withdraw", "drop"},
    "finished": {"withdraw", "drop", "train"},
    "trained": set(),
    "dropped": set(),
    "failed": set(),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", LEGAL)
@pytest.mark.parametrize("below", [False, True])
def test_only_the_steps_of_the_drawing_are_taken_and_a_refused_one_changes_nothing(
    state: str, step: str, below: bool
) -> None:
    ledger = ledger_with() if state == "pending" else ledger_with(p1=state)
    if below:  # consumed positions leave the ledger's memory once everything before them is consumed too
        ledger.issue(0, "g", 0, 0.0)
        ledger.drop(0, "r")
    before = ledger.state_dict()
    if step in LEGAL[state]:
        STEPS[step](ledger)
        assert ledger.state_dict() != before
    else:
        with pytest.raises(IllegalTransition, match="position 1 "):
            STEPS[step](ledger)
        assert ledger.state_dict() == before


def test_a_batch_with_an_unfinished_or_repeated_position_trains_nothing() -> None:
    ledger = ledger_with(p0="finished", p1="running")
    for batch in ([0, 1], [0, 0]):
        with pytest.raises(IllegalTransition):
            ledger.train(batch, 0)
    assert isinstance(ledger.entry(0), Finished) and ledger.frontier == 0


def test_the_frontier_passes_whatever_was_consumed_in_any_way_and_stops_at_the_rest() -> None:
    ledger = ledger_with(p0="running", p1="trained", p2="failed", p3="dropped", p4="finished", p5="trained")
    assert ledger.frontier == 0
    ledger.drop(0, "no spread")
    assert ledger.frontier == 4 and ledger.next_pending == 6
    ledger.train([4], 5)
    assert ledger.frontier == 6
    assert ledger.counts == {"trained": 3, "dropped": 2, "failed": 1}
    assert ledger.state_dict()["entries"] == [], "what is below the frontier takes no room"


def test_a_position_that_comes_again_goes_before_new_ones_and_keeps_its_attempts() -> None:
    ledger = ledger_with(p0="running", p1="running", p2="running")
    ledger.withdraw(2)
    assert ledger.lose(1, "timeout")
    assert ledger.to_reissue == [1, 2] and ledger.next_pending == 1
    ledger = Ledger.restore(json.loads(json.dumps(ledger.state_dict())), (), max_attempts=2)
    assert ledger.to_reissue == [0, 1, 2]
    ledger.issue(1, "generator-1", 0, 3.0)
    assert not ledger.lose(1, "timeout"), "the second attempt of two was its last, restored or not"
    ledger.issue(2, "generator-1", 0, 3.0)
    assert ledger.lose(2, "timeout"), "being withdrawn costs no attempt"


def test_a_resumed_ledger_keeps_what_was_saved_in_its_order_and_issues_the_rest_again() -> None:
    ledger = ledger_with(p0="running", p3="finished", p1="finished", p2="finished", p4="trained")
    state = json.loads(json.dumps(ledger.state_dict()))
    again = Ledger.restore(state, kept=(3, 1), max_attempts=3)
    assert list(again.finished) == [3, 1], "what finished first stays first"
    assert again.to_reissue == [0, 2] and not again.in_flight
    assert again.entry(4) == Trained(4) and again.counts == ledger.counts
    assert Ledger.restore(state, (), 3).to_reissue == [0, 1, 2, 3]


# --- random schedules with kills ------------------------------------------------------------------


@dataclass
class Checkpoint:
    state: str
    spooled: list[int]
    trained: list[int]


@dataclass
class Run:
    """A run as the ledger sees one; ``trained`` is what the surviving lineage of weights was trained on."""

    ledger: Ledger = field(default_factory=lambda: Ledger(3))
    step: int = 0
    trained: list[int] = field(default_factory=list)
    saved: Checkpoint = field(default_factory=lambda: Checkpoint(json.dumps(Ledger(3).state_dict()), [], []))

    def act(self, action: str, pick: int) -> None:
        running, finished = list(self.ledger.in_flight), list(self.ledger.finished)
        if action == "issue":
            self.ledger.issue(self.ledger.next_pending, "g", self.step, 0.0)
        elif action == "finish" and running:
            self.ledger.finish(running[pick % len(running)])
        elif action == "lose" and running:
            self.ledger.lose(running[pick % len(running)], "r")
        elif action == "drop" and running:
            self.ledger.drop(running[pick % len(running)], "r")
        elif action == "train" and len(finished) >= G:
            start = pick % (len(finished) - G + 1)
            batch = finished[start : start + G]
            self.ledger.train(batch, self.step)
            self.trained += batch
            self.step += 1
        elif action == "save":
            spooled = finished[pick % (len(finished) + 1) :]  # some of them: a full disk may cost any
            self.saved = Checkpoint(json.dumps(self.ledger.state_dict()), spooled, list(self.trained))
        elif action == "kill":
            self.ledger = Ledger.restore(json.loads(self.saved.state), self.saved.spooled, 3)
            self.trained, self.step = list(self.saved.trained), len(self.saved.trained) // G

    def drain(self) -> None:
        """Bring everything that was ever issued to its end."""
        while self.ledger.to_reissue:
            self.act("issue", 0)
        while self.ledger.in_flight:
            self.act("finish", 0)
        while len(self.ledger.finished) >= G:
            self.act("train", 0)


ACTIONS = st.sampled_from(["issue"] * 4 + ["finish"] * 4 + ["train"] * 2 + ["save", "kill", "lose", "drop"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, 50)), max_size=120))
def test_along_the_surviving_lineage_every_position_is_consumed_exactly_once(schedule: list[tuple[str, int]]) -> None:
    run = Run()
    for action, pick in schedule:
        run.act(action, pick)
        check(run)
    run.drain()
    check(run)
    ledger = run.ledger
    assert not ledger.in_flight and not ledger.to_reissue and len(ledger.finished) < G
    # Nothing was skipped: all that was ever handed out is consumed, but for what does not fill a batch.
    assert sum(ledger.counts.values()) + len(ledger.finished) == ledger.next_pending


def check(run: Run) -> None:
    ledger = run.ledger
    assert max(Counter(run.trained).values(), default=1) == 1, "trained twice"
    assert ledger.counts["trained"] == len(run.trained)
    issued = range(ledger.next_pending if not ledger.to_reissue else max(ledger.to_reissue) + 1)
    states = Counter(type(ledger.entry(p)) for p in issued if p >= ledger.frontier)
    assert all(p < ledger.frontier or isinstance(ledger.entry(p), Trained) for p in run.trained)
    consumed = sum(ledger.counts.values())
    assert consumed == ledger.frontier + sum(
        1 for p in range(ledger.frontier, ledger._next) if isinstance(ledger.entry(p), Trained | Dropped | Failed)
    )
    assert states[Pending] == len(ledger.to_reissue)
    first = ledger.entry(ledger.frontier)
    assert not isinstance(first, Trained | Dropped | Failed)
