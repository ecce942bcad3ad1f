"""SelectConfig: what ``burnish select``, ``answer`` and ``serve`` sample, who scores it, and what is kept.

May import: pydantic and the settings of the other rooms (never torch, ray, vllm or deepspeed).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from launch.label_config import (
    CandidateSettings,
    KeepSettings,
    LabelConfig,
    LabellingSections,
    OutputSettings,
    Positive,
)
from launch.serve_config import ServeSettings
from trainers.settings import Settings


class DrawSettings(CandidateSettings):
    """How the candidates of one prompt are sampled."""

    num_candidates: Positive = Field(8, description="n: completions of one prompt")


class SelectSettings(Settings):
    """Which answers are rows of the SFT set."""

    top_k: Positive | None = Field(1, description="the best so many of a prompt, different texts; null: all of them")
    threshold: float | None = Field(
        None, allow_inf_nan=False, description="lowest score that is kept; default: no bound, every prompt counts"
    )
    drop_truncated: bool = Field(
        True, description="leave out answers that were cut at max_tokens: SFT would teach to stop there"
    )

    @model_validator(mode="after")
    def _something_is_rejected(self) -> Self:
        if self.top_k is None and self.threshold is None:
            raise ValueError("top_k=null: without a threshold every answer would be kept; give threshold or top_k")
        return self


class SelectedSettings(Settings):
    """What is written."""

    path: str | None = Field(
        None, description="default: sft.FORMAT, of burnish answer answers.FORMAT, in the run folder"
    )
    format: Literal["parquet", "jsonl"] = Field("parquet", description="of the file")


class SelectConfig(LabellingSections):
    """A complete run of sampling and choosing; a recipe is one when it has the key ``select``."""

    sampling: DrawSettings = DrawSettings()
    select: SelectSettings = SelectSettings()
    output: SelectedSettings = SelectedSettings()
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        n, top_k = self.sampling.num_candidates, self.select.top_k
        if top_k is not None and top_k > n:
            raise ValueError(f"select.top_k={top_k}: only sampling.num_candidates={n} are sampled; use at most {n}")
        if n == 1 and self.compares:
            raise ValueError(
                "sampling.num_candidates=1: label compares answers with each other, and one has nothing beside it; "
                "give 2 or more, or label.rewards, label.reward_model or a label.judge.rubric"
            )
        try:
            self.labelling("")
        except ValidationError as error:  # what a labelling run would refuse, in its own words
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def compares(self) -> bool:
        """Whether answers are scored by how many of the others they beat."""
        judge = self.label.judge
        return self.label.pair is not None or (judge is not None and judge.rubric is None)

    def target(self, name: str) -> Path:
        """Where the rows go: ``output.path``, or ``name`` with its ending in the run folder."""
        if self.output.path is not None:
            return Path(self.output.path).expanduser()
        return Path(self.run.directory) / self.run.name / f"{name}.{self.output.format}"

    def labelling(self, name: str) -> LabelConfig:
        """The run that samples and scores; ``name`` as in :meth:`target`."""
        return LabelConfig(
            **{section: getattr(self, section) for section in LabellingSections.model_fields},
            sampling=self.sampling,
            # What is scored one by one needs no pairs, of which a record would hold C(n, 2).
            keep=KeepSettings(pairs="all" if self.compares else "random"),
            output=OutputSettings(path=str(self.target(name)), format=self.output.format),
        )
