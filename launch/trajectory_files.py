"""What was sampled, as a table: a row a sample, for trajectories/*.parquet and W&B; and those files.

May import: numpy, pyarrow, trainers.experience.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.experience import VERSION_SPAN, GroupRewards, TrajectoryGroup

MAX_HELD_BYTES = 256 * 2**20  # of tables that a full disk refused


class TrajectoryFiles:
    """trajectories/step-NNNNNN.parquet of a run.  What a full disk refuses is held and written before the next one.

    Args:
        lost: told (step, file name, reason) when a table is given up: more than ``MAX_HELD_BYTES`` wait, or the end.
    """

    def __init__(self, folder: Path, lost: Callable[[int, str, str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lost = folder, lost
        self._held: dict[int, pa.Table] = {}
        self._reason = ""

    def write(self, step: int, table: pa.Table) -> None:
        self._held[step] = table
        self._flush()
        while self._held and sum(held.nbytes for held in self._held.values()) > MAX_HELD_BYTES:
            self._give_up(next(iter(self._held)))

    def go_back(self, step: int) -> None:
        """Later steps are of a lineage that is left."""
        self._held = {at: table for at, table in self._held.items() if at <= step}

    def close(self) -> None:
        self._flush()
        for step in list(self._held):
            self._give_up(step)

    def _flush(self) -> None:
        for step in list(self._held):
            path = self._folder / _name(step)
            fresh = path.with_name(f".{path.name}.tmp")
            try:
                pq.write_table(self._held[step], fresh, compression="zstd")
                os.replace(fresh, path)
            except OSError as error:
                fresh.unlink(missing_ok=True)  # a part of it takes room that others need
                self._reason = str(error)
                return
            del self._held[step]

    def _give_up(self, step: int) -> None:
        del self._held[step]
        self._lost(step, _name(step), self._reason)


def _name(step: int) -> str:
    return f"step-{step:06d}.parquet"


def trajectory_table(
    groups: Sequence[TrajectoryGroup], rewards: Sequence[GroupRewards], advantages: Mapping[str, np.ndarray]
) -> pa.Table:
    """One row a sample, in group and sample order; a masked reward or advantage is null.

    ``rewards`` is parallel to ``groups`` (ValueError otherwise); ``advantages``: group id -> float [G].
    """
    ids = [g.group_id for g in groups]
    if ids != [r.group_id for r in rewards]:
        raise ValueError(f"groups and rewards do not belong together: {ids[:4]} against others")
    samples = [(g, t) for g in groups for t in g.trajectories]
    sizes = [len(g.trajectories) for g in groups]

    def column(per_group: Sequence[np.ndarray | None]) -> pa.Array:
        parts = [
            np.full(n, np.nan) if a is None else np.asarray(a, np.float64)
            for a, n in zip(per_group, sizes, strict=True)
        ]
        return pa.array(np.concatenate(parts) if parts else np.zeros(0), pa.float64(), from_pandas=True)

    ints = pa.list_(pa.int32())
    columns: dict[str, pa.Array] = {
        "group_id": pa.array([g.group_id for g, _ in samples], pa.string()),
        "sample_index": pa.array([t.sample_index for _, t in samples], pa.int32()),
        "seed": pa.array([t.seed for _, t in samples], pa.int64()),
        "prompt": pa.array([g.prompt.text for g, _ in samples], pa.string()),
        "completion": pa.array([t.text for _, t in samples], pa.string()),
        "prompt_ids": pa.array([g.prompt.token_ids for g, _ in samples], ints),
        "completion_ids": pa.array([t.completion_ids for _, t in samples], ints),
        "behavior_logprobs": pa.array([t.behavior_logprobs for _, t in samples], pa.list_(pa.float32())),
        "version_spans": pa.array(
            [
                [
                    {"incarnation": s.version.incarnation, "step": s.version.step, "num_tokens": s.num_tokens}
                    for s in t.version_spans
                ]
                for _, t in samples
            ],
            pa.list_(VERSION_SPAN),
        ),
        "finish_reason": pa.array([t.finish_reason for _, t in samples], pa.string()),
        "reward": column([r.totals for r in rewards]),
        "advantage": column([advantages.get(i) for i in ids]),
    }
    for part in dict.fromkeys(name for r in rewards for name in r.parts):
        columns[f"rewards/{part}"] = column([r.parts.get(part) for r in rewards])
    return pa.table(columns)
