"""Tokenised examples in an Arrow file that every rank maps into memory: a step names examples by number.

A file is written once, before the ranks start, into the run folder, which on a cluster lies on a disk that all nodes
see.  So no token passes through the controller, a rank reads only the pages of its own examples, and ranks of one
node share them.
May import: numpy, pyarrow, trainers.examples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainers.examples import Example

SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("mask", pa.large_list(pa.uint8())),  # not bool: Arrow packs bits, which cannot be mapped
        ("source_index", pa.int64()),
    ]
)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """One Arrow IPC file of one batch; it appears whole, by a rename."""
    offsets = pa.array(np.concatenate([[0], np.cumsum([e.input_ids.shape[0] for e in examples], dtype=np.int64)]))
    ids = pa.array(np.concatenate([np.zeros(0, np.int32), *(e.input_ids for e in examples)]))
    masks = pa.array(np.concatenate([np.zeros(0, np.uint8), *(e.mask.astype(np.uint8) for e in examples)]))
    columns = [
        pa.LargeListArray.from_arrays(offsets, ids),
        pa.LargeListArray.from_arrays(offsets, masks),
        pa.array([e.source_index for e in examples], pa.int64()),
    ]
    fresh = path.with_name(f".{path.name}.tmp")
    with pa.ipc.new_file(str(fresh), SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    os.replace(fresh, path)


class ExampleFile:
    """The examples of one file, by number; nothing is copied before it is asked for."""

    def __init__(self, path: str) -> None:
        with pa.memory_map(path) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        tokens, masks = batch.column("input_ids"), batch.column("mask")
        self._offsets: np.ndarray = tokens.offsets.to_numpy()
        self._ids: np.ndarray = tokens.values.to_numpy()
        self._masks: np.ndarray = masks.values.to_numpy()
        self._sources: np.ndarray = batch.column("source_index").to_numpy()

    def __len__(self) -> int:
        return len(self._sources)

    def num_tokens(self, index: int) -> int:
        return int(self._offsets[index + 1] - self._offsets[index])

    def __getitem__(self, index: int) -> Example:
        rows = slice(self._offsets[index], self._offsets[index + 1])
        return Example(self._ids[rows], self._masks[rows].astype(bool), int(self._sources[index]))
