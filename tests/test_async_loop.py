"""The loop above staleness 0, in virtual time: bounds, overlap, faults, kills and resumes."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.errors import GroupFailedError, NoGeneratorError, VerificationError
from trainers.evaluation import evaluate
from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion
from trainers.filtering import FilterSettings, RefillLimit, useless
from trainers.ledger import Ledger, Trained
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.protocols import GeneratedGroup, GroupRequest, LearnerGroup, PushReport, UpdateReport

G, SAMPLES, MAX_ATTEMPTS = 2, 4, 3
T = TypeVar("T")


class Jump(selectors.DefaultSelector):
    """Nobody waits: the time that would pass has passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if timeout is None and not ready:
            raise AssertionError("stuck: everyone waits for somebody else")
        self.now += 0.0 if ready else timeout or 0.0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jump = Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.now


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class World:
    """Every part in one fake; durations in virtual seconds."""

    generate_s: Callable[[int], float] = lambda position: 4.0
    update_s: float = 4.0
    push_s: float = 0.0
    evaluate_s: float = 0.0
    save_s: float = 0.0
    loses: Callable[[int, int], bool] = lambda position, attempt: False
    deaths: int = 1  # generators that die over a group before the fleet gives it back
    version: WeightVersion = field(default_factory=lambda: WeightVersion(0, 0))
    calls: list[tuple[float, str, int]] = field(default_factory=list)  # when, what, position or step
    batches: list[list[LearnerGroup]] = field(default_factory=list)
    rows: dict[int, Mapping[str, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    saved: tuple[int, str, list[LearnerGroup]] | None = None  # step, ledger, spooled groups
    trained: list[int] = field(default_factory=list)  # what the surviving weights were trained on
    loop: TrainingLoop | None = None

    def at(self, position: int) -> Prompt:
        return Prompt(f"p{position}", np.array([1, 2], np.int32), f"prompt {position}")

    def occurrence(self, position: int) -> int:
        return 0

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        name = request.group_id
        position = int(name) if name.isdigit() else -1
        self.attempts[position] = self.attempts.get(position, 0) + 1
        lost = self.loses(position, self.attempts[position])
        self.calls.append((now(), "generate", position))
        oldest = self.version
        await asyncio.sleep(self.generate_s(position) if position >= 0 else self.evaluate_s)
        if lost:
            raise GroupFailedError(name, (f"generator-0 died, attempt {self.attempts[position]}",) * self.deaths)
        n = request.num_samples
        return GeneratedGroup(
            GroupSummary(name, request.prompt.prompt_id, 2, tuple(range(1, n + 1)), ("stop",) * n, oldest,
                         self.version, "g", 0.0, (self.version,) * (n - 1) + (oldest,)),
            f"tokens of {name}",
        )  # fmt: skip

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        totals = np.arange(group.summary.num_samples, dtype=np.float64)
        return GroupRewards(group.summary.group_id, totals, {"r": totals})

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        self.calls.append((now(), "update", step))
        await asyncio.sleep(self.update_s)
        self.batches.append(list(groups))
        self.trained += positions(groups)
        return UpdateReport({"loss": 0.0}, {}, 0.0, 1)

    async def save(self, directory: str) -> None: ...

    async def push(self, version: WeightVersion) -> PushReport:
        await asyncio.sleep(self.push_s)
        self.version = version
        self.calls.append((now(), "pushed", version.step))
        return PushReport(version, 1, self.push_s, 0.0, 1)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows[step] = metrics

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def phase(self, name: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    async def between(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        if not self.evaluate_s:
            return {}
        self.calls.append((now(), "evaluate", step))
        report = await evaluate(
            [self.at(-1)] * 3, self, self, version=version, step=step, num_samples=SAMPLES, temperature=1.0,
            max_tokens=4, reward="r", seed=0,
        )  # fmt: skip
        self.calls.append((now(), "evaluated", step))
        return report.metrics

    async def after(self, step: int, version: WeightVersion, last: bool) -> None:
        assert self.loop is not None
        await asyncio.sleep(self.save_s)
        state, finished = self.loop.snapshot()
        self.saved = step, json.dumps(state), finished
        self.calls.append((now(), "saved", step))

    def start(self, num_steps: int, max_staleness: int, *, ppo: Any = None, resume: bool = False,
              filtering: FilterSettings | None = None) -> TrainingLoop:  # fmt: skip
        parts = LoopParts(
            prompts=self, generator=self, scorer=self, reference=None, learner=self, publisher=self, recorder=self,
            between_steps=self.between, on_update=lambda step, batch, report: None, after_record=self.after, ppo=ppo,
            clock=now,
        )  # fmt: skip
        first, ledger, finished = 0, Ledger(MAX_ATTEMPTS), []
        if resume and self.saved is not None:
            first, state, finished = self.saved
            ledger = Ledger.restore(json.loads(state), set(positions(finished)), MAX_ATTEMPTS)
        self.version = WeightVersion(self.version.incarnation + resume, first)
        del self.trained[first * G :]
        chosen = LoopSettings(num_steps, G, SAMPLES, max_staleness, 1.0, 8, 0)
        if filtering is not None:
            chosen = replace(chosen, filtering=filtering)
        self.loop = TrainingLoop(chosen, parts, first, self.version, 0, ledger, finished)
        return self.loop


def positions(groups: Sequence[LearnerGroup]) -> list[int]:
    return [int(g.summary.group_id) for g in groups]


def run(world: World, num_steps: int, max_staleness: int, **more: Any) -> float:
    """Virtual seconds that the run took."""

    async def main() -> float:
        await world.start(num_steps, max_staleness, **more).run()
        return now()

    return in_virtual_time(main())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.lists(st.floats(0.1, 40.0), min_size=3, max_size=9), st.floats(0.1, 9.0))
def test_every_group_is_trained_once_within_its_bound_and_nothing_is_sampled_for_nobody(
    max_staleness: int, durations: list[float], update_s: float
) -> None:
    world = World(lambda p: durations[p % len(durations)], update_s, push_s=0.3)
    run(world, 8, max_staleness)
    assert sorted(world.trained) == list(range(8 * G))
    assert len([c for c in world.calls if c[1] == "generate"]) == 8 * G
    for step, batch in enumerate(world.batches):
        assert positions(batch) == sorted(positions(batch)), "in stream order"
        lags = [step - g.summary.oldest_version.step for g in batch]
        assert min(lags) >= 0 and max(lags) <= max_staleness
        assert world.rows[step + 1]["staleness/max"] == max(lags)
    if max_staleness == 0:
        assert world.trained == list(range(8 * G))


def test_one_step_of_staleness_hides_the_shorter_of_generation_and_training() -> None:
    """Four seconds each: nine of ten updates run while the next groups are sampled."""
    sync, overlapped = World(), World()
    assert run(sync, 10, 0) == pytest.approx(80.0)
    assert run(overlapped, 10, 1) == pytest.approx(44.0)
    assert sync.rows[5]["time/wait_groups_s"] == pytest.approx(4.0)
    assert overlapped.rows[5]["time/wait_groups_s"] == pytest.approx(0.0)
    assert overlapped.rows[5]["throughput/generate_tokens_per_s"] == pytest.approx(G * 10 / 4.0)
    assert "time/generate_s" in sync.rows[5] and "time/generate_s" not in overlapped.rows[5]


def test_the_learner_waits_for_a_straggler_only_at_its_bound_and_says_so() -> None:
    """Position 0 takes 100 s, everyone else 1 s and an update 1 s; with staleness 3 the third lap may pass it."""
    world = World(lambda p: 100.0 if p == 0 else 1.0, update_s=1.0)
    run(world, 6, 3)
    assert [0 in positions(batch) for batch in world.batches] == [False, False, False, True, False, False]
    waited = [world.rows[step]["time/wait_bound_s"] for step in range(1, 7)]
    assert waited[3] == pytest.approx(100.0 - 4.0) and sum(waited) == waited[3]
    assert world.rows[4]["staleness/max"] == 3.0


def test_groups_run_on_while_the_learner_pushes_evaluates_and_saves_and_a_push_lands_in_them() -> None:
    world = World(lambda p: 9.0, update_s=2.0, push_s=1.0, evaluate_s=3.0, save_s=2.0)
    run(world, 6, 1)
    spans = [(g.summary.oldest_version.step, g.summary.newest_version.step) for b in world.batches for g in b]
    assert any(old < new for old, new in spans), "some group was sampled across a push"
    for what, until in (("evaluate", "evaluated"), ("evaluated", "saved")):
        begin, end = (next(t for t, kind, step in world.calls if (kind, step) == (k, 3)) for k in (what, until))
        under_way = [when for when, kind, _ in world.calls if kind == "generate" and begin - 9.0 < when < end]
        assert under_way, f"nothing was sampled from {what} to {until}"
    # evaluate() itself refuses groups of another version; and no push came in between:
    order = [kind for _, kind, _ in world.calls if kind in ("evaluate", "evaluated", "pushed")]
    assert all(order[i + 1] == "evaluated" for i, kind in enumerate(order) if kind == "evaluate")


def test_lag_is_told_by_length_of_the_samples() -> None:
    """Of a group that a push landed in, only the longest sample began before it."""
    world = World(lambda p: 5.0, update_s=2.0)
    run(world, 6, 1)
    row = world.rows[3]
    quartiles = [row[f"staleness/length_quartile_{i}"] for i in (1, 2, 3, 4)]
    assert quartiles == [0.0, 0.0, 0.0, 1.0]


def test_a_generator_that_missed_a_push_ends_the_run_by_name() -> None:
    world = World()
    push = world.push

    async def forgotten(version: WeightVersion) -> PushReport:
        report = await push(version)
        world.version = WeightVersion(0, 0)
        return report

    world.push = forgotten  # type: ignore[method-assign]
    with pytest.raises(VerificationError, match=r"g sampled group \d+ under 0.0.*missed a push"):
        run(world, 5, 1)


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_lost_group_comes_again_and_one_that_is_lost_too_often_makes_room_for_another(max_staleness: int) -> None:
    world = World(loses=lambda position, attempt: position == 3 or (position == 2 and attempt < 3))
    run(world, 4, max_staleness)
    assert sorted(world.trained) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert world.attempts[2] == 3 and world.attempts[3] == 3
    lost = [(e["position"], e["again"]) for e in world.events if e["kind"] == "group_lost"]
    assert sorted(lost) == [(2, True), (2, True), (3, False), (3, True), (3, True)]
    assert world.loop is not None
    assert world.loop.rollouts.ledger.counts == {"trained": 8, "dropped": 0, "failed": 1}


@pytest.mark.parametrize("fate", ["lost", "dropped"])
def test_a_straggler_that_comes_to_nothing_is_waited_for_no_longer(fate: str) -> None:
    """Position 0 takes 100 s and with staleness 3 holds up the fourth lap, as long as it may still be in its batch."""
    world, filtering = filtered(lambda p: fate == "dropped" and p == 0)
    world.generate_s = lambda p: 100.0 if p == 0 or p > 11 else 1.0
    if fate == "lost":
        world.loses = lambda position, attempt: position == 0 and attempt == 1
    run(world, 6, 3, filtering=filtering)
    assert [when for when, kind, step in world.calls if (kind, step) == ("update", 3)] == [pytest.approx(100.0)]
    assert world.rows[4]["time/wait_bound_s"] == pytest.approx(100.0 - 4.0)


def test_what_the_fleet_has_tried_often_enough_is_not_tried_again() -> None:
    world = World(loses=lambda position, attempt: position == 3, deaths=3)
    run(world, 4, 1)
    assert sorted(world.trained) == [0, 1, 2, 4, 5, 6, 7, 8] and world.attempts[3] == 1


def test_when_more_groups_fail_than_a_step_holds_the_run_ends_with_the_reason() -> None:
    with pytest.raises(GroupFailedError, match="attempt 3"):
        run(World(loses=lambda position, attempt: position > 1), 4, 1)


@pytest.mark.parametrize("max_staleness", [0, 3])
def test_without_a_generator_the_run_ends_at_once_and_no_group_is_blamed(max_staleness: int) -> None:
    world = World()

    async def nobody(request: GroupRequest) -> GeneratedGroup:
        raise NoGeneratorError(request.group_id, ("no generator is left: the last one went",))

    world.generate = nobody  # type: ignore[method-assign]
    with pytest.raises(NoGeneratorError, match="no generator is left"):
        run(world, 4, max_staleness)
    assert world.loop is not None and not world.events
    ledger = world.loop.rollouts.ledger
    assert len(ledger.in_flight) == (max_staleness + 1) * G and ledger.counts["failed"] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.floats(0.1, 20.0), min_size=3, max_size=7),
    st.lists(st.floats(0.5, 60.0), min_size=1, max_size=5),
)
def test_killed_at_any_moment_and_resumed_a_run_trains_what_an_uninterrupted_one_does(
    max_staleness: int, durations: list[float], kills: list[float]
) -> None:
    world = World(lambda p: durations[p % len(durations)], update_s=1.0, push_s=0.2, save_s=0.5)
    for kill_s in kills:

        async def killed(kill_s: float = kill_s) -> bool:
            task = asyncio.create_task(world.start(9, max_staleness, resume=world.saved is not None).run())
            done, _ = await asyncio.wait([task], timeout=kill_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return bool(done)

        if in_virtual_time(killed()):
            break
    resumed = world.saved is not None
    if not resumed:
        world = replace(world, trained=[], version=WeightVersion(0, 0))
    run(world, 9, max_staleness, resume=resumed)
    assert sorted(world.trained) == list(range(9 * G))
    assert world.loop is not None and world.loop.rollouts.ledger.frontier == 9 * G


def test_finished_groups_survive_a_stop_and_only_what_was_in_flight_is_sampled_again() -> None:
    world = World(lambda p: 50.0 if p == 0 else 1.0, update_s=1.0)

    async def stopped() -> None:
        task = asyncio.create_task(world.start(9, 2).run())
        await asyncio.sleep(5.0)
        assert world.loop is not None
        world.loop.stop()
        await task
        await world.after(world.loop.step, world.version, False)

    in_virtual_time(stopped())
    assert world.saved is not None
    state, kept = json.loads(world.saved[1]), positions(world.saved[2])
    assert kept and 0 not in kept
    before = dict(world.attempts)
    run(world, 9, 2, resume=True)
    assert [p for p in before if world.attempts[p] > before[p]] == [
        row["position"] for row in state["entries"] if row["state"] == "in_flight"
    ]
    assert sorted(world.trained) == list(range(9 * G))
    assert world.loop is not None and not any(
        isinstance(world.loop.rollouts.ledger.entry(p), Trained) for p in range(9 * G, 9 * G + 4)
    )


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("told_to_stop", [False, True])
def test_a_cancelled_run_says_so_even_when_it_was_told_to_stop_before(max_staleness: int, told_to_stop: bool) -> None:
    """After a second Ctrl-C, in the middle of an update: whoever hears of no cancellation would save it as a step."""
    world = World(lambda p: 1.0, update_s=100.0)

    async def cancelled() -> None:
        task = asyncio.create_task(world.start(9, max_staleness).run())
        await asyncio.sleep(5.0)
        assert world.loop is not None
        if told_to_stop:
            world.loop.stop()
        await asyncio.sleep(5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_virtual_time(cancelled())
    assert [kind for _, kind, _ in world.calls if kind != "generate"] == ["update"] and not world.batches


def test_a_synchronous_run_saves_no_half_lap() -> None:
    world = World(lambda p: 50.0 if p == 1 else 1.0)

    async def stopped() -> None:
        task = asyncio.create_task(world.start(9, 0).run())
        await asyncio.sleep(5.0)
        assert world.loop is not None
        world.loop.stop()
        await task
        await world.after(0, world.version, False)

    in_virtual_time(stopped())
    assert world.saved is not None and world.saved[2] == []
    run(world, 3, 0, resume=True)
    assert world.attempts[0] == 2 and world.trained == list(range(3 * G))


# --- with a critic ------------------------------------------------------------------------------------


class Lap:
    """A PPO lap whose critic writes down when it was asked for values, and of what."""

    def __init__(self, world: World) -> None:
        self.world, self.critic = world, self

    async def values(self, group: GeneratedGroup) -> str:
        self.world.calls.append((now(), "values", int(group.summary.group_id)))
        return f"values of {group.payload}"

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        assert [g.values_payload for g in groups] == [f"values of tokens of {p}" for p in positions(groups)]
        return await self.world.update(groups, step)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_values_are_those_of_the_critic_before_this_very_update(max_staleness: int) -> None:
    world = World(lambda p: 3.0)
    run(world, 4, max_staleness, ppo=Lap(world))
    order = [(kind, step) for _, kind, step in world.calls if kind in ("values", "update")]
    for step, batch in enumerate(world.batches):
        end = order.index(("update", step))
        begin = 0 if step == 0 else order.index(("update", step - 1)) + 1
        assert sorted(order[begin:end]) == [("values", p) for p in sorted(positions(batch))]


# --- filtering ----------------------------------------------------------------------------------------


def filtered(
    equal: Callable[[int], bool], max_refills: int = 4, at_limit: str = "keep"
) -> tuple[World, FilterSettings]:
    """A world in which the samples of some positions all get the same reward."""
    world = World(generate_s=lambda p: 1.0 + p % 3, update_s=1.0)

    async def score(group: GeneratedGroup) -> GroupRewards:
        name, n = group.summary.group_id, group.summary.num_samples
        totals = np.ones(n) if equal(int(name)) else np.arange(n, dtype=np.float64)
        return GroupRewards(name, totals, {"r": totals})

    world.score = score  # type: ignore[method-assign]
    chosen = FilterSettings.model_validate(
        {"zero_variance": True, "max_refills": max_refills, "at_limit": at_limit}
    )
    return world, chosen


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_groups_without_a_spread_are_replaced_and_every_one_of_them_is_counted(max_staleness: int) -> None:
    world, filtering = filtered(lambda p: p % 3 == 0)
    run(world, 6, max_staleness, filtering=filtering)
    assert sorted(world.trained) == [p for p in range(18) if p % 3]
    rows = [world.rows[step] for step in range(1, 7)]
    assert {row["groups/num_trained"] for row in rows} == {G}
    assert sum(row["groups/num_generated"] for row in rows) == 18 + (world.attempts.get(18, 0))
    assert sum(row["groups/num_dropped"] for row in rows) >= 6
    assert all(row["reward"] == 1.5 for row in rows)
    dropped = [row for row in rows if row["groups/num_dropped"]]
    for row in dropped:  # what a reader of the unfiltered run would have seen
        total = G + row["groups/num_dropped"]
        assert row["frac_reward_zero_std"] == pytest.approx(row["groups/num_dropped"] / total)
        assert row["groups/reward_generated"] == pytest.approx((1.5 * G + row["groups/num_dropped"]) / total)
    assert world.loop is not None
    counts = world.loop.rollouts.ledger.counts
    assert counts["trained"] == 12 and counts["dropped"] == sum(row["groups/num_dropped"] for row in rows)


def test_nothing_is_filtered_unless_asked_for() -> None:
    world, _ = filtered(lambda p: True)
    run(world, 2, 0)
    assert world.trained == [0, 1, 2, 3] and world.rows[1]["groups/num_dropped"] == 0
    assert "groups/reward_generated" not in world.rows[1] and world.rows[1]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_at_the_limit_useless_groups_stay_and_the_step_ends(max_staleness: int) -> None:
    world, filtering = filtered(lambda p: True, max_refills=3)
    run(world, 3, max_staleness, filtering=filtering)
    assert [len(batch) for batch in world.batches] == [G] * 3
    assert all(row["groups/num_dropped"] <= 3 * G for row in world.rows.values())
    assert world.rows[1]["groups/num_dropped"] == 3 * G and world.rows[1]["frac_reward_zero_std"] == 1


def test_at_the_limit_the_run_ends_with_what_to_do_if_that_is_wanted() -> None:
    world, filtering = filtered(lambda p: p > 1, max_refills=2, at_limit="fail")
    with pytest.raises(RefillLimit, match=r"max_refills = 2: 4 groups were dropped for step 2.*medium difficulty"):
        run(world, 3, 0, filtering=filtering)


NAN = float("nan")


@pytest.mark.parametrize(
    ("totals", "reasons", "mask_truncated", "expected"),
    [
        ([1.0, 1.0, 1.0], "sss", False, "no spread"),
        ([1.0, 1.0, 0.0], "sss", False, None),
        ([1.0, 1.0, NAN], "sss", False, "no spread"),
        ([NAN, NAN, NAN], "sss", False, "no sample may be trained on"),
        ([1.0, NAN, NAN], "sss", False, "no spread"),
        ([1.0, 1.0, 0.0], "ssa", False, "no spread"),
        ([1.0, 1.0, 0.0], "ssl", True, None),
        ([1.0, 0.0, 0.5], "lll", True, "no sample may be trained on"),
        ([1.0, 0.0, 0.5], "lll", False, None),
    ],
)
def test_a_group_is_useless_exactly_when_it_has_no_advantage(
    totals: list[float], reasons: str, mask_truncated: bool, expected: str | None
) -> None:
    """Masked and aborted samples are no part of the baseline; truncated ones are, even where they are not trained."""
    names: dict[str, Any] = {"s": "stop", "l": "length", "a": "abort"}
    version, n = WeightVersion(0, 0), len(totals)
    summary = GroupSummary("0", "p", 2, (3,) * n, tuple(names[r] for r in reasons), version, version, "g", 0.0)
    assert useless(summary, GroupRewards("0", np.array(totals), {}), mask_truncated) == expected


@pytest.mark.parametrize(
    ("right", "expected"),
    [([1.0, 1.0, 1.0], "no spread"), ([1.0, 0.0, 1.0], None), ([1.0, NAN, 1.0], "no spread"), ([NAN] * 3, None)],
)
def test_with_filtering_by_a_part_no_other_part_makes_a_group_worth_training_on(
    right: list[float], expected: str | None
) -> None:
    version = WeightVersion(0, 0)
    summary = GroupSummary("0", "p", 2, (3, 4, 5), ("stop",) * 3, version, version, "g", 0.0)
    parts = {"right": np.array(right), "overlong": np.array([0.0, -0.5, -1.0])}
    rewards = GroupRewards("0", np.nan_to_num(parts["right"]) + parts["overlong"], parts)
    assert useless(summary, rewards, False, "right") == expected and useless(summary, rewards, False) is None
