"""Learning-rate schedules as pure functions of the step.  May import: math."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, num_steps: int, peak: float, warmup_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """The rate for loop step ``step`` (0-based) of ``num_steps``.

    Linear warm-up from ``peak / warmup_steps``, then constant, or decay to 0 at ``num_steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))
