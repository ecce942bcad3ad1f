"""How rewards become gradients: the keys of ``algorithm``, and which of them go together.

What sets the algorithms apart is a handful of choices: what a reward is compared with (``baseline``), its ``scale``,
the ``ratio`` and its clip, how token terms are averaged (``aggregation``), where the KL goes.  ``name`` picks the
values that belong together (trainers/presets.py); keys that are set win over them.  The defaults are GRPO's.
Online DPO has none of these choices but ``loss`` and beta: it learns from the best and the worst sample of each prompt
(trainers/online_pairs.py).

Asymmetric clip: Yu et al. 2025 (arXiv:2503.14476).  PPO as RLHF uses it: Ouyang et al. 2022 (arXiv:2203.02155).

May import: pydantic, trainers.{correction, presets, reward_shaping, settings}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers.correction import CorrectionSettings
from trainers.presets import PRESETS, Name, RatioKind, merged
from trainers.reward_shaping import RewardShaping
from trainers.settings import Settings

NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OF_GROUP = ("group_mean", "leave_one_out")  # baselines that compare the samples of a prompt with each other
NOT_OF_PAIRS = ("baseline", "scale", "ratio", "aggregation", "clip_low", "clip_high", "kl_placement", "entropy_coef")


class PPOSettings(Settings):
    """What only PPO with a critic has."""

    gamma: Share = Field(1.0, description="discount of a reward one token later; 1: an episode is one completion")
    gae_lambda: Share = Field(
        0.95, description="of generalised advantage estimation (arXiv:1506.02438): 1 return minus value, 0 TD error"
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="how far, in reward, an update may move a value (arXiv:2005.12729, section 3); "
        "null: unbounded"
    )  # fmt: skip
    whiten_advantages: bool = Field(
        True, description="to mean 0 and deviation 1 over all tokens of the global batch (arXiv:2005.12729)"
    )
    value_warmup_steps: int = Field(0, ge=0, description="first steps that train the critic only")
    kl_target: float | None = Field(
        None, gt=0, description="nats a sequence: kl_coef is steered towards it (arXiv:1909.08593, section 2.2); "
        "null: kl_coef is fixed"
    )  # fmt: skip
    kl_horizon: int = Field(10_000, ge=1, description="samples in which a KL 20 % or more off its target moves "
                            "kl_coef by a fifth")
    pretrain_coef: NonNegative = Field(
        0.0, description="PPO-ptx (arXiv:2203.02155, equation 2): weight in the loss of the mean cross-entropy on "
        "pretraining's texts, in nats a token"
    )  # fmt: skip
    pretrain_batch_size: int = Field(16, ge=1, description="texts of pretraining in one optimizer step")
    reward_shaping: RewardShaping = RewardShaping()


class AlgorithmSettings(Settings):
    """How rewards become gradients.  The defaults are GRPO as published."""

    name: Name = Field(
        "grpo", description="the values that keys of this section (dapo: of filtering and rewards too) have where they "
        "are not set: see docs/algorithms.md; ppo: advantages from a critic; online_dpo: pairs of samples"
    )  # fmt: skip
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="online_dpo: of a pair of samples; sigmoid: DPO (arXiv:2305.18290), or ipo "
        "(arXiv:2310.12036)"
    )  # fmt: skip
    baseline: Literal["group_mean", "leave_one_out", "greedy", "none"] = Field(
        "group_mean", description="what is subtracted from a sample's reward; greedy: the reward of the prompt's "
        "greedy completion, sampled besides and not trained on"
    )  # fmt: skip
    scale: Literal["std", "batch", "none"] = Field(
        "std", description="divide by the group's standard deviation, or by that of all tokens of the batch (whose "
        "mean is subtracted too where baseline=none), or leave the scale of the reward"
    )  # fmt: skip
    ratio: RatioKind = Field(
        "token", description="policy_ / proximal_ probability of a token, or the geometric mean over its completion; "
        "sequence_token: the value of sequence, the gradient of the token alone (GSPO-token)"
    )  # fmt: skip
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "sequence",
        description="token: mean over all tokens; sequence: mean over samples of their token means; "
        "constant: sum over tokens / (samples x max_tokens)",
    )
    clip_low: NonNegative = Field(0.2, lt=1, description="ratio is clipped below at 1 - clip_low")
    clip_high: NonNegative = Field(0.2, description="ratio is clipped above at 1 + clip_high")
    kl_coef: NonNegative = Field(
        0.0, description="beta; 0 needs no reference and starts none; online_dpo: that of the loss (ipo: tau), 0.1"
    )
    measure_kl: bool = Field(False, description="start the reference with kl_coef 0 too, only to measure the KL")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="k3 in the loss is the usual GRPO form; its fixed point is not that of k1/k2"
    )
    kl_placement: Literal["loss", "reward"] = Field("loss", description="penalise in the loss, or in the reward")
    entropy_coef: NonNegative = Field(0.0, description="bonus on the mean token entropy")
    num_epochs: int = Field(1, ge=1, description="passes over one batch")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps in one pass")
    mask_truncated: bool = Field(False, description="give samples that hit max_tokens no gradient")
    correction: CorrectionSettings = CorrectionSettings()
    ppo: PPOSettings = PPOSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """The values of ``name`` for what is not set."""
        if not isinstance(data, Mapping):
            return data
        preset = PRESETS.get(str(data.get("name", cls.model_fields["name"].default)))
        return data if preset is None else merged(data, preset.algorithm)

    @model_validator(mode="after")
    def _kl_in_loss_needs_a_gradient(self) -> Self:
        in_loss = self.kl_coef > 0 and self.kl_placement == "loss" and not self.learns_from_pairs
        if in_loss and self.kl_estimator == "k1":
            raise ValueError(
                "k1 in the loss has an expected gradient of zero; use kl_estimator=k2 or k3, or kl_placement=reward"
            )
        return self

    @model_validator(mode="after")
    def _cispo_does_not_clip_the_ratio(self) -> Self:
        for field in ("clip_low", "clip_high", "ratio"):
            if self.correction.kind == "cispo" and self._is_set(field):
                raise ValueError(
                    f"{field}={getattr(self, field)} does nothing with correction.kind=cispo, which clips the weight "
                    "at correction.cap; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _pairs_have_a_loss_of_their_own(self) -> Self:
        if not self.learns_from_pairs:
            if self._is_set("loss"):
                raise ValueError(
                    f"loss={self.loss} does nothing with name={self.name}, which has no pairs; leave it out or set "
                    "name=online_dpo"
                )
            return self
        if self.kl_coef == 0:
            raise ValueError(
                "kl_coef=0.0: name=online_dpo compares the policy with a reference, and kl_coef is the beta of its "
                "loss; give it one above 0, or leave it out for 0.1"
            )
        for field in NOT_OF_PAIRS:
            if self._is_set(field):
                raise ValueError(
                    f"{field}={getattr(self, field)} does nothing with name=online_dpo, whose loss is that of pairs; "
                    "leave it out"
                )
        if self.correction.kind != "none":
            raise ValueError(
                f"correction.kind={self.correction.kind} does nothing with name=online_dpo: a preference holds whoever "
                "sampled its answers; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_deviation_needs_its_group(self) -> Self:
        if not self.needs_critic and self.scale == "std" and self.baseline not in OF_GROUP:
            raise ValueError(
                f"scale=std is the deviation of a group, and baseline={self.baseline} compares with no group; use "
                "scale=batch or scale=none"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if not self.needs_critic:
            for key, value in self.ppo.model_dump(exclude_defaults=True).items():
                raise ValueError(
                    f"ppo.{key}={value} does nothing with name={self.name}, which has no critic; leave it out or set "
                    "name=ppo"
                )
            return self
        for field in ("baseline", "scale"):
            if self._is_set(field):
                raise ValueError(
                    f"{field}={getattr(self, field)} does nothing with name=ppo, where the critic is the baseline; "
                    "leave it out"
                )
        if self.ppo.kl_target is not None and self.kl_coef == 0:
            raise ValueError("ppo.kl_target multiplies kl_coef, and kl_coef=0 stays 0; give kl_coef its first value")
        if self.mask_truncated and self.ppo.reward_shaping.missing_eos_penalty > 0:
            raise ValueError("mask_truncated leaves out the samples that missing_eos_penalty is for; use one of them")
        return self

    def _is_set(self, field: str) -> bool:
        """Whether ``field`` has another value than the one that ``name`` brings along."""
        preset, default = PRESETS[self.name].algorithm, type(self).model_fields[field].default
        return bool(getattr(self, field) != preset.get(field, default))

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.measure_kl

    @property
    def needs_critic(self) -> bool:
        return self.name == "ppo"

    @property
    def learns_from_pairs(self) -> bool:
        """From the best and the worst sample of a prompt, as from a written preference."""
        return self.name == "online_dpo"

    @property
    def needs_group(self) -> bool:
        """A sample is compared with the others of its prompt: one alone teaches nothing, nor do equal rewards."""
        return not self.needs_critic and self.baseline in OF_GROUP

    @property
    def needs_greedy(self) -> bool:
        """Every prompt is answered once more, greedily."""
        return not self.needs_critic and self.baseline == "greedy"

    @property
    def has_token_advantages(self) -> bool:
        """Made of the whole batch, or of what follows each token (trainers/batch_advantages.py)."""
        return not self.needs_critic and (self.scale == "batch" or self.baseline not in OF_GROUP)

    @property
    def num_updates(self) -> int:
        """Optimizer steps made from one batch."""
        return self.num_epochs * self.num_minibatches
