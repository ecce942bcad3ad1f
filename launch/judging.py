"""A language model as judge of two answers, asked in both orders; what labelling and evaluation share of it.

May import: actors.{model_folders, modeling}, cluster.transport, trainers.*, launch.{label_config, model_facts}.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from actors.model_folders import resolve_model
from cluster.transport import fetch
from launch.label_config import JudgeSettings
from launch.model_facts import ModelFacts, check_model_folder
from trainers.errors import InputError
from trainers.experience import Prompt, decode_group
from trainers.labellers import fill_template
from trainers.prompt_format import PromptFormat
from trainers.protocols import Generator, GroupRequest

PAYLOAD_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class PreparedJudge:
    """Where the judge is, checked."""

    path: str
    max_length: int  # prompt + verdict, tokens


def prepare_judge(settings: JudgeSettings, field: str, policy_path: str, policy_max_length: int) -> PreparedJudge:
    """Check the judge's folder, lengths and template.  Without a path of its own the policy judges.

    Raises:
        InputError: of ``field`` (``label.judge``), in one line.
    """
    from actors.modeling import load_tokenizer

    path, max_length = policy_path, policy_max_length
    if settings.path is not None:
        path = resolve_model(settings.path)
        max_length = longest(settings.max_length, check_model_folder(path, f"{field}.path"), f"{field}.max_length")
    if settings.max_tokens >= max_length:
        raise InputError(f"{field}.max_tokens", settings.max_tokens, f"leaves no room in {max_length} tokens",
                         f"use less than {max_length}")  # fmt: skip
    # A chat template that is missing, or refuses a system message, says so here.
    PromptFormat(system=settings.system, chat=settings.chat).render(settings.template, load_tokenizer(path), field)
    return PreparedJudge(path, max_length)


def longest(setting: int | None, facts: ModelFacts, field: str) -> int:
    """The longest sequence: as set, else what the model was built for.  InputError where that is less."""
    if setting is not None and setting > facts.max_length:
        raise InputError(field, setting, f"the model was built for {facts.max_length} tokens",
                         f"use at most {facts.max_length}")  # fmt: skip
    return setting or facts.max_length


class PairJudge:
    """Asks ``generator`` which of two answers is better.  ``max_length``: of question and verdict, tokens."""

    def __init__(
        self, settings: JudgeSettings, generator: Generator, tokenizer: Any, max_length: int, field: str
    ) -> None:
        self._settings, self._generator, self._tokenizer, self._field = settings, generator, tokenizer, field
        self._room = max_length - settings.max_tokens
        self._form = PromptFormat(system=settings.system, chat=settings.chat)

    async def ask(self, prompt: Prompt, a: str, b: str, name: str) -> tuple[str, str] | None:
        """What it said when it was shown (a, b), and when it was shown (b, a); None: that does not fit.

        ``name`` is of this comparison alone, among all that are asked at the same time.
        """
        shown, questions = conversation_text(prompt), []
        for number, (first, second) in enumerate(((a, b), (b, a))):
            text = fill_template(self._settings.template, prompt=shown, a=first, b=second)
            rendered, ids = self._form.render(text, self._tokenizer, self._field)
            if len(ids) > self._room:
                return None
            questions.append(Prompt(f"judge-{name}-{number}", ids, rendered))
        shown_ab, shown_ba = await asyncio.gather(*(self._answer(question) for question in questions))
        return shown_ab, shown_ba

    async def _answer(self, question: Prompt) -> str:
        answered = await self._generator.generate(
            GroupRequest(question.prompt_id, question, 1, (0,), 1.0, self._settings.max_tokens, greedy=True)
        )
        return decode_group(fetch(answered.payload, PAYLOAD_DEADLINE_S)).trajectories[0].text


def conversation_text(prompt: Prompt) -> str:
    """What a judge is shown of a prompt: its text, or its only message, or all messages with their roles."""
    source = prompt.source
    if isinstance(source, str):
        return source
    if len(source) == 1:
        return str(source[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in source)
