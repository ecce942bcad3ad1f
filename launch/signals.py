"""SIGINT and SIGTERM of a run.  May import: trainers.{loop, protocols}."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence

from trainers.loop import TrainingLoop
from trainers.protocols import Recorder


@contextlib.contextmanager
def stop_on_signals(loop: TrainingLoop, recorder: Recorder) -> Iterator[list[str]]:
    """The first SIGINT or SIGTERM asks the run to stop with a checkpoint; the second ends it at once.

    Yields the names of those received so far.
    """
    running = asyncio.get_running_loop()
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    received: list[str] = []

    def on_signal(number: signal.Signals) -> None:
        recorder.event("stopping", signal=number.name)
        received.append(number.name)
        loop.stop()
        for s in signals:
            running.remove_signal_handler(s)

    for s in signals:
        running.add_signal_handler(s, on_signal, s)
    try:
        yield received
    finally:
        for s in signals:
            running.remove_signal_handler(s)
