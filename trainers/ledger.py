"""The ledger: what became of every position of the prompt stream.  A pure state machine.

    pending --issue--> in flight --finish--> finished --train--> trained (at step s)
       ^                |     |                 `-------drop---> dropped (filtered; the reason)
       |                |     `-------------------------drop-------'
       |---- lose ------'     `-- lose, for the n-th time -----> failed (after n attempts; the reason)
       `---- withdraw, from in flight or finished: no attempt is counted

Trained, dropped and failed are final: such a position is *consumed*.  The consumption frontier is the first
position that is not; the order in which positions were handed out says nothing.  What lies below the frontier is
counted and forgotten, so the state is as small as what is under way.
A position is one prompt in one epoch, so "every position at most once" is "every prompt once an epoch".
May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self


class IllegalTransition(ValueError):
    """A step that the drawing above does not have."""


@dataclass(frozen=True, slots=True)
class Pending:
    """To be issued, for the first time or again."""

    attempts: int = 0  # that were lost


@dataclass(frozen=True, slots=True)
class InFlight:
    """Being sampled or scored."""

    where: str
    since: float  # s, of the clock that the caller goes by
    version: int  # laps that were finished at admission: its age is counted from here
    attempts: int = 1  # this one included


@dataclass(frozen=True, slots=True)
class Finished:
    """Sampled and scored, not trained on yet."""

    version: int  # at admission
    attempts: int


@dataclass(frozen=True, slots=True)
class Trained:
    """Part of the batch of ``step``."""

    step: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Finished and left out on purpose."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Lost too often."""

    attempts: int
    reason: str


Entry = Pending | InFlight | Finished | Trained | Dropped | Failed
_KINDS: dict[str, type[Entry]] = {
    "pending": Pending, "in_flight": InFlight, "finished": Finished,
    "trained": Trained, "dropped": Dropped, "failed": Failed,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _KINDS.items()}
_CONSUMED = (Trained, Dropped, Failed)


class Ledger:
    """Positions ``frontier`` and up.  Every method either makes the whole transition or raises IllegalTransition.

    ``max_attempts``: a group that was lost so often is given up.
    """

    def __init__(self, max_attempts: int, frontier: int = 0) -> None:
        if max_attempts < 1 or frontier < 0:
            raise ValueError(f"{max_attempts=}, {frontier=}")
        self.max_attempts = max_attempts
        self._frontier = frontier
        self._next = frontier  # first position that was never issued
        self._entries: dict[int, Entry] = {}  # in the order in which they came to be what they are
        self._counts = {"trained": 0, "dropped": 0, "failed": 0}

    # --- what there is --------------------------------------------------------------------------

    @property
    def frontier(self) -> int:
        """First position that is not consumed; all below it are."""
        return self._frontier

    @property
    def counts(self) -> Mapping[str, int]:
        """trained, dropped, failed: positions consumed so far, by how."""
        return dict(self._counts)

    @property
    def next_pending(self) -> int:
        """Lowest position that may be issued: one that comes again goes before new ones."""
        return min((p for p, e in self._entries.items() if isinstance(e, Pending)), default=self._next)

    @property
    def to_reissue(self) -> list[int]:
        """Positions that were issued before and are pending again, lowest first."""
        return sorted(p for p, e in self._entries.items() if isinstance(e, Pending))

    @property
    def in_flight(self) -> dict[int, InFlight]:
        """In the order of issue."""
        return {p: e for p, e in self._entries.items() if isinstance(e, InFlight)}

    @property
    def finished(self) -> dict[int, Finished]:
        """In the order of finishing."""
        return {p: e for p, e in self._entries.items() if isinstance(e, Finished)}

    def entry(self, position: int) -> Entry:
        """What ``position`` is; IllegalTransition below the frontier, where that is forgotten."""
        if position < self._frontier:
            raise IllegalTransition(f"position {position} was consumed: the frontier is {self._frontier}")
        return self._entries.get(position, Pending())

    # --- transitions ----------------------------------------------------------------------------

    def issue(self, position: int, where: str, version: int, now: float) -> None:
        """A pending position is handed out.  ``version``: laps finished by now; ``now``: s."""
        entry = self.entry(position)
        if not isinstance(entry, Pending):
            raise _illegal(position, entry, "issue")
        for skipped in range(self._next, position):  # left pending, and remembered as such
            self._entries[skipped] = Pending()
        self._next = max(self._next, position + 1)
        self._put(position, InFlight(where, now, version, entry.attempts + 1))

    def move(self, position: int, where: str, now: float) -> None:
        """Still in flight, but somewhere else; it keeps the version of its admission."""
        self._entries[position] = replace(self._in_flight(position, "move"), where=where, since=now)

    def finish(self, position: int) -> None:
        entry = self._in_flight(position, "finish")
        self._put(position, Finished(entry.version, entry.attempts))

    def lose(self, position: int, reason: str, num_attempts: int = 1) -> bool:
        """So many attempts came to nothing.  True: pending again; False: failed, for there were enough."""
        if num_attempts < 1:
            raise ValueError(f"{num_attempts=}")
        entry = self._in_flight(position, "lose")
        attempts = entry.attempts - 1 + num_attempts
        again = attempts < self.max_attempts
        self._put(position, Pending(attempts) if again else Failed(attempts, reason))
        return again

    def withdraw(self, position: int) -> None:
        """Pending again, by nobody's fault."""
        entry = self.entry(position)
        if not isinstance(entry, InFlight | Finished):
            raise _illegal(position, entry, "withdraw")
        self._put(position, Pending(entry.attempts - 1))

    def drop(self, position: int, reason: str) -> None:
        """Consumed without being trained on."""
        entry = self.entry(position)
        if not isinstance(entry, InFlight | Finished):
            raise _illegal(position, entry, "drop")
        self._put(position, Dropped(reason))

    def train(self, positions: Iterable[int], step: int) -> None:
        """The batch of ``step`` was trained on: all of it or, when one of them is not finished, nothing."""
        batch = list(positions)
        for position in batch:
            entry = self.entry(position)
            if not isinstance(entry, Finished):
                raise _illegal(position, entry, "train")
        if len(set(batch)) < len(batch):
            raise IllegalTransition(f"a position is twice in the batch of step {step}: {sorted(batch)}")
        for position in batch:
            self._put(position, Trained(step))

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        entries = [{"position": p, "state": _NAMES[type(e)], **asdict(e)} for p, e in self._entries.items()]
        return {"frontier": self._frontier, "next": self._next, "counts": dict(self._counts), "entries": entries}

    @classmethod
    def restore(cls, state: Mapping[str, Any], kept: Collection[int], max_attempts: int) -> Self:
        """The ledger of a run that goes on from ``state``.

        ``kept``: finished positions whose samples were saved.  Every other one that was under way is pending again.
        """
        ledger = cls(max_attempts, int(state["frontier"]))
        ledger._next = int(state["next"])
        ledger._counts = {name: int(state["counts"][name]) for name in ledger._counts}
        for row in state["entries"]:
            fields = {name: value for name, value in row.items() if name not in ("position", "state")}
            ledger._entries[int(row["position"])] = _KINDS[row["state"]](**fields)
        for position in [*ledger.in_flight, *(p for p in ledger.finished if p not in kept)]:
            ledger.withdraw(position)
        return ledger

    def _in_flight(self, position: int, step: str) -> InFlight:
        entry = self.entry(position)
        if not isinstance(entry, InFlight):
            raise _illegal(position, entry, step)
        return entry

    def _put(self, position: int, entry: Entry) -> None:
        self._entries.pop(position, None)  # so that the dictionary's order is that of the transitions
        self._entries[position] = entry
        if isinstance(entry, _CONSUMED):
            self._counts[_NAMES[type(entry)]] += 1
            while isinstance(self._entries.get(self._frontier), _CONSUMED):
                del self._entries[self._frontier]
                self._frontier += 1


def _illegal(position: int, entry: Entry, step: str) -> IllegalTransition:
    return IllegalTransition(f"position {position} is {_NAMES[type(entry)].replace('_', ' ')}: it cannot {step}")
