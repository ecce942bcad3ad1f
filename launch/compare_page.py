"""What a comparison leaves: compare.md, compare.json, compare.svg and compare.html, and its section of a page.

May import: launch.*, trainers.calibration, cluster.host.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cluster.host import num_cpus
from launch.compare_config import CompareConfig
from launch.compare_plot import compare_svg
from launch.compare_rows import OK, Row
from launch.eval_page import Cell, Section, Table, write_page
from launch.eval_report import plain
from launch.label import versions
from launch.redaction import redact
from trainers.errors import InputError

MARKDOWN, JSON, PLOT, PAGE = "compare.md", "compare.json", "compare.svg", "compare.html"
BEGIN, END = "<!-- begin of the section that burnish compare --page writes -->", "<!-- end of the section -->"
NOTHING = "\N{EN DASH}"
GOLD = "gold"  # a column where there is a reward that stands for the truth
RESULTS = ("algorithm", "learns", "reward", GOLD, "KL, nats an answer", "win rate over the base", "length, tokens",
           "answers labelled", "tokens sampled", "tokens trained on", "updates", "seconds", "ended")  # fmt: skip
SETTINGS = ("algorithm", "learning rate", "length", "strength of KL or preference", "set for it alone, or for its kind")


def write_tables(config: CompareConfig, rows: Sequence[Row], folder: Path, plot: str | None = None) -> None:
    """Write the numbers and the Markdown, each whole or not at all; ``plot``: the file of the picture."""
    _write(folder / JSON, json.dumps(record(config, rows), indent=1, allow_nan=False) + "\n")
    _write(folder / MARKDOWN, f"# {config.run.name}\n\n{section(config, rows, plot)}\n")


def write_outputs(config: CompareConfig, rows: Sequence[Row], folder: Path) -> None:
    """Write all four files."""
    svg = compare_svg(rows, reward_name(config), config.compare.gold is not None)
    if svg is not None:
        _write(folder / PLOT, svg)
    write_tables(config, rows, folder, None if svg is None else PLOT)
    sections = [
        Section("Reward against KL", "\n\n".join(_facts(config, rows)), plots=() if svg is None else (svg,)),
        Section("What each reached, and at which expense", table=_results(config, rows)),
        Section("How each was run", table=Table(SETTINGS, _settings_rows(rows))),
    ]
    write_page(folder / PAGE, f"{config.run.name}: algorithms side by side", sections)


def reward_name(config: CompareConfig) -> str:
    """What the reward's axis says."""
    if config.compare.gold is not None:
        return f"{config.compare.gold}, held out"
    names = [scorer.name for scorer in config.scorers if scorer.weight]
    return f"{names[0]}, held out" if len(names) == 1 else "total reward, held out"


def record(config: CompareConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """JSON values."""
    return {
        "config": redact(config.model_dump(mode="json")),
        "versions": versions(),
        "num_cpus": num_cpus(),
        "rows": [plain(row) for row in rows],
    }


# --- Markdown -----------------------------------------------------------------------------------


def section(config: CompareConfig, rows: Sequence[Row], plot: str | None) -> str:
    """The facts, the plot and both tables; ``plot``: where the picture lies, seen from the page."""
    picture = [] if plot is None else [f"![reward against KL, one mark an algorithm]({plot})"]
    results = _results(config, rows)
    shown = [[_text(cell) for cell in cells] for cells in results.rows]
    settings = [[_text(cell) for cell in cells] for cells in _settings_rows(rows)]
    tables = markdown_table(results.columns, shown), markdown_table(SETTINGS, settings)
    return "\n\n".join([*_facts(config, rows), *picture, *tables])


def _facts(config: CompareConfig, rows: Sequence[Row]) -> list[str]:
    compare, sampling = config.compare, config.generator.sampling
    base = next((row.settings["per_prompt"] for row in rows if row.kind == "base" and row.settings), None)
    more = "" if base in (None, compare.eval_samples) else f"; the base model by {base} answers to each"
    num_prompts = next((row.measures.reward.n for row in rows if row.measures is not None), 0)
    if len(compare.seeds) == 1:
        over = (
            "prompts alone. One training run each: another run of the same algorithm may differ from it by more than "
            "these intervals, so the rows are no ranking."
        )
    else:
        over = "seeds and prompts; those of the base model and of best-of-n, which have no seeds, over prompts."
    found = [
        f"Recipe {config.run.name}, seeds {', '.join(map(str, compare.seeds))}: {config.model.path}, {compare.budget} "
        f"answers a run, at most {sampling.max_tokens} tokens each, sampled at temperature {sampling.temperature:g}. "
        f"Judged on the same {num_prompts} held-out prompts, {compare.eval_samples} answers to each under the same "
        f"sampling seeds{more}. Intervals are of 95 %, over {over}",
        f"Seconds were measured on {num_cpus()} CPU cores"
        + (" and contain" if config.cluster.device == "cpu" else ", besides GPUs, and contain")
        + " start-up and, of offline methods, the sampling that they share.",
    ]
    return [*found, *([compare.note] if compare.note else [])]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A whole table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _results(config: CompareConfig, rows: Sequence[Row]) -> Table:
    """The first table, without the column of a truth that nobody named."""
    shown = [i for i, name in enumerate(RESULTS) if name != GOLD or config.compare.gold is not None]
    cells = [_row(row) for row in rows]
    return Table(tuple(RESULTS[i] for i in shown), tuple(tuple(row[i] for i in shown) for row in cells))


def _row(row: Row) -> list[Cell]:
    """Cells of the first table."""
    found, cost = row.measures, row.cost
    learns = {"base": "nothing", "search": "nothing", "offline": "offline", "online": "online"}[row.kind]
    if found is None or cost is None:
        return [row.title, learns, *[None] * (len(RESULTS) - 3), row.status]
    trains = row.kind in ("offline", "online")
    kl: Cell = None if row.kl is None else row.kl
    if row.kl is not None and not trains:
        kl = 0 if row.kl_bound is None else f"{row.kl} (at most {row.kl_bound:.3g})"
    spent: list[Cell] = [_rounded(value, trains) for value in astuple(cost)]
    if row.kind == "search":
        given = (cost.num_labelled, cost.num_sampled_tokens, None, None, cost.seconds)
        spent = [None if value is None else f"{value:.3g} for each given" for value in given]
    return [
        row.title, learns, found.reward, found.gold, kl, None if row.kind == "base" else found.win_rate, found.length,
        *spent, row.status,
    ]  # fmt: skip


def _settings_rows(rows: Sequence[Row]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(_settings_row(row) for row in rows if row.kind != "base" and row.settings)


def _settings_row(row: Row) -> tuple[Cell, ...]:
    settings = row.settings
    if row.kind == "search":
        return row.title, None, f"the best of {settings['per_answer']} by the task's reward", None, None
    besides = ", ".join(f"{key}={json.dumps(value)}" for key, value in settings["besides"].items())
    return row.title, f"{settings['lr']:g}", settings["length"], settings["strength"], besides or None


def _rounded(value: float | None, is_there: bool) -> Cell:
    return None if value is None or not is_there else round(value)


def _text(cell: Cell) -> str:
    if cell is None:
        return NOTHING
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


# --- a page of its own --------------------------------------------------------------------------


def check_page(page: Path) -> None:
    """InputError where ``page`` is no file with both markers."""
    if not page.is_file():
        raise InputError("--page", str(page), "there is no such file", "give a Markdown file")
    try:
        renewed(page.read_text(encoding="utf-8"), "")
    except ValueError as error:
        raise InputError("--page", str(page), str(error), "add them, or leave --page out") from error


def renewed(page: str, text: str) -> str:
    """``page`` with ``text`` between its two markers; ValueError where one is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"has not the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def write_section(page: Path, config: CompareConfig, rows: Sequence[Row]) -> None:
    """The section of ``page`` anew, its picture in the folder figures beside it."""
    svg = compare_svg(rows, reward_name(config), config.compare.gold is not None)
    if svg is not None:
        (page.parent / "figures").mkdir(exist_ok=True)
        _write(page.parent / "figures" / PLOT, svg)
    text = section(config, rows, f"figures/{PLOT}" if svg else None)
    _write(page, renewed(page.read_text(encoding="utf-8"), text))


def num_missing(rows: Sequence[Row]) -> int:
    """Rows that are not whole."""
    return sum(row.status != OK for row in rows)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
