"""Reward functions in a process of their own: what they do to it, they do not do to the loop.

May import: trainers.{experience, rewards}, cluster.transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.settings import RewardWorkerSettings
from cluster.transport import fetch
from trainers.experience import GroupRewards, decode_group
from trainers.rewards import RewardSettings, load_reward, score_group


class RewardWorker:
    """Loads every reward once and scores group after group."""

    def __init__(self, rewards: Sequence[RewardSettings], settings: RewardWorkerSettings) -> None:
        self.settings = settings
        self._rewards = [load_reward(r) for r in rewards]

    async def score(self, payload: list[Any], deadline_s: float) -> GroupRewards:
        """Rewards of the one group in ``payload``; failures are values in it."""
        buffer = await asyncio.to_thread(fetch, payload[0], deadline_s)
        return await score_group(
            self._rewards, decode_group(buffer), self.settings.timeout_s, self.settings.num_retries
        )
