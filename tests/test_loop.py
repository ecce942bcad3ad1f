"""The loop, with fakes where timing and faults are the subject."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from trainers.algorithms import AlgorithmSettings
from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.ppo_lap import PPOLap, PPOState
from trainers.protocols import (
    CriticReport,
    GeneratedGroup,
    GroupRequest,
    LearnerGroup,
    PreparedBatch,
    PushReport,
    UpdateReport,
)

DEADLINE_S = 20.0


class World:
    """Every part in one fake, writing down what happens."""

    def __init__(self, delays: Sequence[int] = (), fail: str = "") -> None:
        self.log: list[str] = []
        self.batches: list[list[str]] = []
        self.requests: list[GroupRequest] = []
        self.version = WeightVersion(0, 0)
        self.delays, self.fail = delays, fail
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.hold: asyncio.Event | None = None
        self.asked = asyncio.Event()

    def at(self, position: int) -> Prompt:
        return Prompt(f"p{position % 4}", np.array([1, 2], np.int32), f"prompt {position % 4}")

    def occurrence(self, position: int) -> int:
        return position // 4

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.requests.append(request)
        self.asked.set()
        self.log.append(f"generate {request.group_id} under {self.version.step}")
        if self.fail == "generate":
            raise RuntimeError("engine died")
        if self.hold is not None:
            await self.hold.wait()
        for _ in range(self.delays[int(request.group_id) % len(self.delays)] if self.delays else 0):
            await asyncio.sleep(0)
        n = request.num_samples
        summary = GroupSummary(
            request.group_id, request.prompt.prompt_id, 2, (3,) * n, ("stop",) * n, self.version, self.version, "g", 0.0
        )
        return GeneratedGroup(summary, None)

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        totals = np.arange(group.summary.num_samples, dtype=np.float64)
        return GroupRewards(group.summary.group_id, totals, {"r": totals})

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        self.log.append(f"update {step}")
        self.batches.append([g.summary.group_id for g in groups])
        if self.fail == "update":
            raise ArithmeticError("loss is NaN")
        return UpdateReport({"loss": 0.0}, {}, 0.0, 1)


    async def push(self, version: WeightVersion) -> PushReport:
        self.log.append(f"push {version.step}")
        self.version = version
        return PushReport(version, 1, 0.0, 0.0, 1)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, metrics))

    def event(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...

    async def between(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        self.log.append(f"between {step}{' last' if last else ''}")
        return {}

    def loop(self, num_steps: int = 3, first_step: int = 0, ppo: PPOLap | None = None) -> TrainingLoop:
        parts = LoopParts(
            prompts=self, generator=self, scorer=self, reference=None, learner=self, publisher=self, recorder=self,
            between_steps=self.between, on_update=lambda step, batch, report: None,
            ppo=ppo,
        )  # fmt: skip
        self.version = WeightVersion(0, first_step)
        settings = LoopSettings(num_steps, 2, 2, 0, 1.0, 8, 0)
        return TrainingLoop(settings, parts, first_step, WeightVersion(0, first_step))


def run(loop: TrainingLoop) -> None:
    asyncio.run(asyncio.wait_for(loop.run(), DEADLINE_S))


def test_a_lap_is_generate_update_push_and_the_next_one_samples_new_weights() -> None:
    world = World()
    run(world.loop(2))
    assert world.log == [
        "between 0", "generate 0 under 0", "generate 1 under 0", "update 0", "push 1", "between 1",
        "generate 2 under 1", "generate 3 under 1", "update 1", "push 2", "between 2 last",
    ]  # fmt: skip


@pytest.mark.parametrize("delays", [(0, 9), (9, 0), (3, 1, 7, 2)])
def test_the_batch_does_not_depend_on_who_finished_first(delays: tuple[int, ...]) -> None:
    world = World(delays)
    run(world.loop(3))
    assert world.batches == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_two_prompts_never_share_a_stream_and_a_repeated_one_draws_anew() -> None:
    world = World()
    run(world.loop(4))
    seeds = [s for r in world.requests for s in r.seeds]
    assert len(set(seeds)) == len(seeds)


def test_the_same_position_issued_again_has_the_same_seeds() -> None:
    first, second = World(), World()
    run(first.loop(2))
    run(second.loop(2, first_step=1))
    again = {r.group_id: r.seeds for r in second.requests}
    assert {r.group_id: r.seeds for r in first.requests if r.group_id in again} == again


@pytest.mark.parametrize(("fail", "error"), [("generate", RuntimeError), ("update", ArithmeticError)])
def test_the_first_failure_ends_the_run_with_its_own_error(fail: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(World(fail=fail).loop())


def test_a_stop_while_sampling_returns_at_once_and_trains_nothing_more() -> None:
    world = World()
    loop = world.loop()

    async def scenario() -> None:
        world.hold = asyncio.Event()  # never set: the group would sample for ever
        task = asyncio.create_task(loop.run())
        await asyncio.wait_for(world.asked.wait(), DEADLINE_S)
        loop.stop()
        await asyncio.wait_for(task, DEADLINE_S)

    asyncio.run(scenario())
    assert loop.step == 0
    assert world.batches == []


def test_every_step_is_recorded_once_with_its_metrics() -> None:
    world = World()
    run(world.loop(3))
    assert [step for step, _ in world.rows] == [1, 2, 3]
    metrics = world.rows[-1][1]
    assert metrics["reward"] == 0.5
    assert metrics["staleness/max"] == 0.0
    assert metrics["num_tokens"] == 3 * 2 * 2 * (2 + 3)


# --- with a critic ------------------------------------------------------------------------------

KL = 40.0  # nats a sequence that every batch reports
TOGETHER = 2  # parties of a meeting


class Meeting:
    """Returns once two have come: whoever is made to wait for the other proves that both were under way."""

    def __init__(self) -> None:
        self.parties = asyncio.Barrier(TOGETHER)

    async def wait(self) -> None:
        await self.parties.wait()


class PolicyAndCritic:
    """Both trained models, writing into the world's log."""

    def __init__(self, world: World, meeting: Meeting | None = None) -> None:
        self.world, self.meeting = world, meeting
        self.coefs: list[float] = []
        self.critic = _Critic(self)

    async def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> PreparedBatch:
        assert [g.values_payload for g in groups] == [f"values of {g.summary.group_id}" for g in groups]
        self.world.log.append("prepare")
        self.coefs.append(kl_coef)
        return PreparedBatch("targets", {"objective/kl": KL}, {}, KL, 4)

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Any, kl_coef: float) -> UpdateReport:
        assert targets == "targets" and kl_coef == self.coefs[-1]
        await self.train("policy")
        return UpdateReport({"loss": 0.0}, {}, 0.0, 1)

    async def train(self, who: str) -> None:
        self.world.log.append(f"{who} begins")
        if self.meeting is not None:
            await self.meeting.wait()
        self.world.log.append(f"{who} ends")


class _Critic:
    def __init__(self, both: PolicyAndCritic) -> None:
        self.both = both

    async def values(self, group: GeneratedGroup) -> str:
        self.both.world.log.append(f"values {group.summary.group_id}")
        return f"values of {group.summary.group_id}"

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Any) -> CriticReport:
        assert targets == "targets"
        await self.both.train("critic")
        return CriticReport({"critic/loss": 1.0}, 0.0)


def ppo(both: PolicyAndCritic, *, overlap: bool = False, state: PPOState | None = None, **keys: Any) -> PPOLap:
    algorithm = AlgorithmSettings.model_validate({"name": "ppo", "kl_coef": 0.1, "ppo": keys})
    return PPOLap(both, both.critic, algorithm, state or PPOState.initial(algorithm), overlap)


def test_with_a_critic_its_values_come_first_and_the_push_after_both_updates() -> None:
    world = World()
    run(world.loop(1, ppo=ppo(PolicyAndCritic(world))))
    assert world.log == [
        "between 0", "generate 0 under 0", "generate 1 under 0", "values 0", "values 1", "prepare",
        "policy begins", "policy ends", "critic begins", "critic ends", "push 1", "between 1 last",
    ]  # fmt: skip
    metrics = world.rows[0][1]
    assert {"loss", "critic/loss", "objective/kl", "kl_coef"} <= metrics.keys()
    assert metrics["time/learn_overlap_s"] == 0.0


def test_placed_apart_policy_and_critic_are_updated_at_the_same_time() -> None:
    async def scenario() -> None:
        world = World()
        loop = world.loop(2, ppo=ppo(PolicyAndCritic(world, Meeting()), overlap=True))
        await asyncio.wait_for(loop.run(), DEADLINE_S)  # one after the other, the first would wait for ever
        for _, metrics in world.rows:
            shorter = min(metrics["time/learn_policy_s"], metrics["time/learn_critic_s"])
            assert 0.0 < metrics["time/learn_overlap_s"] <= shorter + 1e-9

    asyncio.run(scenario())


def test_rewards_and_values_of_a_group_are_made_at_the_same_time() -> None:
    async def scenario() -> None:
        world, meeting = World(), Meeting()
        both = PolicyAndCritic(world)
        score, values = world.score, both.critic.values

        async def meet_and_score(group: GeneratedGroup) -> GroupRewards:
            await meeting.wait()
            return await score(group)

        async def meet_and_value(group: GeneratedGroup) -> str:
            await meeting.wait()
            return await values(group)

        world.score, both.critic.values = meet_and_score, meet_and_value  # type: ignore[method-assign]
        await asyncio.wait_for(world.loop(1, ppo=ppo(both)).run(), DEADLINE_S)

    asyncio.run(scenario())


def test_during_the_value_warm_up_only_the_critic_learns_and_the_coefficient_stays() -> None:
    world = World()
    both = PolicyAndCritic(world)
    run(world.loop(3, ppo=ppo(both, value_warmup_steps=2, kl_target=4.0, kl_horizon=100)))
    assert [entry for entry in world.log if "begins" in entry] == [
        "critic begins", "critic begins", "policy begins", "critic begins",
    ]  # fmt: skip
    assert [entry for entry in world.log if entry.startswith("push")] == ["push 1", "push 2", "push 3"]
    assert both.coefs == [0.1, 0.1, 0.1]
    assert "loss" not in world.rows[0][1] and world.rows[0][1]["critic/loss"] == 1.0


def test_the_coefficient_follows_the_measured_kl_and_a_resumed_run_continues_with_it() -> None:
    whole, first, second = World(), World(), World()
    steered = {"kl_target": 4.0, "kl_horizon": 100}
    models = [PolicyAndCritic(world) for world in (whole, first, second)]
    run(whole.loop(4, ppo=ppo(models[0], **steered)))
    coefs = models[0].coefs
    assert coefs == sorted(coefs) and coefs[0] < coefs[1]  # the KL is above its target
    assert [row["kl_coef"] for _, row in whole.rows] == coefs
    lap = ppo(models[1], **steered)
    run(first.loop(2, ppo=lap))
    state = PPOState.restored(lap.algorithm, lap.state.state_dict())
    run(second.loop(4, first_step=2, ppo=ppo(models[2], state=state, **steered)))
    assert models[1].coefs + models[2].coefs == coefs


def test_a_failure_of_the_critic_ends_the_run_with_its_own_error() -> None:
    world = World()
    both = PolicyAndCritic(world)

    async def fail(groups: Sequence[LearnerGroup], step: int, targets: Any) -> CriticReport:
        raise ArithmeticError("the critic's loss is NaN")

    both.critic.update = fail  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match="critic"):
        run(world.loop(ppo=ppo(both, overlap=True)))
