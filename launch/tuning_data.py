"""Rows to learn from: files and folders as in launch/datasets.py, or what a function returns.

May import: pyarrow, trainers.{errors, examples, prompt_format}, launch.{bad_rows, datasets, made_rows, row_settings}.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from launch.bad_rows import read_rows
from launch.datasets import Row, dataset_files, jsonl_rows, read_table, table_rows
from launch.made_rows import made_rows
from launch.row_settings import HeldOutSettings, OnBadRow
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
    remedy: str, on_bad_row: OnBadRow = "refuse", bad_remedy: str = "",
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """(every row as token ids with its targets, reason -> rows left out); see :func:`trainers.examples.encode_example`.

    Bad rows that were dropped are left out for the reason ``bad_row``.

    Raises:
        InputError: as above, a row that cannot be read (:func:`launch.bad_rows.read_rows`), or nothing is left;
            ``remedy`` is for that.
    """
    rows = load_located_rows(settings, field)
    number = itertools.count()

    def read(where: str, row: Row) -> Example | LeftOut:
        index = next(number)
        return encode_example(row, tokenizer, max_length, form=form, index=index, where=where, truncate=truncate)

    made, bad = read_rows(rows, read, field, on_bad_row, bad_remedy)
    found = [example for example in made if isinstance(example, Example)]
    left = Counter(out.reason for out in made if isinstance(out, LeftOut)) + Counter(bad_row=bad.num)
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
