"""What PPO does with a full batch: targets, then the policy's and the critic's updates.

    scores (shaped) --> prepare --> targets --> policy update \\
                                        \\-----> critic update  +--> one report
The two updates need nothing of each other, so they run at the same time where they have machines of their own.
May import: asyncio, numpy, trainers.*.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from trainers.algorithms import AlgorithmSettings
from trainers.experience import may_train
from trainers.kl_controller import KLController
from trainers.protocols import Critic, LearnerGroup, PolicyLearner, UpdateReport
from trainers.reward_shaping import RunningMoments, shape


@dataclass(frozen=True, slots=True)
class PPOState:
    """What PPO carries from batch to batch, besides weights; it goes into the checkpoint."""

    kl: KLController
    moments: RunningMoments

    @classmethod
    def initial(cls, algorithm: AlgorithmSettings) -> Self:
        return cls(KLController(algorithm.kl_coef, algorithm.ppo.kl_target, algorithm.ppo.kl_horizon), RunningMoments())

    @classmethod
    def restored(cls, algorithm: AlgorithmSettings, state: Mapping[str, Any]) -> Self:
        """Target and horizon are the configuration's; the coefficient is the saved one where it is steered."""
        fresh = cls.initial(algorithm)
        kl = fresh.kl if fresh.kl.target is None else replace(fresh.kl, coef=float(state["kl"]["coef"]))
        return cls(kl, RunningMoments.from_state(state["moments"]))

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"kl": self.kl.state_dict(), "moments": self.moments.state_dict()}

    def scores(
        self, groups: Sequence[LearnerGroup], algorithm: AlgorithmSettings
    ) -> tuple[list[np.ndarray], RunningMoments]:
        """Shaped rewards, float64 [G] a group, NaN where a sample may not be trained on; and the new moments."""
        kept = np.concatenate([may_train(g.summary, g.rewards, algorithm.mask_truncated) for g in groups])
        totals = np.concatenate([g.rewards.totals for g in groups])
        ended = np.array([reason == "stop" for g in groups for reason in g.summary.finish_reasons])
        shaped, moments = shape(np.where(kept, totals, np.nan), ended, algorithm.ppo.reward_shaping, self.moments)
        cuts = np.cumsum([g.summary.num_samples for g in groups])[:-1]
        return np.split(shaped, cuts), moments


class PPOLap:
    """``update`` of the loop, when the advantages come from a critic."""

    def __init__(
        self, learner: PolicyLearner, critic: Critic, algorithm: AlgorithmSettings, state: PPOState, overlap: bool
    ) -> None:
        """``overlap``: policy and critic compute in different places, so they update at the same time."""
        self.learner, self.critic, self.algorithm = learner, critic, algorithm
        self.state, self.overlap = state, overlap

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        """Targets once, then both updates; during the value warm-up only the critic's."""
        started = time.perf_counter()
        coef = self.state.kl.coef
        scores, moments = self.state.scores(groups, self.algorithm)
        targets = await self.learner.prepare(groups, scores, coef)
        prepared = time.perf_counter()
        policy = _Timed(lambda: self.learner.update(groups, step, targets.payload, coef))
        critic = _Timed(lambda: self.critic.update(groups, step, targets.payload))
        kl = self.state.kl
        if step < self.algorithm.ppo.value_warmup_steps:
            await critic.run()
            report = UpdateReport({}, targets.advantages, 0.0, 0)
        else:
            if self.overlap:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(policy.run())
                    tasks.create_task(critic.run())
            else:
                await policy.run()
                await critic.run()
            report = policy.result
            # Not while the policy stands still: its KL says nothing about the coefficient then.
            kl = kl.updated(targets.kl_per_sequence, targets.num_samples)
        self.state = PPOState(kl, moments)
        metrics = {**targets.metrics, **report.metrics, **critic.result.metrics, "kl_coef": coef}
        metrics |= {
            "time/learn_prepare_s": prepared - started,
            "time/learn_policy_s": policy.seconds,
            "time/learn_critic_s": critic.seconds,
            "time/learn_overlap_s": policy.overlap(critic),
        }
        return replace(report, metrics=metrics)


class _Timed:
    """A call, its result, and when it ran."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call
        self.result: Any = None
        self._started = self._ended = 0.0

    async def run(self) -> None:
        self._started = time.perf_counter()
        self.result = await self._call()
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._ended - self._started

    def overlap(self, other: _Timed) -> float:
        """Seconds in which both ran."""
        return max(0.0, min(self._ended, other._ended) - max(self._started, other._started))
