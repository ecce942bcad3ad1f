"""The state of the accounting: calls open and close, and ``settle`` turns what is decided into entries.

    call opens --> call closes --> settle: disjoint pieces + for whom in the gaps --> entries --> totals, metrics, trace

A learner's gap can be explained only when it has ended, and a push only when its report is there; so ``settle`` goes
up to the beginning of the oldest such thing, and the rest belongs to the next one.  What is settled is forgotten but
for the totals, so memory does not grow with the run.
May import: trainers.{accounting, waiting}.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from trainers.accounting import WEIGHT, Attributes, Cause, Span, cut
from trainers.waiting import LEARNER, explain

OPEN = 2**63 - 1  # end of what has not ended
Times = Mapping[tuple[Cause, str], int]  # ns by cause and, with Cause.WAIT, for whom


@dataclass(frozen=True, slots=True)
class Entry:
    """A settled stretch of one worker's time, in ns of the ledger's clock."""

    worker: str
    cause: Cause
    whom: str  # with Cause.WAIT, else ""
    start: int
    end: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Count:
    """A counter's new value, for the trace."""

    time: int
    name: str
    series: str
    value: int


@dataclass(slots=True)
class Call:
    """A call under way; whoever made it may add to it until it closes."""

    cause: Cause
    start: int
    attributes: dict[str, str | int]
    is_decided: bool  # whether its cause stands before it closes
    end: int = OPEN
    head: tuple[Cause, int] | None = None  # another cause up to this time

    def starts_with(self, cause: Cause, duration: int) -> None:
        """Its first ``duration`` ns belong to another cause."""
        self.head = (cause, self.start + max(0, duration))

    def spans(self) -> list[Span[Cause]]:
        cause, until = self.head or (self.cause, self.start)
        until = min(until, self.end)
        parts = [(self.start, until, cause), (until, self.end, self.cause)]
        return [Span(*part, WEIGHT[part[2]], self.attributes) for part in parts if part[0] < part[1]]


@dataclass(slots=True)
class _Life:
    """From a worker's joining to its leaving."""

    worker: str
    role: str
    begun: int
    left: int = OPEN
    calls: list[Call] = field(default_factory=list)

    @property
    def idle_since(self) -> int:
        """OPEN while a call is."""
        return max((call.end for call in self.calls), default=self.begun)


@dataclass(slots=True)
class _Stage:
    """A group at one of waiting.STAGES."""

    name: str
    start: int
    end: int = OPEN


class TimeLedger:
    """Times in ns of ``clock``, which never goes back.  One thread; it never waits."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.begun = self.settled = clock()
        self.roles: dict[str, str] = {}  # of all workers there ever were, in the order of their coming
        self.totals: dict[str, Counter[tuple[Cause, str]]] = defaultdict(Counter)
        self._lives: dict[str, _Life] = {}  # by worker
        self._gone: list[_Life] = []
        self._stages: list[_Stage] = []
        self._lost: Counter[str] = Counter()  # group -> ns of sampling that came to nothing
        self._in_flight: Counter[str] = Counter()
        self._counts: list[Count] = []

    # --- what happens ---------------------------------------------------------------------------

    def join(self, worker: str, role: str) -> None:
        """From now on its seconds are accounted for; nothing happens when they already are."""
        if worker not in self._lives:
            self.roles[worker] = role
            self._lives[worker] = _Life(worker, role, self.clock())

    def is_present(self, worker: str) -> bool:
        """Whether it has joined and not left."""
        return worker in self._lives

    def leave(self, worker: str) -> None:
        """Its time ends here: it died, or left the fleet.  It may :meth:`join` again."""
        life = self._lives.pop(worker, None)
        if life is not None:
            life.left = self.clock()
            for call in life.calls:
                self.closed(call)
            self._gone.append(life)

    def opened(self, worker: str, cause: Cause, *, is_decided: bool = True, **attributes: str | int) -> Call:
        """A call to a worker that has joined."""
        call = Call(cause, self.clock(), dict(attributes), is_decided)
        lost = self._lost.pop(str(attributes["group"]), 0) if cause == Cause.GENERATE and "group" in attributes else 0
        if lost:
            call.starts_with(Cause.PREFILL_AGAIN, lost)
        self._lives[worker].calls.append(call)
        return call

    def closed(self, call: Call, *, lost: bool = False) -> None:
        """``lost``: it failed or was given up, so that what it sampled has to be sampled again."""
        call.end, call.is_decided = min(call.end, self.clock()), True
        if lost and call.cause == Cause.GENERATE and "group" in call.attributes:
            self._lost[str(call.attributes["group"])] += call.end - call.start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A group is at one of waiting.STAGES, queued or served."""
        stage = _Stage(name, self.clock())
        self._stages.append(stage)
        try:
            with self.in_flight(name):
                yield
        finally:
            stage.end = self.clock()

    @contextmanager
    def in_flight(self, series: str) -> Iterator[None]:
        """Counts a group in the trace's counter "groups in flight"."""
        self._change(series, 1)
        try:
            yield
        finally:
            self._change(series, -1)

    def _change(self, series: str, by: int) -> None:
        self._in_flight[series] += by
        self.count("groups in flight", series, self._in_flight[series])

    def count(self, name: str, series: str, value: int) -> None:
        """A counter of the trace has a new value."""
        self._counts.append(Count(self.clock(), name, series, value))

    # --- what it comes to -------------------------------------------------------------------------

    def settle(self, *, final: bool = False) -> tuple[list[Entry], list[Count]]:
        """What is decided since the last time, in order of time; ``final``: everything, up to now."""
        start, end = self.settled, self.clock() if final else self._decided_until()
        lives = [*self._lives.values(), *self._gone]
        entries = self._entries(lives, start, end) if end > start else []
        for entry in entries:
            self.totals[entry.worker][entry.cause, entry.whom] += entry.end - entry.start
        self.settled = end
        for life in lives:
            life.calls = [c for c in life.calls if c.end > end]
        self._stages = [s for s in self._stages if s.end > end]
        self._gone = [life for life in self._gone if life.left > end]
        counts, self._counts = self._counts, []
        return entries, counts

    def _decided_until(self) -> int:
        limits = [self.clock()]
        for life in self._lives.values():
            limits += [call.start for call in life.calls if not call.is_decided]
            if life.role == LEARNER:
                limits.append(life.idle_since)
        return max(self.settled, min(limits))

    def _entries(self, lives: Sequence[_Life], start: int, end: int) -> list[Entry]:
        keys = range(len(lives))  # one worker may have two lives in this time
        roles = [life.role for life in lives]
        calls = [[span for call in life.calls for span in call.spans()] for life in lives]
        busy = [cut(calls[i], max(start, lives[i].begun), min(end, lives[i].left)) for i in keys]
        waits = explain(calls, busy, roles, [Span(s.start, s.end, s.name, 0) for s in self._stages], start, end)
        entries: list[Entry] = []
        for life, pieces, gaps in zip(lives, busy, waits, strict=True):
            entries += [
                Entry(life.worker, p.label, "", p.start, p.end, p.attributes) for p in pieces if p.label is not None
            ]
            entries += [
                Entry(life.worker, Cause.WAIT if p.label else Cause.IDLE, p.label or "", p.start, p.end, {})
                for p in gaps
            ]
        return sorted(entries, key=lambda entry: entry.start)
