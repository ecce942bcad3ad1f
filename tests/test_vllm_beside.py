"""A vLLM engine in a process of its own is asked whether it lives, but not while it cannot answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.vllm_beside import BesideEngine
from cluster.errors import WorkerDiedError


def engine(**state: Any) -> tuple[BesideEngine, list[str]]:
    """Without vLLM; the questions that the engine's process was asked."""
    found, asked = BesideEngine.__new__(BesideEngine), list[str]()

    async def is_sleeping() -> bool:
        asked.append("is_sleeping")
        return False

    found._engine = SimpleNamespace(errored=False, dead_error=None, is_sleeping=is_sleeping)
    found._updating, found._worked, found._running = False, False, set[str]()
    for name, value in state.items():
        setattr(found, name, value)
    return found, asked


@pytest.mark.parametrize(
    ("state", "num_asked"),
    [
        ({}, 1),  # idle, before its first request
        ({"_running": {"first"}}, 0),  # whose kernels it may still compile
        ({"_running": {"second"}, "_worked": True}, 1),
        ({"_updating": True, "_worked": True}, 0),
    ],
)
def test_an_engine_is_asked_whenever_it_can_answer(state: dict[str, Any], num_asked: int) -> None:
    found, asked = engine(**state)
    asyncio.run(found.check())
    assert len(asked) == num_asked


def test_an_engine_that_has_ended_is_known_whatever_it_was_doing() -> None:
    found, _ = engine(_running={"first"})
    found._engine.errored, found._engine.dead_error = True, "killed"
    with pytest.raises(WorkerDiedError, match="killed"):
        asyncio.run(found.check())
