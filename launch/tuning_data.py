"""Rows to learn from: files and folders as in launch/datasets.py, or what a function returns.

May import: pyarrow (by launch.datasets), trainers.{errors, reward_calls, rewards}, launch.{datasets, tuning_config}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.datasets import Row, _files, _jsonl
from launch.tuning_config import HeldOutSettings
from trainers.errors import InputError
from trainers.reward_calls import UserCodeError, user_code
from trainers.rewards import _find


def load_located_rows(settings: HeldOutSettings, field: str) -> list[tuple[str, Row]]:
    """(where, row) of every row, or of the first ``size`` ones; ``where`` names its file and line in errors.

    Raises InputError for everything a user can get wrong up to the columns, which are the caller's to judge.
    """
    found = _made_rows(settings, field) if settings.function is not None else _file_rows(settings, field)
    if not found:
        value = settings.function or settings.path
        name = "function" if settings.function is not None else "path"
        raise InputError(f"{field}.{name}", value, "has no rows", "give a dataset that has some")
    return found[: settings.size]


def _file_rows(settings: HeldOutSettings, field: str) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    for file in _files(Path(settings.path or "").expanduser(), settings.split, field):
        rows += _jsonl(file, field) if file.suffix in (".jsonl", ".ndjson") else _table_rows(file, field)
    return rows


def _table_rows(file: Path, field: str) -> list[tuple[str, Row]]:
    try:
        if file.suffix == ".parquet":
            table = pq.ParquetFile(file).read()
        else:
            with pa.memory_map(str(file)) as source:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{field}.path", str(file), f"cannot be read: {error}", "write the file again") from error
    return [(f"{file} row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _made_rows(settings: HeldOutSettings, field: str) -> list[tuple[str, Row]]:
    name = settings.function or ""
    if ":" not in name:
        raise InputError(f"{field}.function", name, "names no function", "write package.module:function")
    function = _find(name, f"{field}.function")
    try:
        with user_code():
            made: Any = function(**settings.args)
            rows = list(made)
    except UserCodeError as error:
        reason = f"it failed: {error}"
        raise InputError(f"{field}.function", name, reason, f"mend it, or change {field}.args") from error
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            reason = f"item {i} of what it returned is a {type(row).__name__}"
            raise InputError(f"{field}.function", name, reason, "return a list of mappings, one a row")
    return [(f"{field} row {i}", dict(row)) for i, row in enumerate(rows, start=1)]
