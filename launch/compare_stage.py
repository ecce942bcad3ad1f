"""One `burnish` command in a process of its own, what it prints in a file or on the terminal.

May import: launch.run_folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.run_folder import LOCK, held

REPLIES = "replies"  # as in launch/judging.py
GRACE_S = 180.0  # for a command that was told to stop: a run saves a checkpoint
MAX_SHOWN = 300  # characters of the line that says why


class StageError(Exception):
    """It failed, did not end in time, or left nothing; the message says why in one line."""


class LateError(StageError):
    """It did not end in time."""


def run_burnish(arguments: Sequence[str], log: Path | None, deadline_s: float, grace_s: float = GRACE_S) -> float:
    """Seconds that ``burnish *arguments`` took.

    Args:
        log: the file of what it prints; None: it prints where this process does.
        grace_s: seconds that it has to end in once it was told to; with all it started it is killed then.

    Raises:
        LateError: it was not done in ``deadline_s`` seconds, and was told to stop.
        StageError: another exit code than 0.
        KeyboardInterrupt: once the command, which is told as well, has ended.
    """
    started, process = time.perf_counter(), None
    try:
        with contextlib.ExitStack() as files:
            sink = None if log is None else files.enter_context(log.open("w", encoding="utf-8"))
            if sink is not None:
                sink.write(f"$ burnish {' '.join(arguments)}\n")
                sink.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *arguments], stdout=sink,
                stderr=None if sink is None else subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=os.environ | {"TQDM_DISABLE": "1"},
                start_new_session=True,  # Ctrl-C reaches it once, from here: a second one would cost it its checkpoint
            )  # fmt: skip
        code = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        _end(process, grace_s)
        raise LateError(f"was not done in {deadline_s:g} s{_said(log, '; ')}") from None
    except BaseException:
        _end(process, grace_s)
        raise
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise StageError(f"{how}{_said(log, ': ')}")
    return time.perf_counter() - started


def interrupt_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does, so that the command it runs is told to stop.

    The command is in a session of its own: nobody else would tell it when the terminal is closed.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)


def has_checkpoint(folder: Path) -> bool:
    """Whether ``burnish train --resume`` has something to go on from in a run's folder."""
    return bool(newest_checkpoint(folder))


def newest_checkpoint(folder: Path) -> str:
    """Name of the checkpoint that it would go on from; "" where there is none."""
    return max((found.name for found in (folder / "checkpoints").glob("step-*")), default="")


def _end(process: subprocess.Popen[bytes] | None, grace_s: float) -> None:
    """Tell it to stop as Ctrl-C does, and end it with all it started where it does not."""
    if process is None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(grace_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(log: Path | None, before: str) -> str:
    return "" if log is None else f"{before}{last_line(log)}"


def cleared(folder: Path) -> None:
    """Remove a run folder but for what judges replied in it: that was paid for, and is not asked again.

    Raises:
        StageError: the run still goes on in it.
    """
    remedy = "wait until it has ended, or end it"
    with held(folder / LOCK, lambda who: StageError(f"{who} still works in {folder}; {remedy}")):
        for entry in folder.iterdir():
            if entry.name == REPLIES:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def last_line(log: Path) -> str:
    """The line of a log that says what went wrong: burnish's own, else the last one that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("burnish: ")]
    errors = [line for line in lines if "Error" in line]
    chosen = (own or errors or lines or ["it printed nothing"])[-1]
    return chosen.removeprefix("burnish: ")[:MAX_SHOWN]
