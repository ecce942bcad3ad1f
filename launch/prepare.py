"""Everything that can be checked before anything is allocated: model, data, rewards, run folder.

What passes here is what ``burnish validate`` accepts and ``burnish train`` starts with.
May import: actors.{model_folders, modeling}, trainers.*, launch.*.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from actors.model_folders import resolve_model
from launch.config import RunConfig
from launch.model_facts import ModelFacts, check_model_folder
from launch.prompts import DatasetReport, load_prompts
from trainers.errors import InputError
from trainers.experience import Prompt
from trainers.rewards import load_reward, probe_rewards

PROBE_TIMEOUT_S = 60.0  # for one call of a reward function at start, imports included


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked inputs of a run."""

    model_path: str
    facts: ModelFacts
    max_length: int
    train: list[Prompt]
    held_out: list[Prompt]
    report: DatasetReport


def check_run_folder(config: RunConfig, resume: bool) -> Path:
    """The run's folder: absent (or empty) for a new run, a run's for a resumed one."""
    folder = Path(config.run.directory) / config.run.name
    if folder.exists() and not folder.is_dir():
        raise InputError("run.name", config.run.name, f"{folder} is a file", "choose another run.name")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = f"no folder can be made in {there}"
        raise InputError("run.directory", config.run.directory, reason, "choose a folder you may write to")
    used = folder.exists() and any(folder.iterdir())
    if used and not resume:
        raise InputError(
            "run.name", config.run.name, f"the run folder {folder} exists already",
            "add --resume to continue it, or choose another run.name",
        )  # fmt: skip
    if resume and not (folder / "config.yaml").exists():
        raise InputError(
            "run.name", config.run.name, f"there is no run to resume in {folder}", "start it without --resume"
        )
    return folder


def prepare(config: RunConfig) -> Prepared:
    """Check model, data and rewards.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.modeling import load_tokenizer

    path = resolve_model(config.model.path)
    facts = check_model_folder(path)
    max_length = min(config.model.max_length or facts.max_length, facts.max_length)
    max_tokens = config.generator.sampling.max_tokens
    if config.model.max_length is not None and config.model.max_length > facts.max_length:
        raise InputError(
            "model.max_length", config.model.max_length, f"the model was built for {facts.max_length} tokens",
            f"use at most {facts.max_length}",
        )  # fmt: skip
    if max_tokens >= max_length:
        raise InputError(
            "generator.sampling.max_tokens", max_tokens, f"leaves no room for a prompt in {max_length} tokens",
            f"use less than {max_length}",
        )  # fmt: skip
    rewards = [load_reward(r) for r in config.rewards]
    budget = min(config.learner.token_budget, config.reference.token_budget)
    max_prompt = min(max_length, budget) - max_tokens
    if max_prompt < 1:
        raise InputError(
            "learner.token_budget", budget, f"leaves no room for a prompt beside {max_tokens} completion tokens",
            f"use more than {max_tokens}",
        )  # fmt: skip
    tokenizer = load_tokenizer(path)
    if config.reference.path is not None and config.algorithm.needs_reference:
        reference = resolve_model(config.reference.path)
        check_model_folder(reference, "reference.path")
        if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                "reference.path", config.reference.path, "its tokenizer is not that of model.path",
                "use a reference of the same model family, or leave it unset",
            )  # fmt: skip
    train, held_out, report = load_prompts(config.prompts, tokenizer, max_prompt, config.run.seed)
    probe_rewards(rewards, train, PROBE_TIMEOUT_S)
    return Prepared(path, facts, max_length, train, held_out, report)
