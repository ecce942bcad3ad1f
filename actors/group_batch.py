"""The samples of several groups, laid out one after the other as the packing wants them.

May import: numpy, trainers.experience.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from trainers.experience import TrajectoryGroup

Row = TypeVar("Row")


class GroupBatch:
    """``prompts``, ``completions`` (int32 [P], [T]) and ``groups`` (which group, an index) of every sample."""

    def __init__(self, groups: Sequence[TrajectoryGroup]) -> None:
        samples = [(i, g.prompt.token_ids, t.completion_ids) for i, g in enumerate(groups) for t in g.trajectories]
        self.groups: list[int] = [i for i, _, _ in samples]
        self.prompts: list[np.ndarray] = [prompt for _, prompt, _ in samples]
        self.completions: list[np.ndarray] = [completion for _, _, completion in samples]
        self._sizes = [len(g.trajectories) for g in groups]

    def by_group(self, rows: Sequence[Row]) -> list[list[Row]]:
        """One row a sample -> the rows of each group."""
        if len(rows) != len(self.groups):
            raise ValueError(f"{len(rows)} rows for {len(self.groups)} samples")
        left = iter(rows)
        return [[next(left) for _ in range(size)] for size in self._sizes]
