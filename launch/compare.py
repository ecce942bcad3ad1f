"""``burnish compare``: the same task, budget and seeds for many algorithms; one table and one plot.

    plan -> held-out and training prompts, written once -> stages, one `burnish` command each -> rows -> files

Every configuration is checked, and models, prompts and rewards are looked at, before the first stage.  A run that fails
is a row that says why; the others go on.  A stage that ended is not run again by the next call.
May import: everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.compare_answers import Measures
from launch.compare_config import CompareConfig
from launch.compare_folder import DONE, Ended, Folder, Run
from launch.compare_labels import write_labelled
from launch.compare_methods import METHODS, WEIGHTS
from launch.compare_page import MARKDOWN, check_page, num_missing, write_outputs, write_section, write_tables
from launch.compare_plan import Plan, Stage, make_plan
from launch.compare_prepare import Prompts, folder_of, prepare_compare
from launch.compare_recipes import rows_path
from launch.compare_rows import Row, make_rows
from launch.compare_stage import StageError, run_burnish
from launch.progress import duration


def compare(
    config: CompareConfig,
    console: Console,
    page: Path | None = None,
    *,
    run: Run = run_burnish,
    prepare: Callable[[CompareConfig], Prompts] = prepare_compare,
) -> list[Row]:
    """Run what is missing, write table, plot and page.  The rows, those that failed included.

    Args:
        page: a Markdown file whose section, between two markers, is written as well.
        run, prepare: what runs one `burnish` command, and what checks everything before.

    Raises:
        InputError: something cannot be used; nothing was run.
    """
    if page is not None:
        check_page(page)
    folder = Folder(folder_of(config), config, run)
    plan = make_plan(config, folder.path)
    folder.open(plan, *prepare(config))
    known: dict[Any, Measures] = {}
    for number, stage in enumerate(plan.stages, start=1):
        line = f"[{number}/{len(plan.stages)}] {stage.name}"
        ended = _run(stage, plan, config, folder, console, line)
        _say(console, f"{line}: {ended.status}" + (f" in {duration(ended.seconds)}" if ended.seconds else "")
                      + (f": {ended.why}" if ended.why else ""))  # fmt: skip
        if stage.command == "eval" and ended.status == DONE:
            write_tables(config, make_rows(config, plan, folder, known), folder.path)
    rows = make_rows(config, plan, folder, known)
    write_outputs(config, rows, folder.path)
    if page is not None:
        write_section(page, config, rows)
    _show(rows, folder.path, console)
    return rows


def _run(stage: Stage, plan: Plan, config: CompareConfig, folder: Folder, console: Console, line: str) -> Ended:
    """Run ``stage`` unless it has ended well before, or cannot run."""
    if folder.is_done(stage.name):
        return folder.ended[stage.name]
    if missing := [name for name in stage.after if not folder.is_done(name)]:
        before = folder.ended[missing[0]]
        folder.skip(stage, f"{missing[0]} {before.status}: {before.why}")
        return folder.ended[stage.name]
    try:
        more = _late(stage, plan, config, folder)
    except StageError as error:
        folder.skip(stage, str(error))
        return folder.ended[stage.name]
    _say(console, f"{line}: burnish {stage.command}")
    ended = folder.run(stage, more)
    if ended.status == DONE and stage.evaluates is not None and not config.compare.keep_models:
        folder.drop_model(plan.by_name(stage.evaluates))
    return ended


def _late(stage: Stage, plan: Plan, config: CompareConfig, folder: Folder) -> list[str]:
    """Overrides that are known once the stages before have ended."""
    if stage.evaluates is not None:
        return [f"model.path={json.dumps(str(folder.result(plan.by_name(stage.evaluates))))}"]
    method = METHODS.get(stage.recipe)
    if method is None or not method.is_labelled:
        return []
    labelled = folder.path / stage.after[0]
    seed = int(stage.after[0].rpartition("-")[2])
    counts = write_labelled(labelled, rows_path(folder.path, method, seed))
    if counts.desirable_weight is None:
        raise StageError(f"all {counts.num_sampled} answers of {stage.after[0]} got the same reward")
    if any(key in config.compare.of(method) for key in WEIGHTS):
        return []
    return [f"{WEIGHTS[0]}={counts.desirable_weight:.4g}"]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(rows: list[Row], folder: Path, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="held out, with 95 % intervals")
    for column in ("algorithm", "reward", "KL, nats", "win rate", "seconds", "ended"):
        table.add_column(column, overflow="fold")
    for row in rows:
        found = row.measures
        cells = ["", "", ""] if found is None else [str(found.reward), str(row.kl or ""), str(found.win_rate)]
        seconds = f"{row.cost.seconds:.0f}" if row.cost is not None and row.cost.seconds else ""
        table.add_row(*(Text(cell) for cell in (row.title, *cells, seconds, row.status)))  # a log's line is no markup
    console.print(table)
    if missing := num_missing(rows):
        _say(console, f"{missing} of {len(rows)} rows are not whole; the same command again runs what is missing")
    _say(console, f"table, plot and page: {folder / MARKDOWN}")
