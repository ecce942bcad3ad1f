"""Configuration of a policy that is trained, with an adapter or whole, and who its reference then is.

Importable without torch.  May import: pydantic, actors.{lora_settings, settings}.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from actors.lora_settings import LoRASettings, Quantization
from actors.settings import LearnerSettings, ModelSettings, PushSettings, ReferenceSettings


class TrainedModelSettings(ModelSettings):
    """The policy of a run that trains it.  With ``lora``, ``path`` may be an adapter, which is trained on."""

    lora: LoRASettings | None = Field(None, description="train a low-rank adapter on the frozen model, not all of it")
    quantization: Quantization | None = Field(
        None, description="QLoRA: with lora, the frozen linear layers in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes"
    )
    base: str | None = Field(
        None, description="where path is an adapter, the folder of its base; default: the one that the adapter names"
    )
    base_checked: bool = Field(
        False, description="base is what the adapter was trained on, though the adapter calls it by another name"
    )

    @model_validator(mode="after")
    def _only_with_lora(self) -> Self:
        for name, why in (("quantization", "quantised weights cannot be trained"), ("base", "only an adapter has one")):
            value = getattr(self, name)
            if value is not None and self.lora is None:
                raise ValueError(f"{name}={value}: {why}; set lora (for instance rank: 16), or leave {name} out")
        if self.base_checked and self.base is None:
            raise ValueError("base_checked=true: no base is given; set base, or leave base_checked out")
        return self


def is_own_reference(reference: ReferenceSettings, lora: LoRASettings | None) -> bool:
    """Whether the learner computes the reference's log-probs itself, its adapter as it started.

    Raises:
        ValueError: it is asked to and cannot, or workers are described that there will not be.
    """
    if reference.source == "adapter" and (lora is None or reference.path is not None):
        why = "model.lora is not set" if lora is None else f"reference.path={reference.path} is another model"
        raise ValueError(f"reference.source=adapter: {why}; leave it out, or set model.lora and no reference.path")
    if lora is None or reference.path is not None or reference.source == "actor":
        return False
    for name, field in ReferenceSettings.model_fields.items():
        value: Any = getattr(reference, name)
        if name != "source" and value != field.default:
            raise ValueError(
                f"reference.{name}={value}: with model.lora the learner is its own reference and has no workers for "
                "it; leave it out, or set reference.source=actor"
            )
    return True


def check_lora(
    role: str, name: str, lora: LoRASettings | None, ranks: LearnerSettings, sampled: bool = False
) -> None:
    """ValueError where ranks cannot train an adapter.

    Args:
        role: section of the ranks.
        name: section of ``lora``.
        sampled: they learn from samples of generators, which know no dropout.
    """
    if lora is None:
        return
    if sampled and lora.dropout:
        raise ValueError(
            f"{name}.dropout={lora.dropout:g}: another policy would be trained than the one that was sampled, and the "
            "gradient depend on how a batch is cut up; use 0"
        )
    if ranks.zero_stage == 3:
        raise ValueError(
            f"{role}.zero_stage=3: an adapter's base is frozen and whole on every rank; use 0, 1 or 2 with LoRA, and "
            "model.quantization where the base is too large"
        )


def pushes_merged(push: PushSettings, model: TrainedModelSettings) -> bool:
    """Whether generators get the whole merged model instead of the adapter alone.

    Raises:
        ValueError: the push is asked for an adapter that there is not, or that generators would add to another base.
    """
    if model.lora is None:
        if push.lora != "auto":
            raise ValueError(f"push.lora={push.lora}: model.lora is not set, so there is no adapter; leave it out")
        return False
    if model.quantization is not None and push.lora == "adapter":
        raise ValueError(
            f"push.lora=adapter: generators would add it to the base as it lies on the disk, and the learner's is in "
            f"{model.quantization}; use merged"
        )
    return push.lora == "merged" or model.quantization is not None
