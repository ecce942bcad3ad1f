"""The base of every configuration model: unknown keys refused, values frozen.  May import: pydantic."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the run configuration.

    ``extra="forbid"`` turns a misspelt key into an error; launch/overrides.py adds the nearest name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
