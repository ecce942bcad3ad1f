"""What can go wrong between machines.  Imports nothing."""

from __future__ import annotations


class ClusterError(Exception):
    """Base of the errors of this room."""


class ShortfallError(ClusterError):
    """More is asked for than there is; in the four parts of every refusal."""

    def __init__(self, field: str, value: object, reason: str, remedy: str) -> None:
        self.field, self.value, self.reason, self.remedy = field, value, reason, remedy
        super().__init__(field, value, reason, remedy)

    def __str__(self) -> str:
        return " ".join(f"{self.field} = {self.value!r}: {self.reason}; {self.remedy}".split())


class DeadlineError(ClusterError, TimeoutError):
    """A wait that passed its deadline: what was awaited, from whom, for how long."""

    def __init__(self, awaited: str, source: str, deadline_s: float) -> None:
        self.awaited, self.source, self.deadline_s = awaited, source, deadline_s
        super().__init__(awaited, source, deadline_s)

    def __str__(self) -> str:
        return f"waited {self.deadline_s:g} s for {self.awaited} from {self.source}; it did not come"


class DamagedError(ClusterError):
    """Bytes that are not the bytes that were written: a checksum, a fingerprint, a manifest."""


class WorkerError(ClusterError):
    """A worker died or raised; names the group, the rank and the method."""


class WorkerDiedError(WorkerError):
    """A worker, or the engine that it stands for, has ended: it will answer no call."""
