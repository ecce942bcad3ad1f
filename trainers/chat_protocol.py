"""OpenAI's chat completions, as far as a judge needs them: the request's body, the reply read from a response's.  Pure.

May import: trainers.asking.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from trainers.asking import Question, Reply

PATH = "/chat/completions"
SHOWN = 200  # characters of a body that an error quotes
CHARACTERS_PER_TOKEN = 3  # few, so that an estimate is rather too high


def request_body(model: str, question: Question, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of one request; ``parameters`` are sent as they are, but for those that are None: these are left out."""
    messages = [{"role": "user", "content": question.text}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    own = {"temperature": question.temperature, "max_tokens": question.max_tokens, "seed": question.seed}
    said = {name: value for name, value in {**own, **parameters}.items() if value is not None}
    return {**said, "model": model, "messages": messages}


def estimated_tokens(question: Question) -> int:
    """About how many tokens question and longest reply take, before the endpoint says."""
    num_characters = len(question.text) + len(question.system or "")
    return num_characters // CHARACTERS_PER_TOKEN + 8 + question.max_tokens


def read_reply(body: bytes) -> Reply | str:
    """The reply in the body of a 200; a text where it is none, saying what it is instead.

    Usage that is missing counts as 0 tokens: some servers leave it out.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return f"is not JSON: {shown(body)}"
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return f"has no choices[0].message.content: {shown(body)}"
    if text is None:  # a model that only thought, or called a tool
        text = ""
    if not isinstance(text, str):
        return f"has a content that is no text: {shown(body)}"
    usage = found.get("usage")
    prompt, completion = (_count(usage, f"{side}_tokens") for side in ("prompt", "completion"))
    cut_off = choice.get("finish_reason") == "length"
    return Reply(text, cut_off=cut_off, num_prompt_tokens=prompt, num_completion_tokens=completion)


def shown(body: bytes) -> str:
    """The beginning of a body, on one line; the message alone where it is an error in OpenAI's form."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
