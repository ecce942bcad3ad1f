"""Respondents of our own: a generator that is asked in words, its chat template and its room in tokens.

May import: actors.modeling, cluster.transport, trainers.*.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from cluster.transport import fetch
from trainers.asking import Question, Reply
from trainers.chat_protocol import request_body
from trainers.experience import GroupSummary, Prompt, decode_group
from trainers.prompt_format import PromptFormat
from trainers.protocols import GeneratedGroup, Generator, GroupRequest
from trainers.reply_cache import ReplyCache, question_key

PAYLOAD_DEADLINE_S = 120.0


class EngineRespondent:
    """Asks ``generator``.

    Args:
        max_length: question and reply, tokens.
        name: unique among all that ask this generator at the same time.
        cache: of replies; what is there is not asked again.  None: everything is asked.
        model: tells this model's replies from others' in the cache.
    """

    def __init__(
        self, generator: Generator, tokenizer: Any, max_length: int, chat: bool, name: str,
        cache: ReplyCache | None = None, model: str = "",
    ) -> None:  # fmt: skip
        self._generator, self._tokenizer, self._max_length = generator, tokenizer, max_length
        self._chat, self._name, self._cache, self._model = chat, name, cache, model
        self._numbers = itertools.count()

    async def ask(self, question: Question) -> Reply:
        """The reply; ``too_long`` where question and longest reply do not fit the model."""
        form = PromptFormat(system=question.system, chat=self._chat)
        rendered, ids = form.render(question.text, self._tokenizer, self._name)
        if len(ids) + question.max_tokens > self._max_length:
            return Reply("", "too_long", f"{len(ids)} + {question.max_tokens} tokens in {self._max_length}")
        key = question_key({**request_body(self._model, question, {}), "chat": self._chat})
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            return known
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
        reply = Reply(said.text, None, "", said.finish_reason == "length", len(ids), said.num_tokens)
        if self._cache is not None:
            self._cache.put(key, reply)
        return reply

    async def close(self) -> None:
        """Nothing of its own to close."""


class OwnEngine:
    """A generator of this very process (actors/generator.py), as the protocol of generators has it."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        found: tuple[GroupSummary, Any] = await self._generator.generate(request)
        return GeneratedGroup(*found)
