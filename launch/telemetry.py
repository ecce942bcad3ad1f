"""The recorder of a run: metrics.jsonl, events.jsonl, trajectories/*.parquet and W&B.

The files are the truth and W&B a view of them: a row is on disk before W&B hears of it, and whatever W&B
does, the run goes on (online -> offline -> disabled, each fall an event).  A step occurs once in
metrics.jsonl: a resume from step N moves the rows after N to metrics.superseded.jsonl.
May import: trainers, launch.{config, journal, redaction, trajectory_files}; wandb inside the constructor's call only.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.table import Table

from launch.config import TelemetrySettings
from launch.journal import Journal, cut_after, read_rows, strict
from launch.redaction import command_line_has_secrets, redact, wandb_key_is_there
from launch.trajectory_files import TrajectoryFiles, trajectory_table
from trainers.experience import GroupRewards, TrajectoryGroup
from trainers.metrics import METRICS, check

if TYPE_CHECKING:
    import wandb

LOGGER = logging.getLogger("burnish.launch")

WANDB_INIT_TIMEOUT_S = 30.0  # an unreachable server costs this once, before the first step
WANDB_FINISH_TIMEOUT_S = 60.0  # then the rest stays on disk for `wandb sync`
WANDB_MAX_PENDING = 1000  # rows W&B may lag behind; further ones are in metrics.jsonl only
SAMPLE_TABLE_EVERY = 10  # steps between W&B sample tables, besides the steps with an evaluation
SHOWN_EVENTS = frozenset(  # also noted on the terminal
    {"alarm", "rolling_back", "roll_back_failed", "fault", "wandb_fallback", "record_lost", "worker_died",
     "worker_replaced", "start_failed", "generator_joined", "generator_left", "scale_refused", "checkpoint_failed",
     "checkpoint_waits", "rank_died", "learner_restarted", "node_joined", "node_left", "node_adopted",
     "node_refused"}
)
KEY_METRICS = ("reward", "eval/accuracy", "completions/mean_length", "completions/clipped_ratio", "kl", "entropy",
               "frac_reward_zero_std", "grad_norm", "time/step_s", "throughput/generate_tokens_per_s")


class Watcher(Protocol):
    """Shows the run while it goes on; ``launch.progress.Progress`` is one."""

    def phase(self, name: str, done: int, total: int) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...



class Telemetry:
    """Implements ``trainers.protocols.Recorder``; call :meth:`trajectories` before :meth:`step` of the same step.

    ``config`` is the resolved run configuration as plain data.  ``resume_step``: the step of the checkpoint the
    run continues from; None starts anew (earlier rows of the folder are set aside, not kept).
    Nothing here raises for a full disk or a failing W&B; ValueError is for callers' mistakes only: a metric
    without a dictionary line, a step recorded twice.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], settings: TelemetrySettings, *,
                 wandb_id: str | None = None, resume_step: int | None = None, watcher: Watcher | None = None) -> None:
        self._files = TrajectoryFiles(
            folder / "trajectories",
            lambda step, file, reason: self.event("record_lost", step=step, file=file, reason=reason),
        )
        self._folder, self._settings, self._watcher = folder, settings, watcher
        self._num_superseded = cut_after(folder, -1 if resume_step is None else resume_step)
        self._rows = list(read_rows(folder / "metrics.jsonl"))
        self._last_step = self._rows[-1]["step"] if self._rows else -1
        before = list(read_rows(folder / "events.jsonl")) if resume_step is not None else []
        self._metrics, self._events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")
        known = [e["wandb_id"] for e in before if e.get("kind") == "recording" and e.get("wandb_id")]
        self._wandb_id = wandb_id or (known[-1] if known else secrets.token_hex(4))
        self._table: wandb.Table | None = None
        self._eval_every = int((config.get("evaluation") or {}).get("every") or 0)
        # W&B has a thread of its own, so a stalled service stalls nothing else; its errors come back as values
        # (future.exception()), since several of them have no public class, and each becomes an event.
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._pending: deque[Future[None]] = deque()
        self._next_wandb_step = 0
        self._run: wandb.Run | None = None
        for mode in self._modes():
            self._run = self._open_wandb(mode, redact(config))
            if self._run is not None:
                self._next_wandb_step = self._run.step
                break
        self.event("recording", step=resume_step, num_superseded=self._num_superseded, wandb_id=self.wandb_id,
                   wandb="disabled" if self._run is None else "offline" if self._run.offline else "online",
                   url=self.url)

    @property
    def wandb_id(self) -> str | None:
        """The W&B run id, to be given back on resume; None when W&B is disabled by configuration."""
        return None if self._settings.wandb == "disabled" else self._wandb_id

    @property
    def url(self) -> str | None:
        """Where the run is shown; None offline."""
        return None if self._run is None or self._run.offline else self._run.url

    def _modes(self) -> tuple[str, ...]:
        """W&B modes to try, in order."""
        asked: str = self._settings.wandb
        if asked == "auto":
            said = os.environ.get("WANDB_MODE", "")
            asked = said if said in ("online", "offline", "disabled") else "online"
            if asked == "online" and not wandb_key_is_there():
                asked = "offline"
        elif asked == "online" and not wandb_key_is_there():  # wandb would stop and ask on the terminal
            self.event("wandb_fallback", mode="online", reason="no key: set WANDB_API_KEY or run `wandb login`")
            asked = "offline"
        return {"online": ("online", "offline"), "offline": ("offline",)}.get(asked, ())

    def _open_wandb(self, mode: str, config: dict[str, Any]) -> wandb.Run | None:
        try:
            import wandb
        except ImportError as error:
            self.event("wandb_fallback", mode=mode, reason=str(error))
            return None
        settings = wandb.Settings(
            init_timeout=WANDB_INIT_TIMEOUT_S, login_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=WANDB_FINISH_TIMEOUT_S, reinit="create_new", silent=True, disable_code=True,
            console="off",  # the live display is no log, and what is printed may hold secrets
            x_disable_meta=command_line_has_secrets(sys.argv),
        )

        def start() -> wandb.Run:
            run = wandb.init(project=self._settings.project, name=(config.get("run") or {}).get("name"),
                             id=self._wandb_id, resume="allow", mode=mode,  # type: ignore[arg-type]
                             dir=str(self._folder), tags=list(self._settings.tags), config=config, settings=settings)
            run.define_metric("step")
            for names in ("*", "eval/*", "push/*"):
                run.define_metric(names, step_metric="step")
            return run

        started = self._aside.submit(start)
        if self._failed(started, mode, 2 * WANDB_INIT_TIMEOUT_S):
            # The failed start holds the run id until its service ends.
            self._failed(self._aside.submit(wandb.teardown), "teardown", WANDB_INIT_TIMEOUT_S)
            return None
        return started.result()

    def _failed(self, call: Future[Any], doing: str, deadline_s: float) -> bool:
        """Wait for a W&B call; True, with an event, when it raised or did not end in ``deadline_s``."""
        try:
            error = call.exception(timeout=deadline_s)
        except (TimeoutError, CancelledError):
            error = TimeoutError(f"no answer from W&B in {deadline_s:g} s")
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
            self.event("wandb_fallback", mode=doing, reason=redact(reason[:500]))
        return error is not None

    def _wandb_takes_more(self) -> bool:
        """Whether W&B is there and not too far behind; what earlier calls raised ends it here."""
        while self._run is not None and self._pending and self._pending[0].done():
            if self._failed(self._pending.popleft(), "running", 0):
                self._run = None
        return self._run is not None and len(self._pending) < WANDB_MAX_PENDING

    def _log_wandb(self, row: dict[str, Any]) -> None:
        if self._run is None or not self._wandb_takes_more():
            return
        # W&B's own counter only ever grows; the axis of every chart is the logged `step`.
        counter = max(row["step"], self._next_wandb_step)
        self._next_wandb_step = counter + 1
        self._pending.append(self._aside.submit(self._run.log, row, step=counter, commit=True))

    # Recorder ---------------------------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; NaN and infinite values are null there and left out of W&B."""
        for name in metrics:
            check(name)
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}: a step is recorded once, in order")
        self._last_step = step
        row: dict[str, Any] = {"step": step, "time_unix": time.time(), **strict(metrics)}
        self._metrics.append(row)
        self._rows.append(row)
        shown = {k: v for k, v in row.items() if v is not None and k != "time_unix"}
        if self._table is not None:
            shown["samples"], self._table = self._table, None
        self._log_wandb(shown)
        if self._watcher is not None:
            self._watcher.step(step, metrics)

    def go_back(self, step: int | None) -> int:
        """Go on from the checkpoint of ``step`` (None: from the beginning) within this attempt, as a resume does.

        Returns the number of rows that are superseded.
        """
        last = -1 if step is None else step
        self._metrics.close()
        self._files.go_back(last)
        num_superseded = cut_after(self._folder, last)
        self._metrics = Journal(self._folder / "metrics.jsonl")
        self._rows = list(read_rows(self._folder / "metrics.jsonl"))
        self._last_step = self._rows[-1]["step"] if self._rows else -1
        self._table = None
        return num_superseded

    def event(self, kind: str, **fields: Any) -> None:
        """One row of events.jsonl: time_unix, kind, step (the last recorded one unless given), fields."""
        step = fields.pop("step", None)
        step = self._last_step if step is None and self._last_step >= 0 else step
        self._events.append({"time_unix": time.time(), "kind": kind, "step": step, **fields})
        if self._watcher is not None and kind in SHOWN_EVENTS:
            self._watcher.note(f"{kind}: " + ", ".join(f"{k}={v}" for k, v in fields.items()))

    def value(self, step: int, name: str | None) -> float | None:
        """Metric ``name`` of the row of ``step``, if that is the last row and has it."""
        row = self._rows[-1] if self._rows else {}
        found: float | None = row.get(name) if name is not None and row.get("step") == step else None
        return found

    def alert(self, title: str, text: str) -> None:
        """A W&B alert, which its users may have sent to mail or chat; nothing waits for it.

        Its place in the files and on the terminal is the event that goes with it.
        """
        if self._run is not None and self._wandb_takes_more():
            self._pending.append(self._aside.submit(self._run.alert, title[:63], redact(text), level="WARN"))

    def phase(self, name: str, done: int, total: int) -> None:
        """Passed on to the watcher."""
        if self._watcher is not None:
            self._watcher.phase(name, done, total)

    def trajectories(self, step: int, groups: Sequence[TrajectoryGroup], rewards: Sequence[GroupRewards],
                     advantages: Mapping[str, np.ndarray]) -> None:
        """Write trajectories/step-NNNNNN.parquet; every tenth and every evaluated step W&B gets a few rows."""
        table = trajectory_table(groups, rewards, advantages)
        self._files.write(step, table)
        shown = step % SAMPLE_TABLE_EVERY == 0 or bool(self._eval_every and step % self._eval_every == 0)
        if self._run is not None and self._settings.num_sample_rows and shown and table.num_rows:
            import wandb

            few = table.slice(0, self._settings.num_sample_rows)
            names = ["step", "prompt", "completion", *(n for n in few.column_names if n.startswith("reward")),
                     "advantage", "finish_reason"]
            data = [[step, *(row[n] for n in names[1:])] for row in few.to_pylist()]
            self._table = wandb.Table(columns=names, data=data)

    def summary(self) -> Table:
        """First, last and best of the metrics that tell how the run went."""
        table = Table(title=f"{self._folder.name}: {len(self._rows)} steps")
        for title in ("metric", "unit", "first", "last", "best"):
            table.add_column(title, justify="left" if title in ("metric", "unit") else "right")
        for name in KEY_METRICS:
            values = [row[name] for row in self._rows if row.get(name) is not None]
            if values:
                best = f"{max(values):.4g}" if name in ("reward", "eval/accuracy") else ""
                table.add_row(name, METRICS[name].unit, f"{values[0]:.4g}", f"{values[-1]:.4g}", best)
        return table

    def close(self) -> None:
        """End W&B (at most about WANDB_FINISH_TIMEOUT_S; what is left stays on disk) and close the files."""
        run, self._run = self._run, None
        if run is not None:
            failed = self._failed(self._aside.submit(run.finish), "finish", 1.5 * WANDB_FINISH_TIMEOUT_S)
            for call in () if failed else self._pending:
                self._failed(call, "running", 0)
        self._pending.clear()
        self._aside.shutdown(wait=False, cancel_futures=True)
        self._files.close()
        self._metrics.close()
        self._events.close()
