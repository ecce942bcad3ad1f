"""Language models that are asked something: checked before the start, and made into respondents and judges.

May import: actors.{endpoint, judge_settings, model_folders, modeling, respondents}, trainers.*,
launch.{contents, label_config, model_facts}.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from actors.endpoint import EndpointRespondent, read_key
from actors.judge_settings import EndpointSettings, JudgeRewardSettings, LanguageModelSettings
from actors.model_folders import resolve_model
from actors.respondents import EngineRespondent
from launch.contents import model_digest
from launch.label_config import JudgeSettings
from launch.model_facts import ModelFacts, check_model_folder
from trainers.asking import Respondent
from trainers.errors import EndpointError, InputError
from trainers.judge import PairJudge
from trainers.prompt_format import PromptFormat
from trainers.protocols import Generator
from trainers.reply_cache import ReplyCache

REPLIES = "replies"  # folder of what was replied, in the run's
ENDPOINT = "endpoint"  # what stands for a model's folder where others serve it


@dataclass(frozen=True, slots=True)
class PreparedJudge:
    """Where a language model is, checked."""

    path: str  # ENDPOINT where it is served by others
    max_length: int  # question + reply, tokens; 0 behind an endpoint, which knows itself


def prepare_judge(
    settings: LanguageModelSettings, field: str, policy_path: str, policy_max_length: int, max_tokens: int,
    template: str = "",
) -> PreparedJudge:  # fmt: skip
    """Check the model's folder, lengths and template, or ask its endpoint once.  Without either the policy is it.

    Raises:
        InputError: of ``field`` (``label.judge``), in one line.
    """
    from actors.modeling import load_tokenizer

    if settings.endpoint is not None:
        probe_endpoint(settings.endpoint, f"{field}.endpoint")
        return PreparedJudge(ENDPOINT, 0)
    path, max_length = policy_path, policy_max_length
    if settings.path is not None:
        path = resolve_model(settings.path)
        max_length = longest(settings.max_length, check_model_folder(path, f"{field}.path"), f"{field}.max_length")
    if max_tokens >= max_length:
        raise InputError(f"{field}.max_tokens", max_tokens, f"leaves no room in {max_length} tokens",
                         f"use less than {max_length}")  # fmt: skip
    # A chat template that is missing, or refuses a system message, says so here.
    PromptFormat(system=settings.system, chat=settings.chat).render(template, load_tokenizer(path), field)
    return PreparedJudge(path, max_length)


def probe_endpoint(settings: EndpointSettings, field: str) -> None:
    """Ask it once.  Not to be called from a running event loop.

    Raises:
        InputError: the key is not there, or the endpoint is down, slow, busy, or answers nonsense.
    """
    read_key(settings.api_key_env, f"{field}.api_key_env")

    async def probe() -> None:
        # The cache is not touched: a start that is refused leaves nothing behind.
        await EndpointRespondent(settings, Path(REPLIES), field).probe()

    try:
        asyncio.run(probe())
    except EndpointError as error:
        raise InputError(f"{field}.base_url", error.url, f"({error.status}) {error.reason}", error.remedy) from error


def longest(setting: int | None, facts: ModelFacts, field: str) -> int:
    """The longest sequence: as set, else what the model was built for.  InputError where that is less."""
    if setting is not None and setting > facts.max_length:
        raise InputError(field, setting, f"the model was built for {facts.max_length} tokens",
                         f"use at most {facts.max_length}")  # fmt: skip
    return setting or facts.max_length


def reply_folder(settings: EndpointSettings, run_folder: Path) -> Path:
    """Where an endpoint's replies are kept: absolute, because workers have other working directories."""
    return (run_folder / REPLIES if settings.cache is None else Path(settings.cache).expanduser()).absolute()


def make_respondent(
    settings: LanguageModelSettings, prepared: PreparedJudge, field: str, run_folder: Path, generator: Generator | None
) -> Respondent:
    """Who answers: the endpoint, or ``generator``'s engines."""
    if settings.endpoint is not None:
        cache = reply_folder(settings.endpoint, run_folder)
        return EndpointRespondent(settings.endpoint, cache, f"{field}.endpoint", run_folder / REPLIES)
    from actors.modeling import load_tokenizer

    assert generator is not None
    return EngineRespondent(
        generator, load_tokenizer(prepared.path), prepared.max_length, settings.chat, field,
        ReplyCache(run_folder / REPLIES), model_digest(Path(prepared.path)),
    )  # fmt: skip


def pair_judge(settings: JudgeSettings, respondent: Respondent, template: str | None = None) -> PairJudge:
    """A judge of two answers; ``template`` in the place of that of ``settings``."""
    return PairJudge(respondent, template or settings.template, settings.max_tokens, settings.system)


def prepare_judges(judges: tuple[JudgeRewardSettings, ...], policy_path: str) -> None:
    """Check every judge that is a reward.  InputError as of :func:`prepare_judge`."""
    for index, judge in enumerate(judges):
        template = judge.template if judge.pairwise else judge.rubric.template
        prepare_judge(judge, f"judges.{index}", policy_path, 0, judge.max_tokens, template)
