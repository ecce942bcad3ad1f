"""What `burnish compare` can set side by side: offline preference losses, policy-gradient algorithms, best-of-n.

    offline   learns from answers of the base model that were labelled once; all of these learn from the same ones
    online    samples, labels and trains in turns
    search    trains nothing: the best of n answers of the base model, by the task's reward

A method of another kind joins here with a kind of its own, and in launch/compare_plan.py with what its runs are.
May import: trainers.{preference_training, presets}.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from trainers.preference_training import LABELLED, LOSSES
from trainers.presets import PRESETS

Kind = Literal["offline", "online", "search"]
BEST_OF_N = "best_of_n"
GROUPS = ("offline", "online", "label", "eval")  # besides methods' names, keys of compare.overrides
WEIGHTS = ("algorithm.desirable_weight", "algorithm.undesirable_weight")  # of good and of bad answers


@dataclass(frozen=True, slots=True)
class Method:
    """One algorithm of a comparison."""

    name: str
    title: str
    kind: Kind
    algorithm: Mapping[str, Any] = field(default_factory=dict)  # its section; empty: nothing is trained

    @property
    def is_labelled(self) -> bool:
        """Whether it learns from answers that are good or bad, one by one; else from compared ones."""
        loss = self.algorithm.get("loss")
        return loss is not None and LOSSES[loss].rows == LABELLED

    @property
    def has_reference(self) -> bool:
        """Whether an offline method asks the base model for its log-probs."""
        loss = self.algorithm.get("loss")
        return loss is not None and LOSSES[loss].has_reference


def _offline(name: str, title: str, **settings: Any) -> Method:
    return Method(name, title, "offline", {"name": "dpo", **settings})


_ALL = (
    _offline("dpo", "DPO", loss="sigmoid"),
    _offline("cdpo", "conservative DPO", loss="sigmoid", label_smoothing=0.1),
    _offline("robust_dpo", "robust DPO", loss="robust", label_smoothing=0.1),
    _offline("ipo", "IPO", loss="ipo"),
    _offline("kto", "KTO", loss="kto"),
    _offline("orpo", "ORPO", loss="orpo"),
    _offline("simpo", "SimPO", loss="simpo"),
    *(Method(name, preset.title, "online", {"name": name}) for name, preset in PRESETS.items()),
    Method(BEST_OF_N, "best-of-n", "search"),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
DEFAULTS = (
    "dpo", "ipo", "kto", "orpo", "simpo", "grpo", "rloo", "reinforce_plus_plus", "dapo", "gspo", "cispo", "ppo",
    BEST_OF_N,
)  # fmt: skip


def canonical(name: str) -> str:
    """``REINFORCE++-baseline`` and ``best-of-n`` as the configuration writes them."""
    return name.strip().lower().replace("++", "_plus_plus").replace("-", "_")


def unknown(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Reason and remedy for a name that is none of ``known``."""
    near = difflib.get_close_matches(canonical(name), list(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no such algorithm; {hint}known are {', '.join(known)}"
