"""What the loop is made of: its settings and the parts it drives.  May import: trainers.*."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from trainers.ensembles import EnsembleSettings
from trainers.experience import Prompt, WeightVersion
from trainers.filtering import FilterSettings
from trainers.ppo_lap import PPOLap
from trainers.protocols import (
    Generator,
    Learner,
    LearnerGroup,
    Recorder,
    Reference,
    Scorer,
    UpdateReport,
    WeightPublisher,
)


class Prompts(Protocol):
    """An endless stream in which every position always holds the same prompt."""

    def at(self, position: int) -> Prompt: ...

    def occurrence(self, position: int) -> int: ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The loop's part of the run configuration."""

    num_steps: int
    groups_per_step: int
    samples_per_prompt: int
    max_staleness: int
    temperature: float
    max_tokens: int
    seed: int
    filtering: FilterSettings = field(default_factory=FilterSettings)
    mask_truncated: bool = False  # as the algorithm has it: which samples may be trained on
    greedy_baseline: bool = False  # every prompt is answered once more, greedily (trainers/greedy.py)
    ensembles: Mapping[str, EnsembleSettings] = field(default_factory=dict)  # those that mask, by name


@dataclass(frozen=True, slots=True)
class LoopParts:
    """Everything the loop drives."""

    prompts: Prompts
    generator: Generator
    scorer: Scorer
    reference: Reference | None
    learner: Learner
    publisher: WeightPublisher
    recorder: Recorder
    # After a push: evaluation, as asked for; its metrics join the row of this step.  No push comes before it returns,
    # so what it samples is of one version; groups of later steps may run beside it.
    between_steps: Callable[[int, WeightVersion, bool], Awaitable[dict[str, float]]]
    on_update: Callable[[int, list[LearnerGroup], UpdateReport], None]
    # After the row of this step: its checkpoint.  In this order a kill in between loses no row of the lineage.
    after_record: Callable[[int, WeightVersion, bool], Awaitable[None]] | None = None
    ppo: PPOLap | None = None  # with a critic: its values of each group, and its update in place of the learner's
    clock: Callable[[], float] = time.perf_counter  # s
