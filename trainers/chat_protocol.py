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
BYTES_PER_TOKEN = 3  # few, so that an estimate is rather too high; a Chinese character has three
LIMITS = ("max_tokens", "max_completion_tokens")  # of a reply, by the names that servers take
HIDDEN = "<key>"


def request_body(model: str, question: Question, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of one request; ``parameters`` are sent as they are, but for those that are None: these are left out."""
    messages = [{"role": "user", "content": question.text}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    own = {"temperature": question.temperature, "max_tokens": question.max_tokens, "seed": question.seed}
    said = {name: value for name, value in {**own, **parameters}.items() if value is not None}
    return {**said, "model": model, "messages": messages}


def estimated_tokens(body: Mapping[str, Any], longest: int) -> int:
    """About how many tokens a request and its longest reply take, before the endpoint says.

    Args:
        longest: reply, tokens, where the request has no limit.
    """
    num_bytes = sum(len(message["content"].encode("utf-8", "replace")) for message in body["messages"])
    limits = [body[name] for name in LIMITS if isinstance(body.get(name), int)]
    return num_bytes // BYTES_PER_TOKEN + 8 + (min(limits) if limits else longest)


def read_reply(body: bytes, secret: str = "") -> Reply | str:
    """The reply in the body of a 200; a text where it is none, saying what it is instead, without ``secret``.

    Usage that is missing counts as 0 tokens: some servers leave it out.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return f"is not JSON: {shown(body, secret)}"
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return f"has no choices[0].message.content: {shown(body, secret)}"
    if choice.get("finish_reason") == "error" or choice.get("error"):  # some gateways fail inside a 200
        return f"has a choice that failed: {shown(body, secret)}"
    if text is None:  # a model that only thought, or called a tool
        text = ""
    if not isinstance(text, str):
        return f"has a content that is no text: {shown(body, secret)}"
    usage = found.get("usage")
    prompt, completion = (_count(usage, f"{side}_tokens") for side in ("prompt", "completion"))
    cut_off = choice.get("finish_reason") == "length"
    whole = text.encode("utf-8", "replace").decode()  # half an emoji, cut at the limit, is no text that can be written
    return Reply(whole, cut_off=cut_off, num_prompt_tokens=prompt, num_completion_tokens=completion)


def shown(body: bytes, secret: str = "") -> str:
    """The beginning of a body, on one line; the message alone where it is an error in OpenAI's form.

    ``secret`` is taken out before anything is cut off: half of it would not be found.
    """
    text = hidden(body.decode(errors="replace"), secret)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = hidden(str(json.loads(text)["error"]["message"]), secret)
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def hidden(text: str, secret: str) -> str:
    """``text`` without ``secret``, as it is and as JSON would write it."""
    if not secret:
        return text
    for form in {secret, json.dumps(secret)[1:-1], json.dumps(secret)[1:-1].replace("/", r"\/")}:
        text = text.replace(form, HIDDEN)
    return text


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
