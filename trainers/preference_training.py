"""Offline preference learning: the ``algorithm`` section of a run whose name is ``dpo``, and what each loss needs.

May import: pydantic, trainers.settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainers.settings import Settings

LossName = Literal["sigmoid", "robust", "ipo", "kto", "orpo", "simpo"]
PAIRS = "prompt, chosen, rejected"
LABELLED = "prompt, completion, label"
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class LossKind:
    """What one loss learns from, and which settings it has."""

    rows: str  # columns
    has_reference: bool
    has_label_smoothing: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)  # settings besides these two, with their defaults


LOSSES: dict[LossName, LossKind] = {
    "sigmoid": LossKind(PAIRS, True, True, {"beta": 0.1}),
    "robust": LossKind(PAIRS, True, True, {"beta": 0.1}),
    "ipo": LossKind(PAIRS, True, defaults={"beta": 0.1}),
    "kto": LossKind(LABELLED, True, defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "orpo": LossKind(PAIRS, False, defaults={"beta": 0.1}),
    "simpo": LossKind(PAIRS, False, defaults={"beta": 2.0, "gamma": 0.5}),
}


class PreferenceSettings(Settings):
    """DPO and its relatives (trainers/preference_losses.py), from written preferences."""

    name: Literal["dpo"] = Field("dpo", description="dpo: a policy from preferences, without a reward model")
    loss: LossName = Field(
        "sigmoid", description="sigmoid: DPO, with label_smoothing conservative DPO; robust, ipo, kto, orpo, simpo"
    )
    beta: Above | None = Field(
        None, description="strength of the reference (ipo: tau); orpo: weight of the odds ratio, lambda; default: 0.1, "
        "simpo 2.0"
    )  # fmt: skip
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels that are taken to be wrong")
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="simpo: how far apart the two rewards should be; default: 0.5"
    )
    desirable_weight: Above | None = Field(None, description="kto: of answers labelled true; default: 1")
    undesirable_weight: Above | None = Field(None, description="kto: of answers labelled false; default: 1")
    reference_cache: str | None = Field(
        None, description="folder of computed reference log-probs, by content; default: reference-logprobs in "
        "run.directory"
    )  # fmt: skip

    @property
    def kind(self) -> LossKind:
        """What ``loss`` needs."""
        return LOSSES[self.loss]

    def option(self, name: str) -> float:
        """The value of a setting that ``loss`` has."""
        given: float | None = getattr(self, name)
        return self.kind.defaults[name] if given is None else given

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> Self:
        for name in ("beta", "gamma", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if value is not None and name not in self.kind.defaults:
                theirs = " or ".join(loss for loss, kind in LOSSES.items() if name in kind.defaults)
                raise ValueError(
                    f"{name}={value}: loss={self.loss} has no {name}, only {theirs} has; leave it out or change loss"
                )
        if self.label_smoothing and not self.kind.has_label_smoothing:
            theirs = " and ".join(loss for loss, kind in LOSSES.items() if kind.has_label_smoothing)
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: loss={self.loss} has no label smoothing, only {theirs} have; "
                "leave it out or change loss"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "label_smoothing=0.0: loss=robust undoes a known share of wrong labels, and with 0 it is sigmoid; give "
                "that share, or use loss=sigmoid"
            )
        if self.reference_cache is not None and not self.kind.has_reference:
            raise ValueError(
                f"reference_cache={self.reference_cache}: loss={self.loss} has no reference; leave it out"
            )
        return self
