"""Rows that a preference loss learns from: those of another kind are refused, unpaired ones get mismatched answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preference_kit import PLAIN, comparisons, tokenizer

from trainers.comparisons import Comparison, ComparisonTable, write_comparisons
from trainers.errors import InputError
from trainers.labelled_answers import read_preference, with_mismatched
from trainers.preference_training import LossName

__all__ = ["tokenizer"]  # a fixture

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ANSWER = {"prompt": "p", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("loss", "row", "reason"),
    [
        ("sigmoid", ANSWER, r"holds one labelled answer, and pairs are needed; give prompt, chosen, "
         r"rejected.* such rows are for .*algorithm.loss=kto"),
        ("simpo", ANSWER, "pairs are needed"),
        ("kto", PAIR, "compared, and loss=kto learns .* give prompt, completion, label; such .*algorithm.loss=sigmoid"),
        ("kto", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}, "give prompt, completion, label"),
        ("ipo", {"prompt": "p", "completion": "a"}, "is an example of SFT.*algorithm.name=sft"),
        ("orpo", {"messages": [{"role": "user", "content": "x"}]}, "is an example of SFT"),
        ("kto", {"prompt": "p", "completion": "a"}, "has no label"),
        ("kto", ANSWER | {"label": 1}, "label is neither true nor false"),
        ("sigmoid", PAIR | {"rejected": "a"}, "chosen and rejected are identical"),
        ("ipo", {"prompt": "p", "completions": ["a", "a"], "ranks": [1, 2]}, "answers 0 and 1 are identical"),
        ("sigmoid", {"prompt": "p", "chosen": "a"}, "has no column rejected"),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_is_refused_with_the_right_one(
    loss: LossName, row: dict[str, Any], reason: str, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_preference(row, "rows.jsonl:3", tokenizer, PLAIN, loss)
    assert caught.value.field == "rows.jsonl:3" and "\n" not in str(caught.value)


def test_a_labelled_answer_keeps_its_label_on_disk(tokenizer: Any, tmp_path: Path) -> None:
    rows = [ANSWER, ANSWER | {"label": False, "prompt": "q"}]
    read = [read_preference(row, "row", tokenizer, PLAIN, "kto") for row in rows]
    write_comparisons([*read, *comparisons("sigmoid", tokenizer, 2)], tmp_path / "t.arrow")
    table = ComparisonTable(tmp_path / "t.arrow")
    assert [table[i].label for i in range(len(table))] == [True, False, None, None]


def test_a_labelled_answer_that_was_cut_off_gets_no_eos_that_nobody_sampled(tokenizer: Any) -> None:
    whole, cut = (
        read_preference(ANSWER | {"finish_reason": reason}, "row", tokenizer, PLAIN, "kto").completion_ids[0]
        for reason in ("stop", "length")
    )
    assert whole[-1] == tokenizer.eos_token_id and whole[:-1].tolist() == cut.tolist()


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2, 4, 1), (5, 5), (7, 1, 2)])
def test_a_mismatched_answer_is_of_another_prompt_and_each_serves_once(sizes: tuple[int, ...]) -> None:
    answers = [
        Comparison(f"p{g}", np.arange(4, dtype=np.int32), (np.array([g, i, 9], dtype=np.int32),), label=True)
        for g, size in enumerate(sizes)
        for i in range(size)
    ]
    found = with_mismatched(answers, 3, 100, "data")
    assert [f.completion_ids[0].tolist() for f in found] == [a.completion_ids[0].tolist() for a in answers]
    others = [tuple(f.completion_ids[1].tolist()) for f in found]
    assert all(f"p{other[0]}" != f.prompt_id for f, other in zip(found, others, strict=True))
    if max(sizes) * 2 <= sum(sizes):
        assert sorted(others) == sorted(tuple(a.completion_ids[0].tolist()) for a in answers)
    assert others == [tuple(f.completion_ids[1].tolist()) for f in with_mismatched(answers, 3, 100, "data")]
    assert all(len(f.completion_ids[1]) == 1 for f in with_mismatched(answers, 3, 5, "data")), "cut to fit"


def test_answers_to_one_prompt_alone_have_no_mismatched_ones(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="all of them answer one prompt"):
        with_mismatched([read_preference(ANSWER, "row", tokenizer, PLAIN, "kto")] * 3, 0, 100, "data.train")
