"""How a reward model is trained: the ``algorithm`` section of a run whose name is ``reward``.

May import: pydantic, trainers.settings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.settings import Settings


class RewardTrainingSettings(Settings):
    """Bradley-Terry on pairs and rankings (arXiv:2203.02155, eq. 1).  The defaults add nothing to it."""

    name: Literal["reward"] = Field("reward", description="a reward model from preferences")
    group_by_prompt: bool = Field(
        False,
        description="rows of one prompt are one comparison: an answer that stands in several pairs is computed once, "
        "and each prompt weighs once (arXiv:2203.02155, section 3.5)",
    )
    margin_column: str | None = Field(
        None, description="a column with how much better the better answer is, in units of reward"
    )
    centering_coef: float = Field(
        0.0, ge=0, description="times the mean square of the sum of a pair's scores: keeps scores around 0"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels that are taken to be wrong")
    reference_samples: str | None = Field(
        None,
        description="JSONL or Parquet file of prompt and completion, sampled from the policy to be trained: the "
        "stored mean and standard deviation are of their scores; default: of the held-out answers",
    )
    num_bins: Annotated[int, Field(ge=2)] = Field(10, description="of the reliability plot and of the ECE")
