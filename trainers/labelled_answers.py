"""Rows for preference learning: which kind of row a loss learns from, and KTO's labelled answers.

    pairs and rankings            trainers/preferences.py
    prompt, completion, label     an answer that somebody found good (true) or not (false)

KTO estimates a KL from answers to other prompts.  Each labelled answer therefore gets such an answer beside it, as its
second completion, once and for all: what the reference thinks of both can be computed before training.
May import: numpy, trainers.{comparisons, errors, preference_training, preferences, prompt_format, row_kinds}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.preference_training import LossName
from trainers.preferences import read_comparison, read_sample, without_eos
from trainers.prompt_format import PromptFormat
from trainers.row_kinds import COLUMNS, refuse_other_kind

Row = Mapping[str, Any]


def read_preference(row: Row, where: str, tokenizer: Any, form: PromptFormat, loss: LossName) -> Comparison:
    """The pair, the ranking or (loss ``kto``) the labelled answer that ``row`` holds.

    Raises:
        RowKindError: a row of the kind that another loss, or another algorithm, learns from.
        InputError: one that cannot be read.
    """
    if loss == "kto":
        refuse_other_kind(row, where, "labelled")
        return _read_labelled(row, where, tokenizer, form)
    return read_comparison(row, where, tokenizer, form)


def _read_labelled(row: Row, where: str, tokenizer: Any, form: PromptFormat) -> Comparison:
    label = row.get("label")
    if label is None:
        reason = "has no label: was the answer good?"
        there = sorted(name for name, value in row.items() if value is not None)
        raise InputError(where, there, reason, f"give {COLUMNS['labelled']}, with label true or false")
    if not isinstance(label, bool):
        raise InputError(where, label, "label is neither true nor false", "give true for a good answer, else false")
    sample = read_sample(row, where, tokenizer, form)
    if row.get("finish_reason") == "length":  # as of a ranking: an EOS that nobody sampled is not learned
        sample = replace(sample, completion_ids=(without_eos(sample.completion_ids[0], tokenizer),))
    return replace(sample, label=label)


def with_mismatched(answers: Sequence[Comparison], seed: int, max_length: int, field: str) -> list[Comparison]:
    """Each answer with one to another prompt as its second completion; the order stays.

    Each answer serves once, unless more than half of all share their prompt.  ``max_length``: of a prompt with its
    mismatched answer in tokens; a longer one is cut, since it is only looked at.

    Raises:
        InputError: all answers are to one prompt.
    """
    counts = Counter(a.prompt_id for a in answers)
    if len(counts) < 2:
        reason = "all of them answer one prompt, and KTO's estimate of the KL needs answers to another"
        raise InputError(field, f"{len(answers)} answers", reason, "give answers to several prompts")
    # All answers of one prompt side by side, prompts in random order: so many places on stands another prompt's.
    draw = np.random.default_rng(seed)
    ranks = dict(zip(counts, draw.permutation(len(counts)), strict=True))
    order = sorted(draw.permutation(len(answers)).tolist(), key=lambda i: ranks[answers[i].prompt_id])
    most, shift = counts.most_common(1)[0]
    others = [i for i in order if answers[i].prompt_id != most]
    found: list[Comparison] = list(answers)
    for place, i in enumerate(order):
        other = answers[order[(place + shift) % len(order)]]
        if other.prompt_id == answers[i].prompt_id:  # the prompt with more than half of all answers
            other = answers[others[place % len(others)]]
        room = max(1, max_length - int(answers[i].prompt_ids.shape[0]))
        found[i] = replace(answers[i], completion_ids=(answers[i].completion_ids[0], other.completion_ids[0][:room]))
    return found
