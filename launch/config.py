"""RunConfig: every section composed, and the checks that need more than one section.

The sections are defined beside their consumers; a default lives in exactly one place.
May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from actors.adapted_model import TrainedModelSettings, check_lora, is_own_reference, pushes_merged
from actors.judge_settings import JudgeRewardSettings, check_judges
from actors.settings import (
    CriticSettings,
    GeneratorSettings,
    LearnerSettings,
    PushSettings,
    ReferenceSettings,
    RewardModelSettings,
    RewardWorkerSettings,
)
from cluster.retention import Best
from cluster.settings import ClusterSettings, HealthSettings
from launch.preset_values import with_preset
from launch.row_settings import PretrainingSettings
from trainers.alarms import AlarmSettings
from trainers.algorithms import AlgorithmSettings
from trainers.filtering import FilterSettings
from trainers.kl_controller import MAX_ERROR
from trainers.metrics import check as check_metric
from trainers.rewards import RewardSettings
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]


class DatasetSettings(Settings):
    """One stream of prompts: a file, a folder, a procedural generator, or a function."""

    path: str | None = Field(None, description="Parquet, JSONL or Arrow file, or a Hugging Face dataset folder")
    split: str | None = Field(None, description="of a dataset folder")
    procedural: str | None = Field(None, description="a reasoning-gym dataset, for instance chain_sum")
    function: str | None = Field(
        None, description="package.module:function or path/to/file.py:function that returns rows (a list of mappings)"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the procedural dataset or function")
    size: Positive | None = Field(None, description="distinct prompts to use; needed for procedural ones")
    prompt_column: str = Field("prompt", description="the column that holds the prompt, text or messages")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.path, self.procedural, self.function)) != 1:
            raise ValueError("give exactly one of path and procedural and function")
        if self.procedural is not None and self.size is None:
            raise ValueError("size is needed with procedural: how many distinct prompts to use")
        return self


class PromptSettings(Settings):
    """Where prompts come from and how they are shown to the model."""

    train: DatasetSettings
    eval: DatasetSettings | None = Field(None, description="held out: questions of train are removed from it")
    system: str | None = Field(None, description="system message put before each prompt")
    template: str = Field("{prompt}", description="wraps a plain-text prompt; {prompt} is replaced")
    chat: bool = Field(True, description="apply the tokenizer's chat template to plain-text prompts")
    shuffle: bool = Field(True, description="a new seeded order every epoch")


class EvaluationSettings(Settings):
    """Held-out evaluation."""

    every: int = Field(10, ge=0, description="steps between evaluations; 0: never")
    num_samples: Positive = Field(1, description="k of pass@k; 1 decodes greedily")
    temperature: float = Field(1.0, gt=0, description="with num_samples > 1")
    reward: str | None = Field(None, description="which reward is accuracy; default: the first")


class CheckpointSettings(Settings):
    """Saving and keeping."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only the last one")
    keep: Positive = Field(2, description="newest checkpoints that stay")
    keep_best: int = Field(0, ge=0, description="checkpoints that stay besides, those of the best best_metric")
    best_metric: str | None = Field(
        None, description="a name of the metric dictionary, for instance eval/reward; measured at every checkpoint"
    )
    best: Best = Field("highest", description="which value of best_metric is best")
    wait_s: float = Field(900.0, gt=0, description="wait for the checkpoint before to be written; then leave this out")
    grace_s: float | None = Field(
        None, gt=0, description="seconds from SIGTERM in which to save and stop; default: as long as it takes"
    )
    export: bool = Field(True, description="write a Hugging Face folder at the end")
    export_merged: bool = Field(
        True, description="with model.lora: the merged model, and below adapter/ the adapter; false: the adapter alone"
    )

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.keep_best and self.best_metric is None:
            raise ValueError(f"keep_best={self.keep_best} needs best_metric: by which metric, for instance eval/reward")
        if self.best_metric is not None:
            check_metric(self.best_metric)
        return self

    def check_adapter(self, is_trained: bool) -> None:
        """ValueError when the adapter alone is to be exported and there is none."""
        if not is_trained and not self.export_merged:
            raise ValueError("checkpoint.export_merged=false: model.lora is not set: there is no adapter; leave it out")

    def check_evaluation(self, every: int) -> None:
        """ValueError when best_metric is an evaluation's and a checkpoint would come without one of its step."""
        metric = self.best_metric or ""
        if self.keep_best and metric.startswith("eval/") and (not every or self.every % every):
            raise ValueError(
                f"checkpoint.best_metric={metric} is measured every {every} steps (evaluation.every) and checkpoints "
                f"come every {self.every} (checkpoint.every): make the second a multiple of the first"
            )


class TelemetrySettings(Settings):
    """What is recorded, and where it is shown."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when a key is there, else offline"
    )
    project: str = Field("burnish", description="W&B project")
    tags: tuple[str, ...] = Field((), description="W&B tags")
    num_sample_rows: int = Field(8, ge=0, description="samples shown in each W&B table")
    progress: bool | None = Field(None, description="live progress; default: when the output is a terminal")


class RunSettings(Settings):
    """Name, place, length and seed of the run."""

    name: str = Field(description="the run's folder below directory, and its name in W&B")
    directory: str = Field("runs", description="where run folders are made; on a cluster a shared disk")
    seed: int = Field(0, ge=0, lt=2**31, description="of prompts' order, sampling streams and dropout")
    num_steps: Positive = Field(description="laps: batches sampled, trained on and pushed")
    groups_per_step: Positive = Field(description="prompts trained on in one step")
    samples_per_prompt: Positive = Field(8, description="completions of one prompt: the group")
    max_staleness: int = Field(
        0, ge=0, description="steps a trained sample may lag behind the learner; 0: synchronous, on-policy"
    )

    @model_validator(mode="after")
    def _plain_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError("name is a folder name: letters, digits, '.', '_' and '-', at most 64 of them")
        return self


class RunConfig(Settings):
    """A complete run."""

    run: RunSettings
    model: TrainedModelSettings
    prompts: PromptSettings
    rewards: tuple[RewardSettings, ...] = ()
    reward_models: tuple[RewardModelSettings, ...] = ()
    judges: tuple[JudgeRewardSettings, ...] = ()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    pretraining: PretrainingSettings | None = None
    filtering: FilterSettings = FilterSettings()
    generator: GeneratorSettings = GeneratorSettings()
    learner: LearnerSettings = LearnerSettings()
    critic: CriticSettings = CriticSettings()
    reference: ReferenceSettings = ReferenceSettings()
    reward_workers: RewardWorkerSettings = RewardWorkerSettings()
    push: PushSettings = PushSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    alarms: AlarmSettings = AlarmSettings()
    health: HealthSettings = HealthSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """The values that algorithm.name has for sections and keys that are not set."""
        return with_preset(data) if isinstance(data, Mapping) else data

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_sampled(cls, data: Any) -> Any:
        """Rows for algorithm.name=dpo, in the section that offline learning has, under another name."""
        algorithm = data.get("algorithm") if isinstance(data, Mapping) else None
        if isinstance(algorithm, Mapping) and algorithm.get("name") == "online_dpo" and "data" in data:
            raise ValueError(
                "algorithm.name=online_dpo: data is for what learns from written preferences, and online_dpo samples "
                "its own pairs; give prompts and rewards in its place, or use algorithm.name=dpo"
            )
        return data

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        run, alg = self.run, self.algorithm
        if run.max_staleness > 0 and self.cluster.backend == "in_process":
            raise ValueError(
                f"run.max_staleness={run.max_staleness}: generators and learner share one process with "
                "cluster.backend=in_process and cannot work at the same time; use 0 or cluster.backend=ray"
            )
        self._check_adoption()
        if self.learner.optimizer.head_lr_factor != 1.0:
            raise ValueError(
                f"learner.optimizer.head_lr_factor={self.learner.optimizer.head_lr_factor:g}: a policy has no scalar "
                "head; leave it out, or set critic.optimizer.head_lr_factor"
            )
        if run.samples_per_prompt < 2 and alg.needs_group:
            what = "a pair of samples" if alg.learns_from_pairs else "a group-relative advantage"
            raise ValueError(f"run.samples_per_prompt={run.samples_per_prompt}: {what} needs at least 2 samples")
        if self.filtering.zero_variance and not alg.needs_group:
            how = "the critic" if alg.needs_critic else f"algorithm.baseline={alg.baseline}"
            raise ValueError(
                f"filtering.zero_variance=true: with algorithm.name={alg.name} advantages come from {how}, and a "
                "group of equal rewards teaches as much as any other; leave it out"
            )
        if run.groups_per_step % alg.num_minibatches:
            raise ValueError(
                f"run.groups_per_step={run.groups_per_step} is not divisible by "
                f"algorithm.num_minibatches={alg.num_minibatches}"
            )
        per_update = run.groups_per_step // alg.num_minibatches * run.samples_per_prompt
        trained = {"learner": self.learner} | ({"critic": self.critic} if alg.needs_critic else {})
        for role, ranks in trained.items():
            if per_update < ranks.num_workers:
                raise ValueError(
                    f"{role}.num_workers={ranks.num_workers} ranks but only {per_update} samples an update; "
                    f"raise run.groups_per_step or lower {role}.num_workers"
                )
        longest = self.model.max_length
        if longest is not None and self.generator.sampling.max_tokens >= longest:
            raise ValueError(
                f"generator.sampling.max_tokens={self.generator.sampling.max_tokens} leaves no room for a prompt in "
                f"model.max_length={longest}"
            )
        for role, ranks in trained.items():
            if longest is not None and ranks.token_budget < longest:
                raise ValueError(
                    f"{role}.token_budget={ranks.token_budget} is below model.max_length={longest}: "
                    "the longest sample would fit no micro-batch"
                )
            if self.cluster.backend == "in_process" and ranks.num_workers > 1:
                raise ValueError(
                    f"{role}.num_workers={ranks.num_workers}: one process holds one rank of a process group; "
                    f"use {role}.num_workers=1 or cluster.backend=ray"
                )
        if (self.pretraining is None) == (alg.ppo.pretrain_coef > 0):
            remedy = "set it to 0 or give pretraining" if alg.ppo.pretrain_coef else "raise it or leave pretraining out"
            raise ValueError(
                f"algorithm.ppo.pretrain_coef={alg.ppo.pretrain_coef:g}: it weighs the texts of pretraining, and the "
                f"two go together; {remedy}"
            )
        num_samples = run.groups_per_step * run.samples_per_prompt
        if alg.ppo.kl_target is not None and MAX_ERROR * num_samples >= alg.ppo.kl_horizon:
            raise ValueError(
                f"algorithm.ppo.kl_horizon={alg.ppo.kl_horizon} is too short for steps of {num_samples} samples: one "
                f"step could bring kl_coef to 0; use more than {MAX_ERROR * num_samples:g}"
            )
        self.checkpoint.check_evaluation(self.evaluation.every)
        self._check_lora()
        names = self.reward_names
        if not names:
            raise ValueError("rewards is empty and so is reward_models: nothing would be learned; give one of them")
        check_judges(self.judges, run.samples_per_prompt)
        self._check_comparing_judges()
        weights = [r.weight for r in self.rewards] + [m.weight for m in self.reward_models]
        if not any(weights + [judge.weight for judge in self.judges]):
            raise ValueError(
                f"rewards: all of {names} have weight 0, so they are measured and nothing is learned; weigh one of them"
            )
        parts = [*(r.name for r in self.rewards), *(part for m in self.reward_models for part in m.part_names),
                 *(part for judge in self.judges for part in judge.part_names)]  # fmt: skip
        if len(set(parts)) != len(parts):
            raise ValueError(f"rewards: names must differ, got {parts}; give each a name")
        if self.filtering.by is not None and self.filtering.by not in names:
            raise ValueError(f"filtering.by={self.filtering.by!r} is none of the rewards {names}; name one of them")
        if self.evaluation.reward is not None and self.evaluation.reward not in names:
            raise ValueError(f"evaluation.reward={self.evaluation.reward!r} is none of the rewards {names}")
        if self.evaluation.every and self.prompts.eval is None:
            raise ValueError("evaluation.every is set but prompts.eval is missing; add it or set evaluation.every=0")
        return self

    def _check_comparing_judges(self) -> None:
        """Who compares samples needs several of each prompt, and says nothing of all of them together."""
        for index, judge in enumerate(self.judges):
            if not judge.pairwise:
                continue
            name = f"judges.{index}.pairwise"
            if self.algorithm.needs_greedy:
                raise ValueError(f"{name}: the greedy answer of algorithm.name={self.algorithm.name} has nothing to be "
                                 "compared with; use a rubric, or another algorithm")  # fmt: skip
            if self.evaluation.every:
                raise ValueError(f"{name}: the share of the other samples that a sample beats is 1/2 on average, "
                                 "however good they are, so evaluation.every would show nothing; set it to 0, and use "
                                 "burnish eval with eval.judge")  # fmt: skip

    def _check_lora(self) -> None:
        """Pushes, reference, critic and dropout of a run with an adapter."""
        check_lora("learner", "model.lora", self.model.lora, self.learner, sampled=True)
        check_lora("critic", "critic.lora", self.critic.lora, self.critic, sampled=True)
        self.checkpoint.check_adapter(self.model.lora is not None)
        _ = self.pushes_merged, self.has_reference_workers

    @property
    def pushes_merged(self) -> bool:
        """Whether generators get a merged model instead of the adapter alone."""
        return pushes_merged(self.push, self.model)

    @property
    def watched(self) -> AlarmSettings:
        """The alarms that mean something here: where no group is a baseline, equal rewards teach too."""
        return self.alarms if self.algorithm.needs_group else self.alarms.model_copy(update={"dead_groups": None})

    @property
    def own_reference(self) -> bool:
        """Whether the learner computes the reference's log-probs itself, with its adapter as it started."""
        return self.algorithm.needs_reference and is_own_reference(self.reference, self.model.lora)

    @property
    def has_reference_workers(self) -> bool:
        """Whether the reference has processes of its own."""
        return self.algorithm.needs_reference and not self.own_reference

    def _check_adoption(self) -> None:
        most, place = self.health.adopt_up_to, self.cluster
        if most is None:
            return
        if place.backend == "in_process" or place.colocate:
            why = "each generator shares the GPU of a learner rank" if place.colocate else "one process has no nodes"
            raise ValueError(f"health.adopt_up_to={most}: no generator can be added on a node that joins, because "
                             f"{why}; leave it out")  # fmt: skip
        if most < self.generator.num_workers:
            raise ValueError(
                f"health.adopt_up_to={most} is below generator.num_workers={self.generator.num_workers}, with which "
                "the run starts; raise it or leave it out"
            )

    @property
    def reward_names(self) -> list[str]:
        """Parts of the reward: the functions', then the models', then the judges' axes."""
        names = [r.name for r in self.rewards] + [m.name for m in self.reward_models]
        return names + [part for judge in self.judges for part in judge.part_names]
