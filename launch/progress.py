"""What the terminal shows while a run goes on: a live display, or one plain line a step.

The live display has a bar for the run and one for each phase of the current step.  Where the output is no
terminal (a log file, a CI job) every step is one line that reads well on its own and can be grepped.
May import: rich.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

PHASES = ("generate", "score", "learn", "push")
RECENT = 0.7  # weight of the past in the running mean of the step time, for the ETA

# metric, label, format of the value; in the order of the line
_SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("eval/accuracy", "accuracy", "{:.3f}"),
    ("completions/mean_length", "length", "{:.1f}"),
    ("kl", "kl", "{:.4f}"),
    ("throughput/generate_tokens_per_s", "tok/s", "{:.0f}"),
    ("time/step_s", "step", "{:.1f}s"),
)


def duration(seconds: float) -> str:
    """``seconds`` for people: 42s, 3m07s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"


class Progress:
    """Live progress of ``num_steps`` steps on ``console``; plain lines unless ``live``.

    Methods do no waiting and may be called in any order after construction; ``close`` restores the terminal.
    """

    def __init__(self, num_steps: int, console: Console, live: bool) -> None:
        self._num_steps, self._console = num_steps, console
        self._step_s: float | None = None  # running mean
        self._last = time.monotonic()
        self._bars: Bars | None = None
        self._phases: dict[str, TaskID] = {}
        if live:
            self._bars = Bars(
                TextColumn("{task.description:>9}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"), console=console, transient=False,
            )
            self._run = self._bars.add_task("run", total=num_steps, note="")
            for name in PHASES:
                self._phases[name] = self._bars.add_task(name, total=None, note="", visible=False)
            self._bars.start()

    def phase(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of phase ``name`` of the current step; silent in plain mode."""
        if self._bars is None:
            return
        if name not in self._phases:
            self._phases[name] = self._bars.add_task(name, total=None, note="")
        self._bars.update(self._phases[name], completed=done, total=total, visible=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step ``step`` is over; step 0 is what precedes training (an evaluation)."""
        now = time.monotonic()
        took = metrics.get("time/step_s", now - self._last)
        self._last = now
        if step > 0 and math.isfinite(took):
            self._step_s = took if self._step_s is None else RECENT * self._step_s + (1 - RECENT) * took
        parts = [f"{label} {form.format(metrics[name])}" for name, label, form in _SHOWN if name in metrics]
        left = self._num_steps - step
        if self._step_s is not None and left > 0:
            parts.append(f"ETA {duration(left * self._step_s)}")
        line = "  ".join(parts)
        if self._bars is None:
            self._print(f"step {step}/{self._num_steps}  {line}")
            return
        self._bars.update(self._run, completed=step, note=line)
        for task in self._phases.values():
            self._bars.reset(task, total=None, visible=False)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._print(text)

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        if self._bars is not None:
            self._bars.stop()

    def _print(self, text: str) -> None:
        # Text of a run is data: no markup, no colouring, no wrapping.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
