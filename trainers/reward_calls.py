"""One call of a user's reward function: what it is passed, how it is bounded, what it may return.

Synchronous functions run in a daemon thread of their own, asynchronous ones on the running loop (one
that blocks the loop cannot be timed out).  A thread that is past its limit is abandoned, since Python
cannot end it; a daemon thread keeps no process from ending, a thread of a pool would.
May import: numpy, trainers.experience.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from trainers.experience import Prompt, RewardFailure, Trajectory

PROTOCOL = ("prompts", "completions", "completion_ids")  # a dataset column may not have these names
NUM_THREADS = 32  # synchronous calls at once in one event loop; further ones wait outside their time limit

_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


class UserCodeError(Exception):
    """A user's function raised; the text says what."""


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward function, ready to be called."""

    name: str
    weight: float
    function: functools.partial[Any]  # its arguments are bound
    accepts: frozenset[str] | None  # names of lists it takes; None: all of them (it has **kwargs)
    required: frozenset[str]  # names of lists it cannot do without
    bound: frozenset[str]  # names of its arguments, which no column overrides


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """The one place where everything is caught: the code inside is the user's and may raise whatever it likes.

    SystemExit counts too: a reward function that calls sys.exit() shall not end a run.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{type(error).__name__}: {error}") from error


def _constant(value: Any) -> Callable[[Trajectory], Any]:
    return lambda _: copy.deepcopy(value)


def arguments(reward: LoadedReward, prompt: Prompt, trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """The lists ``reward`` takes, one entry a sample; copies, so that nothing a function does is seen by others."""
    chat = isinstance(prompt.source, list)
    source = prompt.text if prompt.source is None else prompt.source
    offered: dict[str, Callable[[Trajectory], Any]] = {
        **{name: _constant(value) for name, value in prompt.columns.items()},
        "prompts": lambda t: copy.deepcopy(source),
        "completions": lambda t: [{"role": "assistant", "content": t.text}] if chat else t.text,
        "completion_ids": lambda t: t.completion_ids.tolist(),
    }
    wanted = offered.keys() if reward.accepts is None else offered.keys() & reward.accepts
    return {name: [offered[name](t) for t in trajectories] for name in wanted if name not in reward.bound}


async def call(
    reward: LoadedReward, prompt: Prompt, trajectories: Sequence[Trajectory], timeout_s: float
) -> list[float | None | RewardFailure]:
    """Call once: a number, None (abstained) or what is wrong with it, for each sample.

    Raises UserCodeError when the function raises, TimeoutError when it takes longer than ``timeout_s``.
    """
    kwargs = arguments(reward, prompt, trajectories)
    if _is_async(reward.function):
        async with asyncio.timeout(timeout_s):
            with user_code():
                result = _unpack(await reward.function(**kwargs))
    else:
        loop = asyncio.get_running_loop()
        async with _slots.setdefault(loop, asyncio.Semaphore(NUM_THREADS)), asyncio.timeout(timeout_s):
            result = await _in_thread(reward, kwargs)
            if inspect.isawaitable(result):
                with user_code():
                    result = _unpack(await result)
    return _values(reward.name, result, len(trajectories))


def _is_async(function: functools.partial[Any]) -> bool:
    return inspect.iscoroutinefunction(function.func) or inspect.iscoroutinefunction(type(function.func).__call__)


async def _in_thread(reward: LoadedReward, kwargs: Mapping[str, Any]) -> Any:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: UserCodeError | None) -> None:
        if not future.done():  # it is cancelled after a timeout
            future.set_exception(error) if error is not None else future.set_result(result)

    def run() -> None:
        result, failed = None, None
        try:
            with user_code():
                result = _unpack(reward.function(**kwargs))
        except UserCodeError as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, daemon=True, name=f"reward-{reward.name}").start()
    return await future


def _unpack(result: Any) -> Any:
    """A list of plain values where there is one: of sequences, arrays, tensors and generators."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, (str, bytes, Mapping)) or inspect.isawaitable(result) or not hasattr(result, "__iter__"):
        return result
    return [v.item() if getattr(v, "shape", None) == () and hasattr(v, "item") else v for v in result]


def _values(name: str, result: Any, num_samples: int) -> list[float | None | RewardFailure]:
    if not isinstance(result, list):
        detail = f"returned {type(result).__name__}, not a list of {num_samples} values"
        return [RewardFailure(name, "wrong_count", detail)] * num_samples
    if len(result) != num_samples:
        detail = f"returned {len(result)} values for {num_samples} samples"
        return [RewardFailure(name, "wrong_count", detail)] * num_samples
    return [_value(name, value) for value in result]


def _value(name: str, value: Any) -> float | None | RewardFailure:
    if value is None:
        return None
    if not isinstance(value, (Real, np.bool_)):
        return RewardFailure(name, "not_a_number", f"returned {type(value).__name__} {str(value)[:80]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else RewardFailure(name, "nan", f"returned {number}")
