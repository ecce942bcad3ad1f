"""What an alarm does to a run: it ends it with a checkpoint, or takes it back to one from before the trouble.

    row --> telemetry --> alarms --stop-------> the loop ends after this step; its checkpoint is saved
                            `-----roll_back---> an event names the checkpoint, the loop ends, nothing is saved
                                                          `--> the run starts again from there (launch/train.py)
The event stands in events.jsonl before anything ends, so a run that is killed in between resumes from the
checkpoint it names (launch/resuming.py) and not from a later one.
May import: cluster.{checkpoints, errors}, launch.{alarm_watch, telemetry}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.checkpoints import CheckpointStore
from cluster.errors import DamagedError
from launch.alarm_watch import AlarmWatch, Verdict
from launch.telemetry import Telemetry


class WatchedRecorder:
    """The loop's recorder: every row goes into the files, then past the alarms, and these may end the loop.

    ``stop`` asks the loop to return after the step that was recorded.
    """

    def __init__(
        self, telemetry: Telemetry, watch: AlarmWatch, store: CheckpointStore, stop: Callable[[], None]
    ) -> None:
        self._telemetry, self._watch, self._store, self._stop = telemetry, watch, store, stop
        self.target: int | None = None  # step of the checkpoint that the run must go back to

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See :class:`trainers.protocols.Recorder`; what the alarms ask for has been announced on return."""
        self._telemetry.step(step, metrics)
        verdict = self._watch.observe(step, metrics)
        if verdict is None or verdict.action == "record":
            return
        names = [alarm.name for alarm in verdict.alarms]
        if verdict.action == "roll_back":
            self._choose_target(verdict, names)
        if self.target is None:
            self._telemetry.event("stopping", alarms=names)
        self._stop()

    def event(self, kind: str, **fields: Any) -> None:
        self._telemetry.event(kind, **fields)

    def phase(self, name: str, done: int, total: int) -> None:
        self._telemetry.phase(name, done, total)

    def _choose_target(self, verdict: Verdict, names: list[str]) -> None:
        self.target = newest_before(self._store, verdict.since)
        if self.target is not None:
            self._telemetry.event("rolling_back", to=self.target, since=verdict.since, alarms=names)
            return
        kept = ", ".join(str(step) for step in self._store.steps()) or "none"
        self._telemetry.event(
            "roll_back_failed", since=verdict.since, alarms=names,
            reason=f"no intact checkpoint is from before step {verdict.since}; there are: {kept}",
            remedy="lower checkpoint.every or raise checkpoint.keep",
        )  # fmt: skip


def newest_before(store: CheckpointStore, step: int) -> int | None:
    """The newest intact checkpoint of an earlier step than ``step``; reads every byte of those it tries."""
    for candidate in sorted((s for s in store.steps() if s < step), reverse=True):
        try:
            return store.load(candidate).step
        except DamagedError:
            continue
    return None
