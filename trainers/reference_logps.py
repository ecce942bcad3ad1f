"""Reference log-probs of a data set, computed once: a Parquet file whose name says what it holds.

The name is a digest of the reference's weights, of the tokens it read (so of the data, the tokenizer and the prompt
format) and of the precision it computed in.  The file says the same inside, with a checksum of its numbers.
Axes: K answers of a comparison.  May import: numpy, pyarrow, trainers.{comparisons, errors}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.comparisons import Comparison
from trainers.errors import VerificationError

FORMAT = 1
TEMPERATURE = 1.0  # answers were written, or sampled who knows how: they are scored as the model is
META = b"burnish.reference"
SCHEMA = pa.schema([("logps", pa.list_(pa.float64()))])  # a row a comparison, a sum over tokens for each answer


def reference_key(comparisons: Sequence[Comparison], model_digest: str, dtype: str) -> str:
    """Names the log-probs of ``comparisons`` under a model, whatever is said of which answer is better."""
    state = hashlib.blake2b(f"{FORMAT} {model_digest} {dtype} {TEMPERATURE}".encode(), digest_size=16)
    for c in comparisons:
        state.update(str([c.prompt_ids.shape[0], *(a.shape[0] for a in c.completion_ids)]).encode())
        state.update(np.concatenate([c.prompt_ids, *c.completion_ids]).astype("<i4").tobytes())
    return state.hexdigest()


def write_reference(path: Path, rows: Sequence[np.ndarray], key: str) -> None:
    """``rows``: float64 [K] of each comparison.  The file appears whole, by a rename."""
    meta = json.dumps({"format": FORMAT, "key": key, "checksum": _checksum(rows)})
    schema = SCHEMA.with_metadata({META: meta.encode()})
    table = pa.table({"logps": pa.array(list(rows), type=SCHEMA.field("logps").type)}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs may compute the same file
    pq.write_table(table, fresh)
    os.replace(fresh, path)


def read_reference(path: Path, comparisons: Sequence[Comparison], key: str) -> list[np.ndarray]:
    """float64 [K] of each comparison.

    Raises:
        VerificationError: the file is damaged, or not that of ``key``.
    """
    rows, found = _load(path)
    if found != key:
        raise VerificationError(f"{path} holds the log-probs of {found}, not of {key}")
    if [len(row) for row in rows] != [len(c.completion_ids) for c in comparisons]:
        raise VerificationError(f"{path} holds {len(rows)} rows of other answers than the {len(comparisons)} asked for")
    return rows


def reference_rows(path: Path) -> list[np.ndarray]:
    """The same of a file that is known to be the right one; VerificationError when it is damaged."""
    return _load(path)[0]


def _load(path: Path) -> tuple[list[np.ndarray], str | None]:
    try:
        table = pq.ParquetFile(path).read()
        meta = json.loads((table.schema.metadata or {}).get(META, b"{}"))
        rows = [np.array(row, dtype=np.float64) for row in table["logps"].to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise VerificationError(f"{path} cannot be read: {error}") from error
    if meta.get("checksum") != _checksum(rows):
        raise VerificationError(f"{path} is damaged: its checksum is not that of its numbers")
    return rows, meta.get("key")


def _checksum(rows: Sequence[np.ndarray]) -> str:
    state = hashlib.blake2b(str([len(row) for row in rows]).encode(), digest_size=16)
    for row in rows:
        state.update(row.astype("<f8").tobytes())
    return state.hexdigest()
