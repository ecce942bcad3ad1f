"""One `burnish` command in a process of its own, what it prints in a file.

May import: the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 180.0  # for a command that was told to stop: a run saves a checkpoint
MAX_SHOWN = 300  # characters of the line that says why


class StageError(Exception):
    """It failed, did not end in time, or left nothing; the message says why in one line."""


def run_burnish(arguments: Sequence[str], log: Path, deadline_s: float) -> float:
    """Seconds that ``burnish *arguments`` took.

    Raises:
        StageError: another exit code than 0, or not done in ``deadline_s`` seconds; it is told to stop then.
        KeyboardInterrupt: once the command, which is told as well, has ended.
    """
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as sink:
        sink.write(f"$ burnish {' '.join(arguments)}\n")
        sink.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *arguments], stdout=sink, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"},
            start_new_session=True,  # Ctrl-C reaches it once, from here: a second one would cost it its checkpoint
        )  # fmt: skip
    try:
        code = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        _end(process)
        raise StageError(f"was not done in {deadline_s:g} s; {last_line(log)}") from None
    except BaseException:
        _end(process)
        raise
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise StageError(f"{how}: {last_line(log)}")
    return time.perf_counter() - started


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell it to stop as Ctrl-C does, and end it with all it started where it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    """The line of a log that says what went wrong: burnish's own, else the last one that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("burnish: ")]
    errors = [line for line in lines if "Error" in line]
    chosen = (own or errors or lines or ["it printed nothing"])[-1]
    return chosen.removeprefix("burnish: ")[:MAX_SHOWN]
