"""The candidates of one prompt, each at its temperature and with its own sampling stream.

May import: cluster.transport, actors.{generator_fleet, respondents}, trainers.*, launch.{label_config, label_sources}.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from actors.respondents import PAYLOAD_DEADLINE_S
from cluster.transport import fetch
from launch.label_config import CandidateSettings
from launch.label_sources import merge
from trainers.experience import Prompt, TrajectoryGroup, decode_group
from trainers.protocols import GeneratedGroup, GroupRequest
from trainers.sampling_seeds import sample_seed


class Samples(Protocol):
    """Who samples: a :class:`actors.generator_fleet.GeneratorFleet`."""

    async def generate(self, request: GroupRequest) -> GeneratedGroup: ...


async def sample_candidates(
    generator: Samples, prompt: Prompt, sampling: CandidateSettings, seed: int, turn: int, name: str
) -> tuple[TrajectoryGroup, list[float]]:
    """(``sampling.num_candidates`` completions of ``prompt``, the temperature of each).

    Args:
        seed: the streams are drawn from this, the prompt, the candidate's index and ``turn``.
        turn: how often the prompt came before.
        name: of the group, no other one's at the same time.
    """
    temperatures = [sampling.temperatures[i % len(sampling.temperatures)] for i in range(sampling.num_candidates)]

    async def at(temperature: float) -> tuple[list[int], TrajectoryGroup]:
        indices = [i for i, t in enumerate(temperatures) if t == temperature]
        generated = await generator.generate(
            GroupRequest(
                group_id=f"{name}@{temperature}",
                prompt=prompt,
                num_samples=len(indices),
                seeds=tuple(sample_seed(seed, prompt.prompt_id, i, turn) for i in indices),
                temperature=temperature or 1.0,
                max_tokens=sampling.max_tokens,
                greedy=temperature == 0,
            )
        )
        return indices, decode_group(await asyncio.to_thread(fetch, generated.payload, PAYLOAD_DEADLINE_S))

    groups = await asyncio.gather(*(at(temperature) for temperature in dict.fromkeys(temperatures)))
    return merge(groups, name, sampling.num_candidates), temperatures
