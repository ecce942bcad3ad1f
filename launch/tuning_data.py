"""Rows to learn from: files and folders as in launch/datasets.py, or what a function returns.

May import: pyarrow, trainers.{errors, examples, prompt_format}, launch.{datasets, made_rows, row_settings}.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from launch.datasets import Row, dataset_files, jsonl_rows, read_table, table_rows
from launch.made_rows import made_rows
from launch.row_settings import HeldOutSettings
from trainers.errors import InputError
from trainers.examples import Example, LeftOut, encode_example
from trainers.prompt_format import PromptFormat


def load_located_rows(settings: HeldOutSettings, field: str) -> list[tuple[str, Row]]:
    """(where, row) of every row, or of the first ``size`` ones; ``where`` names its file and line in errors.

    Raises InputError for everything a user can get wrong up to the columns, which are the caller's to judge.
    """
    if settings.function is None:
        found = _file_rows(settings, field)
    else:
        made = made_rows(settings.function, settings.args, field)
        found = [(f"{field} row {i}", row) for i, row in enumerate(made, start=1)]
    if not found:
        value = settings.function or settings.path
        name = "function" if settings.function is not None else "path"
        raise InputError(f"{field}.{name}", value, "has no rows", "give a dataset that has some")
    return found[: settings.size]


def load_examples(
    settings: HeldOutSettings, field: str, tokenizer: Any, max_length: int, form: PromptFormat, truncate: bool,
    remedy: str,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """(every row as token ids with its targets, reason -> rows left out); see :func:`trainers.examples.encode_example`.

    Raises:
        InputError: as above, a row that cannot be read, or nothing is left; ``remedy`` is for that.
    """
    found: list[Example] = []
    left: Counter[str] = Counter()
    for index, (where, row) in enumerate(load_located_rows(settings, field)):
        made = encode_example(row, tokenizer, max_length, form=form, index=index, where=where, truncate=truncate)
        if isinstance(made, LeftOut):
            left[made.reason] += 1
        else:
            found.append(made)
    if not found:
        counts = ", ".join(f"{count} {reason}" for reason, count in left.items())
        raise InputError(field, f"{sum(left.values())} rows", f"none is left to learn from ({counts})", remedy)
    return found, dict(left)


def _file_rows(settings: HeldOutSettings, field: str) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    for file in dataset_files(Path(settings.path or "").expanduser(), settings.split, field):
        is_json = file.suffix in (".jsonl", ".ndjson")
        rows += jsonl_rows(file, field) if is_json else table_rows(read_table(file, field), file)
    return rows
