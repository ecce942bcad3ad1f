"""What the loop asks of the parts it does not know: protocols, and the values they exchange.

``Payload`` is opaque to the loop: an object-store reference on a cluster, the plain value in the
in-process twin.  The loop forwards payloads and never opens them.
May import: trainers.experience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion

Payload = Any  # Arrow buffer or a reference to one


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Sample ``num_samples`` completions of ``prompt``."""

    group_id: str
    prompt: Prompt
    num_samples: int
    seeds: tuple[int, ...]  # [num_samples], one stream a sample
    temperature: float
    max_tokens: int
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class GeneratedGroup:
    """A finished group: what the loop may know, and where its tokens are."""

    summary: GroupSummary
    payload: Payload


@dataclass(frozen=True, slots=True)
class LearnerGroup:
    """One group as the learner gets it.  Rewards are small, so every rank sees all of them."""

    summary: GroupSummary
    rewards: GroupRewards
    payload: Payload
    reference_payload: Payload | None  # log-probs by the reference, when a KL term asks for them
    values_payload: Payload | None = None  # the critic's values before the update, with PPO
    greedy_reward: float | None = None  # of the prompt's greedy completion, where that is the baseline; NaN: none


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one batch did to the policy: scalar metrics (names in trainers/metrics.py) and samples' terms."""

    metrics: Mapping[str, float]
    advantages: Mapping[str, np.ndarray]  # group id -> float64 [G], NaN where masked
    learn_s: float
    num_tokens: int  # completion tokens trained on


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """What PPO fixes before it updates anything: the targets (trainers/ppo_targets.py), and what they tell."""

    payload: Payload  # proximal log-probs, advantages, returns and values of every sample
    metrics: Mapping[str, float]
    advantages: Mapping[str, np.ndarray]  # group id -> float64 [G], mean over a sample's tokens, NaN where masked
    kl_per_sequence: float  # nats, policy against reference, mean over valid samples; NaN without a reference
    num_samples: int  # valid ones


@dataclass(frozen=True, slots=True)
class CriticReport:
    """What one batch did to the critic."""

    metrics: Mapping[str, float]
    learn_s: float


@dataclass(frozen=True, slots=True)
class PushReport:
    """One weight push, verified."""

    version: WeightVersion
    num_bytes: int
    push_s: float  # wall time of the whole push
    pause_s: float  # longest time one generator did not sample
    num_verified: int  # parameters whose fingerprint was compared after load
    num_arrival_verified: int = 0  # parameters compared as they arrived (kernels repacked them since)


class Generator(Protocol):
    """Samples groups; several engines behind one face."""

    async def generate(self, request: GroupRequest) -> GeneratedGroup: ...


class Scorer(Protocol):
    """Gives rewards; a failure is a value, never an exception."""

    async def score(self, group: GeneratedGroup) -> GroupRewards: ...


class Reference(Protocol):
    """Log-probabilities under the frozen reference, as a payload for the learner."""

    async def logprobs(self, group: GeneratedGroup) -> Payload: ...


class Learner(Protocol):
    """Owns the policy's weights."""

    async def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport: ...


class PolicyLearner(Protocol):
    """A learner whose advantages come from a critic."""

    async def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> PreparedBatch:
        """Targets of one batch.  ``scores``: shaped rewards, float64 [G] a group, NaN where masked."""
        ...

    async def update(
        self, groups: Sequence[LearnerGroup], step: int, targets: Payload, kl_coef: float
    ) -> UpdateReport: ...


class Critic(Protocol):
    """Owns the value function's weights."""

    async def values(self, group: GeneratedGroup) -> Payload:
        """Value of the state before each completion token, under the present weights."""
        ...

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Payload) -> CriticReport: ...


class WeightPublisher(Protocol):
    """Moves the learner's weights into every generator and proves that they arrived."""

    async def push(self, version: WeightVersion) -> PushReport: ...


class Recorder(Protocol):
    """Takes down what happens; never blocks the run, never raises."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...
