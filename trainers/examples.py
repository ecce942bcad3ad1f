"""Rows of TRL's kinds as token ids with a mask of what is learned.

    prompt + completion   texts: the completion and its EOS are targets; lists of messages: as ``messages``
    messages              the assistant's turns are targets, each with the token that ends it
    text                  everything is a target, the EOS that is appended too

A prompt and a completion of plain text get the tokens that a policy sees and samples (trainers/prompt_format.py).
A conversation is cut where the generator would begin or stop to write; its pieces keep the tokens of the whole text
where these respect the cut, else they get their own.  A BOS is there if the tokenizer (or the chat template) adds it.
Axes: L tokens of one example.
May import: numpy, trainers.{errors, prompt_format, row_kinds}; jinja2 inside a function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainers.errors import InputError, RowKindError
from trainers.prompt_format import Messages, PromptFormat, checked_text, close
from trainers.row_kinds import refuse_other_kind

Reason = Literal["too_long", "no_target"]
KINDS = (("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True, slots=True)
class Example:
    """One text to learn from."""

    input_ids: NDArray[np.int32]  # [L], L >= 2
    mask: NDArray[np.bool_]  # [L]: true for a target; never the first token, which nothing predicts
    source_index: int  # of its row


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that cannot be learned from, and why; to be counted."""

    reason: Reason
    source_index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of text that is learned, or not."""

    text: str
    is_target: bool


def encode_example(
    row: Mapping[str, Any],
    tokenizer: Any,
    max_length: int,
    *,
    form: PromptFormat = PromptFormat(),  # noqa: B008 - frozen
    index: int = 0,
    where: str = "row",
    truncate: bool = False,
) -> Example | LeftOut:
    """One row; longer ones than ``max_length`` tokens are left out, or cut with ``truncate``.

    ``where`` names the row in errors.

    Raises:
        RowKindError: none (or several) of the kinds above, or a judgement on answers.
        InputError: a value that is empty or of another type, messages without a role or text, a chat template that is
            missing or cannot be cut into turns.
    """
    kind = _kind(row, where)
    columns = [checked_text(row[name], name, where) for name in kind]
    if kind == ("text",):
        ids, mask = _of_text(columns[0], tokenizer, where)
    elif kind == ("messages",):
        ids, mask = _of_messages([], columns[0], form, tokenizer, where)
    elif isinstance(columns[0], str) and isinstance(columns[1], str):
        before = form.render(columns[0], tokenizer, where)[1]
        after = close(columns[1], tokenizer)
        ids, mask = np.concatenate([before, after]), np.arange(len(before) + len(after)) >= len(before)
    else:
        ids, mask = _of_messages(columns[0], columns[1], form, tokenizer, where)
    if len(ids) > max_length and not truncate:
        return LeftOut("too_long", index, len(ids))
    mask = mask[:max_length].copy()
    mask[:1] = False
    if not mask.any():
        return LeftOut("no_target", index, len(ids))
    return Example(np.asarray(ids[:max_length], dtype=np.int32), mask, index)


# --- rows -------------------------------------------------------------------------------------


def _kind(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    refuse_other_kind(row, where, "example")
    there = {name for name, value in row.items() if value is not None}
    kinds = [kind for kind in KINDS if there.issuperset(kind)]
    if len(kinds) != 1:
        shown = ", ".join(sorted(there)) or "nothing"
        reason = "can be read in several ways" if kinds else "has none of: prompt and completion, messages, text"
        raise RowKindError(where, shown, reason, "give the columns of exactly one of these; or leave the row out")
    return kinds[0]


def _of_text(text: str | Messages, tokenizer: Any, where: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    if not isinstance(text, str):
        raise InputError(where, text, "text is a list", "give a string, or call the column messages")
    ids = list(tokenizer.encode(text))
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids), np.ones(len(ids), dtype=bool)


def _of_messages(
    context: str | Messages, learned: str | Messages, form: PromptFormat, tokenizer: Any, where: str
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    if isinstance(context, str) or isinstance(learned, str):
        raise InputError(where, learned, "is text where messages are needed",
                         "give prompt and completion both as text or both as messages")  # fmt: skip
    if not any(message["role"] == "assistant" for message in learned):
        raise InputError(where, learned, "no turn is the assistant's: nothing to learn", "leave the row out")
    messages = form.messages([*context, *learned]) or []
    pieces = _turns(messages, len(messages) - len(learned), tokenizer, where)
    parts = _ids(tokenizer, [piece.text for piece in pieces])
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for piece, part in zip(pieces, parts, strict=True):
        if piece.is_target and part[-1] not in ends:
            reason = "the chat template ends an assistant's turn without a token that stops generation"
            raise InputError(where, piece.text, reason, "use a template that closes the turn with EOS or <|im_end|>")
    mask = np.repeat([piece.is_target for piece in pieces], [len(part) for part in parts])
    return np.concatenate(parts), mask


# --- turns ------------------------------------------------------------------------------------


def _turns(messages: Messages, num_context: int, tokenizer: Any, where: str) -> list[_Piece]:
    """The rendered conversation, cut before and after what the assistant writes in its turns.

    Found by rendering prefixes of the conversation: what the template adds for an assistant's turn, beyond the
    prompt for it, is the turn.  White space behind its last token belongs to what follows: the model has stopped.
    """
    pieces: list[_Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < num_context:
            continue
        before = _render(messages[:i], True, tokenizer, where)
        after = _render(messages[: i + 1], False, tokenizer, where)
        if not before.startswith(done) or not after.startswith(before):
            raise _not_prefixes(where, messages)
        end = len(after.rstrip())
        pieces += [_Piece(before[len(done) :], False), _Piece(after[len(before) : end], True)]
        done = after[:end]
    whole = _render(messages, False, tokenizer, where)
    if not whole.startswith(done):
        raise _not_prefixes(where, messages)
    return pieces  # what follows the last target is not learned, and nothing later looks at it


def _render(messages: Messages, is_prompt: bool, tokenizer: Any, where: str) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        reason = "the tokenizer has no chat template"
        raise InputError(where, messages, reason, "use a model with one, or rows of plain text")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, tokenize=False))
    except TemplateError as error:
        reason = f"the chat template refuses it: {error}"
        raise InputError(where, messages, reason, "give messages that the model knows") from error


def _not_prefixes(where: str, messages: Messages) -> InputError:
    reason = "the chat template renders the first turns differently once more turns follow, so turns cannot be found"
    remedy = "use a template that only appends, or rows of prompt and completion with one turn"
    return InputError(where, messages, reason, remedy)


# --- tokens -----------------------------------------------------------------------------------


def _ids(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Token ids of each piece, none of them added by the tokenizer."""
    parts: list[list[int]] = []
    ids: list[int] = []
    text = ""
    for piece in pieces:
        text += piece
        longer = list(tokenizer.encode(text, add_special_tokens=False))
        # Where a token of the whole text reaches over the cut, the piece is tokenised alone.
        cut = longer[len(ids) :] if longer[: len(ids)] == ids else tokenizer.encode(piece, add_special_tokens=False)
        parts.append(list(cut))
        ids = ids + parts[-1]
    return parts
