"""The KL coefficient from step to step: fixed, or steered towards a target.  A frozen value; imports nothing.

Its state goes into the checkpoint: a resumed run continues with the coefficient it had reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

MAX_ERROR = 0.2  # of the proportional controller: one surprising batch moves the coefficient only so far


@dataclass(frozen=True, slots=True)
class KLController:
    """The coefficient beta of the KL penalty, and how it answers to the KL that was measured."""

    coef: float  # beta, reward per nat
    target: float | None = None  # nats per sequence; None: the coefficient is fixed
    horizon: int = 10_000  # samples over which an error of 0.2 moves the coefficient by a fifth

    def __post_init__(self) -> None:
        if not (self.coef >= 0.0 and math.isfinite(self.coef)):
            raise ValueError(f"coef = {self.coef} must be finite and not negative")
        if self.target is not None and not (self.target > 0.0 and math.isfinite(self.target)):
            raise ValueError(f"target = {self.target} must be finite and above 0")
        if self.horizon < 1:
            raise ValueError(f"horizon = {self.horizon} must be at least 1")

    def updated(self, kl_per_sequence: float, num_samples: int) -> KLController:
        """The controller after a batch.

        ``coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon``: Ziegler et al. 2019
        (arXiv:1909.08593), section 2.2.  A batch without valid samples says nothing and changes nothing.

        Args:
            kl_per_sequence: nats, the mean over sequences of the sum over their tokens.
            num_samples: valid samples in the batch.

        Raises:
            ValueError: the KL is NaN, or so many samples fit into the horizon that a single batch could
                bring the coefficient to 0, from which no multiplication leads back.
        """
        if self.target is None or num_samples == 0:
            return self
        if math.isnan(kl_per_sequence):
            raise ValueError(f"the KL of {num_samples} samples is NaN")
        if MAX_ERROR * num_samples >= self.horizon:
            raise ValueError(f"horizon = {self.horizon} is too short for batches of {num_samples} samples")
        error = min(max(kl_per_sequence / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        return replace(self, coef=self.coef * (1.0 + error * num_samples / self.horizon))

    def state_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float | int | None]) -> KLController:
        """The inverse of ``state_dict``."""
        coef, target, horizon = state["coef"], state["target"], state["horizon"]
        if coef is None or horizon is None:
            raise ValueError(f"{dict(state)} is no state of a KL controller")
        return cls(float(coef), None if target is None else float(target), int(horizon))
