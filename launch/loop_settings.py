"""What the configuration says to the loop: its settings, and the lap of PPO.

May import: launch.{assemble, config}, trainers.*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.assemble import Fleet
from launch.config import RunConfig
from trainers.loop import LoopSettings
from trainers.ppo_lap import PPOLap, PPOState


def loop_settings(config: RunConfig) -> LoopSettings:
    run, sampling = config.run, config.generator.sampling
    return LoopSettings(
        num_steps=run.num_steps, groups_per_step=run.groups_per_step, samples_per_prompt=run.samples_per_prompt,
        max_staleness=run.max_staleness, temperature=sampling.temperature, max_tokens=sampling.max_tokens,
        seed=run.seed, filtering=config.filtering, mask_truncated=config.algorithm.mask_truncated,
        greedy_baseline=config.algorithm.needs_greedy,
        ensembles={m.name: m.ensemble for m in config.reward_models if m.ensemble is not None and m.ensemble.masks},
    )  # fmt: skip


def ppo_lap(config: RunConfig, fleet: Fleet, saved: Mapping[str, Any] | None) -> PPOLap | None:
    """With a critic: the lap that updates both, with the state that is ``saved`` in a checkpoint's metadata if any."""
    if fleet.critic is None:
        return None
    algorithm = config.algorithm
    state = PPOState.initial(algorithm) if saved is None else PPOState.restored(algorithm, saved["ppo"])
    overlap = config.critic.overlap
    if overlap is None:
        overlap = fleet.device == "cuda" and not config.cluster.colocate
    return PPOLap(fleet.learner, fleet.critic, algorithm, state, overlap)
