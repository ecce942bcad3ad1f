"""``burnish inspect RUN``: what a run folder says, as tables.  Reads only; works while the run goes on.

May import: rich, pyarrow, trainers.errors, trainers.metrics, launch.journal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.journal import read_rows
from trainers.errors import InputError
from trainers.metrics import check

MAX_METRIC_ROWS = 20
MAX_EVENT_ROWS = 20
PROMPT_TAIL_CHARS = 120
COMPLETION_CHARS = 400

_COLUMNS = (  # metric, header
    ("reward", "reward"),
    ("reward_std", "std"),
    ("eval/accuracy", "accuracy"),
    ("completions/mean_length", "length"),
    ("completions/clipped_ratio", "clipped"),
    ("kl", "kl"),
    ("entropy", "entropy"),
    ("grad_norm", "grad"),
    ("time/step_s", "step s"),
    ("throughput/generate_tokens_per_s", "tok/s"),
)


def inspect_run(run_dir: Path, console: Console, step: int | None, num_rows: int) -> None:
    """Print metrics by step, the last evaluation, samples and events of ``run_dir``.

    ``step``: whose samples to show (default: the last that were written); ``num_rows``: how many of them.
    InputError when ``run_dir`` is no run folder or holds no samples of ``step``.
    """
    if not (run_dir / "metrics.jsonl").is_file() and not (run_dir / "config.yaml").is_file():
        raise InputError("RUN", str(run_dir), "not a run folder: no metrics.jsonl and no config.yaml in it",
                         "give a folder such as runs/NAME")
    samples = _samples_file(run_dir, step)
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    events = list(read_rows(run_dir / "events.jsonl"))
    console.print(metrics_table(rows))
    evaluation = evaluation_table(rows)
    if evaluation is not None:
        console.print(evaluation)
    if samples is not None and num_rows > 0:
        console.print(samples_table(samples, num_rows))
    if events:
        console.print(events_table(events))


def thin(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` rows, evenly spread, the first and the last among them."""
    if len(rows) <= limit or limit < 2:
        return list(rows[-limit:])
    return [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]


def metrics_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Main metrics, about MAX_METRIC_ROWS steps; columns no step has are left out."""
    shown = [(name, title) for name, title in _COLUMNS if any(row.get(name) is not None for row in rows)]
    table = Table(title=f"metrics ({len(rows)} steps recorded)")
    table.add_column("step", justify="right")
    for _, title in shown:
        table.add_column(title, justify="right")
    for row in thin(rows, MAX_METRIC_ROWS):
        table.add_row(str(row["step"]), *(_number(row.get(name)) for name, _ in shown))
    return table


def evaluation_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Every eval/ metric of the last evaluated step beside the first; None when nothing was evaluated."""
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not evaluated:
        return None
    first, last = evaluated[0], evaluated[-1]
    table = Table(title=f"held-out evaluation, step {last['step']}")
    for title in ("metric", "unit", f"step {first['step']}", f"step {last['step']}"):
        table.add_column(title, justify="right" if title.startswith("step") else "left")
    for name in (n for n in last if n.startswith("eval/")):
        table.add_row(name, check(name).unit, _number(first.get(name)), _number(last[name]))
    return table


def samples_table(path: Path, num_rows: int) -> Table:
    """``num_rows`` samples of one trajectories file: end of the prompt, completion, reward, advantage, length."""
    names = ["prompt", "completion", "completion_ids", "reward", "advantage", "finish_reason"]
    try:
        rows = pq.read_table(path, columns=names).slice(0, num_rows).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError("RUN", str(path), f"the file cannot be read: {error}", "choose another --step") from error
    table = Table(title=f"samples, step {int(path.stem.removeprefix('step-'))}", show_lines=True)
    for title in ("prompt (end)", "completion"):
        table.add_column(title, overflow="fold")
    for title in ("reward", "advantage", "tokens", "ended"):
        table.add_column(title, justify="right")
    for row in rows:
        tail, text = row["prompt"][-PROMPT_TAIL_CHARS:], row["completion"]
        text = text if len(text) <= COMPLETION_CHARS else text[:COMPLETION_CHARS] + "..."
        table.add_row(Text(tail), Text(text), _number(row["reward"]), _number(row["advantage"]),
                      str(len(row["completion_ids"])), row["finish_reason"])
    return table


def events_table(events: Sequence[dict[str, Any]]) -> Table:
    """The newest MAX_EVENT_ROWS events."""
    table = Table(title=f"events (last {min(len(events), MAX_EVENT_ROWS)} of {len(events)})")
    table.add_column("time", no_wrap=True)
    table.add_column("step", justify="right")
    table.add_column("kind")
    table.add_column("what", overflow="fold")
    for event in events[-MAX_EVENT_ROWS:]:
        fields = {k: v for k, v in event.items() if k not in ("time_unix", "kind", "step") and v is not None}
        what = ", ".join(f"{k}={v}" for k, v in fields.items())
        clock = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time_unix") or 0))
        step = event.get("step")
        table.add_row(clock, "" if step is None else str(step), Text(str(event.get("kind"))), Text(what))
    return table


def _samples_file(run_dir: Path, step: int | None) -> Path | None:
    """The trajectories file to show: of ``step``, else the newest, else None."""
    files = {int(p.stem.removeprefix("step-")): p for p in (run_dir / "trajectories").glob("step-*.parquet")}
    if step is None:
        return files[max(files)] if files else None
    if step not in files:
        have = f"steps {min(files)} to {max(files)}, {len(files)} of them" if files else "none"
        raise InputError("--step", step, f"no trajectories of this step (there are: {have})", "choose one of these")
    return files[step]


def _number(value: Any) -> str:
    """A cell: four significant digits; a value that could not be had is a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
