"""Laws of the liveness machine, on clocks of their own, and of the task that drives it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import WorkerDiedError
from cluster.health import Dead, Health, Probe, Staffing, State, Suspect
from cluster.heartbeats import Heartbeats

DETECT_S = 8.0
seconds = st.floats(0.01, 20.0)


def watched(*members: int) -> Health:
    health = Health(DETECT_S)
    for member in members:
        health.join(member, 0.0, 100.0)
        health.started(member, 0.0)
    return health


def run_until(
    health: Health, end: float, answers: Callable[[int, float], float | None], late: Callable[[], float] = lambda: 0.0
) -> list[tuple[float, Dead]]:
    """Tick when the machine asks for it (``late`` later), answering probes after ``answers`` seconds, if at all."""
    now, wakes, deaths = 0.0, 0, list[tuple[float, Dead]]()
    coming: list[tuple[float, int]] = []
    while now < end:
        now = max(now, min([health.next_wake(), *(at for at, _ in coming), end]) + late())
        wakes += 1
        assert wakes < 5000, "ticks that come to nothing"
        # The tick before the answers that have arrived meanwhile: the worst order there is.
        for action in health.tick(now) if now >= health.next_wake() else []:
            if isinstance(action, Probe):
                delay = answers(action.member, now)
                coming += [] if delay is None else [(now + delay, action.member)]
            elif isinstance(action, Dead):
                deaths.append((now, action))
        for answer in [c for c in coming if c[0] <= now]:
            coming.remove(answer)
            health.heard(answer[1], now)
    return deaths


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 0.7 * DETECT_S), min_size=1, max_size=8))
def test_a_member_that_answers_within_three_quarters_of_the_deadline_lives(delays: list[float]) -> None:
    turn = cycle(delays)
    health = watched(1)
    assert run_until(health, 30 * DETECT_S, lambda member, now: next(turn)) == []
    assert health.state(1) in (State.ALIVE, State.SUSPECT)


@settings(deadline=None)
@given(st.floats(0.0, 50.0))
def test_silence_is_noticed_within_detect_s_of_the_last_answer_and_others_are_not_touched(falls_silent: float) -> None:
    health = watched(1, 2)
    heard = [0.0]

    def answers(member: int, now: float) -> float | None:
        if member == 1 and now >= falls_silent:
            return None
        if member == 1:
            heard[0] = now
        return 0.0

    ((at, dead),) = run_until(health, 100.0, answers)
    assert dead.member == 1 and health.state(2) is State.ALIVE
    assert at - heard[0] == pytest.approx(DETECT_S) and dead.silent_s == pytest.approx(DETECT_S)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 40 * DETECT_S), min_size=1, max_size=10))
def test_a_watcher_that_sleeps_kills_nobody_who_answers(pauses: list[float]) -> None:
    turn = cycle(pauses)
    health = watched(1, 2)
    assert run_until(health, 100 * DETECT_S, lambda member, now: 0.1 * DETECT_S, lambda: next(turn)) == []


def test_a_suspect_gets_a_mark_once_and_comes_back_when_heard() -> None:
    health = watched(1)
    assert health.tick(2.0) == [Probe(1)]
    assert health.tick(4.0) == [Suspect(1, 4.0)] and health.state(1) is State.SUSPECT
    assert health.tick(4.5) == []
    assert health.heard(1, 5.0) and health.state(1) is State.ALIVE
    assert not health.heard(1, 5.5)
    assert health.next_wake() == 7.5


def test_a_work_result_counts_as_a_heartbeat() -> None:
    health = watched(1)
    for now in range(1, 50):
        health.heard(1, float(now))
        assert health.tick(now + 0.5) == []


@settings(deadline=None)
@given(st.sampled_from(["starting", "alive", "suspect"]), st.lists(st.sampled_from("shfl"), max_size=6))
def test_dead_is_final_and_told_once(state: str, later: str) -> None:
    health = Health(DETECT_S)
    health.join(1, 0.0, 100.0)
    if state != "starting":
        health.started(1, 0.0)
    if state == "suspect":
        health.tick(2.0)
        health.tick(4.0)
    dead = health.failed(1, 5.0, "killed")
    assert dead is not None and dead.reason == "killed"
    for what in later:
        {"s": health.started, "h": health.heard}.get(what, lambda *_: None)(1, 6.0)
        assert what != "f" or health.failed(1, 6.0, "again") is None
        if what == "l":
            health.leave(1)
    assert health.state(1) is State.DEAD and health.tick(200.0) == [] and health.members(State.DEAD) == [1]


def test_one_that_left_is_neither_asked_nor_dead_and_its_number_is_used_up() -> None:
    health = watched(1)
    health.leave(1)
    assert health.tick(100.0) == [] and health.failed(1, 100.0, "exit") is None
    with pytest.raises(ValueError, match="member 1 has joined before"):
        health.join(1, 0.0, 1.0)


def test_a_start_has_a_deadline_of_its_own_and_is_not_asked() -> None:
    health = Health(DETECT_S)
    health.join(3, 0.0, 60.0)
    assert health.next_wake() == 60.0 and health.tick(59.0) == []
    (dead,) = health.tick(60.0)
    assert isinstance(dead, Dead) and dead.reason == "not ready after 60 s"


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 100.0)), max_size=20), st.integers(0, 5), st.integers(0, 5))
def test_starts_never_exceed_the_target_and_wait_longer_after_each_failure(
    tries: list[tuple[bool, float]], target: int, there: int
) -> None:
    staffing, now = Staffing(target, 2.0), 0.0
    for works, waited in tries:
        now += waited
        assert staffing.num_to_start(there, now) in (0, max(0, target - there))
        if works:
            staffing.reset()
            assert staffing.num_to_start(there, now) == max(0, target - there)
        else:
            before = staffing.num_failed
            pause = staffing.failed(now)
            assert pause == 2.0 * 2 ** min(before, 6)
            assert staffing.num_to_start(0, now + 0.99 * pause) == 0
            assert staffing.num_to_start(0, now + 1.01 * pause) == target


def test_heartbeats_ask_and_tell_of_suspicion_recovery_and_death() -> None:
    async def law() -> list[object]:
        told: list[object] = []
        beats: Heartbeats
        answering = asyncio.Event()
        dead = asyncio.Event()

        def on_change(change: object) -> None:
            told.append(change if isinstance(change, int) else (type(change).__name__, change.member))  # type: ignore[attr-defined]
            if isinstance(change, Suspect):
                answering.set()
            if isinstance(change, Dead):
                dead.set()

        async def ping(member: int) -> None:
            if member == 2:
                raise WorkerDiedError("worker[2] died")
            if not answering.is_set():
                await answering.wait()
                return
            await asyncio.Event().wait()

        beats = Heartbeats(Health(0.4), ping, on_change)
        for member in (1, 2):
            beats.join(member, 10.0)
            beats.started(member)
        running = asyncio.create_task(beats.run())
        try:
            async with asyncio.timeout(30):
                while ("Dead", 1) not in told:
                    await dead.wait()
                    dead.clear()
        finally:
            running.cancel()
        return told

    told = asyncio.run(law())
    assert told.index(("Dead", 2)) < told.index(("Suspect", 1)) < told.index(1) < told.index(("Dead", 1))
