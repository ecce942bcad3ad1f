"""How a prompt and an answer become the tokens of a policy: template, system message, chat template, EOS.

An answer ends as the policy's own samples do: with EOS.  It is tokenised apart from its prompt, as it was sampled
apart from it.  May import: numpy, pydantic, jinja2 (inside a function), trainers.{errors, settings}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from trainers.errors import InputError
from trainers.settings import Settings

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]


class PromptFormat(Settings):
    """How prompts are shown to a model; the same three keys as in a policy's ``prompts`` section."""

    system: str | None = Field(None, description="system message put before each prompt")
    template: str = Field("{prompt}", description="wraps a plain-text prompt; {prompt} is replaced")
    chat: bool = Field(True, description="apply the tokenizer's chat template to plain-text prompts")

    def messages(self, prompt: str | Messages) -> Messages | None:
        """The conversation that ``prompt`` opens; None where it is plain text."""
        if isinstance(prompt, str):
            if not self.chat:
                return None
            opened: Messages = [{"role": "user", "content": self.template.replace("{prompt}", prompt)}]
        else:
            opened = list(prompt)
        if self.system is not None and opened[0]["role"] not in ("system", "developer"):
            opened.insert(0, {"role": "system", "content": self.system})
        return opened

    def render(self, prompt: str | Messages, tokenizer: Any, where: str) -> tuple[str, np.ndarray]:
        """(text, int32 [P] token ids) up to the place where the answer begins.

        Raises:
            InputError: the tokenizer has no chat template, or it refuses the messages.
        """
        messages = self.messages(prompt)
        if messages is None:
            if self.system is not None:
                raise InputError(f"{where}: system", self.system, "plain text has no system message",
                                 "put it into template, or set chat=true")  # fmt: skip
            text = self.template.replace("{prompt}", str(prompt))
            return text, np.array(tokenizer.encode(text), dtype=np.int32)
        text = _chat(tokenizer, messages, True, where)
        # Not encode(text): a chat template writes its own BOS, and the tokenizer would add a second one.
        return text, np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def answer(self, prompt: str | Messages, answer: str | Messages, tokenizer: Any, where: str) -> np.ndarray:
        """int32 [T] token ids of ``answer`` to ``prompt``, EOS included; a text, or the messages that follow.

        Raises:
            InputError: the chat template shows the prompt differently once it is answered.
        """
        if isinstance(answer, str):
            return close(answer, tokenizer)
        if len(answer) == 1:
            return close(str(answer[0]["content"]), tokenizer)
        opened = self.messages(prompt)
        if opened is None:
            raise InputError(where, answer, "several messages cannot follow plain text", "set chat=true")
        whole = _chat(tokenizer, [*opened, *answer], False, where)
        start = _chat(tokenizer, opened, True, where)
        if not whole.startswith(start):
            reason = "the chat template shows the prompt differently once it is answered"
            raise InputError(where, answer, reason, "give the last turn alone as the answer")
        return close(whole[len(start) :].rstrip().removesuffix(tokenizer.eos_token), tokenizer)


def close(text: str, tokenizer: Any, finished: bool = True) -> np.ndarray:
    """int32 [T]: the tokens of an answer; EOS follows where the answer was ``finished``."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.array([*ids, tokenizer.eos_token_id] if finished else ids, dtype=np.int32)


def checked_text(value: Any, column: str, where: str) -> str | Messages:
    """``value`` as non-empty text or messages; null entries of messages (Arrow fills them in) are left out.

    Raises:
        InputError: empty, of another type, or a message without role or text.
    """
    remedy = "give a non-empty string, or a list of messages with role and content; or leave the row out"
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str) or value is None or value == []:
        raise InputError(where, value, f"{column} is empty", remedy)
    if not isinstance(value, Sequence):
        raise InputError(where, value, f"{column} is of type {type(value).__name__}", remedy)
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            reason = f"message {i} of {column} has no role out of {', '.join(ROLES)}"
            raise InputError(where, message, reason, remedy)
        if not isinstance(message.get("content"), str):
            raise InputError(where, message, f"message {i} of {column} has no text as content", remedy)
    if not value[-1]["content"].strip():
        raise InputError(where, value[-1], f"the last message of {column} is empty", remedy)
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _chat(tokenizer: Any, messages: Messages, generate: bool, where: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: chat", True, "needs a chat template, and the tokenizer has none",
                         "use a model that has one, or give plain text and set chat=false")  # fmt: skip
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False))
    except TemplateError as error:
        raise InputError(
            where, messages, f"the chat template refuses it: {error}", "give messages that the model knows"
        ) from error
