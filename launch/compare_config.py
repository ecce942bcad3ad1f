"""CompareConfig: the one task on which algorithms are compared, what they may spend, and where each differs.

The sections are those of runs that sample.  launch/compare_plan.py makes a recipe for each algorithm of them.
May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from actors.adapted_model import TrainedModelSettings
from actors.judge_settings import JudgeRewardSettings, check_judges, refuse_pairwise
from actors.settings import (
    CriticSettings,
    GeneratorSettings,
    LearnerSettings,
    PushSettings,
    ReferenceSettings,
    RewardModelSettings,
    RewardWorkerSettings,
)
from cluster.settings import ClusterSettings
from launch.compare_methods import BEST_OF_N, DEFAULTS, GROUPS, METHODS, Method, canonical, unknown
from launch.config import PromptSettings, TelemetrySettings
from trainers.rewards import RewardSettings
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]
# What is the same for all, or is set by the comparison itself.
FIXED = ("run.name", "run.directory", "run.seed", "run.num_steps", "model", "base.path", "prompts", "rewards", "data",
         "generator.sampling", "sampling", "label", "keep", "output", "eval", "algorithm.name", "algorithm.loss",
         "checkpoint.export", "reward_models", "judges", "reference.path", "run.max_staleness")  # fmt: skip


class CompareRunSettings(Settings):
    """Name and place of a comparison, and the seed of its task."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="its folder below directory")
    directory: str = Field("runs", description="where it is made; on a cluster a shared disk")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of procedural prompts and of the evaluations' sampling: the same for all runs"
    )


class ComparisonSettings(Settings):
    """Who is compared, at which expense, and what only some of them have."""

    algorithms: tuple[str, ...] = Field(DEFAULTS, min_length=1, description="names (docs/compare.md), in this order")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        (0,), min_length=1, description="run.seed of the runs: each algorithm runs once with each"
    )
    budget: Positive = Field(description="answers that one run may have sampled from its policy and labelled")
    groups_per_step: Positive = Field(8, description="prompts of one step, and of one batch of preferences")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(8, description="answers to one prompt, labelled together")
    best_of: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (4, 16), min_length=1, description="n of best_of_n: answers sampled and labelled for each one that is given"
    )
    gold: str | None = Field(
        None, description="a reward of weight 0 that stands for the truth: it has a column of its own and is what the "
        "plot shows; by its name"
    )  # fmt: skip
    eval_prompts: Positive | None = Field(None, description="use the first held-out prompts only; default: all")
    eval_samples: Positive = Field(2, description="answers to each held-out prompt, under the same seeds for all")
    note: str = Field("", description="what a reader of the table has to know besides; written above it")
    keep_models: bool = Field(False, description="keep the trained models; else they go once they are evaluated")
    deadline_s: float = Field(7200.0, gt=0, description="for one run, one labelling or one evaluation")
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="algorithm, or offline, online, label, eval -> keys of its recipes, dotted or nested; an "
        "algorithm's own win",
    )  # fmt: skip

    @field_validator("algorithms")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if canonical(name) not in METHODS:
                raise ValueError(f"algorithms={name}: {unknown(name, METHODS)}")
        found = tuple(canonical(name) for name in names)
        if len(set(found)) < len(found):
            raise ValueError(f"algorithms={list(names)}: one is named twice; name each once")
        return found

    @field_validator("seeds", "best_of")
    @classmethod
    def _differ(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{list(numbers)} has a number twice; give each once")
        return numbers

    @field_validator("overrides")
    @classmethod
    def _of_somebody(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, keys in given.items():
            if canonical(name) not in (*METHODS, *GROUPS):
                raise ValueError(f"overrides={name}: {name}: {unknown(name, (*GROUPS, *METHODS))}")
            if canonical(name) == BEST_OF_N:
                raise ValueError(f"overrides={name}: nothing is trained there; set best_of")
            for key in flat(keys):
                # Also a section that would be replaced as a whole, and what is fixed in it with it.
                if fixed := next((f for f in FIXED if f"{key}.".startswith(f"{f}.") or f.startswith(f"{key}.")), None):
                    raise ValueError(
                        f"overrides={name}: {name}.{key} would change {fixed}, which all runs have in common or the "
                        "comparison sets; leave it out"
                    )
        return {canonical(name): dict(keys) for name, keys in given.items()}

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        step = self.groups_per_step * self.samples_per_prompt
        what = f"one step of {self.groups_per_step} prompts x {self.samples_per_prompt} answers is {step}"
        if self.budget < step:
            raise ValueError(f"budget={self.budget}: {what}; give at least that, or lower groups_per_step")
        if self.budget % step:
            less = self.budget // step * step
            raise ValueError(f"budget={self.budget}: {what}, which does not go into it; use {less} or {less + step}")
        return self

    def own(self, name: str) -> dict[str, Any]:
        """Dotted key -> value of what only ``label`` or ``eval`` has."""
        return flat(self.overrides.get(name, {}))

    def of(self, method: Method) -> dict[str, Any]:
        """Dotted key -> value of what only this method, or only its kind, has."""
        return {**self.own(method.kind), **self.own(method.name)}


class CompareConfig(Settings):
    """A complete comparison; a recipe is one when it has the key ``compare``."""

    run: CompareRunSettings
    compare: ComparisonSettings
    model: TrainedModelSettings
    prompts: PromptSettings
    rewards: tuple[RewardSettings, ...] = ()
    reward_models: tuple[RewardModelSettings, ...] = ()
    judges: tuple[JudgeRewardSettings, ...] = ()
    generator: GeneratorSettings = GeneratorSettings()
    learner: LearnerSettings = LearnerSettings()
    critic: CriticSettings = CriticSettings()
    reference: ReferenceSettings = ReferenceSettings()
    reward_workers: RewardWorkerSettings = RewardWorkerSettings()
    push: PushSettings = PushSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.prompts.eval is None:
            raise ValueError("prompts.eval: is missing, and all are judged on how they answer held-out prompts; add it")
        if self.reference.path is not None:
            raise ValueError(
                f"reference.path={self.reference.path}: everything is compared with model.path, which all runs start "
                "from; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        check_judges(self.judges, self.compare.samples_per_prompt)
        refuse_pairwise(self.judges, "a comparison", "use a rubric")
        if any(name == self.compare.gold and weight for name, weight in self._weights()):
            raise ValueError(f"compare.gold={self.compare.gold!r}: it has a weight, so it is what is learned from, and "
                             "no truth beside it; give it weight 0")  # fmt: skip
        if not any(scorer.weight for scorer in self.scorers):
            raise ValueError("rewards: nothing is rewarded; give rewards, reward_models or judges with a weight")
        gold, known = self.compare.gold, self.reward_names
        if gold is not None and gold not in known:
            raise ValueError(f"compare.gold={gold!r} is none of the rewards {known}; name one of them")
        if any(method.kind == "offline" for method in self.methods):
            self._check_labellers()
        return self

    def _check_labellers(self) -> None:
        """Offline methods learn from labels, which one kind of scorer gives: all functions, a model, or a judge."""
        kinds = [
            *(["rewards"] if any(r.weight for r in self.rewards) else []),
            *(f"reward_models.{i}" for i, model in enumerate(self.reward_models) if model.weight),
            *(f"judges.{i}" for i, judge in enumerate(self.judges) if judge.weight),
        ]
        if len(kinds) > 1:
            raise ValueError(
                f"{kinds[1]}.weight: offline methods learn from the labels of one scorer, and {' and '.join(kinds)} "
                "all weigh; give weight to one of them, or compare online methods alone"
            )
        for name in ("reward_models", "judges"):
            for index, scorer in enumerate(getattr(self, name)):
                if scorer.weight < 0:
                    raise ValueError(f"{name}.{index}.weight={scorer.weight:g}: labels prefer what scores higher; use "
                                     "more than 0")  # fmt: skip

    def _weights(self) -> list[tuple[str, float]]:
        """(part of the reward, its weight in the total)."""
        found = [(r.name, r.weight) for r in self.rewards] + [(m.name, m.weight) for m in self.reward_models]
        for judge in self.judges:
            weights = [axis.weight for axis in judge.rubric.axes]
            found += [(part, judge.weight * w) for part, w in zip(judge.part_names, weights, strict=True)]
        return found

    @property
    def scorers(self) -> tuple[RewardSettings | RewardModelSettings | JudgeRewardSettings, ...]:
        """All that give a reward."""
        return (*self.rewards, *self.reward_models, *self.judges)

    @property
    def reward_names(self) -> list[str]:
        """Parts of the reward: the functions', then the models', then the judges' axes."""
        names = [r.name for r in self.rewards] + [m.name for m in self.reward_models]
        return names + [part for judge in self.judges for part in judge.part_names]

    @property
    def methods(self) -> list[Method]:
        """Who is compared."""
        return [METHODS[name] for name in self.compare.algorithms]


def flat(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; a later one wins over an earlier one of the same name."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
