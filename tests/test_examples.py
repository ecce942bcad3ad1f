"""What is learned of a row: the assistant's turns with their ends, the completion, the text; nothing else, ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from actors.model_folders import resolve_model
from trainers.errors import InputError
from trainers.examples import Example, LeftOut, encode_example
from trainers.prompt_format import PromptFormat

PLAIN = PromptFormat(chat=False)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  "},
    {"role": "assistant", "content": "Hello, é!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": " 4\n"},
]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("builtin:tiny-llama"), local_files_only=True)


def encoded(row: dict[str, Any], tokenizer: Any, form: PromptFormat = PromptFormat(), **more: Any) -> Example:  # noqa: B008
    made = encode_example(row, tokenizer, more.pop("max_length", 1000), form=form, **more)
    assert isinstance(made, Example)
    assert made.input_ids.dtype == np.int32 and made.mask.dtype == np.bool_ and not made.mask[0]
    return made


def runs(example: Example, tokenizer: Any) -> list[str]:
    """The stretches of targets, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.mask.astype(int), [0]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# --- messages -----------------------------------------------------------------------------------


def test_only_the_assistants_turns_are_learned_each_with_its_end(tokenizer: Any) -> None:
    example = encoded({"messages": TALK}, tokenizer)
    assert runs(example, tokenizer) == ["Hello, é!<|im_end|>", " 4\n<|im_end|>"]


def test_the_tokens_before_a_turn_are_the_prompt_that_a_generator_would_see(tokenizer: Any) -> None:
    example = encoded({"messages": TALK}, tokenizer)
    first = int(np.argmax(example.mask))
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[:first].tolist() == list(prompt)


def test_turns_of_the_prompt_are_context_even_where_the_assistant_says_them(tokenizer: Any) -> None:
    example = encoded({"prompt": TALK[:4], "completion": TALK[4:]}, tokenizer)
    assert runs(example, tokenizer) == [" 4\n<|im_end|>"]
    assert example.input_ids.tolist() == encoded({"messages": TALK}, tokenizer).input_ids.tolist()


def test_null_keys_that_arrow_fills_in_change_nothing(tokenizer: Any) -> None:
    padded = [{**message, "tool_calls": None} for message in TALK]
    row = {"messages": padded, "prompt": None, "text": None}
    assert encoded(row, tokenizer).input_ids.tolist() == encoded({"messages": TALK}, tokenizer).input_ids.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (  # drops what the assistant said before the last turn
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}<|im_start|>{{ m['content'] }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with pytest.raises(InputError, match="turns cannot be found"):
        encode_example({"messages": TALK}, tokenizer, 1000)


def test_a_template_that_never_ends_a_turn_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(InputError, match="without a token that stops generation"):
        encode_example({"messages": TALK}, tokenizer, 1000)


# --- prompt and completion, text ------------------------------------------------------------------


def test_a_plain_completion_and_its_eos_are_learned_and_the_prompt_is_not(tokenizer: Any) -> None:
    example = encoded({"prompt": "Say hi:", "completion": " hi"}, tokenizer, PLAIN)
    assert tokenizer.decode(example.input_ids) == "Say hi: hi<|im_end|>"
    assert runs(example, tokenizer) == [" hi<|im_end|>"]


def test_a_plain_prompt_is_shown_as_a_policy_would_see_it(tokenizer: Any) -> None:
    form = PromptFormat(system="Be brief.", template="Q: {prompt}")
    example = encoded({"prompt": "hi", "completion": "ho"}, tokenizer, form)
    prompt_ids = form.render("hi", tokenizer, "row")[1]
    assert example.input_ids[: len(prompt_ids)].tolist() == prompt_ids.tolist()
    assert runs(example, tokenizer) == ["ho<|im_end|>"]


def test_plain_text_is_learned_whole_with_one_eos(tokenizer: Any) -> None:
    example = encoded({"text": "abc"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "abc<|im_end|>"
    assert example.mask.tolist() == [False, True, True, True], "nothing predicts the first token"
    assert encoded({"text": "abc<|im_end|>"}, tokenizer).input_ids.tolist() == example.input_ids.tolist()


def test_a_bos_is_there_exactly_if_the_tokenizer_adds_one(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    row = {"prompt": "a", "completion": "b"}
    without = encoded(row, tokenizer, PLAIN)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    example = encoded(row, tokenizer, PLAIN)
    assert example.input_ids.tolist() == [tokenizer.bos_token_id, *without.input_ids.tolist()]
    assert runs(example, tokenizer) == ["b<|im_end|>"]
    assert encoded({"messages": TALK}, tokenizer).input_ids.tolist().count(tokenizer.bos_token_id) == len(TALK)


# --- length ---------------------------------------------------------------------------------------


def test_a_row_that_is_too_long_is_left_out_or_cut_and_never_without_a_target(tokenizer: Any) -> None:
    row = {"prompt": "12345678", "completion": "abcd"}  # 13 tokens with EOS
    assert isinstance(encode_example(row, tokenizer, 13, form=PLAIN), Example)
    assert encode_example(row, tokenizer, 12, form=PLAIN, index=7) == LeftOut("too_long", 7, 13)
    cut = encoded(row, tokenizer, PLAIN, max_length=10, truncate=True)
    assert tokenizer.decode(cut.input_ids) == "12345678ab" and runs(cut, tokenizer) == ["ab"]
    assert encode_example(row, tokenizer, 8, form=PLAIN, truncate=True) == LeftOut("no_target", 0, 13)


# --- rows that cannot be used -----------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no known column": ({"question": "a", "answer": "b"}, "has none of"),
    "a prompt alone": ({"prompt": "a"}, "has none of"),
    "two kinds at once": ({"text": "a", "messages": TALK}, "several ways"),
    "an empty completion": ({"prompt": "a", "completion": "  "}, "completion is empty"),
    "an empty prompt": ({"prompt": "", "completion": "b"}, "prompt is empty"),
    "empty text": ({"text": ""}, "text is empty"),
    "a number as text": ({"text": 3}, "text is of type int"),
    "a list as text": ({"text": TALK}, "text is a list"),
    "no messages": ({"messages": []}, "messages is empty"),
    "text as messages": ({"messages": "hi"}, "text where messages"),
    "a role nobody knows": ({"messages": [{"role": "robot", "content": "hi"}]}, "no role"),
    "a message without content": ({"messages": [{"role": "user"}]}, "no text as content"),
    "no turn of the assistant": ({"messages": TALK[:2]}, "nothing to learn"),
    "a completion that only the user says": ({"prompt": TALK[:1], "completion": TALK[1:2]}, "nothing to learn"),
    "an answer labelled good": ({"prompt": "a", "completion": "b", "label": True}, "one labelled answer.*loss=kto"),
    "an answer labelled bad": ({"prompt": "a", "completion": "b", "label": False}, "SFT imitates every answer"),
    "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "were compared.*algorithm.name=dpo"),
    "a ranking": ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, "were compared.*algorithm.name=reward"),
    "one text and one list": ({"prompt": "a", "completion": TALK}, "text where messages"),
}


def test_a_label_of_something_else_does_not_make_a_row_a_judgement(tokenizer: Any) -> None:
    for row in ({"prompt": "a", "completion": "b", "label": 3}, {"text": "a film review", "label": True}):
        assert isinstance(encode_example(row, tokenizer, 1000, form=PLAIN), Example)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_and_named(case: str, tokenizer: Any) -> None:
    row, reason = BAD[case]
    with pytest.raises(InputError, match=reason) as caught:
        encode_example(row, tokenizer, 1000, where="train.jsonl:3")
    assert caught.value.field == "train.jsonl:3"
