"""One measurement, one process: clean memory, clean thread pools, the same environment for both sides.

Every side runs under ``cluster.host.worker_environment``, the environment of a run's workers
(thread counts, tcmalloc and Intel OpenMP where this machine has them).
May import: the standard library, cluster.host.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.host import num_cpus, worker_environment

ROOT = Path(__file__).resolve().parent.parent
KILL_GRACE_S = 10.0  # between asking a process group to end and ending it
ERROR_LINES = 6


class MeasurementError(RuntimeError):
    """A side did not yield numbers; the message says why, in one line."""


def environment(preload: bool = True, **more: str) -> dict[str, str]:
    """The variables of a measuring process.  Without ``preload``: as a user's shell would start it."""
    variables = {k: v for k, v in os.environ.items() if preload or k != "LD_PRELOAD"}
    if preload:
        variables |= worker_environment(num_cpus(), None)
    paths = [str(ROOT), *(p for p in variables.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT))]
    quiet = {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1",
    }  # fmt: skip
    return variables | quiet | {"PYTHONPATH": os.pathsep.join(paths)} | more


def run(
    module: str,
    arguments: Sequence[str],
    deadline_s: float,
    *,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
    wants_output: bool = True,
) -> dict[str, Any]:
    """Run ``python -m module`` and return the JSON it wrote to its ``--output``.

    Raises:
        MeasurementError: it failed, wrote nothing, or was not done in ``deadline_s`` seconds (it is then ended,
            with every process that it started).
    """
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        output, log = Path(folder) / "output.json", Path(folder) / "log"
        asked = [*arguments, *([f"--output={output}"] if wants_output else [])]
        process = start(module, asked, log, python=python, variables=variables)
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"{module} was not done in {deadline_s:g} s; {last_lines(log)}") from None
        finally:
            end(process)
        if code != 0 or (wants_output and not output.exists()):
            how = f"was ended by signal {-code}, which it was not sent here" if code < 0 else f"ended with {code}"
            raise MeasurementError(f"{module} {how}: {last_lines(log)}")
        return dict(json.loads(output.read_text())) if wants_output else {}


def start(
    module: str,
    arguments: Sequence[str],
    log: Path,
    *,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
    num_cores: int | None = None,
) -> subprocess.Popen[bytes]:
    """``python -m module`` in a session of its own, so that :func:`end` reaches whatever it starts; output to ``log``.

    ``num_cores``: how many of the cores of this process it may use; all of them where there are no more.
    """
    with log.open("w") as sink, _on_cores(num_cores):
        return subprocess.Popen(
            [python, "-m", module, *arguments], cwd=ROOT, env=dict(environment() if variables is None else variables),
            stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@contextmanager
def _on_cores(num_cores: int | None) -> Iterator[None]:
    """What this thread starts meanwhile may use so many of its cores."""
    if num_cores is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:num_cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it left behind: all of it is in a session of its own."""
    for number, wait_s in ((signal.SIGTERM, KILL_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


def last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    chosen = errors[-2:] or lines[-ERROR_LINES:]
    return " | ".join(line[:300] for line in chosen) or "it printed nothing"


def write_output(path: Path | None, values: Mapping[str, Any]) -> None:
    """What :func:`run` reads back; printed where nobody asked for a file."""
    text = json.dumps(values)
    if path is None:
        print(text)
    else:
        path.write_text(text)


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
