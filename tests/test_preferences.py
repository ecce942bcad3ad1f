"""Preference rows become comparisons in the policy's own tokens, or are refused where their file and line are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from trainers.comparisons import (
    Comparison,
    ComparisonTable,
    digest,
    grouped_by_prompt,
    split_by_prompt,
    without_prompts,
    write_comparisons,
)
from trainers.errors import InputError
from trainers.preferences import read_comparison, read_sample
from trainers.prompt_format import PromptFormat

PLAIN = PromptFormat(chat=False)
PAIR = {"prompt": "Two and two?", "chosen": "four", "rejected": "five"}
USER = {"role": "user", "content": "Two and two?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("builtin:tiny-llama"))


def read(row: dict[str, Any], tokenizer: Any, form: PromptFormat = PLAIN, **options: Any) -> Comparison:
    return read_comparison(row, "rows.jsonl:7", tokenizer, form, **options)


def texts(comparison: Comparison, tokenizer: Any) -> tuple[str, list[str]]:
    return tokenizer.decode(comparison.prompt_ids), [tokenizer.decode(c) for c in comparison.completion_ids]


# --- what is read -------------------------------------------------------------------------------


def test_answers_are_tokenised_apart_from_the_prompt_and_end_with_eos(tokenizer: Any) -> None:
    found = read(PAIR, tokenizer)
    assert texts(found, tokenizer) == ("Two and two?", ["four<|im_end|>", "five<|im_end|>"])
    assert all(c[-1] == tokenizer.eos_token_id and c.dtype == np.int32 for c in found.completion_ids)
    assert found.pairs == ((0, 1),) and found.margins is None


def test_an_answer_that_was_cut_off_gets_no_eos_that_nobody_sampled(tokenizer: Any) -> None:
    cut = PAIR | {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}
    assert texts(read(cut, tokenizer), tokenizer)[1] == ["four<|im_end|>", "five"]
    ranking = {"prompt": "Two and two?", "completions": ["four", "five"], "ranks": [1, 2]}
    found = read(ranking | {"finish_reasons": ["length", "stop"]}, tokenizer)
    assert texts(found, tokenizer)[1] == ["four", "five<|im_end|>"]
    as_labelled = read(ranking | {"completion_finish_reasons": ["stop", "length"]}, tokenizer)
    assert texts(as_labelled, tokenizer)[1] == ["four<|im_end|>", "five"], "the column that burnish label writes"


def test_every_way_to_write_a_conversation_gives_the_same_tokens(tokenizer: Any) -> None:
    shown = read(PAIR, tokenizer, PromptFormat())
    rows = [
        {"prompt": [USER], "chosen": [said("four")], "rejected": [said("five")]},
        {"prompt": [USER], "chosen": "four", "rejected": "five"},
        {"chosen": [USER, said("four")], "rejected": [USER, said("five")]},  # implicit prompt
        {"prompt": "Two and two?", "chosen": [USER, said("four")], "rejected": [USER, said("five")]},
        {"prompt": [USER], "completions": ["four", [said("five")]], "ranks": [1, 2]},
    ]
    assert texts(shown, tokenizer)[0] == "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    for row in rows:
        assert digest([read(row, tokenizer, PromptFormat())]) == digest([shown]), row


def test_an_implicit_prompt_reaches_up_to_the_turn_where_the_conversations_part(tokenizer: Any) -> None:
    begun = [USER, said("four"), {"role": "user", "content": "Sure?"}]
    found = read({"chosen": [*begun, said("yes")], "rejected": [*begun, said("no")]}, tokenizer, PromptFormat())
    assert texts(found, tokenizer)[0].endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")
    assert texts(found, tokenizer)[1] == ["yes<|im_end|>", "no<|im_end|>"]
    parted = {"role": "user", "content": "Really?"}  # they part at the user's turn: the answer before it is compared
    row = {"chosen": [*begun, said("yes")], "rejected": [USER, said("four"), parted, said("no")]}
    found = read(row, tokenizer, PromptFormat())
    assert texts(found, tokenizer)[0] == "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(found, tokenizer)[1][0] == (
        "four<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_an_implicit_prompt_of_plain_text_is_cut_between_words(tokenizer: Any) -> None:
    row = {"chosen": "Human: hi\n\nAssistant: hello there", "rejected": "Human: hi\n\nAssistant: help me"}
    assert texts(read(row, tokenizer), tokenizer) == (
        "Human: hi\n\nAssistant:",
        [" hello there<|im_end|>", " help me<|im_end|>"],
    )


def test_a_ranking_gives_all_pairs_and_leaves_ties_out(tokenizer: Any) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"]}
    assert read(row | {"ranks": [2, 1, 2, 3]}, tokenizer).pairs == ((0, 3), (1, 0), (1, 2), (1, 3), (2, 3))
    assert read(row | {"scores": [0.5, 9, 0.5, -1]}, tokenizer).pairs == ((0, 3), (1, 0), (1, 2), (1, 3), (2, 3))


def test_margins_are_read_from_their_column(tokenizer: Any) -> None:
    assert read(PAIR | {"gap": 2}, tokenizer, margin_column="gap").margins == (2.0,)
    ranking = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1.0, 4.0, 2.0]}
    assert read(ranking, tokenizer, margin_column="scores").margins == (3.0, 2.0, 1.0)  # of (1,0), (1,2), (2,0)


def test_template_and_system_are_those_of_the_policys_prompts(tokenizer: Any) -> None:
    form = PromptFormat(chat=False, template="Q: {prompt}\nA:")
    assert texts(read(PAIR, tokenizer, form), tokenizer)[0] == "Q: Two and two?\nA:"
    assert "be brief" in texts(read(PAIR, tokenizer, PromptFormat(system="be brief")), tokenizer)[0]


def test_the_prompt_id_is_that_of_the_policys_prompt(tokenizer: Any) -> None:
    from launch.config import PromptSettings
    from launch.prompts import build_prompts

    settings = PromptSettings.model_validate({"train": {"path": "x"}})
    prompt = build_prompts([{"prompt": "Two and two?"}], settings, tokenizer, 512, "prompts.train")[0]
    found = read(PAIR, tokenizer, PromptFormat())
    assert found.prompt_id == prompt.prompt_id
    assert np.array_equal(found.prompt_ids, prompt.token_ids)


# --- what is refused ----------------------------------------------------------------------------

RANKING = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
BAD = {
    "identical answers": (PAIR | {"rejected": "four"}, "identical"),
    "identical candidates": (RANKING | {"completions": ["a", "b", "a"], "ranks": [1, 2, 3]}, "answers 0 and 2 are ide"),
    "missing column": ({"prompt": "p", "chosen": "a", "rejectd": "b"}, "no column rejected, the nearest is rejectd"),
    "missing ranks": ({"prompt": "p", "completions": ["a", "b"], "rank": [1, 2]}, "the nearest is rank"),
    "missing prompt": ({"completions": ["a", "b"], "ranks": [1, 2]}, "no column prompt"),
    "null answer": (PAIR | {"chosen": None}, "chosen is empty"),
    "empty answer": (PAIR | {"chosen": "  "}, "chosen is empty"),
    "empty prompt": (PAIR | {"prompt": ""}, "prompt is empty"),
    "empty candidate": (RANKING | {"completions": ["a", ""]}, "completions[1] is empty"),
    "empty message": (PAIR | {"chosen": [said("")], "rejected": [said("b")]}, "last message of chosen is empty"),
    "number as answer": (PAIR | {"chosen": 4}, "chosen is of type int"),
    "text beside messages": (PAIR | {"chosen": [said("a")]}, "one is text and one is messages"),
    "message without role": (PAIR | {"chosen": [{"content": "a"}], "rejected": [said("b")]}, "has no role"),
    "answer by the user": (
        {"prompt": [USER], "chosen": [USER], "rejected": [said("b")]},
        "begins with another role than assistant",
    ),
    "prompt that is answered": (PAIR | {"prompt": [USER, said("a")]}, "ends with the assistant"),
    "one candidate": (RANKING | {"completions": ["a"], "ranks": [1]}, "a ranking of 1 answers"),
    "candidates as text": (RANKING | {"completions": "ab"}, "completions is no list"),
    "too few ranks": (RANKING | {"ranks": [1]}, "not one number for each of the 2"),
    "rank as text": (RANKING | {"ranks": [1, "2"]}, "ranks[1] is no finite number"),
    "rank not finite": (RANKING | {"ranks": [1, float("nan")]}, "ranks[1] is no finite number"),
    "all tied": (RANKING | {"ranks": [1, 1]}, "tied"),
    "ranks and scores": (RANKING | {"scores": [1, 2]}, "ranks and scores"),
    "a labelled answer": ({"prompt": "p", "completion": "a", "label": False}, "algorithm.loss=kto"),
    "an example": ({"messages": [USER, said("a")]}, "is an example of SFT, and pairs are needed"),
    "nothing shared": ({"chosen": "yes", "rejected": "no"}, "share no beginning"),
    "no conversation shared": ({"chosen": [said("a")], "rejected": [said("b")]}, "share no beginning"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_in_one_line_with_its_place(name: str, tokenizer: Any) -> None:
    row, reason = BAD[name]
    with pytest.raises(InputError) as caught:
        read(row, tokenizer, PromptFormat())
    message = str(caught.value)
    assert reason in message and message.startswith("rows.jsonl:7") and "\n" not in message


@pytest.mark.parametrize("value", [-1.0, "2", None, float("inf"), True])
def test_a_margin_that_is_no_margin_is_refused(value: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="gap"):
        read(PAIR | {"gap": value}, tokenizer, margin_column="gap")
    with pytest.raises(InputError, match="no column gap, the nearest is gaps"):
        read(PAIR | {"gaps": 1.0}, tokenizer, margin_column="gap")


def test_a_conversation_needs_a_chat_template() -> None:
    tokenizer = load_tokenizer(resolve_model("builtin:tiny-llama"))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no"):
        read(PAIR, tokenizer, PromptFormat())
    assert read(PAIR, tokenizer, PLAIN).prompt_ids.size


# --- tables and splits --------------------------------------------------------------------------


def rows_of(tokenizer: Any, num_prompts: int = 20, per_prompt: int = 3) -> list[Comparison]:
    return [
        read({"prompt": f"p{p}", "chosen": f"a{i}", "rejected": f"b{i}"}, tokenizer)
        for i in range(per_prompt)
        for p in range(num_prompts)
    ]


def test_a_table_gives_back_what_was_written(tokenizer: Any, tmp_path: Path) -> None:
    ranking = {"prompt": "p", "completions": ["a", "bb", "ccc"], "scores": [1.0, 4.0, 2.0]}
    comparisons = [
        read(PAIR, tokenizer),
        read(ranking, tokenizer, margin_column="scores"),
        read_sample({"prompt": "p", "completion": "only"}, "x:1", tokenizer, PLAIN),
    ]
    write_comparisons(comparisons, tmp_path / "t.arrow")
    table = ComparisonTable(tmp_path / "t.arrow")
    found = [table[i] for i in range(len(table))]
    assert digest(found) == digest(comparisons)
    for a, b in zip(found, comparisons, strict=True):
        assert (a.prompt_id, a.pairs, a.margins) == (b.prompt_id, b.pairs, b.margins)
        assert np.array_equal(a.prompt_ids, b.prompt_ids)


def test_no_prompt_is_on_both_sides_of_the_split_whatever_the_order_of_rows(tokenizer: Any) -> None:
    rows = rows_of(tokenizer)
    train, held = split_by_prompt(rows, 10, seed=3)
    assert 10 <= len(held) < 10 + 3 and len(train) + len(held) == len(rows)
    assert not {c.prompt_id for c in train} & {c.prompt_id for c in held}
    _, again = split_by_prompt(rows[::-1], 10, seed=3)
    assert {c.prompt_id for c in again} == {c.prompt_id for c in held}
    _, other = split_by_prompt(rows, 10, seed=4)
    assert {c.prompt_id for c in other} != {c.prompt_id for c in held}
    assert without_prompts(rows, {c.prompt_id for c in held}) == train


def test_grouped_rows_say_the_same_of_every_pair_with_each_answer_once(tokenizer: Any) -> None:
    judged = [("p", "a", "bb"), ("q", "a", "ccc"), ("p", "ccc", "a"), ("p", "bb", "a"), ("q", "a", "d")]
    rows = [read({"prompt": p, "chosen": c, "rejected": r}, tokenizer) for p, c, r in judged]
    first, second = grouped_by_prompt(rows, 1000, 100, True)
    assert (len(first.completion_ids), len(second.completion_ids)) == (3, 3)
    for found, prompt in ((first, "p"), (second, "q")):
        said = [(found.completion_ids[a].tolist(), found.completion_ids[b].tolist()) for a, b in found.pairs]
        own = [c for c in rows if c.prompt_id == found.prompt_id]
        assert said == [tuple(c.completion_ids[i].tolist() for i in c.pairs[0]) for c in own]
        assert len(own) == sum(p == prompt for p, _, _ in judged)


def test_grouping_respects_the_token_budget_and_leaves_a_row_that_is_too_long_alone(tokenizer: Any) -> None:
    rows = [read({"prompt": "p", "chosen": "a" * i, "rejected": "b"}, tokenizer) for i in (2, 3, 4, 40, 5)]
    budget = rows[0].cost(False) + rows[1].cost(False)
    found = grouped_by_prompt(rows, budget, rows[0].longest + 10, False)
    assert all(c.cost(False) <= budget for c in found if c.longest <= rows[0].longest + 10)
    assert sum(len(c.pairs) for c in found) == len(rows) and 2 <= len(found) < len(rows)
    assert [len(c.pairs) for c in found if c.longest > rows[0].longest + 10] == [1]
    assert grouped_by_prompt(rows, 1, 1000, False) == rows  # nothing fits beside anything


def test_grouping_keeps_each_pairs_margin(tokenizer: Any) -> None:
    rows = [
        read({"prompt": "p", "chosen": "a", "rejected": "b", "m": 2.0}, tokenizer, margin_column="m"),
        read({"prompt": "p", "chosen": "b", "rejected": "c"}, tokenizer),
        read({"prompt": "p", "chosen": "a", "rejected": "c", "m": 5.0}, tokenizer, margin_column="m"),
    ]
    (found,) = grouped_by_prompt(rows, 1000, 100, True)
    assert found.margins == (2.0, 0.0, 5.0) and found.pairs == ((0, 1), (1, 2), (0, 2))


def test_the_digest_names_answers_preferences_and_order(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, 2, 1)
    swapped = read(PAIR | {"chosen": "five", "rejected": "four"}, tokenizer)
    assert digest(rows) != digest(rows[::-1])
    assert digest([read(PAIR, tokenizer)]) != digest([swapped])
    assert digest([read(PAIR, tokenizer)]) != digest([read(PAIR | {"m": 1}, tokenizer, margin_column="m")])
