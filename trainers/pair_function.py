"""Functions that compare two answers: how they are loaded, probed and called.

    fn(prompts=[...], completions_a=[...], completions_b=[...], seeds=[...], **columns) -> [1 | 0 | 0.5 | None]

One entry a pair: 1 where a is preferred, 0 where b is, 0.5 for a tie, None where it cannot say.  The protocol is
that of reward functions (trainers/rewards.py) otherwise: a function gets the lists it has parameters for, may be
async, may fail.  ``seeds`` are whole numbers that depend on the run's seed and the pair alone: a function that
plays a noisy human draws from them, and a run that is resumed or repeated has the same labels.

May import: numpy, trainers.{errors, experience, reward_calls, rewards}.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainers.errors import InputError
from trainers.experience import Prompt, RewardFailure, Trajectory
from trainers.reward_calls import LoadedReward, UserCodeError, call
from trainers.rewards import RewardSettings, load_reward

OFFERED = ("completions_a", "completions_b", "seeds")
PROBE_TEXTS = ("The answer is 4.", "I do not know.")
Value = float | None | RewardFailure


def load_pair_function(settings: RewardSettings, field: str) -> LoadedReward:
    """Import the function and bind its arguments; InputError names ``field``."""
    try:
        return load_reward(settings)
    except InputError as error:
        raise InputError(field, error.value, error.reason, error.remedy) from error


async def compare(
    function: LoadedReward,
    prompt: Prompt,
    pairs: Sequence[tuple[Trajectory, Trajectory]],
    seeds: Sequence[int],
    timeout_s: float,
    num_retries: int = 0,
) -> list[Value]:
    """1, 0, 0.5, None or what went wrong, for each pair; never raises for what the function does."""
    adapted = _adapt(function, prompt, [b for _, b in pairs], seeds)
    values: list[Value] = []
    for _ in range(1 + num_retries):
        try:
            values = await call(adapted, prompt, [a for a, _ in pairs], timeout_s)
            break
        except UserCodeError as error:
            values = [RewardFailure(function.name, "raised", str(error))] * len(pairs)
        except TimeoutError:
            values = [RewardFailure(function.name, "timeout", f"no answer in {timeout_s:g} s")] * len(pairs)
    return [_outcome(function.name, value) for value in values]


def _outcome(name: str, value: Value) -> Value:
    if isinstance(value, float) and value not in (0.0, 0.5, 1.0):
        return RewardFailure(name, "not_a_number", f"returned {value:g}, not 1, 0, 0.5 or None")
    return value


def _adapt(function: LoadedReward, prompt: Prompt, seconds: Sequence[Trajectory], seeds: Sequence[int]) -> LoadedReward:
    """The function as a reward function of the first answers of all pairs."""
    chat = isinstance(prompt.source, list)
    others: dict[str, list[Any]] = {
        "completions_b": [[{"role": "assistant", "content": t.text}] if chat else t.text for t in seconds],
        "seeds": list(seeds),
    }

    def pairwise(completions: list[Any], **lists: list[Any]) -> Any:
        lists.pop("completion_ids", None)
        offered = {"completions_a": completions, **others}
        wanted = offered if function.accepts is None else offered.keys() & function.accepts
        return function.function(**lists, **{name: offered[name] for name in wanted if name not in function.bound})

    accepts = None if function.accepts is None else (function.accepts - {*OFFERED}) | {"completions"}
    return dataclasses.replace(function, function=functools.partial(pairwise), accepts=accepts)


def probe_pair_function(function: LoadedReward, prompts: Sequence[Prompt], field: str, timeout_s: float) -> None:
    """Call it on two real prompts before anything is allocated; not from a running event loop.

    Raises:
        InputError: it needs a column the dataset lacks, raises, or returns what is no outcome.
    """
    name = str(getattr(function.function.func, "__qualname__", function.name))
    if function.accepts is not None and not function.accepts & {"completions_a", "completions_b"}:
        raise InputError(field, name, "takes no completions_a and completions_b", "name its parameters so")
    for prompt in prompts[:2]:
        if missing := function.required - {"prompts", *OFFERED, *prompt.columns}:
            raise InputError(field, name, f"needs {', '.join(sorted(missing))}, which the dataset lacks",
                             "add the column, or give the value in args")  # fmt: skip
        ids, none = prompt.token_ids[-4:], np.zeros(4, np.float32)
        a, b = (Trajectory(i, 0, ids, none[: len(ids)], text, "stop", ()) for i, text in enumerate(PROBE_TEXTS))
        for value in asyncio.run(compare(function, prompt, [(a, b), (b, a)], [0, 1], timeout_s)):
            if isinstance(value, RewardFailure):
                raise InputError(
                    field, name, f"{value.kind} on prompt {prompt.text[:60]!r}: {value.detail}",
                    "return 1, 0, 0.5 or None for each pair",
                )  # fmt: skip


def source_of(function: LoadedReward) -> str:
    """The source text of the function's module, "" where there is none: part of what names a labelling."""
    module = inspect.getmodule(inspect.unwrap(function.function.func))
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):  # compiled, or typed in
        return ""
