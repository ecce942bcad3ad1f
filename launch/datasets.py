"""Rows of a dataset: Parquet, JSONL or Arrow files, Hugging Face dataset folders, procedural questions.

A row is a dict whose ``prompt`` is a non-empty string or a list of messages; everything that is wrong
with a row is said here, where its file and line are known.
May import: pyarrow, reasoning_gym (inside a function), trainers.errors, launch.{config, made_rows}.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.config import DatasetSettings
from launch.made_rows import made_rows
from trainers.errors import InputError

Row = dict[str, Any]
READERS = (".parquet", ".jsonl", ".ndjson", ".arrow")
ROLES = ("system", "developer", "user", "assistant", "tool")
DRAWS_PER_QUESTION = 50  # of a procedural dataset, before its question space counts as exhausted
SPLIT_FILE = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}")  # how Hugging Face names the parts of a split


def load_rows(settings: DatasetSettings, seed: int, field: str, exclude: Collection[str] = ()) -> list[Row]:
    """All rows of ``settings``, its prompt column renamed to ``prompt``; with ``size``, that many distinct prompts.

    ``exclude`` holds questions that a procedural dataset must not draw.  A procedural draw depends on
    ``seed`` and ``field``, so train and eval differ under one run seed.  Rows of a procedural dataset
    are {"prompt", "answer", "entry"}.  Raises InputError for everything a user can get wrong.
    """
    if settings.procedural is not None:
        return _procedural(settings, seed, field, frozenset(exclude))
    if settings.function is not None:
        made = made_rows(settings.function, settings.args, field)
        located = [(f"{field} row {i}", row) for i, row in enumerate(made, start=1)]
        rows = list(_checked_rows(located, settings, field))
    else:
        path = Path(settings.path or "").expanduser()
        rows = [row for file in dataset_files(path, settings.split, field) for row in _file_rows(file, settings, field)]
    if not rows:
        name, value = ("function", settings.function) if settings.function is not None else ("path", str(path))
        raise InputError(f"{field}.{name}", value, "has no rows", "give a dataset that has some")
    return rows if settings.size is None else _first_distinct(rows, settings.size, field)


def prompt_key(prompt: Any) -> str:
    """What makes two prompts equal."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _first_distinct(rows: list[Row], size: int, field: str) -> list[Row]:
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(prompt_key(row["prompt"]), row)
    if len(distinct) < size:
        raise InputError(
            f"{field}.size", size, f"only {len(distinct)} distinct prompts exist", f"use size={len(distinct)} or less"
        )
    return list(distinct.values())[:size]


# --- files ------------------------------------------------------------------------------------


def dataset_files(path: Path, split: str | None, field: str) -> list[Path]:
    """The files of a dataset, or of its ``split``, in order; raises InputError where that is unclear."""
    if not path.exists():
        raise InputError(f"{field}.path", str(path), "does not exist", "check the path; it is read on this machine")
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{field}.path", str(path), "is of an unknown kind", f"use one of {', '.join(READERS)}")
        return _whole([path], split, None, field)
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return _saved_parts(path / _choose(split, names, field), field)
    if (path / "state.json").is_file():
        own_split = json.loads((path / "state.json").read_text()).get("_split")
        return _whole(_saved_parts(path, field), split, own_split, field)
    return _loose_files(path, split, field)


def _whole(files: list[Path], split: str | None, own_split: str | None, field: str) -> list[Path]:
    if split not in (None, own_split):
        raise InputError(f"{field}.split", split, "the dataset has no splits to choose from", "leave split out")
    return files


def _choose(split: str | None, names: list[str], field: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        reason = "is needed: the folder has several" if split is None else "is not in the folder"
        raise InputError(f"{field}.split", split, reason, f"choose one of {', '.join(sorted(names))}")
    return split


def _saved_parts(folder: Path, field: str) -> list[Path]:
    """The Arrow files of ``Dataset.save_to_disk``, in order."""
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{field}.path", str(folder), f"its state.json cannot be read: {error!r}", "save the dataset again"
        ) from error
    if state.get("_indices_data_files"):
        raise InputError(
            f"{field}.path", str(folder), "keeps an index beside its rows", "call flatten_indices() and save it again"
        )
    if missing := [f.name for f in files if not f.is_file()]:
        raise InputError(f"{field}.path", str(folder), f"lacks {', '.join(missing)}", "copy the whole folder")
    return files


def _loose_files(folder: Path, split: str | None, field: str) -> list[Path]:
    """Parquet, JSONL or Arrow files of a folder (or of its ``data`` folder, or of a folder named as the split)."""
    places = [folder / split] if split is not None and (folder / split).is_dir() else [folder, folder / "data"]
    found = [f for place in places if place.is_dir() for f in sorted(place.iterdir()) if f.suffix in READERS]
    kinds = {f.suffix for f in found}
    if len(kinds) != 1:
        reason = f"mixes {', '.join(sorted(kinds))} files" if kinds else f"has no {', '.join(READERS)} file"
        raise InputError(f"{field}.path", str(folder), reason, "name one file, or a folder of one kind")
    by_split: dict[str, list[Path]] = {}
    for file in found:
        match = SPLIT_FILE.fullmatch(file.stem)
        by_split.setdefault(match["split"] if match else file.stem, []).append(file)
    if len(places) == 1 or (split is None and not any(SPLIT_FILE.fullmatch(f.stem) for f in found)):
        return found
    return by_split[_choose(split, list(by_split), field)]


def _file_rows(file: Path, settings: DatasetSettings, field: str) -> Iterator[Row]:
    column = settings.prompt_column
    located = list(jsonl_rows(file, field) if file.suffix in (".jsonl", ".ndjson") else _arrow(file, column, field))
    return _checked_rows(located, settings, field)


def _checked_rows(located: Sequence[tuple[str, Row]], settings: DatasetSettings, field: str) -> Iterator[Row]:
    column = settings.prompt_column
    names = {name for _, row in located for name in row}
    if located and column not in names:
        raise _missing_column(column, names, field)
    for where, row in located:
        prompt = _checked_prompt(row.get(column), where, f"{field}.{column}")
        yield {"prompt": prompt, **{n: row.get(n) for n in sorted(names) if n not in (column, "prompt")}}


def _missing_column(column: str, names: Iterable[str], field: str) -> InputError:
    near = difflib.get_close_matches(column, sorted(names), n=3, cutoff=0.3) or sorted(names)[:8]
    return InputError(f"{field}.prompt_column", column, "is no column", f"the nearest are {', '.join(near)}")


def jsonl_rows(file: Path, field: str) -> Iterator[tuple[str, Row]]:
    """``(file:line, row)`` of each line that is not empty; raises InputError that names the line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(where, line.decode(errors="replace"), f"is not JSON: {error}", "mend it") from error
            if not isinstance(row, dict):
                raise InputError(where, row, "is not a JSON object", "write one object a line")
            yield where, row


def _arrow(file: Path, column: str, field: str) -> Iterator[tuple[str, Row]]:
    table = read_table(file, field)
    if column not in table.column_names:
        raise _missing_column(column, table.column_names, field)
    yield from table_rows(table, file)


def read_table(file: Path, field: str) -> pa.Table:
    """A Parquet file or an Arrow file or stream; InputError names ``field`` when it cannot be read."""
    try:
        if file.suffix == ".parquet":
            return pq.ParquetFile(file).read()
        with pa.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{field}.path", str(file), f"cannot be read: {error}", "write the file again") from error


def table_rows(table: pa.Table, file: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) of each row, counted from 1."""
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{file} row {number}", row


def _checked_prompt(prompt: Any, where: str, field: str) -> str | list[dict[str, Any]]:
    """The prompt as it may be used; null entries of messages (Arrow fills them in) are left out."""
    remedy = "give a non-empty string, or a list of messages with role and content; or leave the row out"
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if not isinstance(prompt, list) or not prompt:
        is_empty = prompt is None or prompt == [] or isinstance(prompt, str)
        raise InputError(where, prompt, f"{field} is {'empty' if is_empty else type(prompt).__name__}", remedy)
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(where, message, f"message {i} of {field} has no role out of {', '.join(ROLES)}", remedy)
        if not isinstance(message.get("content"), str):
            raise InputError(where, message, f"message {i} of {field} has no text as content", remedy)
    if prompt[-1]["role"] == "assistant":
        raise InputError(where, prompt[-1], f"{field} ends with the assistant's message", "end with the user's")
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


# --- procedural -------------------------------------------------------------------------------


def _procedural(settings: DatasetSettings, seed: int, field: str, exclude: frozenset[str]) -> list[Row]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, size = settings.procedural, settings.size
    assert name is not None and size is not None  # DatasetSettings checks it
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise InputError(f"{field}.procedural", name, "reasoning-gym has no such dataset", f"near: {', '.join(near)}")
    if taken := {"size", "seed"} & settings.args.keys():
        raise InputError(f"{field}.args", settings.args, f"{', '.join(sorted(taken))} is set elsewhere",
                         f"use {field}.size and run.seed")  # fmt: skip
    # reasoning-gym draws item i from seed + i: near seeds share items, so the seed is a hash.
    digest = hashlib.blake2b(f"{field}/{seed}".encode(), digest_size=4).digest()
    num_draws = DRAWS_PER_QUESTION * max(size, 20)
    found: dict[str, Row] = {}
    try:
        draws = reasoning_gym.create_dataset(
            name, seed=int.from_bytes(digest, "big") >> 1, size=num_draws, **settings.args
        )
        for i in range(num_draws):
            entry = draws[i]
            if entry["question"] not in exclude:
                found.setdefault(
                    entry["question"], {"prompt": entry["question"], "answer": entry["answer"], "entry": entry}
                )
            if len(found) == size:
                return list(found.values())
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{field}.args", settings.args, f"{name} refuses them: {error}", "see reasoning-gym's configuration of it"
        ) from error
    besides = f" besides the {len(exclude)} that are held out" if exclude else ""
    raise InputError(
        f"{field}.size",
        size,
        f"{num_draws} draws of {name} gave only {len(found)} distinct questions{besides}",
        f"use size={len(found)} or less, or args with a larger question space" if found else "use other args",
    )
