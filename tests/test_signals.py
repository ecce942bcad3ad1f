"""Laws of stopping: SIGTERM may have a limit, and what it cuts off is not mistaken for a finished step."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from cluster.errors import DeadlineError
from launch.signals import Stopping, stop_on_signals

DEADLINE_S = 30.0


class Story:
    """A loop that ends ``needs_s`` after it was asked to stop and, which none should, swallows a cancellation."""

    def __init__(self, number: signal.Signals, needs_s: float, grace_s: float | None) -> None:
        self.number, self.needs_s, self.grace_s = number, needs_s, grace_s
        self.asked, self.events, self.saved = asyncio.Event(), list[str](), False

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append(f"{kind} {fields['signal']}")

    async def loop(self) -> None:
        try:
            await self.asked.wait()
            await asyncio.sleep(self.needs_s)
        except asyncio.CancelledError:
            if not self.asked.is_set():
                raise

    async def run(self) -> Stopping:
        async with stop_on_signals(self.asked.set, self, self.grace_s) as stopping:  # type: ignore[arg-type]
            os.kill(os.getpid(), self.number)
            await self.loop()
            stopping.check()
            self.saved = True
        return stopping


def play(number: signal.Signals, needs_s: float, grace_s: float | None) -> tuple[Story, Stopping]:
    async def whole() -> tuple[Story, Stopping]:
        story = Story(number, needs_s, grace_s)
        return story, await asyncio.wait_for(story.run(), DEADLINE_S)

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("number", "grace_s"), [(signal.SIGTERM, None), (signal.SIGTERM, DEADLINE_S), (signal.SIGINT, 0.01)]
)
def test_a_run_that_ends_in_time_saves(number: signal.Signals, grace_s: float | None) -> None:
    story, stopping = play(number, 0.1, grace_s)
    assert story.saved and stopping.received == [number.name] and story.events == [f"stopping {number.name}"]


def test_after_its_grace_a_run_is_ended_and_the_cut_off_step_is_not_saved() -> None:
    async def whole() -> Story:
        story = Story(signal.SIGTERM, DEADLINE_S, 0.05)
        with pytest.raises(DeadlineError, match=r"waited 0.05 s for the end of the step.*after SIGTERM"):
            await asyncio.wait_for(story.run(), DEADLINE_S / 2)
        return story

    assert not asyncio.run(whole()).saved


def test_a_save_that_outlasts_the_grace_ends_with_the_same_error() -> None:
    async def whole() -> None:
        async with stop_on_signals(lambda: None, None, 0.05):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(DEADLINE_S)

    with pytest.raises(DeadlineError, match="after SIGTERM"):
        asyncio.run(whole())
