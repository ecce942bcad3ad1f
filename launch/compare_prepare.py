"""What is looked at before a comparison's first run: every configuration, the model, rewards, prompts, and their room.

May import: launch.*, actors.*, trainers.{errors, experience}.
"""

from __future__ import annotations

from pathlib import Path

from actors.settings import ModelSettings
from launch.compare_config import CompareConfig
from launch.compare_plan import make_plan
from launch.compare_recipes import SCORERS
from launch.eval_config import EvalConfig
from launch.eval_prepare import prepare_eval
from launch.prompts import load_prompts
from trainers.errors import InputError
from trainers.experience import Prompt

Prompts = tuple[list[Prompt], list[Prompt]]


def folder_of(config: CompareConfig) -> Path:
    """Absolute."""
    return (Path(config.run.directory) / config.run.name).absolute()


def prepare_compare(config: CompareConfig) -> Prompts:
    """(training, held-out) prompts, once the plan, the model and the rewards are such that it can run.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.model_folders import resolve_model
    from actors.modeling import load_tokenizer

    make_plan(config, folder_of(config))
    given = config.model_dump(mode="json", exclude_unset=True)
    same = ("prompts", *SCORERS, "generator", "reward_workers", "cluster")
    whole = {name: given[name] for name in same if name in given}
    whole["model"] = {key: value for key, value in given["model"].items() if key in ModelSettings.model_fields}
    run = {"name": config.run.name, "directory": config.run.directory, "seed": config.run.seed}
    evaluation = {"num_samples": config.compare.eval_samples, "num_prompts": config.compare.eval_prompts}
    try:
        prepared = prepare_eval(EvalConfig.model_validate({**whole, "run": run, "eval": evaluation}))
    except InputError as error:
        field = "compare.eval_prompts" if error.field == "eval.num_prompts" else error.field
        raise InputError(field, error.value, error.reason, error.remedy) from error
    longest = min(prepared.max_length, config.learner.token_budget, config.reference.token_budget)
    room = longest - config.generator.sampling.max_tokens
    if room < 1:
        field, value = "generator.sampling.max_tokens", config.generator.sampling.max_tokens
        raise InputError(field, value, f"leaves no room for a prompt in {longest} tokens", f"use less than {longest}")
    tokenizer = load_tokenizer(resolve_model(config.model.path))
    train, held_out, _ = load_prompts(config.prompts, tokenizer, room, config.run.seed)
    if len({isinstance(prompt.source, str) for prompt in [*train, *held_out]}) > 1:
        raise InputError("prompts", config.prompts.train.path, "some prompts are text and some are messages",
                         "give all of them in one form")  # fmt: skip
    check_rankings(config, max((len(prompt.token_ids) for prompt in train), default=0))
    return train, held_out


def check_rankings(config: CompareConfig, longest_prompt: int) -> None:
    """A prompt's answers are compared in one micro-batch; what does not fit is not learned from.

    One method would then see less of the task than another, and only a line of its log would say so.
    """
    num_answers, longest = config.compare.samples_per_prompt, config.generator.sampling.max_tokens
    for method in config.methods:
        if method.kind != "offline" or method.is_labelled:
            continue
        own = config.compare.of(method)
        budget = own.get("learner.token_budget", config.learner.token_budget)
        shares = own.get("learner.share_prompts", config.learner.share_prompts)
        shares = config.cluster.device == "cpu" if shares is None else shares
        tokens = num_answers * longest + longest_prompt * (1 if shares else num_answers)
        if tokens > budget:
            reason = f"a prompt with its {num_answers} answers may have {tokens} tokens, which {method.name} compares"
            raise InputError("learner.token_budget", budget, f"{reason} in one micro-batch", f"use {tokens} or more")
