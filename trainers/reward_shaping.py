"""From the rewards that were given to the rewards that PPO learns from: normalise, clip, charge for no end.

Pure numpy, float64; NaN marks a masked sample, stays NaN and enters no statistic.
May import: numpy, pydantic, trainers.settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from trainers.settings import Settings

EPSILON = 1e-8  # added to the variance: rewards that are all equal become 0


class RewardShaping(Settings):
    """What happens to a sample's total reward before advantages are made of it."""

    normalize: Literal["none", "running", "batch"] = Field(
        "none", description="to mean 0 and deviation 1: over all samples of the run so far, or over this batch"
    )
    clip: float | None = Field(None, gt=0, description="bound on the size of the (normalised) reward")
    missing_eos_penalty: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="subtracted, unscaled and last, from samples that never ended"
    )


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of every value seen: it goes into the checkpoint."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, values: np.ndarray) -> RunningMoments:
        """With these values added; those that are not finite are left out.

        Chan, Golub and LeVeque 1983 (The American Statistician 37:3): the moments of two parts combine
        exactly, so batches may be of any size and nothing is lost by cancellation.
        """
        kept = values[np.isfinite(values)].astype(np.float64)
        if kept.size == 0:
            return self
        count = self.count + kept.size
        shift = float(kept.mean()) - self.mean
        mean = self.mean + shift * kept.size / count
        m2 = self.m2 + float(((kept - kept.mean()) ** 2).sum()) + shift * shift * self.count * kept.size / count
        return RunningMoments(count, mean, m2)

    @property
    def std(self) -> float:
        """Of the population; NaN before the first value."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """``(x - mean) / sqrt(variance + 1e-8)``, float64, the shape of ``values``."""
        return (values - self.mean) / math.sqrt(self.m2 / max(1, self.count) + EPSILON)

    def state_dict(self) -> dict[str, float | int]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float | int]) -> RunningMoments:
        """The inverse of ``state_dict``."""
        return cls(int(state["count"]), float(state["mean"]), float(state["m2"]))


def shape(
    totals: np.ndarray, ended: np.ndarray, settings: RewardShaping, running: RunningMoments
) -> tuple[np.ndarray, RunningMoments]:
    """Normalise, then clip, then subtract the penalty of samples without an end.

    The penalty comes last so that its size is the one that was configured, whatever the scale of the
    rewards, and so that it cannot vanish in the clip.

    Args:
        totals: float64 [samples], NaN where masked.
        ended: bool [samples], the sample closed with an end-of-sequence token.
        running: of all batches before this one.

    Returns:
        float64 [samples], NaN where masked; and the moments including this batch, which it was
        normalised with (``normalize: running``; otherwise ``running`` as it came).
    """
    if totals.shape != ended.shape or totals.ndim != 1:
        raise ValueError(f"totals {totals.shape} and ended {ended.shape} must both be [samples]")
    shaped = np.where(np.isfinite(totals), totals.astype(np.float64), np.nan)
    if settings.normalize == "running":
        running = running.updated(shaped)
        shaped = running.normalized(shaped)
    elif settings.normalize == "batch":
        shaped = RunningMoments().updated(shaped).normalized(shaped)
    if settings.clip is not None:
        shaped = np.clip(shaped, -settings.clip, settings.clip)
    return shaped - settings.missing_eos_penalty * ~ended.astype(bool), running
