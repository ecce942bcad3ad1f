"""What ``algorithm.name`` gives a run beyond its own section: DAPO's dynamic sampling and over-long punishment.

Works on the raw mapping, before anything is checked: what the recipe itself has stays as it is, and a configuration
that was dumped with its values, which has them all, comes out unchanged.
May import: actors.{judge_settings, settings}, trainers.{presets, rewards, rubric}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.judge_settings import WINS, JudgeRewardSettings
from actors.settings import SamplingSettings
from trainers.presets import PRESETS, Preset, merged
from trainers.rewards import default_name
from trainers.rubric import RubricSettings

NAME = "overlong"  # of the reward that is added
OVERLONG = "length"  # the built-in reward function that is DAPO's soft over-long punishment (trainers/verifiers.py)


def preset_of(raw: Mapping[Any, Any]) -> Preset | None:
    """The preset that ``raw`` names; None where its name is none of them, which is refused later."""
    algorithm = raw.get("algorithm", {})
    name = algorithm.get("name", "grpo") if isinstance(algorithm, Mapping) else getattr(algorithm, "name", None)
    return PRESETS.get(name) if isinstance(name, str) else None


def with_preset(raw: Mapping[Any, Any]) -> dict[Any, Any]:
    """The configuration ``raw`` with the values of its preset where it has none."""
    preset = preset_of(raw)
    if preset is None:
        return dict(raw)
    values: dict[str, Any] = {"algorithm": preset.algorithm, "filtering": preset.filtering}
    found = dict(raw)
    for section, given in values.items():
        own = raw.get(section, {})
        if given and isinstance(own, Mapping):
            found[section] = merged(own, given)
    return _with_punishment(found, preset.overlong_share) if preset.overlong_share else found


def _with_punishment(raw: dict[Any, Any], share: float) -> dict[Any, Any]:
    """One more reward: -1 at ``max_tokens``, growing over the last ``share`` of them.

    Not where the recipe has such a reward or one of that name itself, of whatever weight, and not where nothing else
    is rewarded.
    """
    rewards, models, judges = (raw.get(key, ()) for key in ("rewards", "reward_models", "judges"))
    if not all(isinstance(scorers, list | tuple) for scorers in (rewards, models, judges)):
        return raw
    if not (rewards or models or judges):
        return raw
    if any(_get(reward, "function") == OVERLONG or _get(reward, "name") == NAME for reward in rewards):
        return raw
    sampling = _get(raw.get("generator", {}), "sampling") or {}
    max_tokens = _get(sampling, "max_tokens") or SamplingSettings.model_fields["max_tokens"].default
    if not isinstance(max_tokens, int) or max_tokens < 1:
        return raw  # refused later, at its own key
    raw["rewards"] = [*rewards, punishment(max_tokens, share)]
    evaluation, filtering = raw.get("evaluation", {}), raw.get("filtering", {})
    names = _names(rewards, models, judges)
    if not rewards and isinstance(evaluation, Mapping):  # a punishment is no accuracy, though it comes first now
        raw["evaluation"] = {"reward": names[0], **evaluation}
    weighty = _names(*([s for s in scorers if _get(s, "weight") != 0] for scorers in (rewards, models, judges)))
    if len(weighty) == 1 and isinstance(filtering, Mapping):  # of several none alone says what was right
        raw["filtering"] = {"by": weighty[0], **filtering}
    return raw


def _names(rewards: Sequence[Any], models: Sequence[Any], judges: Sequence[Any]) -> list[Any]:
    """Parts of the reward, as the configuration will name them; None: it has no name and will be refused."""
    found = [_get(reward, "name") or default_name(str(_get(reward, "function"))) for reward in rewards]
    found += [_get(model, "name") for model in models]
    for judge in judges:
        name = _get(judge, "name") or JudgeRewardSettings.model_fields["name"].default
        axes = _get(_get(judge, "rubric") or {}, "axes") or RubricSettings().axes
        found += [f"{name}_{WINS}"] if _get(judge, "pairwise") else [f"{name}_{_get(axis, 'name')}" for axis in axes]
    return found


def punishment(max_tokens: int, share: float) -> dict[str, Any]:
    """An item of ``rewards``: DAPO's punishment over the last ``share`` of ``max_tokens``."""
    arguments = {"max_tokens": max_tokens, "buffer_tokens": max(1, round(max_tokens * share))}
    return {"name": NAME, "function": OVERLONG, "args": arguments}


def _get(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)
