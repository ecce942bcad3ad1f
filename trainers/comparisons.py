"""Comparison: one prompt, K answers and who was preferred to whom; as a record, and as a table on disk.

Axes: P prompt tokens, T tokens of one answer, K answers, N (better, worse) pairs.
May import: numpy, pyarrow.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Comparison:
    """A pair is K = 2; a text that is only to be scored is K = 1 with no pairs."""

    prompt_id: str  # digest of the rendered prompt, as in trainers.experience.Prompt
    prompt_ids: np.ndarray  # int32 [P]
    completion_ids: tuple[np.ndarray, ...]  # K of int32 [T], EOS included
    pairs: tuple[tuple[int, int], ...] = ()  # N of (better, worse), indices of completion_ids
    margins: tuple[float, ...] | None = None  # N: by how much, in units of reward
    label: bool | None = None  # whether answer 0 is desirable, where answers are judged one by one (KTO)

    @property
    def num_tokens(self) -> int:
        """Tokens of every answer with its prompt."""
        return len(self.completion_ids) * int(self.prompt_ids.shape[0]) + self._num_completion

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return int(self.prompt_ids.shape[0]) + max(int(c.shape[0]) for c in self.completion_ids)

    def cost(self, share_prompts: bool) -> int:
        """Tokens that are computed for it: the prompt once where attention shares it."""
        return int(self.prompt_ids.shape[0]) + self._num_completion if share_prompts else self.num_tokens

    @property
    def _num_completion(self) -> int:
        return sum(int(c.shape[0]) for c in self.completion_ids)


SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("pairs", pa.list_(pa.list_(pa.int32(), 2))),
        ("margins", pa.list_(pa.float64())),  # null where there are none
        ("label", pa.bool_()),  # as margins
    ]
)


def write_comparisons(comparisons: Sequence[Comparison], file: Path) -> None:
    """One Arrow file; the same comparisons give the same bytes.  It appears whole, by a rename."""
    rows = [
        {
            "prompt_id": c.prompt_id,
            "prompt_ids": c.prompt_ids,
            "completion_ids": list(c.completion_ids),
            "pairs": [list(pair) for pair in c.pairs],
            "margins": None if c.margins is None else list(c.margins),
            "label": c.label,
        }
        for c in comparisons
    ]
    fresh = file.with_name(f".{file.name}.tmp")
    with pa.ipc.new_file(str(fresh), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    os.replace(fresh, file)


class ComparisonTable:
    """Comparisons in a file, opened one at a time: their tokens stay on disk until they are asked for."""

    def __init__(self, file: Path) -> None:
        with pa.memory_map(str(file)) as source:
            self._batch = pa.ipc.open_file(source).get_batch(0)

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, index: int) -> Comparison:
        row = {name: self._batch.column(name)[index] for name in SCHEMA.names}
        margins = row["margins"].as_py()
        return Comparison(
            prompt_id=row["prompt_id"].as_py(),
            prompt_ids=row["prompt_ids"].values.to_numpy(),
            completion_ids=tuple(answer.values.to_numpy() for answer in row["completion_ids"]),
            pairs=tuple((better, worse) for better, worse in row["pairs"].as_py()),
            margins=None if margins is None else tuple(margins),
            label=row["label"].as_py(),
        )


def grouped_by_prompt(
    comparisons: Sequence[Comparison], max_cost: int, max_longest: int, share_prompts: bool
) -> list[Comparison]:
    """Comparisons of one prompt as one, each answer in it once: what was compared three times is computed once.

    Order: that of the first row of each prompt.  A prompt with more answers than ``max_cost`` tokens (see
    :meth:`Comparison.cost`) is several comparisons; nothing joins one that is too long on its own (an answer above
    ``max_longest``, or above ``max_cost``).  Pairs keep their order and their margins, repeated and contradictory
    ones too: each is one judgement.
    """
    open_: dict[str, int] = {}  # prompt -> its comparison that may still grow, an index of found
    found: list[Comparison] = []
    for comparison in comparisons:
        place = open_.get(comparison.prompt_id)
        alone_too_long = comparison.longest > max_longest or comparison.cost(share_prompts) > max_cost
        joined = None if place is None or alone_too_long else _joined(found[place], comparison)
        if joined is not None and place is not None and joined.cost(share_prompts) <= max_cost:
            found[place] = joined
            continue
        if not alone_too_long:
            open_[comparison.prompt_id] = len(found)
        found.append(comparison)
    return found


def _joined(first: Comparison, second: Comparison) -> Comparison:
    answers = list(first.completion_ids)
    places = {answer.tobytes(): i for i, answer in enumerate(answers)}
    index = []
    for answer in second.completion_ids:
        if answer.tobytes() not in places:
            places[answer.tobytes()] = len(answers)
            answers.append(answer)
        index.append(places[answer.tobytes()])
    margins = None
    if first.margins is not None or second.margins is not None:
        margins = tuple(m for c in (first, second) for m in (c.margins or (0.0,) * len(c.pairs)))
    pairs = first.pairs + tuple((index[better], index[worse]) for better, worse in second.pairs)
    return Comparison(first.prompt_id, first.prompt_ids, tuple(answers), pairs, margins)


def digest(comparisons: Sequence[Comparison]) -> str:
    """Names the comparisons and their order."""
    state = hashlib.blake2b(digest_size=16)
    for c in comparisons:
        label = "" if c.label is None else c.label
        state.update(f"{c.prompt_id}{c.pairs}{c.margins}{[a.shape[0] for a in c.completion_ids]}{label}".encode())
        state.update(np.concatenate(c.completion_ids).astype("<i4").tobytes())
    return state.hexdigest()


def split_by_prompt(
    comparisons: Sequence[Comparison], size: int, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """(train, held out) with no prompt in common: whole prompts are held out until they have ``size`` comparisons.

    Which prompts depends on ``seed`` and on the prompts alone, not on the order of the rows.
    """
    by_prompt: dict[str, int] = {}
    for comparison in comparisons:
        by_prompt[comparison.prompt_id] = by_prompt.get(comparison.prompt_id, 0) + 1
    held: set[str] = set()
    count = 0
    for prompt in sorted(by_prompt, key=lambda p: hashlib.blake2b(f"{seed}/{p}".encode()).digest()):
        if count >= size:
            break
        held.add(prompt)
        count += by_prompt[prompt]
    return without_prompts(comparisons, held), [c for c in comparisons if c.prompt_id in held]


def without_prompts(comparisons: Sequence[Comparison], prompt_ids: Collection[str]) -> list[Comparison]:
    """Those whose prompt is none of ``prompt_ids``."""
    return [c for c in comparisons if c.prompt_id not in prompt_ids]
