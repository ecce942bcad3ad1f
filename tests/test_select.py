"""Rejection sampling and best-of-n answers: what is kept of the candidates, what is refused, runs on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from launch import label as labelling
from launch import select
from launch.label_records import RecordFile
from launch.overrides import expect_command, load_config
from launch.select_config import SelectConfig, SelectSettings
from launch.select_records import METADATA_KEY, Selection, answer_rows, choose, sft_rows
from trainers.errors import InputError
from trainers.examples import Example, encode_example
from trainers.prompt_format import PromptFormat

TINY = "builtin:tiny-llama"
Candidate = tuple[str, float | None, str]  # text, score, why it ended


def record_of(*candidates: Candidate, prompt: Any = "2 + 2?", position: int = 0, turn: int = 0) -> dict[str, Any]:
    return {
        "position": position, "turn": turn, "prompt_id": str(prompt), "prompt": prompt, "prompt_ids": [1, 2],
        "columns": {"answer": "4"},
        "candidates": [
            {"text": text, "ids": [3], "finish_reason": why, "seed": i, "temperature": 1.0}
            for i, (text, _, why) in enumerate(candidates)
        ],
        "labels": {"scores": [score for _, score, _ in candidates], "outcomes": [], "dropped": {}},
    }  # fmt: skip


def raw_config(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    question = {"procedural": "chain_sum", "args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    raw: dict[str, Any] = {
        "run": {"name": "chosen", "directory": str(tmp_path)},
        "model": {"path": TINY},
        "prompts": {"train": {**question, "size": 6}},
        "sampling": {"num_candidates": 4, "max_tokens": 8},
        "label": {"source": "function", "rewards": [{"function": "bare_number"}]},
        "select": {},
        "cluster": {"backend": "in_process", "device": "cpu"},
    }
    return raw | sections


def config(tmp_path: Path, **sections: Any) -> SelectConfig:
    return SelectConfig.model_validate(raw_config(tmp_path, **sections))


# --- what is kept ---------------------------------------------------------------------------------

MIXED = record_of(
    ("good", 2.0, "stop"), ("best", 3.0, "stop"), ("cut", 9.0, "length"), ("good", 2.0, "stop"), ("bad", 0.0, "stop"),
    ("lost", None, "stop"), (" ", None, "stop"), ("gone", None, "abort"),
)  # fmt: skip


def test_the_best_answer_is_kept_and_every_other_one_is_counted_with_its_reason() -> None:
    kept, dropped = choose(MIXED, SelectSettings())
    assert kept == [1]
    assert dropped == {"truncated": 1, "duplicate": 1, "unscored": 1, "empty": 1, "aborted": 1, "not_among_top_k": 2}
    assert len(kept) + sum(dropped.values()) == len(MIXED["candidates"])


def test_the_top_k_are_different_texts_best_first() -> None:
    assert choose(MIXED, SelectSettings(top_k=2))[0] == [1, 0]
    assert choose(MIXED, SelectSettings(top_k=3))[0] == [1, 0, 4]  # not the same text twice


def test_a_threshold_keeps_what_reaches_it_and_both_together_the_best_of_those() -> None:
    assert choose(MIXED, SelectSettings(top_k=None, threshold=2.0))[0] == [1, 0]
    assert choose(MIXED, SelectSettings(top_k=1, threshold=2.0))[0] == [1]
    kept, dropped = choose(MIXED, SelectSettings(threshold=3.5))
    assert kept == [] and dropped["below_threshold"] == 4


def test_answers_that_were_cut_are_kept_where_that_is_asked_for() -> None:
    assert choose(MIXED, SelectSettings(drop_truncated=False))[0] == [2]


def test_an_answer_that_an_earlier_turn_gave_is_a_duplicate_and_none_is_promoted_in_its_place() -> None:
    first = record_of(("4", 1.0, "stop"), ("5", 0.0, "stop"))
    again = record_of(("4", 1.0, "stop"), ("6", 0.5, "stop"), position=1, turn=1)
    other = record_of(("4", 1.0, "stop"), ("7", 0.0, "stop"), prompt="1 + 3?", position=2)
    selection = Selection()
    rows = list(sft_rows([first, again, other], SelectSettings(), selection))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("2 + 2?", "4"), ("1 + 3?", "4")]
    found = selection.to_dict()
    assert found["dropped"] == {"not_among_top_k": 3, "duplicate": 1}
    assert (found["num_prompts"], found["num_rows"], found["num_prompts_without"]) == (3, 2, 1)
    assert found["num_candidates"] == found["num_rows"] + sum(found["dropped"].values())
    assert found["mean_score_sampled"] == pytest.approx(3.5 / 6) and found["mean_score_kept"] == 1.0


def test_messages_are_answered_by_messages_and_both_forms_are_read_by_sft() -> None:
    tokenizer = load_tokenizer(resolve_model(TINY))
    for prompt in ("2 + 2?", [{"role": "user", "content": "2 + 2?"}]):
        (row,) = sft_rows([record_of(("4", 1.0, "stop"), prompt=prompt)], SelectSettings(), Selection())
        form = PromptFormat(chat=not isinstance(prompt, str))
        example = encode_example(row, tokenizer, 512, form=form)
        assert isinstance(example, Example)
        assert "4" in tokenizer.decode(example.input_ids[example.mask])


def test_every_prompt_has_an_answer_row_and_the_scores_of_all_candidates() -> None:
    nothing = record_of(("", None, "stop"), ("x", None, "stop"), position=1)
    selection = Selection()
    best, none = answer_rows([MIXED, nothing], SelectSettings(), selection)
    assert (best["completion"], best["score"], best["candidate"]) == ("best", 3.0, 1)
    assert best["scores"] == MIXED["labels"]["scores"] and len(best["scores"]) == 8
    assert none["completion"] is None and none["score"] is None and none["scores"] == [None, None]
    assert selection.num_prompts_without == 1 and selection.num_rows == 1


# --- configuration --------------------------------------------------------------------------------


def test_who_scores_one_by_one_needs_no_pairs_and_who_compares_needs_all(tmp_path: Path) -> None:
    pair = {"source": "function", "pair": {"function": "trainers.planted:planted_human", "args": {"noise": 1.0}}}
    assert config(tmp_path).labelling("sft").keep.pairs == "random"
    assert config(tmp_path, label=pair).labelling("sft").keep.pairs == "all"


def test_the_file_stands_in_the_run_folder_or_where_it_is_asked_for(tmp_path: Path) -> None:
    assert config(tmp_path).target("sft") == tmp_path / "chosen" / "sft.parquet"
    assert config(tmp_path, output={"format": "jsonl"}).target("answers").name == "answers.jsonl"
    assert config(tmp_path, output={"path": "/data/x.parquet"}).target("sft") == Path("/data/x.parquet")


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("sampling.num_candidates=0", "sampling.num_candidates", "at least 1"),
        ("select.top_k=0", "select.top_k", "greater than or equal to 1"),
        ("select.top_k=17", "select.top_k", "use at most 16"),
        ("select={top_k: null}", "select.top_k", "every answer would be kept"),
        ("select.threshold=high", "select.threshold", "a number"),
        ("select.treshold=1", "select.treshold", "select.threshold"),
        ("prompts.eval={procedural: chain_sum, size: 3}", "prompts.eval", "nothing is evaluated here"),
        ("generator.sampling.max_tokens=9", "generator.sampling", "use sampling"),
        ("label.source=judge", "label", "needs judge"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(override: str, field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("cpu-rejection", [override])
    assert caught.value.field.startswith(field) and words in str(caught.value) and "\n" not in str(caught.value)


def test_one_answer_cannot_be_compared_with_others(tmp_path: Path) -> None:
    pair = {"source": "function", "pair": {"function": "trainers.planted:planted_human", "args": {"noise": 1.0}}}
    with pytest.raises(ValidationError, match="one has nothing beside it"):
        config(tmp_path, label=pair, sampling={"num_candidates": 1})
    assert config(tmp_path, sampling={"num_candidates": 1}).sampling.num_candidates == 1


def test_a_recipe_of_another_kind_is_sent_to_its_command() -> None:
    chosen = load_config("cpu-rejection").config
    expect_command(chosen, "select", "cpu-rejection")
    expect_command(chosen, "answer", "cpu-rejection")
    with pytest.raises(InputError, match="use `burnish select`"):
        expect_command(chosen, "train", "cpu-rejection")
    with pytest.raises(InputError, match="use `burnish train`"):
        expect_command(load_config("cpu-demo").config, "answer", "cpu-demo")


# --- whole runs, with the records of a run that was made up -------------------------------------------


def made_up(folder: Path, *records: dict[str, Any]) -> None:
    """A run folder in which everything was sampled and scored."""
    folder.mkdir(parents=True)
    file = RecordFile(folder / "labelled.jsonl")
    for record in records:
        file.append(record)
    file.close()


def resumed(monkeypatch: pytest.MonkeyPatch, settings: SelectConfig) -> None:
    """Let a resumed run begin: its identity is the one it was started with."""
    found = labelling.prepare_label(settings.labelling("sft"))
    folder = Path(settings.run.directory) / settings.run.name
    (folder / labelling.MANIFEST).write_text(json.dumps(found.identity.to_json()))


SUMS = [record_of((f"{i}", i / 5, "stop"), ("x", 0.0, "stop"), prompt=f"q{i}", position=i) for i in range(6)]


def test_the_sft_set_is_written_with_its_provenance_and_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, select={"threshold": 0.5})
    made_up(tmp_path / "chosen", *SUMS)
    resumed(monkeypatch, settings)
    table = pq.read_table(select.select_answers(settings, Console(quiet=True), resume=True))
    assert [(r["prompt"], r["completion"]) for r in table.to_pylist()] == [("q3", "3"), ("q4", "4"), ("q5", "5")]
    assert json.loads(table.schema.metadata[METADATA_KEY])["config"]["select"]["threshold"] == 0.5
    summary = json.loads((tmp_path / "chosen" / "summary.json").read_text())
    assert summary["num_rows"] == 3 and summary["dropped"] == {"below_threshold": 9}


def test_a_threshold_that_nothing_reaches_is_refused_and_a_lower_one_takes_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, select={"threshold": 7.0})
    made_up(tmp_path / "chosen", *SUMS)
    resumed(monkeypatch, settings)
    with pytest.raises(InputError) as caught:
        select.select_answers(settings, Console(quiet=True), resume=True)
    assert caught.value.field == "select.threshold" and "the highest score is 1" in str(caught.value)
    assert not (tmp_path / "chosen" / "sft.parquet").exists()
    lower = config(tmp_path, select={"threshold": 1.0})
    assert pq.read_table(select.select_answers(lower, Console(quiet=True), resume=True)).num_rows == 1


def test_a_run_without_a_single_score_is_refused_with_what_counts_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    made_up(tmp_path / "chosen", *(record_of(("x", None, "stop"), prompt=f"q{i}", position=i) for i in range(6)))
    resumed(monkeypatch, settings)
    with pytest.raises(InputError, match="none is kept: unscored 6"):
        select.select_answers(settings, Console(quiet=True), resume=True)


def test_answers_are_written_a_row_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, output={"format": "jsonl"}, select={"threshold": 0.3})
    made_up(tmp_path / "chosen", *SUMS)
    resumed(monkeypatch, settings)
    file = select.answer_prompts(settings, Console(quiet=True), resume=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["completion"] for row in rows] == [None, None, "2", "3", "4", "5"]
    assert rows[2]["score"] == 0.4 and rows[2]["scores"] == [0.4, 0.0]


def test_a_resumed_run_replaces_its_own_file_and_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "human.parquet"
    theirs.write_bytes(b"by people")
    settings = config(tmp_path, output={"path": str(theirs)})
    made_up(tmp_path / "chosen", *SUMS)
    resumed(monkeypatch, settings)
    for command in (select.select_answers, select.answer_prompts):
        with pytest.raises(InputError, match="this run did not write it") as caught:
            command(settings, Console(quiet=True), resume=True)
        assert caught.value.field == "output.path" and theirs.read_bytes() == b"by people"
    own = config(tmp_path, output={"path": str(tmp_path / "own.parquet")}, select={"threshold": 0.5})
    assert pq.read_table(select.select_answers(own, Console(quiet=True), resume=True)).num_rows == 3
    lower = own.model_copy(update={"select": SelectSettings(threshold=0.3)})
    assert pq.read_table(select.select_answers(lower, Console(quiet=True), resume=True)).num_rows == 4
    (tmp_path / "own.parquet").write_bytes(b"mended by people")
    with pytest.raises(InputError, match="this run did not write it as it is now"):
        select.select_answers(own, Console(quiet=True), resume=True)
    within = config(tmp_path, output={"path": str(tmp_path / "chosen" / "labelled.jsonl")})
    with pytest.raises(InputError, match="a file of the run itself"):
        select.select_answers(within, Console(quiet=True), resume=True)


def test_more_than_the_best_answer_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one answer, the best"):
        select.answer_prompts(config(tmp_path, select={"top_k": 2}), Console(quiet=True))
    with pytest.raises(InputError, match="leave out --resume"):
        select.answer_one(config(tmp_path), "2 + 2?", Console(quiet=True), resume=True)


def test_one_prompt_is_a_dataset_and_a_verifier_without_its_column_is_refused(tmp_path: Path) -> None:
    one = select.of_one_prompt(config(tmp_path), "2 + 2?", str(tmp_path / "scratch"))
    (prompt,) = labelling.prepare_label(one.labelling("answers")).prompts
    assert prompt.source == "2 + 2?" and one.target("answers").parent.parent == tmp_path / "scratch"
    needs_entry = select.of_one_prompt(load_config("cpu-rejection", [f"model.path={TINY}"]).config, "2 + 2?", "x")
    with pytest.raises(InputError, match="entry"):
        labelling.prepare_label(needs_entry.labelling("answers"))


# --- with engines ---------------------------------------------------------------------------------

LETTERS = "def letters(completions):\n    return [float(sum(c.isalpha() for c in text)) for text in completions]\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_are_sampled_kept_and_learned_from(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(LETTERS)
    rewards = {"source": "function", "rewards": [{"function": f"{tmp_path}/score.py:letters"}]}
    settings = config(tmp_path, label=rewards, select={"top_k": 2, "drop_truncated": False})
    target = select.select_answers(settings, Console(quiet=True))
    rows = pq.read_table(target).to_pylist()
    assert 6 <= len(rows) <= 12 and all(row["score"] == sum(c.isalpha() for c in row["completion"]) for row in rows)
    with pytest.raises(InputError, match="exists already"):
        select.select_answers(settings, Console(quiet=True))
    learn = [
        sys.executable, "-m", "launch.cli", "train", "cpu-sft", f"model.path={TINY}",
        f"data.train=[{{path: {target}}}]", "data.eval=null", "data.format.chat=true", f"run.directory={tmp_path}",
        "run.num_steps=2", "run.batch_size=4", "cluster.backend=in_process", "telemetry.wandb=disabled",
    ]  # fmt: skip
    # A process of its own: DeepSpeed does not survive the end of vLLM's process group.
    root = Path(__file__).parents[1]
    done = subprocess.run(learn, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "cpu-sft" / "export").glob("step-*/model.safetensors"))


@pytest.mark.slow
def test_one_prompt_is_answered_by_its_best_sample_and_leaves_nothing_behind(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "score.py").write_text(LETTERS)
    rewards = {"source": "function", "rewards": [{"function": f"{tmp_path}/score.py:letters"}]}
    settings = config(place, label=rewards, select={"drop_truncated": False})
    row = select.answer_one(settings, "Write a word.", Console(quiet=True))
    assert row["score"] == max(score for score in row["scores"] if score is not None) and len(row["scores"]) == 4
    assert not list(place.iterdir())
