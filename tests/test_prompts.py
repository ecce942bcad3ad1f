"""Laws of datasets, prompts, the prompt stream and sampling seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.config import DatasetSettings, PromptSettings
from launch.datasets import load_rows
from launch.prompts import PromptStream, build_prompts, load_prompts, split_disjoint
from trainers.errors import InputError
from trainers.experience import Prompt
from trainers.sampling_seeds import sample_seed

CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ROWS = [{"prompt": "one", "answer": 1, "extra": None}, {"prompt": "two", "answer": 2, "extra": {"a": [1, 2]}}]


def tokenizer_with(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=template, clean_up_tokenization_spaces=False, eos_token="!"
    )


def file_settings(path: Path, **more: Any) -> DatasetSettings:
    return DatasetSettings(path=str(path), **more)


def prompt_settings(**more: Any) -> PromptSettings:
    return PromptSettings(train=DatasetSettings(path="unused"), **more)


def prompts_of(*texts: str, **more: Any) -> list[Prompt]:
    return build_prompts([{"prompt": t} for t in texts], prompt_settings(**more), tokenizer_with(), 100, "train")


def write(path: Path, rows: list[dict[str, Any]], kind: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The layout of Hugging Face's Dataset.save_to_disk: two shards, state.json, dataset_info.json."""
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        write(folder / name, rows[i::2])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


# --- files ---


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", ""), ("a.jsonl", ""), ("a.arrow", "file"), ("b.arrow", "")])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, kind: str) -> None:
    assert load_rows(file_settings(write(tmp_path / name, ROWS, kind)), 0, "prompts.train") == ROWS


def test_a_saved_dataset_and_a_saved_split_are_read_in_order(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "all" / "train", ROWS)
    save_to_disk(tmp_path / "all" / "test", ROWS[:1] * 2)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert load_rows(file_settings(tmp_path / "all" / "train"), 0, "t") == ROWS
    assert load_rows(file_settings(tmp_path / "all", split="train"), 0, "t") == ROWS
    assert len(load_rows(file_settings(tmp_path / "all", split="test", size=1), 0, "t")) == 1
    with pytest.raises(InputError, match="choose one of test, train"):
        load_rows(file_settings(tmp_path / "all"), 0, "t")
    with pytest.raises(InputError, match="choose one of test, train"):
        load_rows(file_settings(tmp_path / "all", split="dev"), 0, "t")
    (tmp_path / "all" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="lacks data-00001"):
        load_rows(file_settings(tmp_path / "all", split="train"), 0, "t")


def test_a_folder_of_parquet_files_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    rows = load_rows(file_settings(tmp_path, split="train"), 0, "t")
    assert [r["prompt"] for r in rows] == ["one", "two"]
    with pytest.raises(InputError, match="several"):
        load_rows(file_settings(tmp_path), 0, "t")
    write(tmp_path / "loose" / "a.jsonl", ROWS[:1])
    write(tmp_path / "loose" / "b.jsonl", ROWS[1:])
    assert load_rows(file_settings(tmp_path / "loose"), 0, "t") == ROWS


def test_the_prompt_column_may_have_another_name_and_missing_cells_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "one", "level": 3}\n\n{"question": "two"}\n')
    rows = load_rows(file_settings(path, prompt_column="question"), 0, "t")
    assert rows == [{"prompt": "one", "level": 3}, {"prompt": "two", "level": None}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "b"', "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": null}', "is empty"),
        ('{"answer": 1}', "is empty"),
        ('{"prompt": "  "}', "is empty"),
        ('{"prompt": 3}', "is int"),
        ('{"prompt": []}', "is empty"),
        ('{"prompt": ["hi"]}', "no role"),
        ('{"prompt": [{"role": "human", "content": "hi"}]}', "no role"),
        ('{"prompt": [{"role": "user"}]}', "no text"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "assistant"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=reason) as caught:
        load_rows(file_settings(path), 0, "prompts.train")
    assert caught.value.field == f"{path}:2"
    assert "\n" not in str(caught.value)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.arrow").write_text("no")
    (tmp_path / "folder").mkdir()
    reasons = {
        "none.jsonl": "does not exist",
        "a.csv": "unknown kind",
        "empty.jsonl": "has no rows",
        "bad.parquet": "cannot be read",
        "bad.arrow": "cannot be read",
        "folder": "has no",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as caught:
            load_rows(file_settings(tmp_path / name), 0, "prompts.train")
        assert caught.value.field == "prompts.train.path"
    for name in ("a.parquet", "a.jsonl"):
        write(tmp_path / name, [{"prompts": "x", "answer": 1}])
        with pytest.raises(InputError, match="nearest are prompts"):
            load_rows(file_settings(tmp_path / name), 0, "prompts.train")


def test_size_takes_distinct_prompts_or_says_how_many_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, *ROWS])
    assert load_rows(file_settings(path, size=2), 0, "t") == ROWS
    assert len(load_rows(file_settings(path), 0, "t")) == 4
    with pytest.raises(InputError, match="only 2 distinct"):
        load_rows(file_settings(path, size=3), 0, "t")


# --- procedural ---


def test_procedural_rows_are_distinct_and_drawn_again_the_same() -> None:
    settings = DatasetSettings(procedural="chain_sum", size=150, args=ONE_DIGIT)
    rows = load_rows(settings, 3, "prompts.train")
    assert len({r["prompt"] for r in rows}) == len(rows) == 150
    assert rows == load_rows(settings, 3, "prompts.train")
    assert rows != load_rows(settings, 4, "prompts.train")
    assert rows != load_rows(settings, 3, "prompts.eval")
    assert all(r["prompt"] == r["entry"]["question"] and r["answer"] == r["entry"]["answer"] for r in rows)


def test_an_exhausted_question_space_says_how_many_questions_it_has() -> None:
    with pytest.raises(InputError, match=r"only \d+ distinct questions.*use size=\d+ or less") as caught:
        load_rows(DatasetSettings(procedural="chain_sum", size=5000, args=ONE_DIGIT), 0, "prompts.train")
    assert caught.value.field == "prompts.train.size"


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("chain_sums", {}, "near: chain_sum"),
        ("chain_sum", {"min_term": 1}, "min_term"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses"),
        ("chain_sum", {"seed": 1}, "run.seed"),
    ],
)
def test_a_wrong_procedural_dataset_is_refused(name: str, args: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_rows(DatasetSettings(procedural=name, size=5, args=args), 0, "prompts.train")


# --- prompts ---


def test_a_plain_prompt_is_wrapped_and_tokenised_once() -> None:
    (chat,) = prompts_of("2+2", template="Q: {prompt} {x}", system="be brief")
    assert chat.text == "<system>be brief<user>Q: 2+2 {x}<assistant>"
    assert chat.token_ids.dtype == np.int32 and tokenizer_with().decode(chat.token_ids) == chat.text
    assert chat.source == "2+2"
    (plain,) = prompts_of("2+2", template="Q: {prompt}", chat=False)
    assert plain.text == "Q: 2+2" and plain.token_ids.tolist() == tokenizer_with().encode("Q: 2+2")


def test_messages_get_the_chat_template_and_keep_their_own_system_message() -> None:
    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    rows = [{"prompt": [user]}, {"prompt": [own, user]}]
    settings = prompt_settings(system="ours", chat=False, template="- {prompt}")
    first, second = build_prompts(rows, settings, tokenizer_with(), 100, "train")
    assert first.text == "<system>ours<user>hi<assistant>" and second.text == "<system>own<user>hi<assistant>"
    assert first.source == [user] and rows[0]["prompt"] == [user]


def test_prompt_ids_are_equal_exactly_where_the_rendered_texts_are() -> None:
    a, b, c = prompts_of("x", "y", "x")
    assert a.prompt_id == c.prompt_id != b.prompt_id and len(a.prompt_id) == 32
    assert prompts_of("x", system="s")[0].prompt_id != a.prompt_id


def test_further_columns_travel_as_json_values() -> None:
    rows = [{"prompt": "x", "answer": np.int64(3), "pair": (1, 2), "vector": np.ones(2), "none": None}]
    (prompt,) = build_prompts(rows, prompt_settings(), tokenizer_with(), 100, "train")
    assert prompt.columns == {"answer": 3, "pair": [1, 2], "vector": [1.0, 1.0], "none": None}
    with pytest.raises(InputError, match="bytes is not JSON"):
        build_prompts([{"prompt": "x", "image": b"1"}], prompt_settings(), tokenizer_with(), 100, "train")
    with pytest.raises(InputError, match="completions"):
        build_prompts([{"prompt": "x", "completions": 1}], prompt_settings(), tokenizer_with(), 100, "train")


def test_a_prompt_that_cannot_be_shown_to_the_model_is_refused() -> None:
    def refused(reason: str, prompt: Any = "hello", template: str | None = CHAT, **more: Any) -> str:
        with pytest.raises(InputError, match=reason) as caught:
            build_prompts([{"prompt": prompt}], prompt_settings(**more), tokenizer_with(template), 10, "prompts.eval")
        return caught.value.field

    assert refused("has 22 tokens, and 1 to 10 are allowed") == "prompts.eval row 0"
    assert refused("set prompts.chat=false", template=None) == "prompts.chat"
    assert refused("needs a chat template", [{"role": "user", "content": "x"}], None, chat=False) == "prompts.chat"
    assert refused("no tools", [{"role": "tool", "content": "x"}]) == "prompts.eval row 0"
    with pytest.raises(InputError, match="put {prompt} into it"):
        prompts_of("x", template="no place")
    with pytest.raises(InputError, match="no system message"):
        prompts_of("x", chat=False, system="s")


# --- train and eval ---


def test_train_and_held_out_share_no_question() -> None:
    train, held = prompts_of("a", "b", "b", "c"), prompts_of("b", "d", "d", "e")
    kept, left, report = split_disjoint(train, held)
    assert kept == train and [p.source for p in left] == ["d", "e"]
    assert (report.num_train, report.num_train_distinct, report.num_eval, report.num_eval_distinct) == (4, 3, 2, 2)
    assert report.num_removed == 2
    kept, left, report = split_disjoint(train, held, remove_from="train")
    assert [p.source for p in kept] == ["a", "c"] and [p.source for p in left] == ["b", "d", "e"]
    assert report.num_removed == 3


def test_a_held_out_set_that_vanishes_is_refused() -> None:
    with pytest.raises(InputError, match="none is left") as caught:
        split_disjoint(prompts_of("a", "b"), prompts_of("b"))
    assert caught.value.field == "prompts.eval"


def test_a_small_question_space_serves_both_sets_in_full() -> None:
    def dataset(size: int) -> DatasetSettings:
        return DatasetSettings(procedural="chain_sum", size=size, args=ONE_DIGIT)

    settings = PromptSettings(train=dataset(100), eval=dataset(60))
    train, held, report = load_prompts(settings, tokenizer_with(), 200, seed=0)
    assert (len(train), len(held), report.num_removed) == (100, 60, 0)
    assert not {p.prompt_id for p in train} & {p.prompt_id for p in held}
    other = PromptSettings(train=dataset(50), eval=dataset(60))
    assert [p.prompt_id for p in load_prompts(other, tokenizer_with(), 200, seed=0)[1]] == [p.prompt_id for p in held]
    with pytest.raises(InputError, match="besides the 60 that are held out"):
        load_prompts(PromptSettings(train=dataset(2000), eval=dataset(60)), tokenizer_with(), 200, seed=0)


def test_questions_of_a_train_file_leave_eval(tmp_path: Path) -> None:
    train = file_settings(write(tmp_path / "train.jsonl", [{"prompt": p} for p in "abc"]))
    held = file_settings(write(tmp_path / "eval.jsonl", [{"prompt": p} for p in "cde"]))
    kept, left, _ = load_prompts(PromptSettings(train=train, eval=held), tokenizer_with(), 100, 0)
    assert ([p.source for p in kept], [p.source for p in left]) == (["a", "b", "c"], ["d", "e"])
    kept, left, report = load_prompts(PromptSettings(train=train), tokenizer_with(), 100, 0)
    assert (len(kept), left, report.num_eval) == (3, [], 0)


# --- the stream ---


def sources(stream: PromptStream, first: int, n: int) -> list[str]:
    return [stream.at(position).source for position in range(first, first + n)]


def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(prompts_of(*"abcdefgh"), seed=1)
    epochs = [sources(stream, 8 * epoch, 8) for epoch in range(4)]
    assert all(sorted(e) == list("abcdefgh") for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert sources(PromptStream(prompts_of(*"abcdefgh"), seed=1), 0, 8) == epochs[0]
    assert sources(PromptStream(prompts_of(*"abcdefgh"), seed=2), 0, 8) != epochs[0]
    assert sources(PromptStream(prompts_of(*"abc"), seed=1, shuffle=False), 0, 5) == list("abcab")


def test_a_position_holds_the_same_prompt_whenever_and_by_whomever_it_is_asked_for() -> None:
    expected = sources(PromptStream(prompts_of(*"abcdef"), seed=3), 0, 20)
    again = PromptStream(prompts_of(*"abcdef"), seed=3)
    assert {n: again.at(n).source for n in (17, 2, 9, 19, 0, 17)} == {n: expected[n] for n in (17, 2, 9, 19, 0)}


def test_a_state_of_other_prompts_or_another_order_is_refused() -> None:
    state = json.loads(json.dumps(PromptStream(prompts_of(*"abc"), seed=3).identity()))
    PromptStream(prompts_of(*"abc"), seed=3).check(state | {"position": 7})
    others = [(prompts_of(*"abd"), 3, True), (prompts_of(*"abcd"), 3, True), (prompts_of(*"bac"), 3, True)]
    for prompts, seed, shuffle in [*others, (prompts_of(*"abc"), 4, True), (prompts_of(*"abc"), 3, False)]:
        with pytest.raises(InputError, match="not the 3 prompts"):
            PromptStream(prompts, seed, shuffle).check(state)
    with pytest.raises(InputError, match="no prompts"):
        PromptStream([], 0)


def test_all_turns_of_one_question_have_different_occurrences() -> None:
    stream = PromptStream(prompts_of(*"abbac"), seed=5)
    turns = [(p.prompt_id, stream.occurrence(n)) for n in range(25) for p in [stream.at(n)]]
    assert len(set(turns)) == 25
    distinct = PromptStream(prompts_of(*"abc"), seed=5)
    assert [distinct.occurrence(n) for n in range(9)] == [0] * 3 + [1] * 3 + [2] * 3


# --- seeds ---


def test_a_seed_is_named_by_run_prompt_sample_and_epoch_alone() -> None:
    names = [(r, p, i, e) for r in range(3) for p in ("a", "b", "a/1") for i in range(12) for e in range(12)]
    seeds = [sample_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert seeds == [sample_seed(*name) for name in names]
    assert all(0 <= s < 2**63 for s in seeds) and max(seeds) > 2**62


def test_a_seed_stays_the_same_across_releases() -> None:
    assert sample_seed(0, "a", 0, 0) == 37397615214725378
