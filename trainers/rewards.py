"""Reward functions: how they are named, loaded and probed, and how a group is scored.

A reward function follows TRL's keyword protocol::

    fn(prompts=[...], completions=[...], completion_ids=[[...]], **columns) -> list[float | None]

or returns an awaitable of such a list.  ``prompts`` and ``completions`` are plain text, or lists of
messages where the dataset's prompt is one; every further dataset column is a list with one entry a
sample.  A function gets those of them that it has parameters for, as fresh copies on each call.

A failure is a value: it masks its sample and never becomes the reward 0.  ``None`` means "this
function does not apply": the part is left out of the sum.

May import: numpy, pydantic, trainers.errors, trainers.experience, trainers.reward_calls, trainers.settings,
trainers.verifiers.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from trainers.errors import InputError
from trainers.experience import GroupRewards, Prompt, RewardFailure, Trajectory, TrajectoryGroup
from trainers.reward_calls import PROTOCOL, LoadedReward, UserCodeError, call, user_code
from trainers.settings import Settings
from trainers.verifiers import BUILTINS, CHECKS

__all__ = ["LoadedReward", "RewardSettings", "load_reward", "probe_rewards", "score_group"]

logger = logging.getLogger("burnish.trainers")

ENTRY_POINTS = "burnish.rewards"
PROBE_TEXTS = ("", "The answer is 4.")  # what an untrained policy may well say


class RewardSettings(Settings):
    """One term of the reward."""

    name: str = Field("", description="in metrics and errors; default: the last part of function")
    function: str = Field(
        min_length=1,
        description="a name from trainers/verifiers.py, package.module:attribute, path/to/file.py:attribute, "
        "or an entry point of group burnish.rewards",
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="the total is the weighted sum of all rewards")
    args: dict[str, Any] = Field(default_factory=dict, description="bound to the function as keyword arguments")

    @model_validator(mode="before")
    @classmethod
    def _name_from_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and isinstance(data.get("function"), str):
            return {**data, "name": default_name(data["function"])}
        return data


def default_name(function: str) -> str:
    """What a term is called that is given no name."""
    return re.split(r"[:./\\]", function)[-1]


def load_reward(settings: RewardSettings) -> LoadedReward:
    """Import the function and bind its arguments.

    Raises InputError when it does not import, is not callable, or the arguments do not fit.
    """
    field, value = f"rewards.{settings.name}.function", settings.function
    function = find_function(settings.function, field)
    if not callable(function):
        raise InputError(field, value, f"is a {type(function).__name__}, not a function", "name a function")
    try:
        parameters = inspect.signature(function).parameters.values()
        inspect.signature(function).bind_partial(**settings.args)
        if function is BUILTINS.get(value):
            CHECKS[value](**settings.args)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"rewards.{settings.name}.args", settings.args, str(error), f"give arguments that {value} accepts"
        ) from error
    lists = [p for p in parameters if p.name not in settings.args and p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in lists):
        raise InputError(field, value, "has positional-only parameters", "everything is passed by keyword")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in lists)
    named = [p for p in lists if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return LoadedReward(
        name=settings.name,
        weight=settings.weight,
        function=functools.partial(function, **settings.args),
        accepts=None if takes_all else frozenset(p.name for p in named),
        required=frozenset(p.name for p in named if p.default is p.empty),
        bound=frozenset(settings.args),
    )


def find_function(function: str, field: str) -> Any:
    """What a built-in name, ``location:attribute`` or an entry point names; raises InputError at ``field``."""
    if function in BUILTINS:
        return BUILTINS[function]
    if ":" not in function:
        return _find_entry_point(function, field)
    location, _, attribute = function.rpartition(":")
    try:
        with user_code():
            return functools.reduce(getattr, attribute.split("."), _import(location))
    except UserCodeError as error:
        raise InputError(
            field, function, f"does not import: {error}", "check the name, and that it is on every node"
        ) from error


def _import(location: str) -> Any:
    if not location.endswith(".py"):
        return importlib.import_module(location)
    path = Path(location).expanduser().resolve()
    digest = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"burnish_reward_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def _find_entry_point(name: str, field: str) -> Callable[..., Any]:
    installed = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        known = sorted({*BUILTINS, *installed})
        near = ", ".join(difflib.get_close_matches(name, known, n=2)) or ", ".join(known)
        raise InputError(
            field,
            name,
            f"is neither built in nor an entry point of group {ENTRY_POINTS}",
            f"use {near}, package.module:attribute or path/to/file.py:attribute",
        )
    try:
        with user_code():
            return installed[name].load()  # type: ignore[no-any-return]
    except UserCodeError as error:
        raise InputError(field, name, f"its entry point does not load: {error}", "reinstall its package") from error


def probe_rewards(rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], timeout_s: float) -> None:
    """Call each function on two real prompts with an empty and a short completion, before anything is allocated.

    Not to be called from a running event loop.  Raises InputError when a function needs a column the
    dataset lacks, raises, takes longer than ``timeout_s``, or returns what is not a finite number or
    None for each sample.
    """
    for reward in rewards:
        for prompt in prompts[:2]:
            field = f"rewards.{reward.name}.function"
            if missing := reward.required - {*PROTOCOL, *prompt.columns}:
                has = ", ".join(sorted(prompt.columns)) or "none"
                raise InputError(
                    field,
                    _name(reward),
                    f"needs {', '.join(sorted(missing))}, which the dataset lacks (further columns: {has})",
                    f"add the column, or give the value in rewards.{reward.name}.args",
                )
            trajectories = [_probe_trajectory(i, prompt, text) for i, text in enumerate(PROBE_TEXTS)]
            _, failures = asyncio.run(_score(reward, prompt, trajectories, timeout_s, num_retries=0, quiet=True))
            for i, failure in failures:
                if failure.kind != "abstained":
                    raise InputError(
                        field,
                        _name(reward),
                        f"{failure.kind} on prompt {prompt.text[:60]!r} and completion {PROBE_TEXTS[i]!r}: "
                        f"{failure.detail}",
                        "return one finite number or None for each completion, an empty one too",
                    )


def _name(reward: LoadedReward) -> str:
    inner = reward.function.func
    return str(getattr(inner, "__qualname__", None) or type(inner).__qualname__)


def _probe_trajectory(i: int, prompt: Prompt, text: str) -> Trajectory:
    ids = prompt.token_ids[-4:] if text else prompt.token_ids[:0]
    return Trajectory(i, 0, ids, np.zeros(len(ids), np.float32), text, "stop", ())


async def score_group(
    rewards: Sequence[LoadedReward], group: TrajectoryGroup, timeout_s: float, num_retries: int
) -> GroupRewards:
    """Score all samples of ``group`` with all functions at once; never raises for what a function does.

    ``timeout_s`` bounds one call of one function, ``num_retries`` counts further calls after an
    exception or a timeout.  totals[i] = sum of weight * part over the parts that have a value, NaN when
    one failed or all abstained.  A part of weight 0 is only measured: whatever it does, the totals are the others';
    where all are, they are 0.
    """
    started, num_samples = time.monotonic(), len(group.trajectories)
    scored = await asyncio.gather(
        *(_score(r, group.prompt, group.trajectories, timeout_s, num_retries) for r in rewards)
    )
    failures = sorted((f for _, fs in scored for f in fs), key=lambda f: f[0])
    weighed = [(r.weight, *found) for r, found in zip(rewards, scored, strict=True) if r.weight != 0]
    totals, applies = np.zeros(num_samples), np.full(num_samples, not weighed)
    for weight, part, why in weighed:
        has_value = np.isfinite(part)
        totals += np.where(has_value, weight * part, 0.0)
        totals[[i for i, f in why if f.kind != "abstained"]] = np.nan
        applies |= has_value
    totals[~applies] = np.nan
    return GroupRewards(
        group_id=group.group_id,
        totals=totals,
        parts={r.name: part for r, (part, _) in zip(rewards, scored, strict=True)},
        failures=tuple(failures),
        score_s=time.monotonic() - started,
        measured=tuple(r.name for r in rewards if r.weight == 0),
    )


async def _score(
    reward: LoadedReward, prompt: Prompt, trajectories: Sequence[Trajectory], timeout_s: float, num_retries: int,
    quiet: bool = False,
) -> tuple[np.ndarray, list[tuple[int, RewardFailure]]]:
    """float64 [G], NaN where there is no value, and why there is none."""
    values: Sequence[float | None | RewardFailure] = ()
    for attempt in range(1 + num_retries):
        try:
            values = await call(reward, prompt, trajectories, timeout_s)
            break
        except UserCodeError as error:
            failure = RewardFailure(reward.name, "raised", str(error))
        except TimeoutError:
            failure = RewardFailure(reward.name, "timeout", f"no answer in {timeout_s:g} s")
        if not quiet:
            logger.warning("reward %s, try %d of %d: %s", reward.name, attempt + 1, 1 + num_retries, failure.detail)
        values = [failure] * len(trajectories)
    abstained = RewardFailure(reward.name, "abstained", "returned None")
    why = [(i, abstained if v is None else v) for i, v in enumerate(values) if not isinstance(v, float)]
    return np.array([v if isinstance(v, float) else np.nan for v in values], dtype=np.float64), why
