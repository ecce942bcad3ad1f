"""TuningConfig: a run that learns from written data: SFT, a reward model, preferences.  What samples: launch/config.py.

May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from actors.adapted_model import TrainedModelSettings, check_lora, is_own_reference
from actors.settings import LearnerSettings, ReferenceSettings
from cluster.settings import ClusterSettings
from launch.config import CheckpointSettings, Positive, TelemetrySettings
from launch.row_settings import HeldOutSettings, OnBadRow
from trainers.alarms import ALARMS, AlarmSettings
from trainers.mixture import Knots, check_knots
from trainers.preference_training import PreferenceSettings
from trainers.prompt_format import PromptFormat
from trainers.reward_training import RewardTrainingSettings
from trainers.settings import Settings
from trainers.sft import SFTSettings

TUNING = ("sft", "reward", "dpo")  # values of algorithm.name that choose this configuration


class TuningRunSettings(Settings):
    """Name, place, length and seed of the run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="the run's folder below directory, its name in W&B"
    )
    directory: str = Field("runs", description="where run folders are made; on a cluster a shared disk")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order of the data, and of dropout")
    num_steps: Positive | None = Field(None, description="optimizer steps; or give num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over all of data.train; or give num_steps")
    batch_size: Positive = Field(description="examples (reward, dpo: prompts with all their answers) of one step")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(f"num_steps={self.num_steps}: give num_steps or num_epochs; one, not both")
        return self


class TrainDataSettings(HeldOutSettings):
    """Rows to train on, and their share of the mixture."""

    name: str = Field("", description="in metrics and errors; default: train-0, train-1, ...")
    weights: float | tuple[tuple[float, float], ...] | None = Field(
        None,
        description="share of the mixture: a number, or [progress, weight] knots (progress 0 to 1, linear between "
        "them); default: by the number of rows, if no dataset has weights",
    )

    @property
    def knots(self) -> Knots | None:
        """``weights`` as knots."""
        return [(0.0, self.weights)] if isinstance(self.weights, float) else self.weights


class DataSettings(Settings):
    """What is learned from, and how prompts are shown to the model."""

    train: tuple[TrainDataSettings, ...] = Field(min_length=1)
    eval: HeldOutSettings | None = Field(None, description="held out")
    format: PromptFormat = Field(PromptFormat(), description="the same keys as in prompts of a run that samples")
    on_bad_row: OnBadRow = Field(
        "refuse",
        description="a row that cannot be read, such as one whose chosen and rejected answers are the same: refuse all "
        "of them at once, with their lines, or drop them, counted, if they are at most half of their dataset",
    )

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"train: names must differ, got {list(names)}; give each dataset its own")
        if "/" in "".join(names):
            raise ValueError(f"train: names must not hold a slash, got {list(names)}; they are parts of metrics' names")
        missing = [name for name, dataset in zip(names, self.train, strict=True) if dataset.weights is None]
        if missing and len(missing) < len(names):
            raise ValueError(f"train: {', '.join(missing)} has no weights and others have; give weights to all or none")
        if not missing:
            check_knots(names, [dataset.knots or () for dataset in self.train])
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the training datasets, in their order."""
        return tuple(dataset.name or f"train-{i}" for i, dataset in enumerate(self.train))

    @property
    def weights(self) -> list[Knots] | None:
        """Knots of each dataset; None: by size."""
        found = [dataset.knots for dataset in self.train]
        return None if found[0] is None else [knots or () for knots in found]


class TuningEvaluationSettings(Settings):
    """Held-out evaluation: before the first step, every so often, and after the last."""

    every: int = Field(50, ge=0, description="steps between evaluations; 0: never")
    size: Positive | None = Field(None, description="held-out rows to use; default: all")


class TuningConfig(Settings):
    """A complete run of SFT, of reward-model training or of offline preference learning."""

    run: TuningRunSettings
    model: TrainedModelSettings
    data: DataSettings
    algorithm: Annotated[SFTSettings | RewardTrainingSettings | PreferenceSettings, Field(discriminator="name")]
    learner: LearnerSettings = LearnerSettings()
    reference: ReferenceSettings | None = None  # None: its defaults, where the loss has one
    evaluation: TuningEvaluationSettings = TuningEvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    alarms: AlarmSettings = AlarmSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        factor = self.learner.optimizer.head_lr_factor
        if factor != 1.0 and self.algorithm.name != "reward":
            raise ValueError(
                f"learner.optimizer.head_lr_factor={factor:g}: only a reward model has a scalar head; leave it out"
            )
        if self.reference is not None and not self.has_reference:
            alg = self.algorithm
            what = f"algorithm.loss={alg.loss}" if isinstance(alg, PreferenceSettings) else f"algorithm.name={alg.name}"
            raise ValueError(f"reference=given: {what} has no reference; leave the section out (reference=null)")
        if rolling := [name for name in ALARMS if self.alarms.action_of(name) == "roll_back"]:
            key = f"actions.{rolling[0]}" if rolling[0] in self.alarms.actions else "action"
            raise ValueError(f"alarms.{key}=roll_back: only a run that samples goes back by itself; use stop or record")
        check_lora("learner", "model.lora", self.model.lora, self.learner)
        self.checkpoint.check_adapter(self.model.lora is not None)
        alg = self.algorithm
        if self.own_reference and isinstance(alg, PreferenceSettings) and alg.reference_cache is not None:
            raise ValueError(
                f"algorithm.reference_cache={alg.reference_cache}: with model.lora the ranks compute the reference's "
                "log-probs themselves and keep none; leave it out, or set reference.source=actor"
            )
        longest = self.model.max_length
        if longest is not None and self.learner.token_budget < longest:
            raise ValueError(
                f"learner.token_budget={self.learner.token_budget} is below model.max_length={longest}: "
                "the longest text would fit no micro-batch; raise it or lower model.max_length"
            )
        self.checkpoint.check_evaluation(self.evaluation.every)
        if self.run.batch_size < self.learner.num_workers:
            raise ValueError(
                f"run.batch_size={self.run.batch_size}: fewer than the {self.learner.num_workers} ranks; raise it or "
                "lower learner.num_workers"
            )
        if self.cluster.backend == "in_process" and self.learner.num_workers > 1:
            raise ValueError(
                f"learner.num_workers={self.learner.num_workers}: one process holds one rank of a process group; "
                "use learner.num_workers=1 or cluster.backend=ray"
            )
        return self

    @property
    def has_reference(self) -> bool:
        """Whether a frozen model is asked for what it thinks of the data."""
        return isinstance(self.algorithm, PreferenceSettings) and self.algorithm.kind.has_reference

    @property
    def own_reference(self) -> bool:
        """Whether the ranks compute the reference's log-probs themselves, with their adapter as it started."""
        return self.has_reference and is_own_reference(self.reference_settings, self.model.lora)

    @property
    def has_reference_workers(self) -> bool:
        """Whether the reference has processes of its own."""
        return self.has_reference and not self.own_reference

    @property
    def reference_settings(self) -> ReferenceSettings:
        """Of that model."""
        return self.reference or ReferenceSettings()
