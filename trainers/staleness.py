"""How far generators may run ahead, and when a finished group must be trained on.  Pure.

Admission:    accepted + running <= (max_staleness + version + 1) * groups_per_step
Consumption:  a group admitted at version a is trained on at a version <= a + max_staleness

``accepted`` counts finished groups over the whole run, ``running`` those under way; a group that is filtered or
fails gives its slot back.  Admission alone does not bound the age of a straggler, so consumption does.  The learner
takes what finished first, as long as what it leaves can still be trained on in time: with D(u) groups that are not
trained on yet and must be at version u at the latest, laps v + 1 .. u have room for (u - v) * groups_per_step of
them, and the rest, D(u) - (u - v) * groups_per_step, must be in the batch of lap v.  Only where too few of those
have finished it waits for one.  Looking at u = v alone is not enough: fast young groups would then crowd out more
old ones than the last lap before their bound can hold.  Admission keeps the rest within one batch: everything not
trained on is at most (max_staleness + 1) * groups_per_step groups.  Nothing is ever dropped for its age, because
slow groups are long ones, and a model that is never trained on long answers learns to be short.

A version is one lap.  With ``max_staleness`` 0 exactly one step's groups are sampled under each version, and all
of them are at their bound: synchronous, on-policy training.
May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class AdmissionGate:
    """Counts slots.  ``version`` is the number of laps finished since the run began.

    Args:
        num_finished: groups that a resumed run brought along, finished and not trained on.
        num_steps: laps of the whole run: nothing is admitted that none of them would train on.
    """

    def __init__(
        self, max_staleness: int, groups_per_step: int, version: int = 0, num_finished: int = 0,
        num_steps: int | None = None,
    ) -> None:  # fmt: skip
        if max_staleness < 0 or groups_per_step < 1 or version < 0 or num_finished < 0:
            raise ValueError(f"{max_staleness=}, {groups_per_step=}, {version=}, {num_finished=}")
        self.max_staleness, self.groups_per_step = max_staleness, groups_per_step
        self.version, self.num_steps = version, num_steps
        self.running = 0
        # Everything up to the present version was accepted, trained and is history.
        self.accepted = version * groups_per_step + num_finished

    @property
    def free_slots(self) -> int:
        """Groups that may be started now."""
        laps = self.max_staleness + self.version + 1
        if self.num_steps is not None:
            laps = min(laps, self.num_steps)
        return max(0, laps * self.groups_per_step - self.accepted - self.running)

    def admit(self) -> None:
        """A group starts."""
        if self.free_slots == 0:
            raise ValueError("no slot is free: ask free_slots first")
        self.running += 1

    def accept(self) -> None:
        """A running group finished and will be trained on."""
        self._end_one()
        self.accepted += 1

    def give_back(self) -> None:
        """A running group failed or was filtered; its slot is free again."""
        self._end_one()

    def advance(self) -> None:
        """The learner finished a lap."""
        self.version += 1

    def _end_one(self) -> None:
        if self.running == 0:
            raise ValueError("no group is running")
        self.running -= 1


@dataclass(frozen=True, slots=True)
class Choice:
    """The next batch, or what it waits for."""

    batch: tuple[int, ...] = ()  # positions in stream order; empty: wait
    at_bound: tuple[int, ...] = ()  # running positions, one of which is waited for although enough others finished


def choose_batch(
    version: int, max_staleness: int, groups_per_step: int, running: Mapping[int, int], finished: Mapping[int, int]
) -> Choice:
    """What the lap that starts from ``version`` trains on.

    Args:
        running: position -> version at admission, of groups that are not finished.
        finished: the same of those that are, in the order in which they finished.

    Raises:
        ValueError: a group is past its bound, or more must be in this batch than it holds: admission was not kept.
    """
    if len(finished) < groups_per_step:
        return Choice()
    chosen: dict[int, None] = {}  # in the order of choice
    late: tuple[int, ...] = ()
    for admitted in sorted({*running.values(), *finished.values()}):  # the groups that must be trained first, first
        laps_left = admitted + max_staleness - version
        due = [p for p, a in finished.items() if a <= admitted]
        awaited = tuple(p for p, a in running.items() if a <= admitted)
        num_needed = len(due) + len(awaited) - laps_left * groups_per_step
        if laps_left < 0 or num_needed > groups_per_step:
            raise ValueError(
                f"version {version}, max_staleness {max_staleness}: {len(due) + len(awaited)} groups admitted at "
                f"{admitted} or before, {laps_left} laps before their bound; a batch holds {groups_per_step}"
            )
        if num_needed > len(due) and not late:
            late = awaited
        chosen |= dict.fromkeys([p for p in due if p not in chosen][: max(0, num_needed - len(chosen))])
    if late:
        return Choice(at_bound=late)
    chosen |= dict.fromkeys([p for p in finished if p not in chosen][: groups_per_step - len(chosen)])
    return Choice(batch=tuple(sorted(chosen)))
