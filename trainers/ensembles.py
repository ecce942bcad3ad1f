"""Several reward models as one: how their scores become a reward, and what their disagreement tells.

    scores [M, S] --combine--> reward [S], disagreement [S] --> metrics and an alarm
                                                          `--> mask_disagreement: samples without a gradient

Scores of different models mean something beside each other on one scale only; who scores brings them there.  A sample
that one member cannot score has no reward: what is left of the members is another ensemble, with another scale.
Axes: M members, S samples, G samples of one prompt.
May import: numpy, pydantic, trainers.{experience, protocols, settings}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from trainers.experience import GroupRewards, RewardFailure
from trainers.protocols import LearnerGroup
from trainers.settings import Settings

Combination = Literal["mean", "worst_case", "mean_minus_variance"]
TOP_SHARE = 0.25  # where a policy that hacks its reward is found
_DISAGREEMENT = ".disagreement"


class EnsembleSettings(Settings):
    """How several reward models become one."""

    combine: Combination = Field(
        description="mean; worst_case: the lowest score; mean_minus_variance: less uncertainty_coef times the variance "
        "over the members (arXiv:2310.02743)"
    )
    uncertainty_coef: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="lambda of mean_minus_variance, in 1 / reward"
    )
    same_scale: bool = Field(
        False, description="the members' own scores are on one scale already; needed where normalize is off"
    )
    mask_above: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="samples whose disagreement is larger get no gradient"
    )
    mask_quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="samples whose disagreement is above this quantile of their step's get no gradient"
    )

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.combine == "mean_minus_variance" and self.uncertainty_coef is None:
            raise ValueError(
                "uncertainty_coef: combine=mean_minus_variance subtracts so many times the variance; give it, for "
                "instance 0.5"
            )
        if self.combine != "mean_minus_variance" and self.uncertainty_coef is not None:
            raise ValueError(
                f"uncertainty_coef={self.uncertainty_coef:g}: combine={self.combine} has no use for it; leave it out, "
                "or set combine=mean_minus_variance"
            )
        if self.mask_above is not None and self.mask_quantile is not None:
            raise ValueError(
                f"mask_above={self.mask_above:g}: there is mask_quantile={self.mask_quantile:g} besides; give one"
            )
        return self

    @property
    def masks(self) -> bool:
        return self.mask_above is not None or self.mask_quantile is not None


def member_name(ensemble: str, index: int) -> str:
    """Part of the reward that holds the score of one member."""
    return f"{ensemble}.{index}"


def disagreement_name(ensemble: str) -> str:
    """Part of the reward that holds the disagreement."""
    return f"{ensemble}{_DISAGREEMENT}"


def combine(
    scores: np.ndarray, how: Combination, uncertainty_coef: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(reward, disagreement) of every sample, float64 [S].

    With ``mu`` and ``v`` the mean and the variance (over M, not M - 1) of a sample's scores, Coste et al. 2023
    (arXiv:2310.02743, section 3) optimise ``mu`` (eq. 2), the lowest score (eq. 3) or ``mu - lambda v`` (eq. 4).
    The disagreement is ``sqrt(v)``.

    Args:
        scores: float32 or float64 [M, S], M >= 1, on one scale; NaN or infinite where a member has none.
        uncertainty_coef: ``lambda``, with mean_minus_variance.

    Returns:
        NaN in both where any member has no score.

    Raises:
        ValueError: no member, or another shape.
    """
    if scores.ndim != 2 or scores.shape[0] < 1:
        raise ValueError(f"scores are [members, samples] with at least one member, not {scores.shape}")
    kept = np.where(np.isfinite(scores).all(axis=0), scores.astype(np.float64), np.nan)
    # In a fixed order: who of the members comes first must not show in the last bit.
    kept = np.sort(kept, axis=0)
    mean = kept.mean(axis=0)
    variance = np.square(kept - mean).mean(axis=0)
    rewards: dict[Combination, np.ndarray] = {
        "mean": mean,
        "worst_case": kept[0],
        "mean_minus_variance": mean - (uncertainty_coef or 0.0) * variance,
    }
    return rewards[how], np.sqrt(variance)


def ensemble_rewards(
    name: str, settings: EnsembleSettings, weight: float, clip: float | None, scored: Sequence[GroupRewards]
) -> GroupRewards:
    """The rewards of one group under the ensemble ``name``, of what each member gave it, in their order.

    Parts: the reward, cut to ``clip``; each member's score and the disagreement, which are only measured.  A failure
    of a member is one of the ensemble on that sample, which is masked.

    Args:
        scored: [M], each with one part; scores on one scale.
    """
    members = [next(iter(rewards.parts.values())) for rewards in scored]
    reward, disagreement = combine(np.stack(members), settings.combine, settings.uncertainty_coef)
    if clip is not None:
        reward = np.clip(reward, -clip, clip)
    failures = [
        (i, RewardFailure(name, failure.kind, f"member {index}: {failure.detail}"))
        for index, rewards in enumerate(scored)
        for i, failure in rewards.failures
    ]
    extra = {member_name(name, i): part for i, part in enumerate(members)} | {disagreement_name(name): disagreement}
    return GroupRewards(
        group_id=scored[0].group_id,
        totals=weight * reward,
        parts={name: reward} | extra,
        failures=tuple(sorted(failures, key=lambda f: f[0])),
        score_s=sum(rewards.score_s for rewards in scored),
        measured=(*(() if weight else (name,)), *extra),
    )


def mask_disagreement(
    batch: Sequence[LearnerGroup], ensembles: Mapping[str, EnsembleSettings]
) -> tuple[list[LearnerGroup], int]:
    """(the same groups, without the totals of samples on which an ensemble disagrees too much; how many these are).

    A masked sample is like one whose reward failed: no advantage, and no part in a baseline or a denominator.  Only
    samples that had a total are counted, and only they make the quantile, which is that of all groups together.

    Args:
        ensembles: by name, those that mask.
    """
    if not ensembles or not batch:
        return list(batch), 0
    valid = np.concatenate([group.rewards.valid for group in batch])
    masked = np.zeros_like(valid)
    for name, settings in ensembles.items():
        found = np.concatenate([group.rewards.parts[disagreement_name(name)] for group in batch])
        looked_at = valid & np.isfinite(found)
        limit = settings.mask_above
        if settings.mask_quantile is not None and looked_at.any():
            limit = float(np.quantile(found[looked_at], settings.mask_quantile))
        if limit is not None:
            masked |= looked_at & (np.where(looked_at, found, 0.0) > limit)
    cuts = np.cumsum([group.rewards.totals.size for group in batch])[:-1]
    kept = [
        replace(group, rewards=replace(group.rewards, totals=np.where(mine, np.nan, group.rewards.totals)))
        if mine.any()
        else group
        for group, mine in zip(batch, np.split(masked, cuts), strict=True)
    ]
    return kept, int(masked.sum())


def disagreement_metrics(rewards: Sequence[GroupRewards], num_masked: int) -> dict[str, float]:
    """Of all samples of a step (names in trainers/metrics.py); nothing where there is no ensemble.

    With several ensembles a sample's disagreement is the largest of theirs.  The top quartile are the samples whose
    total is not below the upper quartile of the totals.
    """
    names = [name for name in (rewards[0].parts if rewards else ()) if name.endswith(_DISAGREEMENT)]
    if not names:
        return {}
    parts = np.stack([np.concatenate([r.parts[name] for r in rewards]) for name in names])
    found = np.where(np.isfinite(parts), parts, -np.inf).max(axis=0)
    totals = np.concatenate([r.totals for r in rewards])
    kept = np.isfinite(found) & np.isfinite(totals)
    metrics = {"disagreement/num_samples_masked": float(num_masked)}
    if kept.any():
        found, totals = found[kept], totals[kept]
        top = totals >= np.quantile(totals, 1.0 - TOP_SHARE)
        metrics |= {"disagreement/mean": float(found.mean()), "disagreement/top_quartile": float(found[top].mean())}
    return metrics
