"""Everything that can be checked before anything is allocated: model, data, rewards, run folder.

What passes here is what ``burnish validate`` accepts and ``burnish train`` starts with.
May import: actors.{model_folders, modeling, reward_model}, trainers.*, launch.*.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.model_folders import resolve_model
from launch.adapters import check_policy, checked_targets
from launch.config import RunConfig
from launch.judging import REPLIES, prepare_judges
from launch.model_facts import ModelFacts, check_model_folder
from launch.prompts import DatasetReport, load_prompts
from launch.run_folder import is_taken
from launch.tuning_data import load_examples
from trainers.errors import InputError
from trainers.examples import Example
from trainers.experience import Prompt
from trainers.prompt_format import PromptFormat
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
    critic_path: str | None = None  # with PPO
    pretraining: tuple[Example, ...] = ()  # with PPO-ptx
    adapter: str | None = None  # folder of the adapter that training goes on from


def run_folder(config: RunConfig) -> Path:
    """Of one run."""
    return Path(config.run.directory) / config.run.name


def check_run_folder(config: RunConfig, resume: bool) -> None:
    """The run's folder has to be absent (or empty) for a new run, a run's for a resumed one."""
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        raise InputError("run.name", config.run.name, f"{folder} is a file", "choose another run.name")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = f"no folder can be made in {there}"
        raise InputError("run.directory", config.run.directory, reason, "choose a folder you may write to")
    if not resume and is_taken(folder, but=[REPLIES]):  # these were paid for
        raise InputError(
            "run.name", config.run.name, f"the run folder {folder} exists already",
            "add --resume to continue it, or choose another run.name",
        )  # fmt: skip
    if resume and not (folder / "config.yaml").exists():
        raise InputError(
            "run.name", config.run.name, f"there is no run to resume in {folder}", "start it without --resume"
        )


def prepare(config: RunConfig) -> Prepared:
    """Check model, data and rewards.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.modeling import load_tokenizer
    from actors.reward_model import check_reward_model

    policy = check_policy(config.model, served_from_disk=not config.pushes_merged)
    path, facts = policy.path, policy.facts
    if policy.adapter is not None and config.has_reference_workers and config.reference.path is None:
        reason = "model.path is an adapter, and workers of their own hold whole models"
        remedy = "leave it out, or set reference.path to the merged model"
        raise InputError("reference.source", config.reference.source, reason, remedy)
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
    max_prompt = min(max_length - max_tokens, prompt_room(config))
    tokenizer = load_tokenizer(path)
    if config.reference.path is not None and config.algorithm.needs_reference:
        reference = resolve_model(config.reference.path)
        check_model_folder(reference, "reference.path")
        same_tokenizer(tokenizer, reference, "reference.path", config.reference.path)
    for model in config.reward_models:
        check_reward_model(model, tokenizer, max_prompt + max_tokens)
    prepare_judges(config.judges, path)
    critic = _critic_path(config, path, tokenizer) if config.algorithm.needs_critic else None
    train, held_out, report = load_prompts(config.prompts, tokenizer, max_prompt, config.run.seed)
    if config.algorithm.learns_from_pairs:
        _refuse_preferences(train)
    probe_rewards(rewards, train, PROBE_TIMEOUT_S)
    texts = _pretraining(config, tokenizer, min(max_length, config.learner.token_budget))
    return Prepared(path, facts, max_length, train, held_out, report, critic, texts, policy.adapter)


def prompt_room(config: RunConfig) -> int:
    """Tokens that a prompt may have, so that with the longest completion it is scored and learned from in one pack.

    Raises:
        InputError: some model's micro-batches hold no prompt beside a completion.
    """
    budgets = {"learner.token_budget": config.learner.token_budget}
    if config.has_reference_workers:
        budgets["reference.token_budget"] = config.reference.token_budget
    if config.algorithm.needs_critic:
        budgets["critic.token_budget"] = config.critic.token_budget
    max_tokens = config.generator.sampling.max_tokens
    for field, budget in budgets.items():
        if budget <= max_tokens:
            raise InputError(field, budget, f"leaves no room for a prompt beside {max_tokens} completion tokens",
                             f"use more than {max_tokens}")  # fmt: skip
    return min(budgets.values()) - max_tokens


def _refuse_preferences(prompts: list[Prompt]) -> None:
    """InputError where rows of preferences stand for prompts: their answers would be left unread."""
    written = {"chosen", "rejected"}
    if any(written <= set(prompt.columns) for prompt in prompts):
        raise InputError(
            "prompts.train", sorted(written), "are written preferences, and online_dpo samples its own pairs",
            "use algorithm.name=dpo, or leave these columns out",
        )  # fmt: skip


def _pretraining(config: RunConfig, tokenizer: Any, max_length: int) -> tuple[Example, ...]:
    """The texts of PPO-ptx, each cut at ``max_length`` tokens as a pretraining run would cut it."""
    if config.pretraining is None:
        return ()
    shown = config.prompts
    form = PromptFormat(system=shown.system, template=shown.template, chat=shown.chat)
    remedy = "give rows with a column text"
    return tuple(load_examples(config.pretraining, "pretraining", tokenizer, max_length, form, True, remedy)[0])


def _critic_path(config: RunConfig, model_path: str, tokenizer: Any) -> str:
    """The folder the critic starts from; it reads the policy's token ids, so its tokenizer must be the policy's.

    Default: the first reward model that reads the policy's tokens, else the policy.
    """
    own = next((model.paths[0] for model in config.reward_models if not model.retokenize), config.model.path)
    given = config.critic.path or own
    path = model_path if given == config.model.path else resolve_model(given)
    if path != model_path:
        check_model_folder(path, "critic.path")
        same_tokenizer(tokenizer, path, "critic.path", given)
    if config.critic.lora is not None:
        from actors.lora import skeleton

        checked_targets(config.critic.lora, skeleton(path), "critic.lora")
    if config.critic.quantization is not None:
        from actors.quantization import check_quantization

        check_quantization(config.critic.quantization, "critic.quantization")
    return path


def same_tokenizer(tokenizer: Any, path: str, field: str, value: str) -> None:
    """InputError where the model in ``path``, which ``field`` = ``value`` names, reads other tokens than the policy."""
    from actors.modeling import load_tokenizer

    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            field, value, "its tokenizer is not that of model.path", "use a model of the same family, or leave it unset"
        )
