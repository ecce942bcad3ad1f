"""Comparison of mathematical answers in a child process that can be stopped.

A completion such as ``$9^{9^{9}}$`` makes sympy compute for hours without giving up the interpreter's
lock, which would freeze the whole reward worker.  So math-verify runs in a child
(``python -m trainers.math_verifier``): one JSON line in, ``[[text, answer], ...]``, one JSON line out,
``[1.0 | 0.0 | null, ...]``.  An alarm bounds each pair; the parent kills a child that ignores its alarm
and starts another one for the next call.  The child ends when its input does, thus with its parent.
May import: math_verify, in the child.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

PAIR_LIMIT_S = 3.0  # for one comparison; ordinary ones take milliseconds
START_LIMIT_S = 60.0  # for the child to import sympy, on a busy machine
MEMORY_BYTES = 4 * 2**30  # address space of the child; huge numbers become an error

_lock = threading.Lock()  # one child, one request at a time
_child: subprocess.Popen[str] | None = None


def same_mathematics(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """For each (text, answer): 1.0 equal, 0.0 not, None where the answer cannot be read or time ran out.

    Raises RuntimeError when the child dies or has to be killed.
    """
    global _child
    with _lock:
        if _child is None or _child.poll() is not None:
            _child = _start()
        child, limit_s = _child, START_LIMIT_S + PAIR_LIMIT_S * len(pairs)
        assert child.stdin is not None and child.stdout is not None
        killer = threading.Timer(limit_s, child.kill)
        killer.daemon = True
        killer.start()
        try:
            child.stdin.write(json.dumps(list(pairs)) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            killer.cancel()
        if not line:
            child.kill()
            raise RuntimeError(f"math-verify's process ended with code {child.wait()} (limit {limit_s:g} s)")
    values: list[float | None] = json.loads(line)
    return values


def _start() -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "trainers.math_verifier"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


class _TooLong(BaseException):
    """Not an Exception: math-verify swallows those."""


def _compare(text: str, answer: str) -> float | None:
    import math_verify

    # The library's own limits are off: its alarms would reset ours, and it calls a timeout "different".
    parse = functools.partial(math_verify.parse, parsing_timeout=None)  # type: ignore[arg-type]
    signal.setitimer(signal.ITIMER_REAL, PAIR_LIMIT_S)
    try:
        gold = parse(answer) if "$" in answer or "\\boxed" in answer else parse(f"${answer}$")
        return float(math_verify.verify(gold, parse(text), timeout_seconds=None)) if gold else None
    except _TooLong:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def too_long(signum: int, frame: FrameType | None) -> Any:
        raise _TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    for line in sys.stdin:
        print(json.dumps([_compare(text, answer) for text, answer in json.loads(line)]), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
