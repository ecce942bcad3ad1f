"""One run under faults: started, hit, watched, resumed, until it has ended by itself.

    start --> rows --> [a fault is due, in its phase] inject --> rows --> recovered --> the next one
      ^                                                  |
      '------ --resume <-- the driver has ended by it ---'
The end of the run before its faults are through makes it longer: it is resumed with more steps.
May import: psutil, scripts.{disk, faults, hosts, injector, recovery, run_files, sites}.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from scripts.disk import Disk
from scripts.faults import KINDS, Act, Fault, Phase
from scripts.hosts import HostsError
from scripts.injector import Effect, Gone, NobodyThereError, Processes, end_all, inject
from scripts.recovery import Recovery
from scripts.run_files import RunTail
from scripts.sites import OneMachine, Site

POLL_S = 0.005  # between two looks at the journals: a push of a tiny model takes some 40 ms
RECOVER_DEADLINE_S = 420.0  # of one fault, the deadlines of the run and a resume included
QUIET_DEADLINE_S = 300.0  # without any row
MAX_LONGER = 6
LEFT_DEADLINE_S = 60.0  # for what a killed driver left to end by itself


class ChaosError(Exception):
    """The run did what it must not; the message says what was expected of whom."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one fault.  Times in s since the injection; None where there is nothing to see."""

    number: int
    kind: str
    phase: str
    step: int
    victims: tuple[str, ...]
    detected_s: float | None
    recovered_s: float
    resumed: bool
    reason: str


@dataclass
class RunOutcome:
    """Of one run."""

    name: str
    num_steps: int
    faults: list[Outcome] = field(default_factory=list)
    num_starts: int = 0
    num_orphans: int = 0  # processes that outlived their driver by LEFT_DEADLINE_S
    num_unexplained: int = 0  # deaths of workers that no fault was meant for
    seconds: float = 0.0
    problem: str | None = None  # None: it ended by itself


class ChaosRun:
    """``command(num_steps, resume)`` starts the run whose folder is ``folder``."""

    def __init__(
        self, name: str, folder: Path, command: Callable[[int, bool], Sequence[str]], faults: Sequence[Fault],
        num_steps: int, more_steps: int, save_every: int, disk: Disk, log: Path, environment: Mapping[str, str],
        say: Callable[[str], None], site: Site | None = None,
    ) -> None:  # fmt: skip
        """``site``: where it takes place; None: on this machine."""
        self._site: Site = site or OneMachine()
        self.outcome = RunOutcome(name, num_steps)
        self._folder, self._command, self._environment, self._log, self._say = folder, command, environment, log, say
        self._faults, self._more_steps, self._save_every, self._disk = deque(faults), more_steps, save_every, disk
        self._tail = RunTail(folder)
        self._driver: subprocess.Popen[bytes]
        self._processes = Processes((), {})  # as of the last row of metrics, when a fault is due
        self._recovery: Recovery | None = None
        self._effect: Effect = Gone()
        self._resumed = False  # since the fault
        self._left: dict[int, psutil.Process] = {}
        self._num_rows = 0  # of metrics, since the last fault was over
        self._step = self._saved_step = 0
        self._num_longer = 0  # times, for the same fault
        self._last_event = ""
        self._heard = time.monotonic()

    def go(self) -> RunOutcome:
        """To the end, or to the first problem; nothing of the run is left alive."""
        started = time.monotonic()
        self._start(resume=False)
        try:
            while self._goes_on(self._attend()):
                self._start(resume=True)
        except (ChaosError, HostsError) as error:
            self.outcome.problem = str(error)
            self._say(f"{self.outcome.name}: {error}")
        finally:
            if self._driver.poll() is None:
                self._left |= {p.pid: p for p in self._site.processes(self._driver.pid).all}
                self._driver.kill()
                self._driver.wait(LEFT_DEADLINE_S)
            with contextlib.suppress(HostsError):  # the hosts go with the run
                self._lift()
            self.outcome.num_orphans = end_all(self._left, LEFT_DEADLINE_S if self.outcome.problem is None else 0.0)
            self.outcome.seconds = round(time.monotonic() - started, 1)
        return self.outcome

    # --- the driver -------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        self.outcome.num_starts += 1
        self._resumed |= resume
        if resume:
            self._site.settle()
        self._last_event, self._heard = "", time.monotonic()
        with self._log.open("ab") as out:
            command = self._command(self.outcome.num_steps, resume)
            self._driver = self._site.start(command, self._environment, out)

    def _attend(self) -> int:
        """Until the driver has ended; its exit code."""
        while self._driver.poll() is None:
            self._look(alive=True)
            self._check_deadlines()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._driver.wait(POLL_S)
        self._look(alive=False)
        return int(self._driver.returncode)

    def _goes_on(self, code: int) -> bool:
        """What the end of the driver means: whether the run is resumed."""
        finished = code == 0 and self._last_event == "finished"
        recovery = self._recovery
        if recovery is not None and not finished:
            if not recovery.may_end(code):
                raise ChaosError(
                    f"fault {recovery.fault.number}, {recovery.fault.kind} of {sorted(recovery.victims)} at step "
                    f"{self._step}: the run ended with exit code {code}, last event {self._last_event!r}; it has to "
                    f"go on, and {recovery.missing} is missing. Its output: {self._log}"
                )
            self._check_stop(recovery)
            self._lift()
            return True
        if not finished:
            raise ChaosError(
                f"it ended with exit code {code}, last event {self._last_event!r}, at step {self._step}, and nothing "
                f"had been done to it. Its output: {self._log}"
            )
        if recovery is not None:  # it was through before anything came of the fault: once more, and not counted
            self._lift()
            self._faults.appendleft(recovery.fault)
            self._recovery = None
        if self._faults:
            self.outcome.num_steps += self._more_steps
            self._num_longer += 1
            if self._num_longer > MAX_LONGER:
                raise ChaosError(
                    f"it was made longer {MAX_LONGER} times and {self._faults[0].kind} never came to its end"
                )
        return bool(self._faults)

    def _check_stop(self, recovery: Recovery) -> None:
        """SIGTERM costs nothing: the checkpoint of the last recorded step is there."""
        if recovery.kind.act is Act.TERMINATE and self._saved_step != self._step:
            raise ChaosError(f"after SIGTERM step {self._step} was recorded last and step {self._saved_step} saved")

    def _check_deadlines(self) -> None:
        recovery = self._recovery
        if recovery is not None and time.time() - recovery.at > RECOVER_DEADLINE_S:
            raise ChaosError(
                f"fault {recovery.fault.number}, {recovery.fault.kind} of {sorted(recovery.victims)}: waited "
                f"{RECOVER_DEADLINE_S:g} s for {recovery.missing} from the run; it did not come"
            )
        if time.monotonic() - self._heard > QUIET_DEADLINE_S:
            raise ChaosError(f"waited {QUIET_DEADLINE_S:g} s for a row of {self._folder}; none came")

    # --- rows and faults --------------------------------------------------------------------------

    def _look(self, alive: bool) -> None:
        rows = self._tail.rows()
        for row in rows:
            self._see(row)
        if not rows:
            return
        self._heard = time.monotonic()
        due = self._faults and self._num_rows >= self._faults[0].gap
        if not (alive and due and self._recovery is None):
            return
        newest = rows[-1]  # it says what the run is doing now
        if "kind" not in newest:
            self._processes = self._site.processes(self._driver.pid)
        if self._is_in(self._faults[0].phase, newest):
            self._inject()

    def _see(self, row: Mapping[str, Any]) -> None:
        if "kind" in row:
            self._last_event = str(row["kind"])
            if self._last_event == "checkpoint":
                self._saved_step = int(row["step"])
            known = self._recovery is not None and self._recovery.explains(row)
            self.outcome.num_unexplained += self._last_event == "worker_died" and not known
        else:
            self._num_rows, self._step = self._num_rows + 1, int(row["step"])
        if self._recovery is not None:
            self._recovery.see(row)
            if self._recovery.lift:
                self._lift()
            if self._recovery.recovered_at is not None:
                self._over(self._recovery, self._recovery.recovered_at)

    def _is_in(self, phase: Phase, row: Mapping[str, Any]) -> bool:
        if phase is Phase.PUSHING:
            return row.get("kind") == "pushing"
        recorded = "kind" not in row
        return recorded and (phase is Phase.SAMPLING or int(row["step"]) % self._save_every == 0)

    def _inject(self) -> None:
        self._left |= {p.pid: p for p in self._processes.all}
        at = time.time()
        try:
            if KINDS[self._faults[0].kind].target == "host":
                victims, self._effect = self._site.take_down(self._faults[0])
            else:
                driver = psutil.Process(self._driver.pid)
                victims, self._effect = inject(self._faults[0], driver, self._processes, self._disk)
        except NobodyThereError:  # still starting: at the next such moment
            return
        fault = self._faults.popleft()
        self._recovery, self._resumed = Recovery(fault, at, victims), False
        self._say(f"{self.outcome.name}: step {self._step}, {fault.phase}: {fault.kind} {' '.join(victims)}")

    def _lift(self) -> None:
        effect, self._effect = self._effect, Gone()  # what fails to end is not tried again
        effect.end()

    def _over(self, recovery: Recovery, at: float) -> None:
        detected = recovery.detected_at
        self.outcome.faults.append(
            Outcome(
                recovery.fault.number, recovery.fault.kind, recovery.fault.phase.value, self._step,
                tuple(sorted(recovery.victims)), None if detected is None else round(detected - recovery.at, 3),
                round(at - recovery.at, 3), self._resumed, recovery.reason[:300],
            )
        )  # fmt: skip
        self._lift()
        self._recovery, self._num_rows, self._num_longer = None, 0, 0
