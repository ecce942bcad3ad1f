"""Who is alive, by what was heard of them and when: a pure state machine with an injected clock.

    join --> starting --started--> alive <--heard-- suspect
                 |                   |  `--silence--^ |
                 `----- deadline ----`---- failed ----`--silence--> dead          leave --> left

A member that is silent for a quarter of ``detect_s`` is asked, after half of it suspect, after all of it dead.
Dead and left are final: a member that is heard of later stays what it is.  Time in which nobody listened does
not count: when ``tick`` comes late, every silence is shorter by the delay, so a stalled watcher kills nobody.
May import: the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

PROBE_AFTER = 0.25  # of detect_s: the answer has three quarters of it to arrive
SUSPECT_AFTER = 0.5
MAX_DOUBLINGS = 6  # of the pause after failed starts: a cluster that has room again is used before long


class State(StrEnum):
    """Of one member."""

    STARTING = "starting"
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


LIVING = (State.ALIVE, State.SUSPECT)


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask this member whether it is there."""

    member: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """Give this member no new work."""

    member: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class Dead:
    """This member is out for good: its work goes elsewhere, and it may be replaced."""

    member: int
    reason: str
    silent_s: float  # since the last sign of life, without the time in which nobody listened


Action = Probe | Suspect | Dead


@dataclass(slots=True)
class _Member:
    state: State
    heard: float
    start_s: float
    asked: bool = False


class Health:
    """States of any number of members, known by numbers that are never used again.

    Methods take the time in seconds of any clock that never goes back.
    """

    def __init__(self, detect_s: float) -> None:
        self.detect_s = detect_s
        self._members: dict[int, _Member] = {}
        self._due = math.inf  # when the next tick was asked for

    def state(self, member: int) -> State:
        """KeyError for a member that never joined."""
        return self._members[member].state

    def members(self, *states: State) -> list[int]:
        """Those in one of ``states``, in the order they joined."""
        return [number for number, member in self._members.items() if member.state in states]

    def join(self, member: int, now: float, start_s: float) -> None:
        """A new member, which has ``start_s`` to start."""
        if member in self._members:
            raise ValueError(f"member {member} has joined before")
        self._members[member] = _Member(State.STARTING, now, start_s)
        self._due = min(self._due, self._due_of(self._members[member]))

    def started(self, member: int, now: float) -> None:
        """It is ready for work."""
        self._heard(member, now, State.STARTING, *LIVING)

    def heard(self, member: int, now: float) -> bool:
        """A sign of life: an answer of any kind.  True when it was suspect until now."""
        found = self._members.get(member)
        recovered = found is not None and found.state is State.SUSPECT
        self._heard(member, now, *LIVING)
        return recovered

    def failed(self, member: int, now: float, reason: str) -> Dead | None:
        """It has certainly ended.  None when that was known."""
        found = self._members.get(member)
        if found is None or found.state in (State.DEAD, State.LEFT):
            return None
        found.state = State.DEAD
        return Dead(member, reason, max(0.0, now - found.heard))

    def leave(self, member: int) -> None:
        """It went as it was asked to; nothing if it is dead."""
        found = self._members.get(member)
        if found is not None and found.state is not State.DEAD:
            found.state = State.LEFT

    def tick(self, now: float) -> list[Action]:
        """What has to be done now.  Call it at :meth:`next_wake`, or sooner."""
        late = max(0.0, now - self._due)
        actions: list[Action] = []
        for number, member in self._members.items():
            if member.state not in (State.STARTING, *LIVING):
                continue
            member.heard = min(now, member.heard + late)
            silent = now - member.heard
            # Compared as the sums of next_wake: a difference may round to just below, and the tick come to nothing.
            if member.state is State.STARTING:
                if now >= member.heard + member.start_s:
                    member.state = State.DEAD
                    actions.append(Dead(number, f"not ready after {member.start_s:g} s", silent))
                continue
            if member.asked and now >= member.heard + self.detect_s:
                member.state = State.DEAD
                actions.append(Dead(number, f"no answer for {self.detect_s:g} s", silent))
                continue
            if not member.asked and now >= member.heard + self.detect_s * PROBE_AFTER:
                member.asked = True
                actions.append(Probe(number))
            if member.state is State.ALIVE and now >= member.heard + self.detect_s * SUSPECT_AFTER:
                member.state = State.SUSPECT
                actions.append(Suspect(number, silent))
        self._due = self.next_wake()
        return actions

    def next_wake(self) -> float:
        """When the next tick is due; infinite when there is nobody to watch."""
        return min((self._due_of(member) for member in self._members.values()), default=math.inf)

    def _due_of(self, member: _Member) -> float:
        if member.state is State.STARTING:
            return member.heard + member.start_s
        if member.state not in LIVING:
            return math.inf
        if not member.asked:
            return member.heard + self.detect_s * PROBE_AFTER
        return member.heard + self.detect_s * (SUSPECT_AFTER if member.state is State.ALIVE else 1.0)

    def _heard(self, member: int, now: float, *states: State) -> None:
        found = self._members.get(member)
        if found is not None and found.state in states:
            found.state, found.heard, found.asked = State.ALIVE, now, False
            self._due = min(self._due, self._due_of(found))


class Staffing:
    """How many workers to start now: up to ``target``, and after a failed start not before a growing pause."""

    def __init__(self, target: int, retry_s: float) -> None:
        self.target, self.retry_s = target, retry_s
        self.num_failed = 0  # starts in a row
        self._not_before = -math.inf

    def num_to_start(self, num_there: int, now: float) -> int:
        """``num_there``: workers that serve or are being started."""
        return 0 if now < self._not_before else max(0, self.target - num_there)

    def reset(self) -> None:
        """A start succeeded, or there is a new reason to try."""
        self.num_failed, self._not_before = 0, -math.inf

    def failed(self, now: float) -> float:
        """Seconds until the next try."""
        pause = self.retry_s * float(2 ** min(self.num_failed, MAX_DOUBLINGS))
        self.num_failed += 1
        self._not_before = now + pause
        return pause
