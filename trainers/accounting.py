"""Every second of every worker by cause: what causes there are, and which one a second belongs to.

A worker may have several calls under way at once; ``cut`` makes them disjoint.  Times are integer nanoseconds of
one clock, so that the causes of a worker sum to its wall time exactly and not up to rounding.

What is no call is a gap, and trainers/waiting.py says for whom the worker waited in it.
May import: the standard library.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

Label = TypeVar("Label")
Attributes = Mapping[str, str | int]
SHOWN_VALUES = 8  # of one attribute, when the calls of one piece differ in it


class Cause(StrEnum):
    """What a second of a worker went into."""

    GENERATE = "generate"  # at least one group is being sampled
    PREFILL_AGAIN = "prefill_again"  # samples again what an earlier attempt at the same group had sampled and lost
    SCORE = "score"  # reward functions or a reward model
    REFERENCE = "reference"  # log-probs under the reference
    VALUES = "values"  # the critic's values of sampled groups
    LEARN = "learn"  # targets, forward, backward, optimizer
    PUSH = "push"  # writes, sends or verifies weights
    PAUSE = "pause"  # an engine stands still to take weights in
    WAIT = "wait"  # has nothing to do until somebody else is done; for whom is named
    CHECKPOINT = "checkpoint"  # saves or exports
    EVALUATE = "evaluate"  # samples or scores held-out prompts
    START = "start"  # constructs, loads a checkpoint, is probed
    IDLE = "idle"  # has nothing to do, and no worker does anything it could wait for


# Of calls under way at once the first of these has the second.  Useful work comes before what goes on beside it (a
# save in the background, a verification between two engine steps), because that costs nothing; an engine that stands
# still samples nothing, whatever groups it holds.
PRECEDENCE = (
    Cause.START, Cause.PAUSE, Cause.LEARN, Cause.GENERATE, Cause.VALUES, Cause.SCORE, Cause.REFERENCE, Cause.EVALUATE,
    Cause.PREFILL_AGAIN, Cause.PUSH, Cause.CHECKPOINT,
)  # fmt: skip
WEIGHT = {cause: len(PRECEDENCE) - place for place, cause in enumerate(PRECEDENCE)}  # of a call's span
USEFUL = frozenset({Cause.GENERATE, Cause.SCORE, Cause.REFERENCE, Cause.VALUES, Cause.LEARN})


@dataclass(frozen=True, slots=True, eq=False)
class Span(Generic[Label]):
    """[start, end) in ns; where spans overlap, the one of the highest weight has the time, then the earlier one."""

    start: int
    end: int
    label: Label
    weight: int
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece(Generic[Label]):
    """A stretch of time with one label; ``spans`` are those that gave it, none in a gap (label None)."""

    start: int
    end: int
    label: Label | None
    spans: tuple[Span[Label], ...] = ()

    @property
    def attributes(self) -> dict[str, str | int]:
        """Those of its spans; different values of one name are listed, SHOWN_VALUES of them at most."""
        found: dict[str, dict[str | int, None]] = {}
        for span in self.spans:
            for name, value in span.attributes.items():
                found.setdefault(name, {})[value] = None
        return {name: _listed(list(values)) for name, values in found.items()}


def _listed(values: Sequence[str | int]) -> str | int:
    if len(values) == 1:
        return values[0]
    shown = ", ".join(str(v) for v in values[:SHOWN_VALUES])
    return shown if len(values) <= SHOWN_VALUES else f"{shown} and {len(values) - SHOWN_VALUES} more"


def cut(spans: Iterable[Span[Label]], start: int, end: int) -> list[Piece[Label]]:
    """[start, end) in disjoint pieces, in order, without holes; neighbours differ in their label.

    O(n log n) in the number of spans; those outside are passed over, those that stand out are cut off.
    """
    waiting = sorted((s for s in spans if s.start < end and s.end > start and s.start < s.end), key=lambda s: s.start)
    active: list[tuple[int, int]] = []  # heap of (-weight, place in waiting); the ended ones leave when they surface
    pieces: list[Piece[Label]] = []
    label: Label | None = None  # with the next two: of the piece that is being made
    since, members = start, list[Span[Label]]()
    now, place = start, 0
    while now < end:
        newcomers = place
        while place < len(waiting) and waiting[place].start <= now:
            heapq.heappush(active, (-waiting[place].weight, place))
            place += 1
        while active and waiting[active[0][1]].end <= now:
            heapq.heappop(active)
        top = waiting[active[0][1]] if active else None
        found = None if top is None else top.label
        if found == label:
            members += [s for s in waiting[newcomers:place] if s.label == label]
        else:
            if since < now:
                pieces.append(Piece(since, now, label, tuple(members)))
            label, since = found, now
            members = [waiting[i] for _, i in active if waiting[i].label == label and waiting[i].end > now]
            members.sort(key=lambda s: s.start)
        until = end if top is None else min(end, top.end)
        now = min(until, waiting[place].start) if place < len(waiting) else until
    if since < end:
        pieces.append(Piece(since, end, label, tuple(members)))
    return pieces


_EVALUATING: ContextVar[bool] = ContextVar("evaluating", default=False)


@contextmanager
def evaluating() -> Iterator[None]:
    """What is sampled and scored within, by the tasks made within, is an evaluation."""
    token = _EVALUATING.set(True)
    try:
        yield
    finally:
        _EVALUATING.reset(token)


def is_evaluating() -> bool:
    """Whether the caller is inside :func:`evaluating`."""
    return _EVALUATING.get()
