"""SIGINT and SIGTERM of a run or a server.  May import: cluster.errors, trainers.protocols."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable

from cluster.errors import DeadlineError
from trainers.protocols import Recorder


class Stopping:
    """What the signals so far mean for the run."""

    def __init__(self, grace_s: float | None) -> None:
        self.received: list[str] = []  # names, in order
        self._grace_s = grace_s
        self._limit = asyncio.timeout(None)

    def note(self, number: signal.Signals) -> None:
        """SIGTERM announces a kill, so its grace begins; who pressed Ctrl-C waits."""
        self.received.append(number.name)
        if number == signal.SIGTERM and self._grace_s is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._grace_s)

    def check(self) -> None:
        """DeadlineError when the grace is over: an update that was cut off must not be saved as if it were whole."""
        if self._limit.expired():
            raise DeadlineError("the end of the step and its checkpoint", "the run after SIGTERM", self._grace_s or 0.0)


@contextlib.asynccontextmanager
async def stop_on_signals(
    stop: Callable[[], None], recorder: Recorder | None, grace_s: float | None
) -> AsyncIterator[Stopping]:
    """The first SIGINT or SIGTERM asks the run to stop in order; the second ends it at once.

    Args:
        stop: has what is being made finished (an update, an answer), and no more begun.  May be called twice, when
            two signals come at once.
        recorder: gets the event; None where nothing is recorded.
        grace_s: seconds from SIGTERM until the block is ended with a DeadlineError; None: no limit.
    """
    running = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    stopping = Stopping(grace_s)

    def on_signal(number: signal.Signals) -> None:
        if recorder is not None:
            recorder.event("stopping", signal=number.name)
        stopping.note(number)
        stop()
        for s in signals:
            running.remove_signal_handler(s)

    for s in signals:
        running.add_signal_handler(s, on_signal, s)
    try:
        async with stopping._limit:
            yield stopping
    except TimeoutError:
        stopping.check()
        raise
    finally:
        for s in signals:
            running.remove_signal_handler(s)
