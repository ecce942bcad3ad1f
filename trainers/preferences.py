"""Preference rows, as TRL has them, to comparisons in tokens.

    prompt, chosen, rejected               texts, or lists of messages
    chosen, rejected                       with the prompt as their common beginning
    prompt, completions, ranks | scores    K answers; rank 1 is the best, the highest score is

A further column, named by ``margin_column``, says by how much: one number of a pair, or one of each answer of a
ranking (their differences are the margins).
Axes: P prompt tokens, T tokens of one answer, K answers, N (better, worse) pairs.
May import: numpy, trainers.{bradley_terry, comparisons, errors, prompt_format, row_kinds}.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.bradley_terry import ranking_pairs
from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.prompt_format import Messages, PromptFormat, checked_text
from trainers.row_kinds import COLUMNS, refuse_other_kind

Row = Mapping[str, Any]
Text = str | Messages


@dataclass(frozen=True, slots=True)
class _Judged:
    """A checked row, still in words."""

    prompt: Text
    answers: list[Text]
    pairs: list[tuple[int, int]]
    margins: list[float] | None


def read_comparison(
    row: Row,
    where: str,
    tokenizer: Any,
    form: PromptFormat,
    margin_column: str | None = None,
) -> Comparison:
    """The comparison that ``row`` holds.

    Args:
        where: file and line, for errors.

    Raises:
        RowKindError: a row without comparisons, for KTO or SFT.
        InputError: missing columns, wrong types, empty text, equal answers, fewer than two of them, no answer
            better than another, or a margin below 0.
    """
    judged = _judge(row, where, margin_column)
    text, prompt_ids = form.render(judged.prompt, tokenizer, where)
    if prompt_ids.size == 0:
        raise InputError(where, text, "the prompt has no token", "leave the row out")
    closed = [form.answer(judged.prompt, a, tokenizer, where) for a in judged.answers]
    whole = _finished(row, len(closed))
    completions = tuple(c if w else without_eos(c, tokenizer) for c, w in zip(closed, whole, strict=True))
    for i, answer in enumerate(completions):
        for other in range(i):
            if np.array_equal(answer, completions[other]):
                reason = f"answers {other} and {i} are identical"
                raise InputError(where, judged.answers[i], reason, "leave the row out, or give different answers")
    return Comparison(
        prompt_id=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        prompt_ids=prompt_ids,
        completion_ids=completions,
        pairs=tuple(judged.pairs),
        margins=None if judged.margins is None else tuple(judged.margins),
    )


def read_texts(row: Row, where: str) -> tuple[Text, list[tuple[Text, Text]]]:
    """(prompt, (better, worse) of every pair) of a row, still in words: what a judge is shown.

    Raises:
        InputError: as of :func:`read_comparison`, but for what tokens alone can tell.
    """
    judged = _judge(row, where, None)
    return judged.prompt, [(judged.answers[better], judged.answers[worse]) for better, worse in judged.pairs]


def read_sample(row: Row, where: str, tokenizer: Any, form: PromptFormat) -> Comparison:
    """A row of ``prompt`` and ``completion``: one answer, no pairs.

    Raises:
        InputError: missing columns, wrong types, or empty text.
    """
    prompt = _checked_prompt(_column(row, "prompt", where), where)
    answer = _follows(checked_text(_column(row, "completion", where), "completion", where), where)
    text, prompt_ids = form.render(prompt, tokenizer, where)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Comparison(digest, prompt_ids, (form.answer(prompt, answer, tokenizer, where),))


def _finished(row: Row, num_answers: int) -> list[bool]:
    """Which answers were ended by the model: where ``burnish label`` says "length", the EOS was never sampled."""
    if row.get("completions") is not None:
        reasons = row.get("completion_finish_reasons") or row.get("finish_reasons") or [None] * num_answers
    else:
        reasons = [row.get("chosen_finish_reason"), row.get("rejected_finish_reason")]
    return [reason != "length" for reason in reasons]


def without_eos(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """An answer that was cut off, without the EOS that it was closed with."""
    return ids[:-1] if ids.size > 1 and ids[-1] == tokenizer.eos_token_id else ids


# --- what a row says ----------------------------------------------------------------------------


def _judge(row: Row, where: str, margin_column: str | None) -> _Judged:
    refuse_other_kind(row, where, "pairs")
    if row.get("completions") is not None:
        return _ranking(row, where, margin_column)
    chosen, rejected = (checked_text(_column(row, name, where), name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        reason = "of chosen and rejected one is text and one is messages"
        raise InputError(where, type(chosen).__name__, reason, "give both as text or both as messages")
    margins = None
    if margin_column is not None:
        margins = [_number(_column(row, margin_column, where), margin_column, where)]
        _refuse_negative(margins, margin_column, where)
    if chosen == rejected:
        raise InputError(where, chosen, "chosen and rejected are identical", "leave the row out")
    prompt = None if row.get("prompt") is None else _checked_prompt(row["prompt"], where)
    if not isinstance(chosen, str) and not isinstance(prompt, list):
        # A text as prompt beside whole conversations (as in UltraFeedback) is what they begin with.
        shared = _shared_messages(chosen, rejected)  # type: ignore[arg-type]
        if shared or prompt is None:
            return _Judged(_opening(shared, where), [chosen[len(shared) :], rejected[len(shared) :]], [(0, 1)], margins)
    if prompt is None:
        shared_text = _shared_text(chosen, rejected)  # type: ignore[arg-type]
        if not shared_text.strip():
            raise InputError(where, chosen, "there is no prompt, and the answers share no beginning", _needs("prompt"))
        cut = len(shared_text)
        answers = [checked_text(t[cut:], "what follows the common beginning", where) for t in (chosen, rejected)]
        return _Judged(shared_text, answers, [(0, 1)], margins)
    return _Judged(prompt, [_follows(chosen, where), _follows(rejected, where)], [(0, 1)], margins)


def _ranking(row: Row, where: str, margin_column: str | None) -> _Judged:
    prompt = _checked_prompt(_column(row, "prompt", where), where)
    answers = row["completions"]
    if not isinstance(answers, (list, tuple)):
        raise InputError(where, answers, "completions is no list", "give a list of answers")
    if len(answers) < 2:
        raise InputError(where, answers, f"a ranking of {len(answers)} answers compares nothing", "give two or more")
    checked = [_follows(checked_text(a, f"completions[{i}]", where), where) for i, a in enumerate(answers)]
    named = [name for name in ("ranks", "scores") if row.get(name) is not None]
    if len(named) == 2:
        raise InputError(where, named, "has ranks and scores", "keep one of them")
    name = named[0] if named else "ranks"
    values = _numbers(_column(row, name, where), len(answers), name, where)
    pairs = ranking_pairs(values if name == "ranks" else [-v for v in values])
    if not pairs:
        raise InputError(where, values, "all answers are tied: nothing is preferred", "leave the row out")
    margins = None
    if margin_column is not None:
        by_answer = _numbers(_column(row, margin_column, where), len(answers), margin_column, where)
        margins = [by_answer[better] - by_answer[worse] for better, worse in pairs]
        _refuse_negative(margins, margin_column, where)
    return _Judged(prompt, checked, pairs, margins)


def _checked_prompt(value: Any, where: str) -> Text:
    prompt = checked_text(value, "prompt", where)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise InputError(where, prompt[-1], "prompt ends with the assistant's message", "end with the user's")
    return prompt


def _opening(shared: Messages, where: str) -> Messages:
    if not shared:
        raise InputError(where, [], "there is no prompt, and the conversations share no beginning", _needs("prompt"))
    return shared


def _follows(answer: Text, where: str) -> Text:
    if not isinstance(answer, str) and answer[0]["role"] != "assistant":
        raise InputError(where, answer[0], "an answer begins with another role than assistant",
                         "give what the assistant says, without the prompt")  # fmt: skip
    return answer


def _shared_messages(chosen: Messages, rejected: Messages) -> Messages:
    """The messages both begin with, up to the assistant's turn in which they part."""
    last = min(len(chosen), len(rejected)) - 1  # each keeps an answer
    size = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while size and not (chosen[size]["role"] == rejected[size]["role"] == "assistant"):
        size -= 1
    return chosen[:size]


def _shared_text(chosen: str, rejected: str) -> str:
    """What both begin with, cut before the white space that precedes their first difference."""
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if size is None else size]
    words = shared.rstrip()
    if len(words) == len(shared):  # they part inside a word
        words = words[: max((i for i, c in enumerate(words) if c.isspace()), default=0)]
    return words.rstrip()


# --- columns ------------------------------------------------------------------------------------


def _column(row: Row, name: str, where: str) -> Any:
    if row.get(name) is not None:
        return row[name]
    if name in row:
        raise InputError(where, None, f"{name} is empty", "give it a value, or leave the row out")
    raise InputError(where, sorted(row), f"has no column {name}{_nearest(name, row)}", _needs(name))


def _nearest(name: str, row: Row) -> str:
    near = difflib.get_close_matches(name, sorted(row), n=1, cutoff=0.4)
    return f", the nearest is {near[0]}" if near else ""


def _needs(name: str) -> str:
    return f"give {name}, or rename a column (needed: {COLUMNS['pairs']})"


def _numbers(values: Any, count: int, name: str, where: str) -> list[float]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise InputError(where, values, f"{name} is not one number for each of the {count} answers", "give as many")
    return [_number(v, f"{name}[{i}]", where) for i, v in enumerate(values)]


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(where, value, f"{name} is no finite number", "give a number, or leave the row out")
    return float(value)


def _refuse_negative(margins: Sequence[float], name: str, where: str) -> None:
    if min(margins) < 0:
        raise InputError(where, min(margins), f"{name} says that the worse answer is better", "use 0 or more")
