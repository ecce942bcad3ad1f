"""Constitutional AI: answers are criticised, revised, judged and written as data; judge and writer are planted.

The planted writer takes the word "damn" out of an answer, the planted judge prefers fewer of them: a small model could
do neither.  Both are stand-ins behind an endpoint; nothing here starts an engine but the test that is marked slow.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from chain_model import chain_model
from pydantic import ValidationError
from rich.console import Console
from stand_in import StandIn, between

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from launch.cli import main
from launch.constitution_files import load_constitution
from launch.recipe_files import parse_yaml
from launch.redaction import REDACTED
from launch.revise import RECORDS, SUMMARY, revise_answers
from launch.revise_config import ReviseConfig
from launch.revise_records import METADATA_KEY, record_of, rounds_of
from trainers.asking import Question, Reply
from trainers.constitution import Constitution, WritingSettings, draw, revise
from trainers.errors import EndpointBrokenError, InputError
from trainers.examples import Example, encode_example
from trainers.experience import Prompt
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat

TINY = "builtin:tiny-llama"
SWORN = "The damn answer is {i}, damn it."


def planted(text: str) -> str:
    """Criticises, revises and judges by the number of times that "damn" is said."""
    if text.startswith("Criticise"):
        return "It swears." if "damn" in between(text, "[Answer]", "\n\n") else "Nothing is wrong."
    if text.startswith("Rewrite"):
        return between(text, "[Answer]\n", "\n\n").replace("damn ", "")
    a, b = between(text, "[Answer A]\n", "\n\n"), between(text, "[Answer B]\n", "\n\n")
    counts = a.count("damn"), b.count("damn")
    return "[[C]]" if counts[0] == counts[1] else "[[A]]" if counts[0] < counts[1] else "[[B]]"


def prompt_file(folder: Path, num: int, messages: bool = False) -> str:
    file = folder / "prompts.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}] if messages else f"Question {i}?",
         "answer": SWORN.format(i=i) if i % 5 else f"It is {i}."}
        for i in range(num)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config_of(folder: Path, url: str, num: int = 10, messages: bool = False, **revise_keys: Any) -> ReviseConfig:
    endpoint = {"base_url": url, "model": "planted", "num_retries": 0, "patience_s": 0.2}
    raw = {
        "run": {"name": "revised", "directory": str(folder / "runs"), "seed": 3},
        "model": {"path": TINY},
        "prompts": {"train": {"path": prompt_file(folder, num, messages)}, "chat": messages},
        "revise": {"answer_column": "answer", "writer": {"endpoint": endpoint}, "judge": {"endpoint": endpoint},
                   **revise_keys},
    }  # fmt: skip
    return ReviseConfig.model_validate(raw)


def run(config: ReviseConfig, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    folder = revise_answers(config, Console(quiet=True), resume)
    return folder, json.loads((folder / SUMMARY).read_text())


# --- the flow, pure -------------------------------------------------------------------------------


class Scripted:
    """Says what ``says`` makes of a question."""

    def __init__(self, says: Callable[[str], Reply]) -> None:
        self.says, self.questions = says, list[Question]()

    async def ask(self, question: Question) -> Reply:
        self.questions.append(question)
        return self.says(question.text)

    async def close(self) -> None: ...


def principles(num: int) -> Constitution:
    rows = [{"name": f"p{i}", "critique": f"C{i}?", "revision": f"R{i}!", "judge": f"J{i}."} for i in range(num)]
    return Constitution.model_validate({"principles": rows})


def test_every_round_criticises_and_revises_what_the_round_before_left() -> None:
    writer = Scripted(lambda text: Reply(text.count("x") * "x" + ("c" if text.startswith("Criticise") else "x")))
    critique, revision = "Criticise {answer} {request}", "{answer}{request}{critique}"
    settings = WritingSettings(critique_template=critique, revision_template=revision)
    found = asyncio.run(revise(writer, settings, principles(2).principles, "P", "x", 0))
    asked = [q.text for q in writer.questions]
    assert asked == ["Criticise x C0?", "xR0!xc", "Criticise xxx C1?", "xxxR1!xxxc"]
    rounds = [(r.principle, r.critique, r.revision) for r in found.rounds]
    assert rounds == [("p0", "xc", "xxx"), ("p1", "xxxc", "x" * 7)]
    assert found.final == "x" * 7 and found.original == "x"


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (Reply("torn", cut_off=True), ("revision", "cut_off")), (Reply(" "), ("critique", "empty")),
        (Reply("", "timeout"), ("critique", "timeout")),
    ],
)  # fmt: skip
def test_a_round_that_fails_leaves_no_half_revision_and_what_was_asked_and_said_before(
    reply: Reply, failure: tuple[str, str]
) -> None:
    found = asyncio.run(revise(Scripted(lambda _: reply), WritingSettings(), principles(1).principles, "P", "A", 0))
    assert found.failure == failure and found.final is None and not found.rounds
    critique = "torn" if failure[0] == "revision" else None
    assert found.unfinished == ("p0", critique)
    record = record_of(0, 0, Prompt("id", np.zeros(1, np.int32), "P"), {}, found, None)
    assert (record["principles"], record["critiques"], record["revisions"]) == (["p0"], [critique], [None])
    assert rounds_of(record) == ()


def test_rounds_that_were_done_are_not_asked_for_again_and_lead_to_the_same_answer() -> None:
    def says(text: str) -> Reply:
        return Reply(str(len(text)))

    drawn = draw(principles(3).principles, 2, 7)
    assert draw(principles(3).principles, 1, 7) == drawn[:1], "a run of more rounds begins with those of fewer"
    first, whole, rest = Scripted(says), Scripted(says), Scripted(says)
    one = asyncio.run(revise(first, WritingSettings(), drawn[:1], "P", "A", 5))
    two = asyncio.run(revise(whole, WritingSettings(), drawn, "P", "A", 5))
    assert asyncio.run(revise(rest, WritingSettings(), drawn, "P", "A", 5, done=one.rounds)) == two
    assert first.questions + rest.questions == whole.questions


def test_principles_are_drawn_by_seed_and_none_comes_again_before_all_have_come() -> None:
    kept = principles(3).principles
    drawn = [draw(kept, 7, seed) for seed in range(20)]
    assert drawn == [draw(kept, 7, seed) for seed in range(20)]
    assert all({p.name for p in row[:3]} == {p.name for p in row[3:6]} == {"p0", "p1", "p2"} for row in drawn)
    assert len({tuple(p.name for p in row) for row in drawn}) > 3


def test_the_constitution_that_comes_with_burnish_is_whole_and_others_are_read_as_yaml_or_json(tmp_path: Path) -> None:
    assert len(load_constitution("default", "f").principles) >= 3
    file = tmp_path / "mine.json"
    file.write_text(principles(2).model_dump_json())
    assert load_constitution(str(file), "f") == principles(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("principles: []", "principles"), ("principles: [{name: a, critique: c, revision: r}]", "principles.0.judge"),
        ("- a", "not a mapping"), ("principles: {", "not valid YAML"), ("rules: []", "nearest one is principles"),
        ("principles: [{name: a, critique: c, revision: r, judge: j}, {name: a, critique: c, revision: r, judge: j}]",
         "names must differ"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_constitution_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        load_constitution(str(tmp_path / "c.yaml"), "revise.constitution")
    assert says in str(refused.value) and str(refused.value).startswith("revise.constitution")
    with pytest.raises(InputError, match="cannot be read"):
        load_constitution(str(tmp_path / "none.yaml"), "revise.constitution")


# --- whole runs, against a stand-in ---------------------------------------------------------------


@pytest.mark.parametrize("messages", [False, True])
def test_revised_answers_win_over_the_originals_by_a_planted_judge_in_both_orders(
    tmp_path: Path, messages: bool
) -> None:
    with StandIn(planted) as server:
        folder, summary = run(config_of(tmp_path, server.url, messages=messages))
    assert summary["num_revised"] == 10 and summary["num_unchanged"] == 2
    assert (summary["num_wins"], summary["num_ties"], summary["num_losses"]) == (8, 2, 0)
    assert summary["win_rate"]["value"] == 0.9 and summary["win_rate"]["low"] > 0.5
    assert summary["judge"]["consistency"]["value"] == 1.0 and summary["judge"]["num_asked"] == 8
    sft = pq.read_table(folder / "sft.parquet").to_pylist()
    pairs = pq.read_table(folder / "preferences.parquet").to_pylist()
    assert len(sft) == 10 and len(pairs) == 8 and summary["dropped"] == {"identical": 2}
    names = {p.name for p in load_constitution("default", "f").principles}
    for row in [*sft, *pairs]:
        assert len(row["principles"]) == len(row["critiques"]) == len(row["revisions"]) == 1
        assert row["principles"][0] in names and row["critiques"][0]
    tokenizer, form = load_tokenizer(resolve_model(TINY)), PromptFormat(chat=False)
    for row in sft:
        assert isinstance(encode_example(row, tokenizer, 512, form=form), Example)
    for row in pairs:
        comparison = read_comparison(row, "row", tokenizer, form)
        said = tokenizer.decode(comparison.completion_ids[comparison.pairs[0][0]].tolist())
        assert comparison.pairs == ((0, 1),) and "damn answer" not in said


def test_the_judge_is_told_the_principle_that_the_answer_was_revised_by(tmp_path: Path) -> None:
    with StandIn(planted) as server:
        folder, _ = run(config_of(tmp_path, server.url, num=4))
        judged = [q for q in server.questions if q.startswith("Which of two")]
    by_name = {p.name: p.judge for p in load_constitution("default", "f").principles}
    records = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    for record in records:
        asked = [q for q in judged if f"[Prompt]\n{record['prompt']}\n" in q]
        assert all(by_name[record["principles"][0]] in q for q in asked)
    assert len(judged) == 6


def test_a_run_that_its_endpoint_ended_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    async def breaks(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({}, status=503) if number > 9 else None

    with StandIn(planted, breaks) as server:
        config = config_of(tmp_path, server.url)
        with pytest.raises(EndpointBrokenError):
            run(config)
        answered = server.questions[2:9]  # after both probes
        server.fault = None
        del server.bodies[:]
        _, summary = run(config_of(tmp_path, server.url), resume=True)
        assert not {*answered} & {*server.questions}
    assert summary["num_revised"] == 10 and summary["num_wins"] == 8


def test_a_finished_run_is_given_more_rounds_and_is_then_as_if_it_had_had_them_from_the_start(tmp_path: Path) -> None:
    def records(folder: Path) -> dict[int, Any]:
        return {r["position"]: r for r in map(json.loads, (folder / RECORDS).read_text().splitlines())}

    def rewrites(text: str) -> str:
        return planted(text) + "!" if text.startswith("Rewrite") else planted(text)

    with StandIn(rewrites) as server:
        run(config_of(tmp_path, server.url, num=4))
        del server.bodies[:]
        folder, summary = run(config_of(tmp_path, server.url, num=4, num_rounds=2), resume=True)
        assert sum(q.startswith("Criticise") for q in server.questions) == 4, "no first round is asked for again"
        other = tmp_path / "other"
        other.mkdir()
        fresh, expected = run(config_of(other, server.url, num=4, num_rounds=2))
        with pytest.raises(InputError, match="revise.num_rounds = 1: the run has 2") as refused:
            run(config_of(tmp_path, server.url, num=4, num_rounds=1), resume=True)
        with pytest.raises(InputError, match="the run was started with 256") as refused:
            run(config_of(tmp_path, server.url, num=4, num_rounds=2, critique_max_tokens=9), resume=True)
    assert refused.value.field == "revise.critique_max_tokens"
    assert records(folder) == records(fresh) and {len(r["revisions"]) for r in records(folder).values()} == {2}
    assert {k: v for k, v in summary.items() if k != "usage"} == {k: v for k, v in expected.items() if k != "usage"}
    for name in ("sft", "preferences"):
        assert pq.read_table(folder / f"{name}.parquet").equals(pq.read_table(fresh / f"{name}.parquet"))


def test_a_key_in_a_configuration_does_not_leave_it(tmp_path: Path) -> None:
    secret = "hf_" + "q" * 30
    with StandIn(planted) as server:
        config = config_of(tmp_path, server.url, num=2)
        writer = config.revise.writer.model_copy(update={"system": f"Be brief. {secret}"})
        revise_keys = config.revise.model_copy(update={"writer": writer})
        folder, _ = run(config.model_copy(update={"revise": revise_keys}))
    shared = [folder / "revise.json", folder / "summary.json", folder / "sft.parquet", folder / "preferences.parquet"]
    assert all(secret.encode() not in file.read_bytes() for file in shared)
    metadata = pq.read_schema(folder / "sft.parquet").metadata[METADATA_KEY]
    assert json.loads(metadata)["config"]["revise"]["writer"]["system"] == REDACTED


def test_keep_wins_keeps_what_the_judge_prefers_and_a_judge_of_places_leaves_nothing(tmp_path: Path) -> None:
    with StandIn(lambda text: "[[A]]" if text.startswith("Which") else planted(text)) as server:
        folder, summary = run(config_of(tmp_path, server.url, keep="wins"))
    assert summary["num_sft_rows"] == summary["num_preference_rows"] == 0
    assert summary["dropped"] == {"inconsistent": 8, "identical": 2}
    assert summary["win_rate"]["value"] == 0.5 and summary["judge"]["consistency"]["value"] == 0.0
    assert pq.read_table(folder / "sft.parquet").num_rows == 0


def test_an_endpoint_that_dies_ends_the_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def dies(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({}, status=500) if number > 2 else None  # after both probes

    with StandIn(planted, dies) as server:
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(json.dumps(config_of(tmp_path, server.url).model_dump(mode="json", exclude_defaults=True)))
        assert main(["revise", str(recipe)]) == 1
        assert main(["revise", str(recipe), "--resume"]) == 2, "now the probe finds it broken"
        assert main(["label", str(recipe)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("burnish: ") for line in lines] == [True] * 3
    assert server.url in lines[0] and "500" in lines[0] and "burnish revise" in lines[2]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"revise": {"keep": "wins"}}, "nobody says which"), ({"prompts.eval": {"path": "x"}}, "nothing is evaluated"),
        ({"revise": {"critique_template": "{answer}"}}, "{request} must stand"),
        ({"generator": {"sampling": {"temperature": 0.5}}}, "generator.sampling"),
        ({"revise": {"answer_column": "a"}, "sampling": {"max_tokens": 9}}, "answer_column"),
        ({"sampling": {"stop": ["."]}}, "sampling.stop"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(keys: dict[str, Any], says: str) -> None:
    raw = {"run": {"name": "r"}, "model": {"path": TINY}, "prompts": {"train": {"path": "x.jsonl"}}, "revise": {}}
    for key, value in keys.items():
        if key == "prompts.eval":
            raw["prompts"]["eval"] = value  # type: ignore[index]
        else:
            raw[key] = value
    with pytest.raises(ValidationError, match=says):
        ReviseConfig.model_validate(raw)


def test_a_row_without_an_answer_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    config = config_of(tmp_path, "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="columns are answer"):
        run(config.model_copy(update={"revise": config.revise.model_copy(update={"answer_column": "reply"})}))


def on_own_engines(folder: Path, writer: str, judge: str) -> ReviseConfig:
    return ReviseConfig.model_validate(
        parse_yaml(
            f"""
run: {{name: own, directory: {folder}, num_prompts: 4}}
model: {{path: {TINY}}}
prompts: {{train: {{procedural: chain_sum, size: 4}}}}
sampling: {{max_tokens: 8}}
generator: {{kv_cache_gib: 0.25}}
revise:
  critique_max_tokens: 8
  revision_max_tokens: 8
  writer: {{{writer}}}
  judge: {{max_tokens: 4, {judge}}}
cluster: {{backend: in_process, device: cpu}}
"""
        )
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_writer_and_judge_on_engines_of_their_own_are_read(tmp_path: Path) -> None:
    own = "chat: false, generator: {kv_cache_gib: 0.25}"
    writer, judge = (chain_model(tmp_path / says, says) for says in ("ok", "A"))
    folder, summary = run(on_own_engines(tmp_path, f"path: {writer}, {own}", f"path: {judge}, {own}"))
    assert summary["num_answers"] == summary["num_revised"] == 4 and not sum(summary["failures"].values())
    rows = pq.read_table(folder / "sft.parquet").to_pylist()
    assert [row["completion"] for row in rows] == ["ok"] * 4 == [row["revisions"][-1] for row in rows]
    assert {critique for row in rows for critique in row["critiques"]} == {"ok"}
    assert summary["judge"]["consistency"]["value"] == 0.0, "it likes whatever comes first"
    assert summary["win_rate"]["value"] == 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_policy_criticises_and_revises_itself_on_its_own_engine(tmp_path: Path) -> None:
    folder, summary = run(on_own_engines(tmp_path, "", ""))
    # A tiny model says nonsense up to its last token: what is cut off is counted, and no half revision is written.
    assert summary["num_answers"] == 4 == summary["num_revised"] + sum(summary["failures"].values())
    assert pq.read_table(folder / "sft.parquet").num_rows == summary["num_revised"]
