"""From a row of metrics to the terminal, events.jsonl and W&B alerts, and to what the run should do about it.

    row --> AlarmBoard --> Alarm --> event "alarm" (disk, then terminal) --> W&B alert
                             `--> strongest action --> the caller stops or rolls back

An alarm asks for a roll-back once a run: when it goes off again the roll-back has not helped, and it stops the
run.  The log of events remembers it, which no roll-back rewinds.
May import: trainers.alarms, launch.journal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launch.journal import read_rows
from trainers.alarms import Action, Alarm, AlarmBoard, Row

STRENGTH: tuple[Action, ...] = ("record", "stop", "roll_back")  # a later one outdoes an earlier one


class Outlet(Protocol):
    """Where alarms go; ``launch.telemetry.Telemetry`` is one.  Neither method waits or raises."""

    def event(self, kind: str, **fields: Any) -> None: ...

    def alert(self, title: str, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the alarms of one row ask for."""

    action: Action  # the strongest
    since: int  # earliest step at which one of those that ask for it began: go back to before it
    alarms: tuple[Alarm, ...]


class AlarmWatch:
    """Feeds ``board`` and passes on what it says.

    ``folder`` is the run's: its events.jsonl tells which roll-backs were asked for before.  What a checkpoint has to
    keep is the state of ``board``, taken after the row of its step.
    """

    def __init__(self, board: AlarmBoard, outlet: Outlet, folder: Path) -> None:
        self.board, self._outlet = board, outlet
        rows = read_rows(folder / "events.jsonl")
        self._rolled_back = {r["name"] for r in rows if r.get("kind") == "alarm" and r.get("action") == "roll_back"}

    def observe(self, step: int, metrics: Row) -> Verdict | None:
        """Call once for each recorded row; None when no alarm went off."""
        alarms = tuple(self.board.observe(step, metrics))
        asked = [(self._announce(alarm), alarm) for alarm in alarms]
        if not asked:
            return None
        strongest = max((action for action, _ in asked), key=STRENGTH.index)
        return Verdict(strongest, min(a.since for action, a in asked if action == strongest), alarms)

    def _announce(self, alarm: Alarm) -> Action:
        action: Action = "stop" if alarm.action == "roll_back" and alarm.name in self._rolled_back else alarm.action
        if action == "roll_back":
            self._rolled_back.add(alarm.name)
        value = float(f"{alarm.value:.4g}")
        self._outlet.event(
            "alarm", name=alarm.name, step=alarm.step, since=alarm.since, value=value, threshold=alarm.threshold,
            meaning=alarm.meaning, remedy=alarm.remedy, action=action,
        )  # fmt: skip
        text = f"step {alarm.step}: {value:g}, threshold {alarm.threshold:g}. {alarm.meaning}. Try: {alarm.remedy}."
        self._outlet.alert(f"alarm: {alarm.name}", text if action == "record" else f"{text} The run: {action}.")
        return action
