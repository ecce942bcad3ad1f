"""What requests to ``burnish serve`` may ask, and what they are told: OpenAI's chat completions, without I/O.

A parameter that we cannot honour is refused by name, never ignored: an answer that was sampled otherwise than it was
asked for is a wrong answer.  May import: trainers.{errors, kl_from_base, prompt_format}, launch.select_config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.select_config import DrawSettings
from trainers.errors import InputError
from trainers.kl_from_base import best_of_n_kl
from trainers.prompt_format import Messages, checked_text

# What decides nothing about the answer, and the value at which another parameter decides nothing either.
SILENT = {"user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key",
          "parallel_tool_calls"}  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "stream": (False,), "top_p": (1, 1.0), "top_k": (-1,), "min_p": (0, 0.0), "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0), "repetition_penalty": (1, 1.0), "logprobs": (False,), "stop": ([], ""),
    "tools": ([],), "tool_choice": ("none",), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}  # fmt: skip
SAID = {"role", "content", "name"}  # of a message
OWN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "best_of")


class ApiError(Exception):
    """A request that is not answered: HTTP status, kind, message, and the parameter that is to blame."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        self.status, self.kind, self.message, self.param = status, kind, message, param
        super().__init__(message)

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that can be answered."""

    messages: Messages
    sampling: DrawSettings
    seed: int | None  # equal requests with equal seeds have equal answers; None: a new one every time


def read_request(body: Any, model: str, sampling: DrawSettings, fewest: int) -> Ask:
    """The request in a JSON ``body``.

    Args:
        model: the one that is served.
        sampling: of the recipe: what is taken where the request says nothing, and the most that it may ask for.
        fewest: candidates that the scorer needs.

    Raises:
        ApiError: 400, and 404 for another model.
    """
    if not isinstance(body, dict):
        raise _refusal(None, "the body is no JSON object", "send model and messages")
    for name, value in body.items():
        if name in OWN or name in SILENT or value is None or value in NEUTRAL.get(name, ()):
            continue
        remedy = f"leave it out, or send {NEUTRAL[name][0]!r}" if name in NEUTRAL else "leave it out"
        raise _refusal(name, f"{name} = {_short(value)} is not supported", remedy)
    if body.get("model") != model:
        message = f"model = {_short(body.get('model'))}: there is no such model here; ask for {model!r}"
        raise ApiError(404, "invalid_request_error", message, "model")
    try:
        messages = checked_text(_plain(body.get("messages")), "messages", "messages")
    except InputError as error:
        raise _refusal("messages", error.reason, error.remedy) from error
    if isinstance(messages, str):
        raise _refusal("messages", "is a text", "send a list of messages with role and content")
    if other := sorted({str(key) for message in messages for key in message} - SAID):
        raise _refusal("messages", f"a message has {_short(other[0])}", "send role, content and name alone")
    if any("\ud800" <= letter <= "\udfff" for message in messages for part in message.values() for letter in str(part)):
        raise _refusal("messages", "a text has half a surrogate pair", "send text that UTF-8 has")
    both = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    changed: dict[str, Any] = {}
    if both:
        changed["max_tokens"] = _whole(body, both[0], 1, sampling.max_tokens)
    if body.get("best_of") is not None:
        changed["num_candidates"] = _whole(body, "best_of", fewest, sampling.num_candidates)
    if body.get("temperature") is not None:
        changed["temperatures"] = (_number(body, "temperature", 0.0, 2.0),)
    seed = None if body.get("seed") is None else _whole(body, "seed", -(2**63), 2**63 - 1)
    return Ask(messages, sampling.model_copy(update=changed), seed)


def answer_json(
    row: Mapping[str, Any], number: str, model: str, created: int, num_prompt_tokens: int, num_sampled_tokens: int
) -> dict[str, Any]:
    """A chat completion with one choice.

    ``usage`` counts the tokens of all candidates, as OpenAI counts those of ``best_of``.  ``best_of_n`` is ours: the
    candidate that was chosen, everybody's score, and how far the best of so many is from the model, at most, in nats.

    Args:
        row: as :func:`launch.select_records.answer_rows` makes it, with an answer.
        created: seconds since 1970.
    """
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {"index": 0, "message": row["completion"][0], "finish_reason": row["finish_reason"], "logprobs": None}
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_sampled_tokens,
            "total_tokens": num_prompt_tokens + num_sampled_tokens,
        },
        "best_of_n": {
            "candidate": row["candidate"],
            "score": row["score"],
            "scores": list(row["scores"]),
            "kl_bound": best_of_n_kl(len(row["scores"])),
        },
    }


def no_answer(dropped: Mapping[str, int]) -> ApiError:
    """No candidate may be kept; ``dropped``: how many of them, by reason."""
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    why = {"truncated": "; raise max_tokens, or serve with select.drop_truncated=false",
           "below_threshold": "; serve with a lower select.threshold"}  # fmt: skip
    remedy = next((why[reason] for reason in dropped if reason in why), "")
    return ApiError(422, "no_candidate", f"none of the candidates may be kept: {told}{remedy}")


def _refusal(param: str | None, reason: str, remedy: str) -> ApiError:
    return ApiError(400, "invalid_request_error", f"{reason}; {remedy}", param)


def _plain(messages: Any) -> Any:
    """Messages whose text comes in parts, with the parts put together."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    found = []
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list):
            other = [p for p in parts if not (isinstance(p, dict) and p.get("type") == "text")]
            if other or not all(isinstance(p.get("text"), str) for p in parts):
                raise _refusal("messages", "a part of a message is no text", "send text alone")
            message = {**message, "content": "".join(p["text"] for p in parts)}
        found.append(message)
    return found


def _whole(body: Mapping[str, Any], name: str, lowest: int, highest: int) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise _refusal(name, f"{name} = {_short(value)} is out of range", f"send a whole number, {lowest} to {highest}")
    return value


def _number(body: Mapping[str, Any], name: str, lowest: float, highest: float) -> float:
    value = body[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # NaN is not
        raise _refusal(name, f"{name} = {_short(value)} is out of range", f"send a number, {lowest:g} to {highest:g}")
    return float(value)


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python prints no number of so many digits
        shown = "a number of thousands of digits"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
