"""Where the rows of one dataset come from.  May import: pydantic, trainers.settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers.settings import Settings

OnBadRow = Literal["refuse", "drop"]


class HeldOutSettings(Settings):
    """Rows of one dataset: a file, a folder, or a function that makes them."""

    path: str | None = Field(None, description="Parquet, JSONL or Arrow file, or a Hugging Face dataset folder")
    split: str | None = Field(None, description="of a dataset folder")
    function: str | None = Field(
        None, description="package.module:function or path/to/file.py:function that returns rows (a list of mappings)"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")
    size: Annotated[int, Field(ge=1)] | None = Field(None, description="use the first rows only")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.function is None):
            raise ValueError(f"path={self.path}: exactly one of path and function; leave the other out")
        return self


class PretrainingSettings(HeldOutSettings):
    """Texts that PPO-ptx keeps learning, with algorithm.ppo.pretrain_coef; the columns are those of SFT."""
