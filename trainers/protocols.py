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


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one batch did to the policy: scalar metrics (names in trainers/metrics.py) and samples' terms."""

    metrics: Mapping[str, float]
    advantages: Mapping[str, np.ndarray]  # group id -> float64 [G], NaN where masked
    learn_s: float
    num_tokens: int  # completion tokens trained on


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

    async def save(self, directory: str) -> None:
        """Write every rank's state below ``directory``; returns when all bytes are there."""
        ...


class WeightPublisher(Protocol):
    """Moves the learner's weights into every generator and proves that they arrived."""

    async def push(self, version: WeightVersion) -> PushReport: ...


class Recorder(Protocol):
    """Takes down what happens; never blocks the run, never raises."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...
