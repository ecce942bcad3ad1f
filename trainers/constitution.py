"""Constitutional AI: an answer is criticised by a principle and revised, and principles judge pairs.

After Bai et al. 2022 (arXiv:2212.08073): critique and revision, drawn anew each round (section 3.1), make an SFT set;
a drawn principle conditions a preference (section 4.1).  Whom it asks this file does not know (trainers/asking.py).
May import: pydantic, numpy, trainers.{asking, settings}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from trainers.asking import Question, Respondent, Silence, check_places, fill_template
from trainers.settings import Settings

Unrevised = Silence | Literal["empty", "cut_off", "aborted"]
Step = Literal["answer", "critique", "revision"]
CRITIQUE_TEMPLATE = """Criticise an answer to a prompt.

[Prompt]
{prompt}

[Answer]
{answer}

{request} Quote what is wrong, or say that nothing is. Reply with the critique alone."""
REVISION_TEMPLATE = """Rewrite an answer to a prompt.

[Prompt]
{prompt}

[Answer]
{answer}

[Critique]
{critique}

{request} Keep what the critique does not touch. Reply with the new answer alone."""


class Principle(Settings):
    """One principle, as a critic, a writer and a judge are told it."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = Field(description="in records")
    critique: str = Field(min_length=1, description="what the critic is asked")
    revision: str = Field(min_length=1, description="what the writer is asked")
    judge: str = Field(min_length=1, description="by what a judge prefers one of two answers")


class Constitution(Settings):
    """The principles of a file."""

    principles: tuple[Principle, ...] = Field(min_length=1, description="any number; names differ")

    @model_validator(mode="after")
    def _names_differ(self) -> Constitution:
        names = [principle.name for principle in self.principles]
        if len(set(names)) < len(names):
            raise ValueError(f"principles: names must differ, got {names}; rename one")
        return self


class WritingSettings(Settings):
    """How answers are criticised and revised."""

    num_rounds: int = Field(1, ge=1, description="critiques and revisions of one answer, each by a new principle")
    critique_template: str = Field(CRITIQUE_TEMPLATE, description="{prompt}, {answer} and {request} are replaced")
    revision_template: str = Field(
        REVISION_TEMPLATE, description="{prompt}, {answer}, {critique} and {request} are replaced"
    )
    critique_max_tokens: int = Field(256, ge=1, description="longest critique")
    revision_max_tokens: int = Field(256, ge=1, description="longest revision; one that is cut off is no revision")
    temperature: float = Field(0.0, ge=0, description="of both; 0: greedy")

    @model_validator(mode="after")
    def _shows_everything(self) -> WritingSettings:
        check_places(self.critique_template, ("{answer}", "{request}"), ("{critique}",))
        check_places(self.revision_template, ("{answer}", "{critique}", "{request}"))
        return self


@dataclass(frozen=True, slots=True)
class Round:
    """One critique and what was made of it."""

    principle: str  # its name
    critique: str
    revision: str


@dataclass(frozen=True, slots=True)
class Revised:
    """An answer through all rounds."""

    original: str
    rounds: tuple[Round, ...]  # those that came to an end
    failure: tuple[Step, Unrevised] | None = None  # what ended them early
    unfinished: tuple[str, str | None] | None = None  # of the round that failed: its principle, its critique if any

    @property
    def final(self) -> str | None:
        """The last revision; None where a round failed, because half a revision is no target."""
        return self.rounds[-1].revision if self.failure is None else None


def draw(principles: Sequence[Principle], num: int, seed: int) -> list[Principle]:
    """``num`` principles in an order that ``seed`` decides; none again before all have come."""
    random, found = np.random.default_rng(seed), list[Principle]()
    while len(found) < num:
        found += [principles[i] for i in random.permutation(len(principles))]
    return found[:num]


async def revise(
    respondent: Respondent, settings: WritingSettings, principles: Sequence[Principle], prompt: str, answer: str,
    seed: int, system: str | None = None, done: Sequence[Round] = (),
) -> Revised:  # fmt: skip
    """Criticise and revise ``answer`` by each of ``principles`` in turn.

    Args:
        done: the first rounds, by the first of ``principles``, from an earlier call with the same arguments.

    Raises:
        EndpointError: nobody is answered any more.
    """
    rounds = list(done)
    current = rounds[-1].revision if rounds else answer
    for number, principle in enumerate(principles[len(rounds) :], start=len(rounds)):
        said: list[str] = []
        steps: tuple[tuple[Step, str, int, str], ...] = (
            ("critique", settings.critique_template, settings.critique_max_tokens, principle.critique),
            ("revision", settings.revision_template, settings.revision_max_tokens, principle.revision),
        )
        for step, template, max_tokens, request in steps:
            values = {"prompt": prompt, "answer": current, "request": request, "critique": "".join(said)}
            text = fill_template(template, **values)
            question = Question(text, max_tokens, system, settings.temperature, (seed + number) % 2**31)
            reply = await respondent.ask(question)
            # A critique that was cut off still says something; a revision would be trained on.
            torn: Unrevised | None = "cut_off" if reply.cut_off and step == "revision" else None
            empty: Unrevised | None = None if reply.text.strip() else "empty"
            failure = reply.silence or empty or torn
            if failure is not None:
                return Revised(answer, tuple(rounds), (step, failure), (principle.name, said[0] if said else None))
            said.append(reply.text.strip())
        current = said[1]
        rounds.append(Round(principle.name, said[0], current))
    return Revised(answer, tuple(rounds))
