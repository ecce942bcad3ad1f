"""Respondents of our own: a generator that is asked in words, its chat template and its room in tokens.

May import: actors.modeling, cluster.transport, trainers.*.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from cluster.transport import fetch
from trainers.asking import Question, Reply
from trainers.experience import GroupSummary, Prompt, decode_group
from trainers.prompt_format import PromptFormat
from trainers.protocols import GeneratedGroup, Generator, GroupRequest

PAYLOAD_DEADLINE_S = 120.0


class EngineRespondent:
    """Asks ``generator``.

    Args:
        max_length: question and reply, tokens.
        name: unique among all that ask this generator at the same time.
    """

    def __init__(self, generator: Generator, tokenizer: Any, max_length: int, chat: bool, name: str) -> None:
        self._generator, self._tokenizer, self._max_length = generator, tokenizer, max_length
        self._chat, self._name = chat, name
        self._numbers = itertools.count()

    async def ask(self, question: Question) -> Reply:
        """The reply; ``too_long`` where question and longest reply do not fit the model."""
        form = PromptFormat(system=question.system, chat=self._chat)
        rendered, ids = form.render(question.text, self._tokenizer, self._name)
        if len(ids) + question.max_tokens > self._max_length:
            return Reply("", "too_long", f"{len(ids)} + {question.max_tokens} tokens in {self._max_length}")
        number, greedy = f"{self._name}-{next(self._numbers)}", question.temperature == 0
        answered = await self._generator.generate(
            GroupRequest(
                number, Prompt(number, ids, rendered), 1, (question.seed,), question.temperature or 1.0,
                question.max_tokens, greedy=greedy,
            )
        )  # fmt: skip
        # Ray's get may block: not in the loop that others wait on.
        buffer = await asyncio.to_thread(fetch, answered.payload, PAYLOAD_DEADLINE_S)
        said = decode_group(buffer).trajectories[0]
        if said.finish_reason == "abort":  # torn, and nobody can tell by the text
            return Reply("", "unavailable", "the engine gave it up")
        return Reply(said.text, None, "", said.finish_reason == "length", len(ids), said.num_tokens)

    async def close(self) -> None:
        """Nothing of its own to close."""


class OwnEngine:
    """A generator of this very process (actors/generator.py), as the protocol of generators has it."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        found: tuple[GroupSummary, Any] = await self._generator.generate(request)
        return GeneratedGroup(*found)
