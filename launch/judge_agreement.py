"""A judge on pairs that people have labelled: what it says of them, and how far the two agree.

May import: trainers.*, launch.{bad_rows, datasets, lanes}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.bad_rows import read_rows
from launch.datasets import Row, prompt_key
from launch.lanes import in_lanes
from trainers.agreement import agreement
from trainers.experience import Prompt
from trainers.judge import PairJudge
from trainers.preferences import Text, read_texts
from trainers.verdicts import WIN, Judgement, judge_report


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two answers, of which people prefer the first."""

    prompt: Prompt  # shown to the judge as words, so it has no tokens
    better: str
    worse: str


def labelled_pairs(rows: Sequence[tuple[str, Row]]) -> list[LabelledPair]:
    """Every pair of every row.  InputError where rows are no preferences."""
    found = []
    read, _ = read_rows(rows, lambda where, row: read_texts(row, where), "eval.preferences")
    for source, pairs in read:
        digest = hashlib.blake2b(prompt_key(source).encode(), digest_size=16).hexdigest()
        prompt = Prompt(digest, np.zeros(0, np.int32), prompt_key(source), source)
        found += [LabelledPair(prompt, _words(better), _words(worse)) for better, worse in pairs]
    return found


async def judge_labelled(judge: PairJudge, pairs: Sequence[LabelledPair], num_at_once: int) -> list[Judgement]:
    """What the judge says of each pair, shown in both orders: where people have the better one is no help to it."""

    async def one(pair: LabelledPair) -> Judgement:
        return await judge.judge(pair.prompt, pair.better, pair.worse)

    return await in_lanes(num_at_once, pairs, one)


def agreement_report(pairs: Sequence[LabelledPair], judgements: Sequence[Judgement], seed: int) -> dict[str, Any]:
    """Agreement with its intervals; pairs on which the judge contradicts itself count as its ties."""
    prompts = [pair.prompt.prompt_id for pair in pairs]
    found = agreement([j.outcome for j in judgements], [WIN] * len(pairs), prompts, seed=seed)
    return {
        "rate": found.rate, "kappa": found.kappa, "num_pairs": len(pairs), "num_left_out": found.num_left_out,
        "judge": judge_report(judgements, prompts, seed),
    }  # fmt: skip


def _words(answer: Text) -> str:
    """An answer as the judge is shown it."""
    if isinstance(answer, str):
        return answer
    if len(answer) == 1:
        return str(answer[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in answer)
