"""Ranks of a process group, a process each.  Not a test."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What the processes import once for all of them.
PRELOADED = ["actors.learner", "deepspeed", "transformers.models.llama.modeling_llama"]


def run_ranks(main: Callable[..., None], ranks: int, *arguments: Any, deadline_s: float) -> str | None:
    """``main(rank, *arguments)`` of a module's top level, in ``ranks`` processes; None, or what went wrong.

    A rank that has not ended ``deadline_s`` after its elders is killed.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    started = [processes.Process(target=main, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(deadline_s)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return None if codes == [0] * ranks else f"exit codes of the ranks: {codes} (None: hangs)"


def model_of_rank(rank: int, zero_stage: int, path: str, scratch: str) -> str:
    """``path``, or a copy below ``scratch`` without weights: with ZeRO 3 all but rank 0 do without."""
    if rank == 0 or zero_stage < 3:
        return path
    target = Path(scratch) / f"{Path(path).name}-without-weights-{rank}"
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return str(target)
