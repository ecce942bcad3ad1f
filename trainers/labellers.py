"""From what a labeller says about the candidates of one prompt to the preferences that are kept.  Pure.

    scores of candidates  --from_scores-->    Labels  --select-->  (chosen, rejected) pairs
    outcomes of pairs     --from_outcomes-->          --rank---->  ranks, 1 the best

What cannot be labelled is masked with a reason and counted; it never becomes a tie or a loss.
Axes: K candidates of one prompt.  May import: numpy, trainers.verdicts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from trainers.verdicts import LOSS, TIE, WIN

Keep = Literal["best_worst", "all", "random"]
Pair = tuple[int, int]


class Outcome(NamedTuple):
    """One comparison: ``value`` 1 where ``first`` is preferred, 0 where ``second`` is, 0.5 for a tie, None: masked."""

    first: int
    second: int
    value: float | None
    reason: str | None = None  # why there is no value


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of the K candidates of one prompt."""

    scores: tuple[float | None, ...]  # [K] higher is better; None: masked
    outcomes: tuple[Outcome, ...]  # of the pairs that were compared
    dropped: Mapping[str, int]  # pairs that were not compared, by reason


@dataclass(frozen=True, slots=True)
class Kept:
    """One preference."""

    chosen: int
    rejected: int
    is_tie: bool = False  # a tie that was kept: its order is a coin flip


def label_seed(*parts: object) -> int:
    """63-bit seed of one draw of the labelling, from what names it and nothing else."""
    name = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"burnish-label").digest(), "big") >> 1


# --- which pairs are compared -------------------------------------------------------------------


def candidate_masks(texts: Sequence[str], finish_reasons: Sequence[str]) -> list[str | None]:
    """[K] why a candidate takes no part: ``aborted`` (the engine gave up), ``empty`` (nothing but white space)."""
    return [
        "aborted" if why == "abort" else None if text.strip() else "empty"
        for text, why in zip(texts, finish_reasons, strict=True)
    ]


def pairs_to_compare(
    texts: Sequence[str], masks: Sequence[str | None], keep: Keep, drop_identical: bool, seed: int
) -> tuple[list[Pair], dict[str, int]]:
    """(pairs (i, j) with i < j, reasons why the other ones are left out).

    All C(K, 2) pairs without a masked candidate and, with ``drop_identical``, without equal texts.  ``random``
    draws one of these before anything is labelled, so a label never decides which pair is drawn.
    """
    found: list[Pair] = []
    dropped: Counter[str] = Counter()
    for i, j in itertools.combinations(range(len(texts)), 2):
        why = masks[i] or masks[j] or ("identical" if drop_identical and texts[i] == texts[j] else None)
        if why is None:
            found.append((i, j))
        else:
            dropped[why] += 1
    if keep == "random" and found:
        return [found[int(np.random.default_rng(seed).integers(len(found)))]], {}
    return found, dict(dropped)


# --- what a labeller said -----------------------------------------------------------------------


def from_scores(
    scores: Sequence[float | None], masks: Sequence[str | None], pairs: Sequence[Pair], dropped: Mapping[str, int]
) -> Labels:
    """Labels of candidates that were scored one by one.

    Args:
        scores: [K]; None or NaN where there is none.
        masks: [K] reasons; a masked candidate has no score, whatever ``scores`` says.
        pairs, dropped: of :func:`pairs_to_compare`.
    """
    valid = tuple(
        None if mask is not None or score is None or math.isnan(score) else float(score)
        for score, mask in zip(scores, masks, strict=True)
    )
    outcomes = []
    for i, j in pairs:
        a, b = valid[i], valid[j]
        if a is None or b is None:
            outcomes.append(Outcome(i, j, None, masks[i] or masks[j] or "unscored"))
        else:
            outcomes.append(Outcome(i, j, WIN if a > b else LOSS if a < b else TIE))
    return Labels(valid, tuple(outcomes), dict(dropped))


def from_outcomes(num_candidates: int, outcomes: Sequence[Outcome], dropped: Mapping[str, int]) -> Labels:
    """Labels of pairs that were compared; a candidate's score is its mean outcome (Copeland), None without one."""
    values: list[list[float]] = [[] for _ in range(num_candidates)]
    for first, second, value, _ in outcomes:
        if value is not None:
            values[first].append(value)
            values[second].append(1.0 - value)
    return Labels(tuple(sum(v) / len(v) if v else None for v in values), tuple(outcomes), dict(dropped))


# --- what is kept -------------------------------------------------------------------------------


def select(labels: Labels, keep: Keep, drop_ties: bool, seed: int) -> tuple[list[Kept], dict[str, int]]:
    """(preferences, reasons why the other ones are dropped).

    A pair is kept on its own label only.  ``all`` and ``random`` keep every compared pair that has one and count
    what they drop pair by pair.  ``best_worst`` keeps the pair whose scores are farthest apart, never a tie, and
    counts one reason for a prompt that gives none.
    """
    reasons = Counter(labels.dropped)
    kept: list[Kept] = []
    for first, second, value, reason in labels.outcomes:
        if value is None:
            reasons[reason or "unlabelled"] += 1
        elif value == TIE and (drop_ties or keep == "best_worst"):
            reasons["tie"] += 1
        elif value == TIE:
            swap = bool(np.random.default_rng([seed, first, second]).integers(2))
            kept.append(Kept(second, first, True) if swap else Kept(first, second, True))
        else:
            kept.append(Kept(first, second) if value > TIE else Kept(second, first))
    if keep != "best_worst":
        return kept, dict(reasons)

    def gap(pair: Kept) -> float:
        best, worst = labels.scores[pair.chosen], labels.scores[pair.rejected]
        return -math.inf if best is None or worst is None else best - worst

    widest = max(kept, key=gap, default=None)
    if widest is not None and gap(widest) > 0:
        return [widest], {}
    # Preferences that run in a circle leave nobody best.
    why = "cycle" if widest is not None else reasons.most_common(1)[0][0] if reasons else "unlabelled"
    return [], {why: 1}


def rank(labels: Labels, texts: Sequence[str]) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """([(candidate, rank)] from the best, reason why there is no ranking).

    Rank 1 is the best, equal scores share a rank, no rank is left out.  Masked candidates and all but the first of
    equal texts are left out of the ranking.
    """
    first_of = {text: i for i, text in reversed(list(enumerate(texts)))}
    scored = [(i, s) for i, s in enumerate(labels.scores) if s is not None and first_of[texts[i]] == i]
    levels = sorted({score for _, score in scored}, reverse=True)
    if len(levels) < 2:
        reasons = Counter(labels.dropped)
        reasons.update("tie" if o.value == TIE else o.reason or "tie" for o in labels.outcomes)
        return [], {reasons.most_common(1)[0][0] if reasons else "unlabelled": 1}
    ranked = [(i, levels.index(score) + 1) for i, score in scored]
    return sorted(ranked, key=lambda pair: pair[1]), {}
