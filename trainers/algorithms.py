"""The policy-gradient algorithms, each one frozen value that names its parts.

What sets them apart is a handful of choices, so they are data and not classes:

=============  ==============  ======  ===============  =====================
               baseline        scale   ratio and clip   aggregation
=============  ==============  ======  ===============  =====================
GRPO           group mean      std     token, .2/.2     sequence (mean of means)
Dr. GRPO       group mean      none    token, .2/.2     constant (max tokens)
RLOO           leave one out   none    token, .2/.2     sequence
=============  ==============  ======  ===============  =====================

GRPO: Shao et al. 2024 (arXiv:2402.03300).  Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783).
RLOO: Ahmadian et al. 2024 (arXiv:2402.14740).  Asymmetric clip: Yu et al. 2025 (arXiv:2503.14476).

May import: pydantic, trainers.settings.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainers.settings import Settings

NonNegative = Annotated[float, Field(ge=0)]


class AlgorithmSettings(Settings):
    """How rewards become gradients.  The defaults are GRPO as published."""

    name: Literal["grpo"] = Field("grpo", description="the family; its members differ in the choices below")
    baseline: Literal["group_mean", "leave_one_out"] = Field(
        "group_mean", description="what is subtracted from a sample's reward"
    )
    scale: Literal["std", "none"] = Field(
        "std", description="divide by the group's standard deviation, or leave the scale of the reward"
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "sequence",
        description="token: mean over all tokens; sequence: mean over samples of their token means; "
        "constant: sum over tokens / (samples x max_tokens)",
    )
    clip_low: NonNegative = Field(0.2, lt=1, description="ratio is clipped below at 1 - clip_low")
    clip_high: NonNegative = Field(0.2, description="ratio is clipped above at 1 + clip_high")
    kl_coef: NonNegative = Field(0.0, description="beta; 0 needs no reference and starts none")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="k3 in the loss is the usual GRPO form; its fixed point is not that of k1/k2"
    )
    kl_placement: Literal["loss", "reward"] = Field("loss", description="penalise in the loss, or in the reward")
    entropy_coef: NonNegative = Field(0.0, description="bonus on the mean token entropy")
    num_epochs: int = Field(1, ge=1, description="passes over one batch")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps in one pass")
    mask_truncated: bool = Field(False, description="give samples that hit max_tokens no gradient")

    @model_validator(mode="after")
    def _kl_in_loss_needs_a_gradient(self) -> Self:
        if self.kl_coef > 0 and self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "k1 in the loss has an expected gradient of zero; use kl_estimator=k2 or k3, or kl_placement=reward"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def num_updates(self) -> int:
        """Optimizer steps made from one batch."""
        return self.num_epochs * self.num_minibatches
