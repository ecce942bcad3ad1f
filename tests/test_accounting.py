"""Every second of every worker by cause: the laws of the cut, of the waits, and of the ledger over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.accounting import PRECEDENCE, USEFUL, WEIGHT, Cause, Span, cut
from trainers.metrics import check
from trainers.time_ledger import Call, Entry, TimeLedger
from trainers.waiting import STAGES, WAITED_FOR

TIMES = st.integers(0, 60)
CALLED = [c for c in Cause if c not in (Cause.WAIT, Cause.IDLE)]
SPANS = st.lists(st.tuples(TIMES, TIMES, st.sampled_from(CALLED)), max_size=12)


def spans(rows: Sequence[tuple[int, int, Cause]]) -> list[Span[Cause]]:
    return [Span(min(a, b), max(a, b), cause, WEIGHT[cause]) for a, b, cause in rows]


# --- the cut --------------------------------------------------------------------------------------


def test_every_cause_of_a_call_has_its_place_in_the_precedence() -> None:
    assert sorted(PRECEDENCE) == sorted(CALLED)
    assert set(CALLED) >= USEFUL


@settings(deadline=None)  # a busy machine is no failure
@given(SPANS, TIMES, TIMES)
def test_each_moment_has_the_first_cause_of_the_precedence_that_is_under_way(
    rows: list[tuple[int, int, Cause]], one: int, other: int
) -> None:
    start, end = min(one, other), max(one, other)
    pieces = cut(spans(rows), start, end)
    assert [p.start for p in pieces] + [end] == [start] + [p.end for p in pieces], "holes, or not the whole time"
    assert all(p.start < p.end for p in pieces)
    assert all(a.label != b.label for a, b in pairwise(pieces))
    for piece in pieces:
        for moment in range(piece.start, piece.end):
            under_way = {s.label for s in spans(rows) if s.start <= moment < s.end}
            assert piece.label == next((c for c in PRECEDENCE if c in under_way), None)


@settings(deadline=None)
@given(SPANS)
def test_a_piece_knows_the_calls_that_it_is_made_of(rows: list[tuple[int, int, Cause]]) -> None:
    given_spans = spans(rows)
    for piece in cut(given_spans, 0, 60):
        expected = [s for s in given_spans if s.label == piece.label and s.start < piece.end and s.end > piece.start]
        assert sorted(map(id, piece.spans)) == sorted(id(s) for s in expected if s.start < s.end)


def test_attributes_of_joined_calls_are_listed_and_many_are_cut_short() -> None:
    groups = [Span(0, 10, Cause.GENERATE, 1, {"group": str(i), "version": "0.3"}) for i in range(10)]
    (piece,) = cut(groups, 0, 10)
    assert piece.attributes == {"group": "0, 1, 2, 3, 4, 5, 6, 7 and 2 more", "version": "0.3"}


# --- a run on a fake clock ------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Run:
    """A ledger with a clock that the test moves, and shorthand for calls."""

    def __init__(self, *workers: str) -> None:
        self.clock = Clock()
        self.ledger = TimeLedger(self.clock)
        self.entries: list[Entry] = []
        for worker in workers:
            self.ledger.join(worker, worker.rpartition("-")[0])

    def at(self, time: int) -> None:
        assert time >= self.clock.now
        self.clock.now = time

    def open(self, worker: str, cause: Cause, time: int, **keys: str | int) -> Call:
        self.at(time)
        return self.ledger.opened(worker, cause, **keys)

    def close(self, call: Call, time: int, *, lost: bool = False) -> None:
        self.at(time)
        self.ledger.closed(call, lost=lost)

    def busy(self, worker: str, cause: Cause, start: int, end: int) -> None:
        self.close(self.open(worker, cause, start), end)

    def settle(self, time: int, *, final: bool = False) -> list[Entry]:
        self.at(time)
        new, _ = self.ledger.settle(final=final)
        self.entries += new
        return new

    def of(self, worker: str) -> list[tuple[str, int, int]]:
        return [
            (f"{e.cause}:{e.whom}" if e.whom else str(e.cause), e.start, e.end)
            for e in self.entries
            if e.worker == worker
        ]


def lap(run: Run, score_s: int = 5) -> None:
    """A synchronous lap: sample 0-40 (the other generator 0-25), score, learn, write, load, begin again at 80."""
    long, short = run.open("generator-0", Cause.GENERATE, 0), run.open("generator-1", Cause.GENERATE, 0)
    run.close(short, 25)
    with stage(run, "score", 25, 28):
        run.busy("reward_workers-0", Cause.SCORE, 25, 28)
    run.close(long, 40)
    with stage(run, "score", 40, 40 + score_s):
        run.busy("reward_workers-0", Cause.SCORE, 40, 40 + score_s)
    run.busy("learner-0", Cause.LEARN, 46, 66)
    run.busy("learner-0", Cause.PUSH, 66, 70)
    loads = [run.open(f"generator-{i}", Cause.PUSH, 70, is_decided=False) for i in (0, 1)]
    for call in loads:
        call.starts_with(Cause.PAUSE, 6)
        run.close(call, 78)
    again = run.open("generator-0", Cause.GENERATE, 80)
    run.close(again, 90)
    run.busy("learner-0", Cause.LEARN, 90, 95)


@contextmanager
def stage(run: Run, name: str, start: int, end: int) -> Iterator[None]:
    run.at(start)
    with run.ledger.stage(name):
        yield
        run.at(end)


ALL = ("generator-0", "generator-1", "learner-0", "reward_workers-0")


def test_in_a_synchronous_lap_everybody_waits_for_the_stage_that_holds_the_lap_up() -> None:
    run = Run(*ALL)
    lap(run)
    run.settle(100, final=True)
    assert run.of("learner-0") == [
        ("wait:generator", 0, 40), ("wait:score", 40, 45), ("idle", 45, 46), ("learn", 46, 66), ("push", 66, 70),
        ("wait:push", 70, 78), ("idle", 78, 80), ("wait:generator", 80, 90), ("learn", 90, 95), ("idle", 95, 100),
    ]  # fmt: skip
    assert run.of("generator-1") == [
        ("generate", 0, 25), ("wait:generator", 25, 40), ("wait:score", 40, 45), ("idle", 45, 46),
        ("wait:learner", 46, 66), ("wait:push", 66, 70), ("pause", 70, 76), ("push", 76, 78), ("idle", 78, 80),
        ("wait:generator", 80, 90), ("wait:learner", 90, 95), ("idle", 95, 100),
    ]  # fmt: skip
    assert run.of("reward_workers-0")[:4] == [
        ("wait:generator", 0, 25), ("score", 25, 28), ("wait:generator", 28, 40), ("score", 40, 45),
    ]  # fmt: skip


def test_settled_step_by_step_a_run_has_the_same_account_as_at_its_end() -> None:
    whole, parts = Run(*ALL), Run(*ALL)
    lap(whole)
    whole.settle(100, final=True)
    move = parts.at

    def settle_and_move(time: int) -> None:
        for moment in range(parts.clock.now, time):
            move(moment)
            parts.settle(moment)
        move(time)

    parts.at = settle_and_move  # type: ignore[method-assign]
    lap(parts)
    parts.at = move  # type: ignore[method-assign]
    parts.settle(100, final=True)
    assert parts.ledger.totals == whole.ledger.totals


def test_a_learner_waits_for_generation_though_scoring_goes_on_beside_it() -> None:
    run = Run("generator-0", "learner-0", "reward_workers-0")
    groups = [run.open("generator-0", Cause.GENERATE, 0) for _ in range(2)]
    run.close(groups[0], 10)
    with stage(run, "score", 10, 14):
        run.busy("reward_workers-0", Cause.SCORE, 10, 14)
    run.close(groups[1], 30)
    run.busy("learner-0", Cause.LEARN, 30, 35)
    run.settle(35, final=True)
    assert run.of("learner-0") == [("wait:generator", 0, 30), ("learn", 30, 35)]


def test_a_learner_waits_for_scoring_though_generators_run_ahead() -> None:
    run = Run("generator-0", "learner-0", "reward_workers-0")
    run.busy("generator-0", Cause.GENERATE, 0, 5)
    ahead = run.open("generator-0", Cause.GENERATE, 5)  # a group of a later step: it ends after the wait
    with stage(run, "score", 5, 40):  # most of it in the queue
        run.busy("reward_workers-0", Cause.SCORE, 30, 40)
    run.busy("learner-0", Cause.LEARN, 40, 50)
    run.close(ahead, 60)
    run.settle(60, final=True)
    assert run.of("learner-0")[:3] == [("wait:generator", 0, 5), ("wait:score", 5, 40), ("learn", 40, 50)]


def test_of_two_stages_at_once_the_learner_waits_for_the_slower_one() -> None:
    run = Run("learner-0", "reference-0", "reward_workers-0")
    scoring = run.ledger.stage("score")
    scoring.__enter__()
    run.at(2)
    with run.ledger.stage("reference"):
        run.at(8)
        scoring.__exit__(None, None, None)
        run.at(20)
    run.busy("learner-0", Cause.LEARN, 20, 21)
    run.settle(21, final=True)
    assert run.of("learner-0") == [("wait:score", 0, 2), ("wait:reference", 2, 20), ("learn", 20, 21)]


def test_while_sampling_and_learning_overlap_scorers_wait_for_the_one_and_the_critic_for_the_other() -> None:
    run = Run("generator-0", "learner-0", "critic-0", "reference-0")
    learn = run.open("learner-0", Cause.LEARN, 0)
    run.busy("generator-0", Cause.GENERATE, 0, 10)
    run.close(learn, 15)
    run.settle(15, final=True)
    assert run.of("reference-0") == [("wait:generator", 0, 10), ("wait:learner", 10, 15)]
    assert run.of("critic-0") == [("wait:learner", 0, 15)]


def test_an_evaluation_beside_the_training_is_waited_for_by_nobody() -> None:
    run = Run("generator-0", "generator-1", "learner-0")
    evaluation = run.open("generator-1", Cause.EVALUATE, 0)
    run.busy("generator-0", Cause.GENERATE, 0, 10)
    run.busy("learner-0", Cause.LEARN, 10, 20)
    run.close(evaluation, 30)
    run.settle(30, final=True)
    assert run.of("learner-0")[0] == ("wait:generator", 0, 10)
    assert run.of("generator-1") == [("evaluate", 0, 30)]


def test_the_policy_waits_for_the_critic_and_generators_with_it() -> None:
    run = Run("generator-0", "learner-0", "critic-0")
    run.busy("learner-0", Cause.LEARN, 0, 10)
    run.busy("critic-0", Cause.LEARN, 10, 25)
    run.busy("learner-0", Cause.PUSH, 25, 27)
    run.settle(27, final=True)
    assert run.of("learner-0") == [("learn", 0, 10), ("wait:critic", 10, 25), ("push", 25, 27)]
    assert run.of("generator-0") == [("wait:learner", 0, 10), ("wait:critic", 10, 25), ("wait:push", 25, 27)]
    assert run.of("critic-0") == [("wait:learner", 0, 10), ("learn", 10, 25), ("wait:push", 25, 27)]


def test_a_rank_without_work_waits_for_its_peer() -> None:
    run = Run("learner-0", "learner-1")
    both = [run.open(f"learner-{i}", Cause.LEARN, 0) for i in (0, 1)]
    run.close(both[1], 6)
    run.close(both[0], 9)
    run.busy("learner-1", Cause.PUSH, 9, 10)
    run.settle(10, final=True)
    assert run.of("learner-1") == [("learn", 0, 6), ("wait:learner", 6, 9), ("push", 9, 10)]


def test_a_save_beside_an_update_costs_nothing() -> None:
    run = Run("learner-0")
    save = run.open("learner-0", Cause.CHECKPOINT, 0)
    run.busy("learner-0", Cause.LEARN, 4, 20)
    run.close(save, 25)
    run.settle(25, final=True)
    assert run.of("learner-0") == [("checkpoint", 0, 4), ("learn", 4, 20), ("checkpoint", 20, 25)]


def test_an_engine_that_stands_still_samples_nothing_but_samples_while_it_verifies() -> None:
    run = Run("generator-0")
    group = run.open("generator-0", Cause.GENERATE, 0)
    load = run.open("generator-0", Cause.PUSH, 10, is_decided=False)
    load.starts_with(Cause.PAUSE, 3)
    run.close(load, 18)
    run.close(group, 30)
    run.settle(30, final=True)
    assert run.of("generator-0") == [("generate", 0, 10), ("pause", 10, 13), ("generate", 13, 30)]


def test_what_a_lost_attempt_had_sampled_is_sampled_again() -> None:
    run = Run("generator-0", "generator-1")
    run.close(run.open("generator-0", Cause.GENERATE, 0, group="7"), 12, lost=True)
    run.close(run.open("generator-1", Cause.GENERATE, 15, group="7"), 40)
    run.close(run.open("generator-1", Cause.GENERATE, 50, group="7"), 60)  # the second attempt was the last one
    run.settle(60, final=True)
    assert run.of("generator-0")[0] == ("generate", 0, 12)
    assert [row for row in run.of("generator-1") if "wait" not in row[0] and row[0] != "idle"] == [
        ("prefill_again", 15, 27), ("generate", 27, 40), ("generate", 50, 60),
    ]  # fmt: skip


def test_a_worker_that_left_has_no_time_after_it_and_may_come_back() -> None:
    run = Run("generator-0", "learner-0")
    run.at(10)
    open_call = run.ledger.opened("generator-0", Cause.GENERATE)
    run.at(20)
    run.ledger.leave("generator-0")
    run.close(open_call, 30)  # its error arrives later
    run.at(50)
    run.ledger.join("generator-0", "generator")
    run.settle(60, final=True)
    assert [row for row in run.of("generator-0") if row[0] == "generate"] == [("generate", 10, 20)]
    assert sum(run.ledger.totals["generator-0"].values()) == 20 + 10
    assert sum(run.ledger.totals["learner-0"].values()) == 60


def test_an_open_push_and_a_learner_s_open_gap_are_left_to_the_next_settlement() -> None:
    run = Run("generator-0", "learner-0")
    run.busy("learner-0", Cause.LEARN, 0, 10)
    assert max(e.end for e in run.settle(30)) == 10, "for whom the learner waits is not known yet"
    learn = run.open("learner-0", Cause.LEARN, 40)
    push = run.open("generator-0", Cause.PUSH, 45, is_decided=False)
    assert max(e.end for e in run.settle(50)) == 45, "how long the engine stood still is not known yet"
    push.starts_with(Cause.PAUSE, 5)
    run.close(push, 55)
    run.close(learn, 60)
    run.settle(60, final=True)
    assert run.of("generator-0")[-3:] == [("pause", 45, 50), ("push", 50, 55), ("wait:learner", 55, 60)]


# --- whatever happens -----------------------------------------------------------------------------

WORKERS = ("generator-0", "generator-1", "learner-0", "learner-1", "critic-0", "reference-0", "reward_models.0-0")
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("open", "close", "lose", "leave", "join", "stage", "settle")),
        st.integers(0, 6), st.integers(0, 9), st.sampled_from(CALLED),
    ),
    max_size=60,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(EVENTS)
def test_causes_of_every_worker_sum_to_its_time_exactly_whatever_happens(
    events: list[tuple[str, int, int, Cause]],
) -> None:
    run = Run(*WORKERS)
    alive: dict[str, int] = dict.fromkeys(WORKERS, 0)  # since
    lived: dict[str, int] = dict.fromkeys(WORKERS, 0)
    calls: list[Call] = []
    stages: list[Callable[[], object]] = []
    for what, who, later, cause in events:
        run.at(run.clock.now + later)
        worker = WORKERS[who]
        if what == "open" and worker in alive:
            calls.append(run.ledger.opened(worker, cause, is_decided=cause != Cause.PUSH, group="g"))
        elif what in ("close", "lose") and calls:
            call = calls.pop(who % len(calls))
            if not call.is_decided and call.end > run.clock.now:
                call.starts_with(Cause.PAUSE, later)
            run.ledger.closed(call, lost=what == "lose")
        elif what == "leave" and worker in alive:
            run.ledger.leave(worker)
            lived[worker] += run.clock.now - alive.pop(worker)
        elif what == "join" and worker not in alive:
            run.ledger.join(worker, worker.rpartition("-")[0])
            alive[worker] = run.clock.now
        elif what == "stage":
            context = run.ledger.stage(STAGES[who % len(STAGES)])
            context.__enter__()
            stages.append(lambda context=context: context.__exit__(None, None, None))  # type: ignore[misc]
            if len(stages) > 2:
                stages.pop(0)()
        elif what == "settle":
            run.settle(run.clock.now)
    run.settle(run.clock.now, final=True)
    for worker in WORKERS:
        expected = lived[worker] + (run.clock.now - alive[worker] if worker in alive else 0)
        assert sum(run.ledger.totals[worker].values()) == expected
        rows = [e for e in run.entries if e.worker == worker]
        assert all(a.end <= b.start for a, b in pairwise(rows)), "entries overlap"
        assert all((e.cause == Cause.WAIT) == (e.whom in WAITED_FOR) for e in rows)
        assert all(e.cause == Cause.WAIT or e.whom == "" for e in rows)


def test_a_settled_ledger_keeps_nothing_but_its_totals() -> None:
    run = Run("generator-0", "learner-0")
    for step in range(50):
        run.busy("generator-0", Cause.GENERATE, 10 * step, 10 * step + 4)
        with stage(run, "score", 10 * step + 4, 10 * step + 5):
            pass
        run.busy("learner-0", Cause.LEARN, 10 * step + 5, 10 * step + 9)
        run.settle(10 * step + 9)
    assert sum(len(life.calls) for life in run.ledger._lives.values()) == 0
    assert run.ledger._stages == [] and run.ledger._counts == []


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_has_its_metric(cause: Cause) -> None:
    assert check(f"accounting/reward_models.0/{cause}_fraction").name == f"accounting/<name>/{cause}_fraction"
