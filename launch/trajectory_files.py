"""What was sampled, as a table: a row a sample, for trajectories/*.parquet and W&B.

May import: numpy, pyarrow, trainers.experience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from trainers.experience import VERSION_SPAN, GroupRewards, TrajectoryGroup


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
