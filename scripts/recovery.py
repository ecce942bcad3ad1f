"""From a fault to the moment the run is well again, as the rows of its own files tell it.  Pure.

    inject --> [detected] --> cause lifted --> recovered
A lost host:
    inject --> worker_died, node_left: the host comes back --> node_joined --> node_adopted --> generator_joined
May import: scripts.faults.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from scripts.faults import KINDS, Act, Ends, Fault

NUM_SLOW_ROWS = 3  # steps that a run has to record beside a slow worker


class Recovery:
    """One fault.  Feed it the rows of events.jsonl and metrics.jsonl in the order of their ``time_unix``.

    Args:
        at: when the fault was injected, unix time in s; what was recorded until then tells nothing of it.
        victims: names of the workers that were hit, as events call them, and the address of a host that was; none for
            driver and disk.
    """

    def __init__(self, fault: Fault, at: float, victims: Collection[str]) -> None:
        self.fault, self.kind, self.at, self.victims = fault, KINDS[fault.kind], at, frozenset(victims)
        self.detected_at: float | None = None
        self.recovered_at: float | None = None
        self.reason = ""  # as the run gave it
        self.lift = False  # the cause has to go now, and not only with the recovery
        self.ended_run = False  # an error that names the victim ended the run, which is to be resumed
        # A process that is to be let go on is let go at the first suspicion; one that dies first is replaced.
        self._signs = ("worker_died", "worker_suspect") if self.kind.ends is Ends.RECOVERED else ("worker_died",)
        self._stopped = False
        self._ready = False  # again, after the fault
        self._num_rows = 0
        self._left = self._adopted = False  # the node that was hit; the one that came for it
        self._node: str | None = None  # that came for it
        self._num_wanted = 0  # generators, since it was adopted

    @property
    def missing(self) -> str:
        """What has not been seen yet."""
        wanted = {
            Ends.REPLACED: "event worker_died" if self.detected_at is None else "event worker_replaced",
            Ends.RECOVERED: "event worker_suspect" if self.detected_at is None else "event worker_recovered",
            Ends.WENT_ON: f"{NUM_SLOW_ROWS} steps",
            Ends.RESTARTED: f"an event that names {self.kind.target}" if self.detected_at is None else "a step",
            Ends.RESUMED: "a step" if self._ready else "event ready",
            Ends.SAVED: "event checkpoint_failed" if self.detected_at is None else "event checkpoint",
            Ends.ADOPTED: "event node_left" if not self._left else "event node_joined" if self._node is None
            else f"event generator_joined, with {self._num_wanted} generators" if self._adopted
            else "event node_adopted",
        }  # fmt: skip
        return wanted[self.kind.ends]

    def explains(self, row: Mapping[str, Any]) -> bool:
        """Whether a ``worker_died`` comes of this fault: a start on a host that is lost, whoever it was, does."""
        hit = row.get("worker") in self.victims
        return hit or (self.kind.ends is Ends.ADOPTED and any(v in str(row.get("reason")) for v in self.victims))

    def may_end(self, code: int) -> bool:
        """Whether the run may have ended with this exit code because of the fault, to be resumed."""
        if self.kind.ends is Ends.RESTARTED:
            return self.ended_run and code != 0
        if self.kind.act is Act.TERMINATE:
            return self._stopped and code == 0
        return self.kind.ends is Ends.RESUMED and code < 0

    def see(self, row: Mapping[str, Any]) -> None:
        """One row; nothing after the recovery."""
        at = float(row["time_unix"])
        if at <= self.at or self.recovered_at is not None:
            return
        if "kind" in row:
            self._event(row, at)
        else:
            self._step(at)

    def _event(self, row: Mapping[str, Any], at: float) -> None:
        kind, hit = row["kind"], row.get("worker") in self.victims
        self._stopped |= kind == "stopped"
        if kind == "ready":
            self._ready = True
        if self.kind.ends in (Ends.REPLACED, Ends.RECOVERED):
            if hit and kind in self._signs:
                self._detected(at, str(row.get("reason", kind)))
            elif hit and kind in ("worker_replaced", "worker_recovered"):
                self.recovered_at = at
        elif self.kind.ends is Ends.RESTARTED:
            if self._names_victim(row):
                self._detected(at, str(row.get("reason") or row.get("error") or kind))
            self.ended_run |= kind == "failed" and self.detected_at is not None
        elif self.kind.ends is Ends.SAVED:
            if kind == "checkpoint_failed":
                self._detected(at, str(row.get("reason", "")))
            elif kind == "checkpoint" and self.detected_at is not None:
                self.recovered_at = at
        elif self.kind.ends is Ends.ADOPTED:
            self._host(row, at, hit)
        elif self.kind.act is Act.TERMINATE and kind == "stopping":
            self._detected(at, str(row.get("signal", "")))

    def _host(self, row: Mapping[str, Any], at: float, hit: bool) -> None:
        """The cause goes only when Ray has given the node up: it takes none back, and one that was healed before that
        would never have left.
        """
        kind, ours = row["kind"], row.get("address") in self.victims
        if hit and kind == "worker_died":
            self._detected(at, str(row.get("reason", kind)))
        elif ours and kind == "node_left":
            self._detected(at, f"node {row['node']} left")
            self._left = True
        elif ours and kind == "node_joined" and self._left:
            self._node, self._adopted = str(row["node"]), False
        elif kind == "node_adopted" and row.get("node") == self._node:
            self._adopted = True
        elif kind == "scaling" and self._adopted:
            self._num_wanted = int(row["wanted"])
        elif kind == "generator_joined" and self._adopted and int(row["num_generators"]) >= self._num_wanted:
            self.recovered_at = at
        self.lift = self._left

    def _step(self, at: float) -> None:
        self._num_rows += 1
        ends = self.kind.ends
        if ends is Ends.WENT_ON and self._num_rows >= NUM_SLOW_ROWS:
            self.recovered_at, self.lift = at, True
        elif (ends is Ends.RESTARTED and self.detected_at is not None) or (ends is Ends.RESUMED and self._ready):
            self.recovered_at = at

    def _detected(self, at: float, reason: str) -> None:
        self.lift = self.kind.act is not Act.FREEZE  # that one wakes up when another stands in its place
        if self.detected_at is None:
            self.detected_at, self.reason = at, reason

    def _names_victim(self, row: Mapping[str, Any]) -> bool:
        """Errors call a rank ``learner[1]``, events ``learner-1`` or by its role."""
        if str(row["kind"]).startswith("checkpoint"):  # these name ranks that are only slow to write
            return False
        role = self.kind.target
        texts = (str(row.get(name, "")) for name in ("error", "reason"))
        return row.get("worker") in self.victims or row.get("role") == role or any(f"{role}[" in t for t in texts)
