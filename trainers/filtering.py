"""Which finished groups teach nothing: dynamic sampling.  Pure.

A group whose samples all got the same reward has no advantage and so no policy gradient.  Dropping it and sampling
another prompt in its place keeps the number of groups that do teach the same from step to step: DAPO
(arXiv:2503.14476), section 3.2, which samples on until the batch is full of prompts of accuracy between 0 and 1.
Where the reward is more than accuracy (DAPO's own punishment of long answers), ``by`` names the part that is; without
it totals are compared, and a group that differs in length alone stays.
May import: numpy, pydantic, trainers.{errors, experience, settings}.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from trainers.errors import BurnishError
from trainers.experience import GroupRewards, GroupSummary, may_train
from trainers.settings import Settings


class FilterSettings(Settings):
    """Dropping groups that teach nothing and sampling others in their place."""

    zero_variance: bool = Field(False, description="drop groups whose rewards are all equal (dynamic sampling, DAPO)")
    by: str | None = Field(
        None, description="the part of the reward that is compared, by its name; default: the total, and with the "
        "punishment that algorithm.name=dapo adds the other part, where there is one"
    )  # fmt: skip
    max_refills: int = Field(
        4, ge=1, description="groups dropped for one step, at most, in multiples of run.groups_per_step"
    )
    at_limit: Literal["keep", "fail"] = Field(
        "keep", description="keep: further such groups stay, and the step ends; fail: the run ends"
    )


class RefillLimit(BurnishError):
    """As many groups were dropped for one step as may be, and another one would have to go."""

    def __init__(self, settings: FilterSettings, num_dropped: int, step: int) -> None:
        super().__init__(
            f"filtering.max_refills = {settings.max_refills}: {num_dropped} groups were dropped for step {step}, and "
            "the next one teaches nothing either; choose prompts of medium difficulty, raise run.samples_per_prompt "
            "or generator.sampling.temperature, or set filtering.at_limit=keep"
        )


def useless(summary: GroupSummary, rewards: GroupRewards, mask_truncated: bool, by: str | None = None) -> str | None:
    """Why the group teaches nothing; None when it does.

    Args:
        mask_truncated: as the algorithm has it.
        by: see :class:`FilterSettings`; a sample in which this part failed is not compared, and a group that has
            none of it, as a task of another kind, by its totals.
    """
    if not may_train(summary, rewards, mask_truncated).any():
        return "no sample may be trained on"
    finished = np.array([reason != "abort" for reason in summary.finish_reasons])
    kept = rewards.valid & finished  # what the baseline is taken over
    part = None if by is None else rewards.parts[by][kept]
    values = rewards.totals[kept] if part is None or not np.isfinite(part).any() else part[np.isfinite(part)]
    return "no spread" if np.ptp(values) == 0 else None
