"""What a run folder knows of the attempts before this one.

May import: cluster.{checkpoints, errors}, trainers.{errors, ledger, protocols},
launch.{adapters, config, journal, spool}.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster.checkpoints import Checkpoint, CheckpointStore
from cluster.errors import DamagedError
from launch.adapters import check_identity
from launch.config import RunConfig
from launch.journal import read_rows
from launch.spool import UNTRAINED, read_spool
from trainers.errors import InputError
from trainers.ledger import Ledger
from trainers.protocols import LearnerGroup


def newest_checkpoint(config: RunConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from, its bytes verified; None when the run ended before its first one.

    Raises:
        InputError: it is damaged, was made by another algorithm, or holds another kind of model.
    """
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    try:
        target = _target(folder)
        checkpoint = store.load(target) if target in store.steps() else store.latest()
    except DamagedError as error:
        reason, _, remedy = str(error).partition("; ")
        raise InputError("--resume", config.run.name, reason, remedy) from error
    if checkpoint is None:
        return None
    saved_critic = "critic" in checkpoint.metadata
    if saved_critic != config.algorithm.needs_critic:
        made_by, has = ("ppo", "a") if saved_critic else ("grpo", "no")
        reason = f"the checkpoint of step {checkpoint.step} has {has} critic"
        raise InputError("algorithm.name", config.algorithm.name, reason, f"resume with algorithm.name={made_by}")
    if saved_critic:
        was, asked = checkpoint.metadata["critic"].get("quantization"), config.critic.quantization
        if was != asked:
            reason = f"the critic in the checkpoint of step {checkpoint.step} was trained in {was or 'no quantisation'}"
            raise InputError("critic.quantization", asked, reason, f"resume with critic.quantization={was or 'null'}")
    if "adapter" in checkpoint.metadata:  # older ones are of whole models
        check_identity(checkpoint.metadata["adapter"], config.model, checkpoint.step)
    elif config.model.lora is not None:
        check_identity(None, config.model, checkpoint.step)
    return checkpoint


def made_with(config: RunConfig) -> str:
    """Digest of the settings that shape a finished group, and of those that say when it must be trained on."""
    run = config.run
    # Where a judge is served, how fast and for how much it is asked does not change what it says.
    asked = [(judge.endpoint.model, judge.endpoint.parameters) for judge in config.judges if judge.endpoint is not None]
    judges = [judge.model_dump(mode="json", exclude={"endpoint", "deadline_s", "generator"}) for judge in config.judges]
    shape = [
        config.model_dump(mode="json", include={"model", "rewards", "reward_models"}),
        config.generator.sampling.model_dump(mode="json"),
        [run.seed, run.samples_per_prompt, run.groups_per_step, run.max_staleness, config.has_reference_workers],
    ]
    if config.algorithm.needs_greedy:
        shape.append("greedy")
    shape += [judges, asked] if judges else []
    return hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16).hexdigest()


def restored_ledger(config: RunConfig, checkpoint: Checkpoint | None) -> tuple[Ledger, list[LearnerGroup]]:
    """The ledger to go on with, and the finished groups that come with it.

    Groups that were saved under other settings are sampled again, like those that were in flight.
    """
    max_attempts = config.health.max_attempts
    if checkpoint is None:
        return Ledger(max_attempts), []
    saved = checkpoint.metadata
    if "ledger" not in saved:  # made before there was one: every position below the frontier was trained on
        return Ledger(max_attempts, frontier=int(saved["prompts"]["position"])), []
    spool = checkpoint.path / UNTRAINED
    usable = spool.exists() and saved["made_with"] == made_with(config)
    groups = read_spool(spool) if usable else []
    kept = {int(g.summary.group_id) for g in groups}
    return Ledger.restore(saved["ledger"], kept, max_attempts), groups


def _target(folder: Path) -> int:
    """Step that an alarm took the run back to, as long as no checkpoint was made since; -1 where there is none.

    Later checkpoints are still there then: they go when the next one is committed.
    """
    target = -1
    for event in read_rows(folder / "events.jsonl"):
        if event.get("kind") == "rolling_back":
            target = int(event["to"])
        elif event.get("kind") == "checkpoint":
            target = -1
    return target


def earlier_attempts(folder: Path) -> tuple[int, str | None]:
    """(highest incarnation that served, last W&B run id) of this run folder; (-1, None) for a new one.

    A checkpoint alone cannot tell: a run that was resumed and killed before its next checkpoint left
    samples of an incarnation which no checkpoint mentions, and versions are never used twice.
    """
    incarnation, wandb_id = -1, None
    for event in read_rows(folder / "events.jsonl"):
        if event.get("kind") in ("ready", "learner_restarted"):
            incarnation = max(incarnation, int(str(event["version"]).split(".")[0]))
        elif event.get("kind") == "recording":
            wandb_id = event.get("wandb_id") or wandb_id
    return incarnation, wandb_id
