"""The workers that score a run's samples: its reward functions, and each of its reward models and judges.

May import: actors.{judge_worker, membership, reward_ensemble, reward_worker, scorer_pools}, cluster.worker_group,
launch.{config, judge_workers}, trainers.prompt_format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from actors.judge_worker import JudgeWorker
from actors.membership import Event, no_event
from actors.reward_ensemble import scorer_class
from actors.reward_worker import RewardWorker
from actors.scorer_pools import RewardModelPool, RewardPool
from cluster.worker_group import WorkerGroup
from launch.config import RunConfig
from launch.judge_workers import judge_kwargs
from trainers.prompt_format import PromptFormat


def reward_pools(
    config: RunConfig, model_path: str, dtype: str, torch_device: str, launch: Callable[..., WorkerGroup],
    event: Event = no_event,
) -> list[RewardPool | RewardModelPool]:
    """One pool for all reward functions, if there are any, and one for each reward model and each judge."""
    shown = config.prompts
    form = PromptFormat(system=shown.system, template=shown.template, chat=shown.chat)
    pools: list[RewardPool | RewardModelPool] = []
    if config.rewards:
        workers = launch(
            "reward_workers", RewardWorker,
            [{"rewards": config.rewards, "settings": config.reward_workers}] * config.reward_workers.num_workers,
            concurrency=64, deadline=config.cluster.start_deadline_s,
        )  # fmt: skip
        pools.append(RewardPool(workers, _reward_deadline(config), config.health, event))
    for index, settings in enumerate(config.reward_models):
        workers = launch(
            f"reward_models.{index}", scorer_class(settings),
            [
                {
                    "settings": settings, "policy_path": model_path, "dtype": dtype, "device": torch_device,
                    "form": form,
                }
            ] * settings.num_workers,
            concurrency=1, deadline=config.cluster.start_deadline_s,
        )  # fmt: skip
        pools.append(RewardModelPool(workers, settings.deadline_s, settings.token_budget, config.health, event))
    run_folder = Path(config.run.directory) / config.run.name
    for index, judge in enumerate(config.judges):
        device = "cpu" if torch_device == "cpu" else "cuda"
        workers = launch(
            f"judges.{index}", JudgeWorker, judge_kwargs(judge, index, run_folder, dtype, device, config.run.seed),
            concurrency=4096, deadline=judge.generator.start_deadline_s,
        )  # fmt: skip
        pools.append(RewardPool(workers, judge.deadline_s, config.health, event, judge.room))
    return pools


def _reward_deadline(config: RunConfig) -> float:
    """Every try of a function, and as long again for a queue of groups before it."""
    workers = config.reward_workers
    return 2 * workers.timeout_s * (workers.num_retries + 1) + 60.0
