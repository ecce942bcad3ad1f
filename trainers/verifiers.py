"""Built-in reward functions: rules that check a completion.

Each one has TRL's keyword protocol and gets completions either as plain text or as messages.  They
run in threads, so a wait inside them is bounded by the caller (``trainers/rewards.py``); C code that
keeps the interpreter's lock, such as a regular expression that backtracks for ever, is not.

``BUILTINS`` maps names to functions, ``CHECKS`` names to checks of their arguments, made when the
configuration is read.
May import: trainers.math_verifier; reasoning_gym, inside functions.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from trainers.math_verifier import same_mathematics

Completion = str | Sequence[Mapping[str, Any]]
Extract = Literal["last_number", "whole", "answer_tag"]

NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?")
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BARE_INTEGER = re.compile(r"[-+]?[0-9]+")


def completion_text(completion: Completion) -> str:
    """The text of a completion in either of TRL's forms."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def extract_answer(text: str, how: Extract) -> str | None:
    """The answer found in ``text``; None where there is none."""
    if how == "whole":
        return text.strip()
    if how == "answer_tag":
        tagged = ANSWER_TAG.findall(text)
        return tagged[-1].strip() if tagged else None
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "").removeprefix("+") if numbers else None


def reasoning_gym(
    completions: Sequence[Completion], entry: Sequence[Any], dataset: str, extract: Extract = "whole"
) -> list[float]:
    """Score of reasoning-gym's own verifier for ``dataset``, usually in [0, 1].

    Column ``entry``: the entry as reasoning-gym made it (question, answer, metadata), or its JSON.
    Most verifiers give part of the score to an answer with words around it; ``extract`` says what
    counts as the answer.
    """
    score = _score_function(dataset)
    entries = [json.loads(e) if isinstance(e, str) else e for e in entry]
    answers = [extract_answer(completion_text(c), extract) for c in completions]
    return [float(score(a, e)) for a, e in zip(answers, entries, strict=True)]


def math_verify(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float | None]:
    """1.0 where the completion's mathematical answer equals column ``answer``, else 0.0.

    None (abstains) where the dataset's own answer is not mathematics that can be read, and where the
    comparison takes longer than ``math_verifier.PAIR_LIMIT_S``.
    """
    return same_mathematics([(completion_text(c), str(a)) for c, a in zip(completions, answer, strict=True)])


def regex(completions: Sequence[Completion], pattern: str) -> list[float]:
    """1.0 where ``pattern`` is found anywhere in the completion (anchor it with ^ and $), else 0.0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(completion_text(c)) is not None) for c in completions]


def bare_number(completions: Sequence[Completion]) -> list[float]:
    """1.0 where the completion, stripped of white space, is one integer and nothing else, else 0.0."""
    return [float(BARE_INTEGER.fullmatch(completion_text(c).strip()) is not None) for c in completions]


def exact(completions: Sequence[Completion], answer: Sequence[Any], extract: Extract = "whole") -> list[float]:
    """1.0 where the completion equals column ``answer``, both stripped of white space, else 0.0.

    ``extract`` says what of the completion counts; 0.0 where there is nothing of the kind.
    """
    found = [extract_answer(completion_text(c), extract) for c in completions]
    return [float(f is not None and f == str(a).strip()) for f, a in zip(found, answer, strict=True)]


def length(completion_ids: Sequence[Sequence[int]], max_tokens: int, buffer_tokens: int) -> list[float]:
    """Soft over-long punishment of DAPO (eq. 13, arXiv:2503.14476), in [-1, 0].

    0 up to ``max_tokens - buffer_tokens``, then down in a straight line to -1 at ``max_tokens``.
    """
    free = max_tokens - buffer_tokens
    return [max(-1.0, min(0.0, (free - len(ids)) / buffer_tokens)) for ids in completion_ids]


@functools.cache
def _score_function(dataset: str) -> Callable[[str | None, Any], float]:
    import reasoning_gym as gym

    score: Callable[[str | None, Any], float] = gym.get_score_answer_fn(dataset)
    return score


def _check_reasoning_gym(dataset: str, extract: str = "whole") -> None:
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        near = difflib.get_close_matches(str(dataset), DATASETS, n=3) or sorted(DATASETS)[:3]
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}; near ones: {', '.join(near)}")
    _check_extract(extract)


def _check_extract(extract: str = "whole") -> None:
    if extract not in get_args(Extract):
        raise ValueError(f"extract is one of {', '.join(get_args(Extract))}, not {extract!r}")


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def _check_length(max_tokens: int, buffer_tokens: int) -> None:
    if not all(type(n) is int for n in (max_tokens, buffer_tokens)) or not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"need whole numbers with 1 <= buffer_tokens <= max_tokens, not {buffer_tokens!r} and {max_tokens!r}"
        )


def _check_no_arguments() -> None:
    """For the functions that have none."""


BUILTINS: dict[str, Callable[..., list[Any]]] = {
    "reasoning_gym": reasoning_gym,
    "math_verify": math_verify,
    "regex": regex,
    "bare_number": bare_number,
    "exact": exact,
    "length": length,
}

CHECKS: dict[str, Callable[..., None]] = {
    "reasoning_gym": _check_reasoning_gym,
    "math_verify": _check_no_arguments,
    "regex": _check_regex,
    "bare_number": _check_no_arguments,
    "exact": _check_extract,
    "length": _check_length,
}
