"""A function that compares answers, in a process of its own: what it does to it, it does not do to the driver.

May import: actors.settings, trainers.{experience, pair_function, rewards}.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.settings import RewardWorkerSettings
from trainers.experience import Prompt, Trajectory
from trainers.pair_function import Value, compare, load_pair_function
from trainers.rewards import RewardSettings


class PairWorker:
    """Loads the function once and compares pair after pair."""

    def __init__(self, function: RewardSettings, settings: RewardWorkerSettings, field: str) -> None:
        self.settings = settings
        self._function = load_pair_function(function, field)

    async def compare(
        self, prompt: Prompt, pairs: Sequence[tuple[Trajectory, Trajectory]], seeds: Sequence[int]
    ) -> list[Value]:
        """1, 0, 0.5, None or a failure for each pair of answers to ``prompt``."""
        timeout_s, num_retries = self.settings.timeout_s, self.settings.num_retries
        return await compare(self._function, prompt, pairs, seeds, timeout_s, num_retries)
