"""Which of two answers a judge prefers: reading it, and combining what was said in both orders.  Pure.

    texts of (a, b) and (b, a) --read_verdict--> verdicts by place --combine--> outcome for a

Judges favour a place, so a preference counts only where it survives the swap.  Where it does not, a label is masked
(half a preference would be trained on) and a win rate counts a tie (leaving it out would flatter the sure ones): the
rule is a choice that the caller names.
May import: trainers.prompt_bootstrap.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trainers.prompt_bootstrap import mean_over_prompts

Verdict = Literal["first", "second", "tie"]  # of the two places that were shown
Unread = Literal["empty", "cut_off", "no_verdict", "contradictory"]
Disagreement = Literal["masked", "tie"]  # what both orders are worth where they disagree
WIN, TIE, LOSS = 1.0, 0.5, 0.0

_MARK = re.compile(r"\[\[\s*(a|b|c|tie)\s*\]\]", re.IGNORECASE)
_LINE = re.compile(r"^\W*(?:final\s+)?(?:verdict|winner|better|answer)\W*:\W*(a|b|c|tie)\W*$", re.IGNORECASE | re.M)
_BARE = re.compile(r"\W*(a|b|c|tie)\W*", re.IGNORECASE)
_MEANING: dict[str, Verdict] = {"a": "first", "b": "second", "c": "tie", "tie": "tie"}
_SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
_OUTCOME: dict[Verdict, float] = {"first": WIN, "second": LOSS, "tie": TIE}


class Reading(NamedTuple):
    """A verdict, or why there is none."""

    verdict: Verdict | None
    failure: Unread | None = None


class Combined(NamedTuple):
    """What both orders say of a: ``value`` 1 where a is preferred, 0 where b is, 0.5 for a tie; None: masked."""

    value: float | None
    reason: str | None = None  # why there is no value: unparsed or inconsistent


def read_verdict(text: str, cut_off: bool = False) -> Reading:
    """Which of the two answers it was shown a judge prefers.

    Read are, in this order: marks such as ``[[A]]``, ``[[B]]``, ``[[C]]`` or ``[[tie]]``; lines such as
    ``Verdict: A``; a text that is nothing but ``A``.  A is the first answer, C a tie.

    Args:
        cut_off: the judge ran into its longest reply; without a verdict so far that is why.
    """
    for said in (_MARK.findall(text), _LINE.findall(text)):
        if said:
            meanings = {_MEANING[word.lower()] for word in said}
            return Reading(meanings.pop()) if len(meanings) == 1 else Reading(None, "contradictory")
    bare = _BARE.fullmatch(text.strip())
    if bare:
        return Reading(_MEANING[bare.group(1).lower()])
    return Reading(None, "empty" if not text.strip() else "cut_off" if cut_off else "no_verdict")


def combine(shown_ab: Verdict | None, shown_ba: Verdict | None, disagreement: Disagreement) -> Combined:
    """Both orders of one comparison as one outcome for a; the second judgement was shown b first.

    Where the two disagree the pair is ``masked`` ("inconsistent") or a ``tie``, as ``disagreement`` says.  Where
    either cannot be read it is masked ("unparsed") by both rules: one order alone would bring the bias of its place
    back.
    """
    if shown_ab is None or shown_ba is None:
        return Combined(None, "unparsed")
    if shown_ab == _SWAPPED[shown_ba]:
        return Combined(_OUTCOME[shown_ab])
    return Combined(TIE) if disagreement == "tie" else Combined(None, "inconsistent")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said of an answer a and an answer b."""

    said: tuple[str, str] | None  # shown (a, b), shown (b, a); None: it was not asked, or did not answer
    verdicts: tuple[Verdict | None, Verdict | None]  # read from it; None: nothing to read
    why: str | None = None  # without ``said``: "identical" (a tie), or what kept it silent (trainers/asking.py)
    failures: tuple[Unread | None, Unread | None] = (None, None)  # why a verdict could not be read

    @classmethod
    def of(cls, texts: tuple[str, str], cut_off: tuple[bool, bool] = (False, False)) -> Judgement:
        """Read from what was said in both orders."""
        ab, ba = (read_verdict(text, cut) for text, cut in zip(texts, cut_off, strict=True))
        return cls(texts, (ab.verdict, ba.verdict), failures=(ab.failure, ba.failure))

    @property
    def outcome(self) -> float | None:
        """Of a comparison that is counted: 1 where a is better in both orders, 0 where b is, 0.5; None: left out."""
        return combine(*self.verdicts, "tie").value


IDENTICAL = Judgement(None, ("tie", "tie"), "identical")  # no judge tells a text from itself


def judge_report(
    judgements: Sequence[Judgement], prompt_ids: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """How far the judge can be believed.

    ``consistency``: share of the pairs it could be read on whose verdict survives the swap; ``first_place``: mean over
    pairs of the share of the pair's choices that fell on the answer shown first, 0.5 of a judge without a favourite
    place; ``unread`` and ``silent``: replies that could not be read, and pairs without a reply, by kind.

    Args:
        prompt_ids: [n] of the pairs.  Both intervals take prompts as the independent observations: the two verdicts of
            a pair hang together, and so do the pairs of a prompt.  Without them each pair stands alone.
        seed: of the intervals' bootstrap.
    """
    reasons = Counter(j.why for j in judgements if j.why is not None)
    prompts = range(len(judgements)) if prompt_ids is None else prompt_ids
    asked = [(j.verdicts, prompt) for j, prompt in zip(judgements, prompts, strict=True) if j.said is not None]
    read = [(v, prompt) for v, prompt in asked if None not in v]
    same = [float(combine(*v, "masked").value is not None) for v, _ in read]
    places, clusters = [_first_place(v) for v, _ in read], [prompt for _, prompt in read]
    return {
        "num_asked": len(asked), "num_unparsed": len(asked) - len(read),
        "num_identical": reasons.pop("identical", 0), "num_too_long": reasons["too_long"],
        "unread": counts(kind for j in judgements for kind in j.failures), "silent": dict(reasons.most_common()),
        "consistency": mean_over_prompts(same, clusters, seed=seed),
        "first_place": mean_over_prompts(places, clusters, seed=seed),
    }  # fmt: skip


def _first_place(verdicts: tuple[Verdict | None, Verdict | None]) -> float | None:
    """Share of a pair's choices that fell on the answer shown first; None of a pair that it called a tie twice."""
    chosen = [verdict for verdict in verdicts if verdict != "tie"]
    return chosen.count("first") / len(chosen) if chosen else None


def counts(kinds: Iterable[str | None]) -> dict[str, int]:
    """How often each kind occurs, the most frequent first; None is no kind."""
    return dict(Counter(kind for kind in kinds if kind is not None).most_common())
