"""What a row of a dataset is for, told by its columns.

    pairs      chosen, rejected; or completions (ranked)
    labelled   completion and label, true or false: an answer that somebody found good or not
    example    prompt and completion, messages, or text: to be imitated

SFT looks at no label, so it would imitate an answer that was labelled bad; and whoever gives pairs to KTO has not one
wrong row but the wrong dataset.  What is of another kind is therefore refused before it is read, with what learns from
it.
May import: trainers.errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trainers.errors import RowKindError

Kind = Literal["pairs", "labelled", "example"]
COLUMNS: dict[Kind, str] = {
    "pairs": "prompt, chosen, rejected; or prompt, completions, ranks (or scores)",
    "labelled": "prompt, completion, label",
    "example": "prompt, completion (without label); or messages; or text",
}
_HOLDS: dict[Kind, str] = {
    "pairs": "holds answers that were compared",
    "labelled": "holds one labelled answer",
    "example": "is an example of SFT",
}
_NEEDED: dict[Kind, str] = {
    "pairs": "pairs are needed",
    "labelled": "loss=kto learns from answers judged one by one",
    "example": "SFT imitates every answer, good or not",
}
_LEARNS: dict[Kind, str] = {
    "pairs": "algorithm.name=dpo and algorithm.loss=sigmoid, or algorithm.name=reward",
    "labelled": "algorithm.name=dpo and algorithm.loss=kto",
    "example": "algorithm.name=sft",
}


def row_kinds(row: Mapping[str, Any]) -> list[Kind]:
    """All kinds that the columns of ``row`` allow, the most telling first; a column without a value is not there."""
    there = {name for name, value in row.items() if value is not None}
    kinds = list[Kind]()
    is_labelled = "completion" in there and isinstance(row.get("label"), bool)
    if {"chosen", "rejected"} <= there or "completions" in there:
        kinds.append("pairs")
    if is_labelled:
        kinds.append("labelled")
    if ({"prompt", "completion"} <= there and not is_labelled) or {"messages", "text"} & there:
        kinds.append("example")
    return kinds


def refuse_other_kind(row: Mapping[str, Any], where: str, needed: Kind) -> None:
    """RowKindError where ``row`` is clearly of another kind; one that is of none is left to who reads it."""
    kinds = row_kinds(row)
    there = sorted(name for name, value in row.items() if value is not None)
    half_a_pair = needed == "pairs" and {"chosen", "rejected"} & set(there)  # it lacks a column, which can be named
    without_label = needed == "labelled" and "pairs" not in kinds  # as well
    if not kinds or needed in kinds or half_a_pair or without_label:
        return
    found = kinds[0]
    reason = f"{_HOLDS[found]}, and {_NEEDED[needed]}"
    raise RowKindError(where, there, reason, f"give {COLUMNS[needed]}; such rows are for {_LEARNS[found]}")
