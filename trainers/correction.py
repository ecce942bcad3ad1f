"""Which off-policy correction the loss applies, and when one is on by itself.

The weights are computed in trainers/off_policy.py; docs/off_policy.md compares the kinds.
May import: pydantic, trainers.settings.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trainers.settings import Settings

Kind = Literal[
    "auto", "none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask", "decoupled", "cispo"
]
CAPPED = ("token_truncate", "sequence_truncate", "cispo")
BANDED = ("token_mask", "sequence_mask")


class CorrectionSettings(Settings):
    """What is done about samples that the policy did not sample itself.  Ratio: proximal_ / behavior_ probability."""

    kind: Kind = Field(
        "auto",
        description="auto: token_truncate with run.max_staleness > 0, else none; token_truncate, sequence_truncate: "
        "times the ratio, at most cap; token_mask, sequence_mask: times the ratio, 0 outside low..high; "
        "decoupled: times a token's ratio; cispo: log-probs times a token's policy_ / behavior_ ratio, at most cap",
    )
    cap: float = Field(2.0, ge=1, allow_inf_nan=False, description="largest weight of a token or sequence")
    low: float = Field(0.5, ge=0, lt=1, description="a token or sequence with a smaller ratio is masked")
    high: float = Field(5.0, gt=1, allow_inf_nan=False, description="one with a larger ratio is masked")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        readers = {"cap": ("auto", *CAPPED), "low": BANDED, "high": BANDED}
        for field, kinds in readers.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default and self.kind not in kinds:
                raise ValueError(
                    f"correction.{field}={value:g} does nothing with correction.kind={self.kind}; leave it out, or use "
                    f"one of {', '.join(kinds)}"
                )
        return self

    @property
    def is_on(self) -> bool:
        """``auto`` that nobody resolved is off: without staleness there is nothing to correct."""
        return self.kind not in ("auto", "none")

    @property
    def truncates(self) -> bool:
        return self.kind in CAPPED

    @property
    def masks(self) -> bool:
        return self.kind in BANDED


def resolved(correction: CorrectionSettings, max_staleness: int) -> CorrectionSettings:
    """``correction`` with ``auto`` replaced by what it means in a run of this ``max_staleness`` (versions)."""
    if correction.kind != "auto":
        return correction
    if max_staleness == 0:
        return CorrectionSettings(kind="none")
    return CorrectionSettings(kind="token_truncate", cap=correction.cap)
