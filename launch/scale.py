"""``burnish scale RUN generators=N``: a request file in the run folder, answered by the driver in events.jsonl.

    control/driver.json           who listens: process and host; there while the run goes on
    control/request-<id>.json     {"generators": N}; removed when it is answered

The driver looks for requests every ``POLL_S`` and opens no port: whoever may write into the run folder may ask.
May import: pydantic, actors.membership (for a type), launch.journal, trainers.{errors, settings}.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import Field, ValidationError

from launch.journal import read_rows
from trainers.errors import InputError
from trainers.settings import Settings

if TYPE_CHECKING:
    from actors.membership import Event

POLL_S = 1.0  # between two looks of the driver
ANSWER_DEADLINE_S = 60.0  # a driver that is saving or recording looks later
LOOK_S = 0.2  # between two looks for the answer
MAX_BYTES = 4096  # of a request
CONTROL, DRIVER = "control", "driver.json"


class ScaleRequest(Settings):
    """What may be asked of a live run."""

    generators: int = Field(ge=1, strict=True)


# --- asking -------------------------------------------------------------------------------------


def parse_scale(assignments: Sequence[str]) -> ScaleRequest:
    """``["generators=3"]`` as a request.  InputError for everything else."""
    remedy = "say how many generators the run is to have, for instance generators=2"
    if len(assignments) != 1 or not assignments[0].startswith("generators="):
        raise InputError("scale", " ".join(assignments), "is not one generators=N", remedy)
    number = assignments[0].removeprefix("generators=")
    if not (number.isascii() and number.isdigit() and int(number) >= 1):
        raise InputError("scale", assignments[0], "N is not a whole number from 1 on", remedy)
    return ScaleRequest(generators=int(number))


def scale(folder: Path, request: ScaleRequest, deadline_s: float = ANSWER_DEADLINE_S) -> str:
    """Ask the driver of the run in ``folder``; one line that says what it answered.

    Raises:
        InputError: no run, no driver, no answer in time (the request is then withdrawn), or the driver refuses.
    """
    if not (folder / "events.jsonl").is_file():
        raise InputError("run", str(folder), "is no run folder: it has no events.jsonl", "give that of a live run")
    driver = _driver(folder)
    if driver is None:
        remedy = "wait until it is ready, or start it with --resume"
        raise InputError("run", str(folder), "no driver listens: the run is starting or has ended", remedy)
    number = secrets.token_hex(8)
    path = folder / CONTROL / f"request-{number}.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(request.model_dump_json(), encoding="utf-8")
    os.replace(fresh, path)
    ends = time.monotonic() + deadline_s
    while time.monotonic() < ends:
        for row in read_rows(folder / "events.jsonl"):
            if row.get("request") != number:
                continue
            if row["kind"] == "scale_refused":
                asked = f"generators={request.generators}"
                raise InputError("scale", asked, row["reason"], "ask for another number")
            return f"{folder.name}: {row['before']} -> {row['wanted']} generators; see events.jsonl for joins"
        threading.Event().wait(LOOK_S)
    path.unlink(missing_ok=True)
    reason = f"the driver (process {driver['pid']} on {driver['host']}) did not answer in {deadline_s:g} s"
    raise InputError("run", str(folder), reason, "look at its output; the request is withdrawn")


def _driver(folder: Path) -> dict[str, object] | None:
    """Who says that it listens, unless it is known to have ended."""
    try:
        driver: dict[str, object] = json.loads((folder / CONTROL / DRIVER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if driver.get("host") == socket.gethostname() and not Path(f"/proc/{driver.get('pid')}").exists():
        return None
    return driver


# --- answering ----------------------------------------------------------------------------------


class Scalable(Protocol):
    """What has a number of generators, and takes another one."""

    @property
    def num_wanted(self) -> int: ...

    def scale(self, num_workers: int) -> None: ...


class ScaleDesk:
    """The driver's side.  ``refusal(n)``: why the run cannot have n generators; empty when it may try."""

    def __init__(
        self, folder: Path, fleet: Scalable, refusal: Callable[[int], str], event: Event, poll_s: float = POLL_S
    ) -> None:
        self._control, self._fleet = folder / CONTROL, fleet
        self._refusal, self._event, self._poll_s = refusal, event, poll_s

    async def run(self) -> None:
        """Until cancelled.  A folder that cannot be read or written costs the run its desk, and nothing else."""
        try:
            self._control.mkdir(exist_ok=True)
            for left in self._control.glob("request-*"):  # asked of an earlier driver, which is answered by nobody
                left.unlink(missing_ok=True)
            driver = {"pid": os.getpid(), "host": socket.gethostname(), "poll_s": self._poll_s}
            (self._control / DRIVER).write_text(json.dumps(driver), encoding="utf-8")
            while True:
                for path in sorted(self._control.glob("request-*.json")):
                    self._answer(path)
                await asyncio.sleep(self._poll_s)
        except OSError as error:
            self._event("scale_closed", reason=str(error))
        finally:
            (self._control / DRIVER).unlink(missing_ok=True)

    def _answer(self, path: Path) -> None:
        number = path.stem.removeprefix("request-")
        before, reason = self._fleet.num_wanted, ""
        try:
            if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                raise ValueError("it is no small plain file")
            request = ScaleRequest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reason = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors())
        except ValueError as error:
            reason = str(error)
        except FileNotFoundError:  # withdrawn since it was listed
            return
        path.unlink(missing_ok=True)
        if not reason:
            reason = self._refusal(request.generators)
        if reason:
            self._event("scale_refused", request=number, reason=reason)
            return
        self._event("scale_accepted", request=number, before=before, wanted=request.generators)
        self._fleet.scale(request.generators)
