"""Everything ``burnish revise`` can refuse before anything is allocated, and what names its run.

May import: actors.{model_folders, modeling}, trainers.*, launch.*.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.judge_settings import LanguageModelSettings
from actors.model_folders import resolve_model
from launch.constitution_files import load_constitution
from launch.judging import PreparedJudge, longest, prepare_judge
from launch.label_prepare import digest_of, folder_digest
from launch.model_facts import check_model_folder
from launch.prompts import PromptStream, load_prompts
from launch.revise_config import ReviseConfig
from launch.run_identity import RunIdentity
from trainers.constitution import Principle
from trainers.errors import InputError
from trainers.experience import Prompt


@dataclass(frozen=True, slots=True)
class PreparedRevise:
    """Checked inputs of a run of revisions."""

    model_path: str
    max_length: int
    prompts: list[Prompt]
    principles: tuple[Principle, ...]
    writer: PreparedJudge
    judge: PreparedJudge | None
    identity: RunIdentity  # what must be the same for a run to be continued


def prepare_revise(config: ReviseConfig) -> PreparedRevise:
    """Check model, prompts, answers, constitution, writer and judge.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    from actors.modeling import load_tokenizer

    asked, path = config.revise, resolve_model(config.model.path)
    max_length = longest(config.model.max_length, check_model_folder(path), "model.max_length")
    max_tokens = config.sampling.max_tokens if asked.answer_column is None else 0
    if max_tokens >= max_length:
        raise InputError("sampling.max_tokens", max_tokens, f"leaves no room for a prompt in {max_length} tokens",
                         f"use less than {max_length}")  # fmt: skip
    tokenizer = load_tokenizer(path)
    prompts, _, _ = load_prompts(config.prompts, tokenizer, max_length - max_tokens, config.run.seed)
    if len({isinstance(prompt.source, str) for prompt in prompts}) > 1:
        raise InputError("prompts.train", config.prompts.train.path, "some prompts are text and some are messages",
                         "give all of them in one form: a file has one")  # fmt: skip
    for prompt in prompts if asked.answer_column is not None else ():
        given_answer(prompt, str(asked.answer_column))
    principles = load_constitution(asked.constitution, "revise.constitution").principles
    longest_text = max(asked.critique_max_tokens, asked.revision_max_tokens)
    template = asked.revision_template
    writer = prepare_judge(asked.writer, "revise.writer", path, max_length, longest_text, template)
    judge = None
    if asked.judge is not None:
        verdict = asked.judge.max_tokens
        judge = prepare_judge(asked.judge, "revise.judge", path, max_length, verdict, asked.judge.template)
    # Not num_rounds: a later round builds on the earlier ones, so a finished run may be given more of them.
    revising = asked.model_dump(mode="json", exclude={"writer", "judge", "keep", "num_rounds", "constitution"})
    sampling = config.sampling.model_dump(mode="json")
    rules = [principle.model_dump() for principle in principles]
    digests = {
        "run.seed": str(config.run.seed),
        "model.path": folder_digest(path),
        "model.dtype": config.model.dtype,
        "prompts": str(PromptStream(prompts, config.run.seed, config.prompts.shuffle).identity()["digest"]),
        "sampling": digest_of(sampling),
        "revise": digest_of([revising, rules]),
        "revise.writer": _model_identity(asked.writer, writer),
        "revise.judge": "none" if asked.judge is None or judge is None else _model_identity(asked.judge, judge),
    }
    told: dict[str, Any] = {
        "run.seed": config.run.seed, "model.path": config.model.path, "model.dtype": config.model.dtype,
        "prompts": config.prompts.model_dump(mode="json"), "sampling": sampling,
        "revise": {**revising, "constitution": asked.constitution},
        "revise.writer": _model_settings(asked.writer),
        "revise.judge": None if asked.judge is None else _model_settings(asked.judge),
    }  # fmt: skip
    return PreparedRevise(path, max_length, prompts, principles, writer, judge, RunIdentity(digests, told))


def given_answer(prompt: Prompt, column: str) -> str:
    """The answer in a prompt's column: text, or messages that end with the assistant's.  InputError otherwise."""
    value: Any = prompt.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        known = ", ".join(sorted(prompt.columns)) or "none"
        raise InputError(f"revise.answer_column, prompt {prompt.text[:60]!r}", value, f"column {column} holds no text",
                         f"name another (columns are {known}), or leave the row out")  # fmt: skip
    return value


def revise_folder(config: ReviseConfig) -> Path:
    """Where a run leaves everything."""
    return Path(config.run.directory) / config.run.name


def _model_identity(settings: LanguageModelSettings, found: PreparedJudge) -> str:
    """Who answers and how, not where it is served, how fast it is asked, or what it may cost."""
    who = "" if settings.endpoint is not None else folder_digest(found.path)
    decides = _model_settings(settings)
    del decides["path"]  # what is in it counts, not where it is
    return digest_of([who, decides])


def _model_settings(settings: LanguageModelSettings) -> dict[str, Any]:
    """What decides about what it says, and the path of its folder."""
    found = settings.model_dump(mode="json", exclude={"endpoint", "generator", "path"})
    if settings.endpoint is not None:
        found["endpoint"] = {"model": settings.endpoint.model, "parameters": settings.endpoint.parameters}
    return {**found, "path": settings.path}
