"""The policy-gradient algorithms by name: each one frozen value, what a recipe gets that says no more than the name.

An algorithm is a choice of parts, so it is data and not a class: the keys of ``algorithm`` and, for DAPO, of two
more sections.  A preset holds what differs from the defaults, which are GRPO's; a key that the recipe sets itself
wins.  But for online DPO no preset has a ``kl_coef``: beta fits the scale of the reward, and above 0 it starts a
reference.  What a preset says of the KL is where it goes and by which estimator once the recipe gives a beta.  Online
DPO only looks at which reward is higher, and its loss is made of the reference, so it has a beta of its own.
docs/algorithms.md sets the resolved values side by side (trainers/algorithm_table.py writes it).
May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Name = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "dapo", "gspo", "cispo",
    "ppo", "online_dpo",
]  # fmt: skip

RatioKind = Literal["token", "sequence", "sequence_token"]  # trainers/sequence_ratio.py has the definitions


@dataclass(frozen=True, slots=True)
class Preset:
    """One algorithm."""

    title: str
    paper: str  # arXiv number
    definition: str  # of its advantage and its ratio, in one line
    algorithm: Mapping[str, Any] = field(default_factory=dict)  # keys of this section; a section's first is its switch
    filtering: Mapping[str, Any] = field(default_factory=dict)
    overlong_share: float = 0.0  # of max_tokens, in which the soft over-long punishment grows; 0: none


PRESETS: Mapping[str, Preset] = MappingProxyType({
    "grpo": Preset(
        "GRPO", "2402.03300",
        "A = (r - mean of the group) / deviation of the group; PPO's clipped ratio of each token",
    ),
    "dr_grpo": Preset(
        "Dr. GRPO", "2503.20783",
        "GRPO without its two biases: no division by the group's deviation, none by a completion's length",
        {"scale": "none", "aggregation": "constant"},
    ),
    "rloo": Preset(
        "RLOO", "2402.14740",
        "A = r - mean of the group's other samples; REINFORCE on the whole completion, its log-probs summed",
        {"baseline": "leave_one_out", "scale": "none", "aggregation": "constant",
         "kl_placement": "reward", "kl_estimator": "k1"},
    ),
    "reinforce_plus_plus": Preset(
        "REINFORCE++", "2501.03262",
        "A_t = r - beta * the k1 of the tokens from t on, then to mean 0 and deviation 1 over all tokens of the batch",
        {"baseline": "none", "scale": "batch", "aggregation": "token", "kl_placement": "reward", "kl_estimator": "k1"},
    ),
    "reinforce_plus_plus_baseline": Preset(
        "REINFORCE++-baseline", "2501.03262",
        "A = (r - mean of the group) / deviation over all tokens of the batch",
        {"scale": "batch", "aggregation": "token", "kl_estimator": "k2"},
    ),
    "remax": Preset(
        "ReMax", "2310.10505",
        "A_t = r - reward of the prompt's greedy completion - beta * the k1 of the tokens from t on",
        {"baseline": "greedy", "scale": "none", "aggregation": "constant",
         "kl_placement": "reward", "kl_estimator": "k1"},
    ),
    "dapo": Preset(
        "DAPO", "2503.14476",
        "GRPO with a higher upper clip bound, a mean over tokens, no groups without a spread, long answers punished",
        {"clip_high": 0.28, "aggregation": "token"},
        filtering={"zero_variance": True},
        overlong_share=0.2,  # of 20,480 tokens the last 4,096: section 4.1
    ),
    "gspo": Preset(
        "GSPO", "2507.18071",
        "GRPO's advantage; one ratio a completion, the geometric mean of its tokens' ratios, and one clip",
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},  # section 5.1
    ),
    "cispo": Preset(
        "CISPO", "2506.13585",
        "GRPO's advantage; the ratio is a constant weight, capped and not clipped, of each token's log-prob",
        # The paper gives no number for its upper bound; 5 is that of ScaleRL (arXiv:2510.13786).
        {"aggregation": "token", "correction": {"kind": "cispo", "cap": 5.0}},
    ),
    "ppo": Preset(
        "PPO", "1707.06347",
        "A_t from a critic by GAE, to mean 0 and deviation 1 over all tokens; PPO's clipped ratio of each token",
        {"aggregation": "token", "kl_placement": "reward", "kl_estimator": "k1"},
    ),
    "online_dpo": Preset(
        "Online DPO", "2402.04792",
        "A = -N dL/d log pi(y) of the DPO loss L over the N prompts' best and worst samples; 0 for the others",
        {"kl_coef": 0.1, "correction": {"kind": "none"}},
    ),
})  # fmt: skip


def merged(given: Mapping[Any, Any], preset: Mapping[str, Any]) -> dict[Any, Any]:
    """``given`` with the preset's values for keys that it leaves out.

    The first key of a nested section is its switch: where ``given`` turns it to something else, the section's other
    values were meant for what is no longer there, and none of them is taken.
    """
    found = dict(given)
    for key, value in preset.items():
        if not isinstance(value, Mapping):
            found.setdefault(key, value)
            continue
        own, switch = given.get(key, {}), next(iter(value))
        if isinstance(own, Mapping) and own.get(switch, value[switch]) == value[switch]:
            found[key] = merged(own, value)
    return found
