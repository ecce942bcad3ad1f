"""AdapterReference: reference log-probs of a model that trains an adapter, by switching the adapter off.

No second copy of the weights.  May import: numpy, actors.{experience_batch, lora}.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.experience_batch import ExperienceBatch
from actors.lora import Adapter


class AdapterReference:
    """Of one rank; its calls are collectives where those of ``score`` are."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._kept: tuple[Any, list[np.ndarray]] | None = None  # of the batch with these summaries
        self._seconds = 0.0

    def logprobs(
        self, batch: ExperienceBatch, score: Callable[[ExperienceBatch], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """float32 [T] of every sample under the model as it started.

        A batch that was prepared is not scored again for its update.

        Args:
            score: log-probs of every sample under the weights as they are.
        """
        summaries = tuple(group.summary for group in batch.groups)
        if self._kept is not None and self._kept[0] == summaries:
            rows, self._kept = self._kept[1], None
            return rows
        started = time.perf_counter()
        with self._adapter.as_started():
            rows = score(batch)
        self._kept, self._seconds = (summaries, rows), self._seconds + time.perf_counter() - started
        return rows

    def took_s(self) -> float:
        """Seconds since this was last asked."""
        took, self._seconds = self._seconds, 0.0
        return took
