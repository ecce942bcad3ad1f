"""RewardEnsemble: several reward models in one process, as one reward.

Every worker holds all members.  On GPUs they are dealt to the worker's own GPUs in turn, so ``gpus_per_worker`` says
whether they share one or stand apart; members on different GPUs score at the same time.
May import: torch, actors.{reward_model, settings}, cluster.transport, trainers.{ensembles, experience, prompt_format}.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from actors.reward_model import RewardModel
from actors.settings import RewardModelSettings
from cluster.transport import fetch
from trainers.ensembles import ensemble_rewards
from trainers.experience import GroupRewards, TrajectoryGroup, decode_group
from trainers.prompt_format import PromptFormat


def scorer_class(settings: RewardModelSettings) -> type[RewardModel] | type[RewardEnsemble]:
    """What a worker of this entry of ``reward_models`` is made of; both take the same arguments."""
    return RewardModel if settings.ensemble is None else RewardEnsemble


class RewardEnsemble:
    """Scores groups by all members.  Arguments as :class:`actors.reward_model.RewardModel`."""

    def __init__(
        self,
        settings: RewardModelSettings,
        policy_path: str,
        dtype: str,
        device: str,
        form: PromptFormat | None = None,
    ) -> None:
        self.settings = settings
        places = member_devices(settings, device)
        self._members = [
            RewardModel(member, policy_path, dtype, place, form)
            for member, place in zip(settings.members, places, strict=True)
        ]
        self._lanes: dict[str, list[int]] = {}  # device -> its members
        for index, place in enumerate(places):
            self._lanes.setdefault(place, []).append(index)
        self._threads = ThreadPoolExecutor(len(self._lanes), "member")

    def score(self, payloads: list[Any], deadline_s: float) -> list[GroupRewards]:
        """Rewards of each group in ``payloads``, see :func:`trainers.ensembles.ensemble_rewards`."""
        return self.score_groups([decode_group(fetch(payload, deadline_s)) for payload in payloads])

    def score_groups(self, groups: Sequence[TrajectoryGroup]) -> list[GroupRewards]:
        """See :meth:`score`."""

        def lane(device: str) -> dict[int, list[GroupRewards]]:
            # A kernel is launched on the thread's own device, which is not that of its arguments by itself.
            with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
                return {index: self._members[index].score_groups(groups) for index in self._lanes[device]}

        found: dict[int, list[GroupRewards]] = {}
        for part in map(lane, self._lanes) if len(self._lanes) == 1 else self._threads.map(lane, self._lanes):
            found |= part
        s, by_member = self.settings, [found[index] for index in range(len(self._members))]
        assert s.ensemble is not None
        return [
            ensemble_rewards(s.name, s.ensemble, s.weight, s.clip, scored) for scored in zip(*by_member, strict=True)
        ]


def member_devices(settings: RewardModelSettings, device: str) -> list[str]:
    """A device for each member: in turn the worker's own GPUs, of which a worker sees no others; else ``device``."""
    count = int(settings.gpus_per_worker or 1) if device.startswith("cuda") else 1
    return [f"cuda:{i % count}" if count > 1 else device for i in range(len(settings.members))]
