"""Admission: how far generators may run ahead of the learner.  A pure state machine.

    accepted + running <= (max_staleness + version + 1) * groups_per_step

``accepted`` counts finished groups over the whole run, ``running`` those being sampled; a group that
is filtered or fails gives its slot back.  With ``max_staleness`` 0 exactly one step's groups are
sampled under each version: synchronous, on-policy training.
May import: the standard library.
"""

from __future__ import annotations


class AdmissionGate:
    """Counts slots.  ``version`` is the number of laps finished since the run began."""

    def __init__(self, max_staleness: int, groups_per_step: int, version: int = 0) -> None:
        if max_staleness < 0 or groups_per_step < 1 or version < 0:
            raise ValueError(f"{max_staleness=}, {groups_per_step=}, {version=}")
        self.max_staleness, self.groups_per_step = max_staleness, groups_per_step
        self.version = version
        self.running = 0
        # Everything up to the present version was accepted, trained and is history.
        self.accepted = version * groups_per_step

    @property
    def free_slots(self) -> int:
        """Groups that may be started now."""
        bound = (self.max_staleness + self.version + 1) * self.groups_per_step
        return max(0, bound - self.accepted - self.running)

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
