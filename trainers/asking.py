"""Asking a language model: what is asked, what comes back, and why nothing came back.

Whoever answers (engines of our own, an endpoint, a stand-in) is a :class:`Respondent`; judges, critics and revisers
know no more of it.  May import: nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, Protocol

# too_long: does not fit the model; refused: the endpoint does not take this question; timeout, unavailable, nonsense:
# it answers others and did not answer this one, after every retry.
Silence = Literal["too_long", "refused", "timeout", "unavailable", "nonsense"]


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of a user, with what is said to the model before it."""

    text: str
    max_tokens: int
    system: str | None = None
    temperature: float = 0.0  # 0: greedy
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said, or why it said nothing."""

    text: str
    silence: Silence | None = None
    detail: str = ""  # of a silence, for people
    cut_off: bool = False  # it ran into max_tokens
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


class Respondent(Protocol):
    """Answers questions, many at a time."""

    async def ask(self, question: Question) -> Reply:
        """A silence is of this question; what concerns every question is raised (EndpointError, WorkerError)."""
        ...

    async def close(self) -> None: ...


@dataclass
class Usage:
    """What was asked of one respondent; JSON values."""

    num_asked: int = 0  # questions, those that the cache answered included
    num_cached: int = 0
    num_requests: int = 0  # calls, retries included
    num_retries: int = 0
    num_prompt_tokens: int = 0  # of new replies, as the endpoint counts them
    num_completion_tokens: int = 0
    silences: Counter[str] = field(default_factory=Counter)


def fill_template(template: str, **values: str) -> str:
    """``template`` with each ``{name}`` replaced at once: a value that contains ``{b}`` is not filled in again."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], template)


def check_places(template: str, needed: tuple[str, ...], refused: tuple[str, ...] = ()) -> None:
    """ValueError where one of ``needed`` does not stand in ``template`` exactly once, or one of ``refused`` does."""
    for name in needed:
        if template.count(name) != 1:
            raise ValueError(f"template: {name} must stand in it exactly once; give {', '.join(needed)} a place each")
    for name in refused:
        if name in template:
            raise ValueError(f"template: nothing is put in the place of {name} here; take it out")
