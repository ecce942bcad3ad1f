"""What scripts that run stages (launch/stages.py) share: their deadline, and what they answer.

May import: launch.{compare_stage, stages}, trainers.errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from launch.compare_stage import StageError, interrupt_on_signals
from launch.stages import DEADLINE_S
from trainers.errors import InputError


def add_deadline(parser: argparse.ArgumentParser) -> None:
    """``--deadline-s``."""
    parser.add_argument("--deadline-s", type=_seconds, default=DEADLINE_S, metavar="S",
                        help=f"that one stage may take before it is told to stop; default: {DEADLINE_S:g}")  # fmt: skip


def _seconds(text: str) -> float:
    if not float(text) > 0:
        raise ValueError(text)
    return float(text)


def answer(name: str, work: Callable[[], None]) -> int:
    """Exit code of ``work``; what stops it is said in one line.

    1: a stage failed; 2: something was refused; 130: it was told to stop, and the stage that ran has ended.
    """
    interrupt_on_signals()
    try:
        work()
    except (StageError, InputError) as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - the script's answer
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130
    return 0
