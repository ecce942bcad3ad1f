"""Everything of a run that learns from files that can be checked before anything is allocated: model, data, checkpoint.

What passes here is what ``burnish validate`` accepts and ``burnish train`` starts with.
May import: actors.modeling, cluster.{checkpoints, errors}, trainers.errors, launch.*.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.modeling import load_tokenizer
from cluster.checkpoints import Checkpoint, CheckpointStore
from cluster.errors import DamagedError
from launch.adapters import adapter_identity, check_identity, check_policy
from launch.tuning_config import TuningConfig
from launch.tuning_task import BaseModelFolder, TuningTask
from trainers.errors import InputError


@dataclass(frozen=True, slots=True)
class PreparedTuning:
    """Checked inputs of a run."""

    base: BaseModelFolder
    task: TuningTask
    num_steps: int


def prepare_tuning(config: TuningConfig) -> PreparedTuning:
    """Check the model and the data.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    policy = check_policy(config.model, with_head=config.algorithm.name == "reward")
    path, facts = policy.path, policy.facts
    if policy.adapter is not None and config.has_reference_workers and config.reference_settings.path is None:
        raise InputError("reference.source", config.reference_settings.source, "model.path is an adapter, and workers "
                         "of their own hold whole models", "leave it out, or set reference.path")  # fmt: skip
    longest = config.model.max_length
    if longest is not None and longest > facts.max_length:
        reason = f"the model was built for {facts.max_length} tokens"
        raise InputError("model.max_length", longest, reason, f"use at most {facts.max_length}")
    max_length = min(longest or facts.max_length, facts.max_length, config.learner.token_budget)
    base = BaseModelFolder(path, facts, max_length, load_tokenizer(path), policy.adapter)
    task = _task(config, base)
    run = config.run
    num_steps = run.num_steps
    if num_steps is None:
        assert run.num_epochs is not None  # TuningRunSettings: one of the two
        num_steps = max(1, round(run.num_epochs * sum(task.sizes) / run.batch_size))
    return PreparedTuning(base, task, num_steps)


def _task(config: TuningConfig, base: BaseModelFolder) -> TuningTask:
    if config.algorithm.name == "reward":
        from launch.reward_task import RewardTask

        return RewardTask(config, base)
    if config.algorithm.name == "dpo":
        from launch.preference_task import PreferenceTask

        return PreferenceTask(config, base)
    from launch.sft_task import SFTTask

    return SFTTask(config, base)


def made_with(config: TuningConfig) -> dict[str, Any]:
    """What a checkpoint belongs to: its weights fit nothing else."""
    return {"algorithm.name": config.algorithm.name, "adapter": adapter_identity(config.model)}


def newest_checkpoint(config: TuningConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from, its bytes verified; None when the run ended before its first one.

    Raises:
        InputError: it is damaged, or was made by another algorithm.
    """
    try:
        checkpoint = CheckpointStore(folder / "checkpoints", config.checkpoint.keep).latest()
    except DamagedError as error:
        reason, _, remedy = str(error).partition("; ")
        raise InputError("--resume", config.run.name, reason, remedy) from error
    if checkpoint is None:
        return None
    saved = dict(checkpoint.metadata["made_with"])
    check_identity(saved.pop("adapter", None), config.model, checkpoint.step)
    for field, before in saved.items():
        value = made_with(config).get(field)
        if value != before:
            reason = f"the checkpoint of step {checkpoint.step} was made with {before}"
            raise InputError(field, value, reason, f"resume with {field}={before}")
    return checkpoint
