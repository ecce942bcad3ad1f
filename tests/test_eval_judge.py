"""A language model as judge of `burnish eval`: asked in both orders, believed where both agree, counted where not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain_model import chain_model
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoModelForCausalLM

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.respondents import EngineRespondent
from launch.eval_config import EvalConfig
from launch.eval_files import write_results
from launch.eval_judge import judge_pairs
from launch.eval_prepare import PreparedEval, prepare_eval
from launch.eval_report import Answers, Measured, build_report
from launch.evaluate import evaluate_models
from launch.judging import pair_judge
from launch.label_config import JudgeSettings
from trainers.asking import Question
from trainers.errors import InputError
from trainers.experience import (
    FinishReason,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.protocols import GeneratedGroup, GroupRequest
from trainers.reply_cache import ReplyCache
from trainers.verdicts import judge_report

TINY = "builtin:tiny-llama"
JUDGE = {"path": TINY, "template": "Q {prompt} first<{a}> second<{b}>", "max_tokens": 4, "chat": False}
RAW: dict[str, Any] = {
    "run": {"name": "judged", "seed": 3},
    "model": {"path": TINY},
    "base": {"path": TINY},
    "prompts": {"train": {"procedural": "chain_sum", "size": 6}},
    "eval": {"judge": JUDGE, "num_samples": 2},
    "generator": {"sampling": {"max_tokens": 8}},
    "telemetry": {"wandb": "disabled"},
    "cluster": {"backend": "in_process", "device": "cpu"},
}
VERSION = WeightVersion(0, 0)


def config(tmp_path: Path, **sections: Any) -> EvalConfig:
    raw = {**RAW, **sections}
    return EvalConfig.model_validate({**raw, "run": {**raw["run"], "directory": str(tmp_path)}})


def group(number: int, *texts: str, finish: FinishReason = "stop") -> TrajectoryGroup:
    answers = tuple(
        Trajectory(i, i, np.zeros(3, np.int32), np.zeros(3, np.float32), text, finish, (VersionSpan(VERSION, 3),))
        for i, text in enumerate(texts)
    )
    question = f"Question {number}"
    return TrajectoryGroup(f"g{number}", Prompt(f"p{number}", np.arange(3), question, source=question), answers)


class FakeJudge:
    """A generator that answers what ``says`` makes of the two answers it is shown."""

    def __init__(self, says: Callable[[str, str], str], finish: FinishReason = "stop") -> None:
        self.says, self.finish, self.num_asked = says, finish, 0

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.num_asked += 1
        a, b = (request.prompt.text.split(f"{place}<")[1].split(">")[0] for place in ("first", "second"))
        answer = group(0, self.says(a, b), finish=self.finish)
        return GeneratedGroup(summarize(answer, "judge", 0.0), encode_group(answer))


def judged(
    says: Callable[[str, str], str], ours: list[str], theirs: list[str], max_length: int = 1000
) -> tuple[Measured, FakeJudge]:
    fake = FakeJudge(says)
    tokenizer = load_tokenizer(resolve_model(TINY))
    respondent = EngineRespondent(fake, tokenizer, max_length, False, "eval.judge")
    judge = pair_judge(JudgeSettings.model_validate(JUDGE), respondent)
    policy, base = ([group(i, text) for i, text in enumerate(texts)] for texts in (ours, theirs))
    found = asyncio.run(judge_pairs(judge, policy, base, 4))
    return Measured(Answers(policy, {}), Answers(base, {}), judgements=found), fake


def better(a: str, b: str) -> str:
    """Likes the letter x."""
    return "[[C]]" if a.count("x") == b.count("x") else "[[A]]" if a.count("x") > b.count("x") else "[[B]]"


def report_of(tmp_path: Path, measured: Measured) -> dict[str, Any]:
    ready = PreparedEval("policy", "base", 64, "prompts.train", [g.prompt for g in measured.policy.groups], [], {})
    return build_report(config(tmp_path, eval={"judge": JUDGE}), ready, measured)


def test_an_honest_judge_decides_the_win_rate(tmp_path: Path) -> None:
    measured, fake = judged(better, ["xx", "x", "a", "b"], ["x", "y", "xb", "c"])
    report = report_of(tmp_path, measured)
    assert [j.outcome for j in measured.judgements] == [1.0, 1.0, 0.0, 0.5] and fake.num_asked == 8
    assert report["win_by"] == "judge" and report["win_rate"]["judge"].raw.value == 2.5 / 4
    assert report["judge"]["consistency"].value == 1.0 and report["judge"]["first_place"].value == 0.5


def test_a_judge_that_favours_a_place_gives_nobody_a_win_and_is_shown_up(tmp_path: Path) -> None:
    measured, _ = judged(lambda a, b: "[[A]]", ["xx", "x"], ["y", "z"])
    report = report_of(tmp_path, measured)
    assert report["win_rate"]["judge"].raw.value == 0.5 and report["win_rate"]["judge"].num_ties == 2
    assert report["judge"]["consistency"].value == 0.0 and report["judge"]["first_place"].value == 1.0


def test_what_a_judge_mumbles_is_left_out_and_counted(tmp_path: Path) -> None:
    measured, _ = judged(lambda a, b: "Hm." if "m" in a + b else better(a, b), ["xx", "xm", "x"], ["y", "z", "q"])
    report = report_of(tmp_path, measured)
    assert report["win_rate"]["judge"].num_left_out == 1 and report["win_rate"]["judge"].raw.value == 1.0
    assert report["judge"]["num_unparsed"] == 1 and report["judge"]["num_asked"] == 3


def test_what_an_engine_replied_is_asked_once_of_one_model(tmp_path: Path) -> None:
    fake, tokenizer = FakeJudge(better), load_tokenizer(resolve_model(TINY))

    def ask(model: str, *questions: Question) -> list[str]:
        respondent = EngineRespondent(fake, tokenizer, 1000, False, "judge", ReplyCache(tmp_path), model)
        return [asyncio.run(respondent.ask(q)).text for q in questions]

    one, other = Question("first<x> second<y>", 8), Question("first<x> second<y>", 8, seed=1)
    assert ask("a", one, one) == ["[[A]]"] * 2 and fake.num_asked == 1
    assert ask("a", one, other) == ["[[A]]"] * 2 and fake.num_asked == 2
    assert ask("b", one) == ["[[A]]"] and fake.num_asked == 3, "another model"


def test_a_verdict_that_an_engine_gave_up_is_a_silence_and_no_verdict(tmp_path: Path) -> None:
    fake, tokenizer = FakeJudge(better, finish="abort"), load_tokenizer(resolve_model(TINY))
    respondent = EngineRespondent(fake, tokenizer, 1000, False, "eval.judge", ReplyCache(tmp_path))
    reply = asyncio.run(respondent.ask(Question("first<x> second<y>", 8)))
    assert (reply.silence, reply.text) == ("unavailable", "")
    assert not any(tmp_path.iterdir()), "it is asked again the next time"


def test_equal_answers_tie_and_too_long_ones_are_left_out_without_a_question() -> None:
    measured, fake = judged(better, ["same", "x" * 300], ["same", "y"], max_length=120)
    assert fake.num_asked == 0 and [j.why for j in measured.judgements] == ["identical", "too_long"]
    assert [j.outcome for j in measured.judgements] == [0.5, None]
    counts = judge_report(measured.judgements)
    assert (counts["num_asked"], counts["num_identical"], counts["num_too_long"]) == (0, 1, 1)


def test_every_verdict_stands_in_a_file_and_on_the_page(tmp_path: Path) -> None:
    measured, _ = judged(better, ["xx", "a"], ["x", "x"])
    path, prompts = resolve_model(TINY), [g.prompt for g in measured.policy.groups]
    ready = PreparedEval(path, path, 64, "prompts.train", prompts, [], {})
    settings = config(tmp_path, eval={"judge": JUDGE})
    write_results(tmp_path, settings, ready, measured, build_report(settings, ready, measured), Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(r["prompt_id"], r["outcome"], r["policy_first"], r["base_first"]) for r in rows] == [
        ("p0", 1.0, "[[A]]", "[[B]]"), ("p1", 0.0, "[[B]]", "[[A]]"),
    ]  # fmt: skip
    assert "asked 2 times in both orders" in (tmp_path / "eval.html").read_text()


def other_base(folder: Path) -> dict[str, str]:
    """A model that says something else under the same seeds."""
    base = AutoModelForCausalLM.from_pretrained(resolve_model(TINY))
    with torch.no_grad():
        base.lm_head.weight.copy_(base.lm_head.weight.roll(1, dims=0))
    base.save_pretrained(folder)
    load_tokenizer(resolve_model(TINY)).save_pretrained(folder)
    return {"path": str(folder)}


@pytest.mark.slow
def test_a_real_engine_s_verdicts_are_read(tmp_path: Path) -> None:
    judge = {**JUDGE, "path": chain_model(tmp_path / "judge", "A")}  # it likes whatever comes first
    settings = config(tmp_path, base=other_base(tmp_path / "base"), eval={"judge": judge})
    report = json.loads(evaluate_models(settings, Console(quiet=True)).read_text())
    counts, rate = report["judge"], report["win_rate"]["judge"]
    assert counts["num_asked"] > 0 == counts["num_unparsed"] and counts["first_place"]["value"] == 1.0
    assert counts["consistency"]["value"] == 0.0 and rate["num_left_out"] == 0 and rate["raw"]["value"] == 0.5


@pytest.mark.slow
def test_a_real_engine_that_marks_is_compared_with_people(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(5)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = {"path": chain_model(tmp_path / "marks", "k:7"), "chat": False, "max_tokens": 8,
             "rubric": {"axes": [{"name": "k", "question": "is it kind?"}]}}  # fmt: skip
    settings = config(
        tmp_path, judges=[judge], eval={"num_samples": 2, "preferences": str(tmp_path / "people.jsonl")}
    )
    report = json.loads(evaluate_models(settings, Console(quiet=True)).read_text())
    assert report["models"]["policy"]["rewards"]["judge_k"]["mean"]["value"] == pytest.approx(6 / 9)
    people = report["marks_agreement"]["judge"]["k"]
    assert people["rate"]["value"] == 0.5 and people["num_pairs"] == 5 and people["num_left_out"] == 0


@pytest.mark.slow
def test_a_real_engine_judges_and_its_nonsense_is_counted(tmp_path: Path) -> None:
    settings = config(tmp_path, base=other_base(tmp_path / "base"))
    report = json.loads(evaluate_models(settings, Console(quiet=True)).read_text())
    counts, rate = report["judge"], report["win_rate"]["judge"]
    assert counts["num_asked"] > 0 and counts["num_asked"] + counts["num_identical"] == 12
    assert rate["num_left_out"] == counts["num_unparsed"] > 0
    assert len((tmp_path / "judged" / "verdicts.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"judge": {**JUDGE, "path": None}}}, "give judge.path"),
        ({"base": {"path": None}}, "eval.judge: there is nothing to compare"),
        ({"eval": {"judge": JUDGE, "win_by": "total"}}, "eval.win_by='total'"),
        ({"eval": {"num_samples": 1}}, "nothing decides who wins"),
        ({"rewards": [{"name": "judge", "function": "length"}]}, "none may be total or judge"),
        ({"eval": {"judge": {**JUDGE, "template": "{a} {a}"}}}, "exactly once"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, **sections)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"path": "no/such/judge"}, "eval.judge.path"), ({"max_tokens": 4096}, "eval.judge.max_tokens")],
)
def test_a_judge_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as refused:
        prepare_eval(config(tmp_path, eval={"judge": {**JUDGE, **change}}))
    assert refused.value.field == field
