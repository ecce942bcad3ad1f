"""Preference collection: what may be kept of what a labeller says, what is refused, and whole runs on a tiny model."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.respondents import EngineRespondent
from launch.judging import pair_judge
from launch.label import label
from launch.label_config import LabelConfig
from launch.label_prepare import label_settings
from launch.label_records import METADATA_KEY, RecordFile, write_preferences
from launch.label_sources import JudgeLabeller, PairLabeller, ScoreLabeller
from launch.run_folder import is_taken, only_process_in
from launch.run_identity import RunIdentity
from trainers.bradley_terry import ranking_pairs
from trainers.errors import InputError
from trainers.experience import (
    GroupRewards,
    Prompt,
    RewardFailure,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.labellers import (
    Labels,
    Outcome,
    candidate_masks,
    from_outcomes,
    from_scores,
    pairs_to_compare,
    rank,
    select,
)
from trainers.pair_function import compare, load_pair_function, probe_pair_function
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat
from trainers.protocols import GeneratedGroup, GroupRequest
from trainers.rewards import RewardSettings

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_S = 300.0
VERSION = WeightVersion(0, 0)

FUNCTIONS = """
def letters(completions):
    return [float(sum(c.isascii() and c.isalpha() for c in text)) for text in completions]

def noisy_human(completions_a, completions_b, seeds, answer):
    assert len(completions_a) == len(completions_b) == len(seeds) == len(answer)
    return [None if a == "?" else float(s % 2) for a, s in zip(completions_a, seeds)]

def unsure(completions_a, completions_b):
    return [0.7] * len(completions_a)

def one(prompts):
    return [1.0] * len(prompts)

def needs_grade(completions_a, completions_b, grade):
    return [1.0] * len(completions_a)
"""


@pytest.fixture
def functions(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return lambda name: f"{file}:{name}"


def group_of(*texts: str, source: Any = "2 + 2?", aborted: tuple[int, ...] = ()) -> TrajectoryGroup:
    prompt = Prompt("id", np.arange(3, dtype=np.int32), "2 + 2?", source, {"answer": "4"})
    ids = np.arange(2, dtype=np.int32)
    return TrajectoryGroup(
        "0", prompt,
        tuple(
            Trajectory(i, i, ids, np.zeros(2, np.float32), text, "abort" if i in aborted else "stop",
                       (VersionSpan(VERSION, 2),))
            for i, text in enumerate(texts)
        ),
    )  # fmt: skip


def config_of(**sections: Any) -> LabelConfig:
    return LabelConfig.model_validate(raw_config(**sections))


def raw_config(**sections: Any) -> dict[str, Any]:
    question = {"procedural": "chain_sum", "args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    raw: dict[str, Any] = {
        "run": {"name": "labels"},
        "model": {"path": "builtin:tiny-llama"},
        "prompts": {"train": {**question, "size": 10}},
        "label": {"source": "function", "rewards": [{"function": "bare_number"}]},
    }
    return raw | sections


# --- what is kept ------------------------------------------------------------------------------------------------


def draws(num: int = 300) -> list[tuple[list[str], list[float | None]]]:
    """Random (texts, scores) with many equal ones of both, and some scores missing."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num):
        k = int(rng.integers(2, 6))
        texts = [str(t) for t in rng.integers(4, size=k)]
        scores = [None if rng.random() < 0.15 else float(s) for s in rng.integers(3, size=k)]
        found.append((texts, scores))
    return found


def labelled(texts: list[str], scores: list[float | None], keep: str = "best_worst", seed: int = 0) -> Labels:
    masks = candidate_masks(texts, ["stop"] * len(texts))
    return from_scores(scores, masks, *pairs_to_compare(texts, masks, keep, True, seed))  # type: ignore[arg-type]


def test_best_worst_is_the_widest_pair_and_never_a_tie_or_two_equal_texts() -> None:
    num_kept = 0
    for texts, scores in draws():
        kept, dropped = select(labelled(texts, scores), "best_worst", True, 0)
        gaps = [
            abs(a - b)
            for (s, a), (t, b) in itertools.combinations(zip(texts, scores, strict=True), 2)
            if a is not None and b is not None and s != t
        ]
        widest = max(gaps, default=0.0)
        assert len(kept) == (widest > 0) and sum(dropped.values()) == 1 - len(kept)
        for pair in kept:
            best, worst = scores[pair.chosen], scores[pair.rejected]
            assert texts[pair.chosen] != texts[pair.rejected] and not pair.is_tie
            assert best is not None and worst is not None and best - worst == widest
            num_kept += 1
    assert 100 < num_kept < 300  # both cases were met


@pytest.mark.parametrize("k", [2, 3, 7])
def test_all_keeps_every_pair_of_different_scores(k: int) -> None:
    kept, dropped = select(labelled([str(i) for i in range(k)], [float(i) for i in range(k)]), "all", True, 0)
    assert {(p.chosen, p.rejected) for p in kept} == {(j, i) for i, j in itertools.combinations(range(k), 2)}
    assert not dropped


def test_every_pair_is_kept_or_counted() -> None:
    for texts, scores in draws():
        kept, dropped = select(labelled(texts, scores, "all"), "all", True, 0)
        assert len(kept) + sum(dropped.values()) == math.comb(len(texts), 2)
        assert dropped.get("unscored", 0) + dropped.get("identical", 0) >= (None in scores)


def test_a_random_pair_is_drawn_before_it_is_labelled() -> None:
    texts = ["a", "b", "b", "c"]
    drawn = {seed: pairs_to_compare(texts, [None, None, None, "empty"], "random", True, seed) for seed in range(40)}
    assert all(len(pairs) == 1 and not dropped for pairs, dropped in drawn.values())
    assert {pairs[0] for pairs, _ in drawn.values()} == {(0, 1), (0, 2)}


def test_a_tie_that_is_kept_is_marked_and_its_order_is_chance() -> None:
    labels = labelled(["a", "b"], [1.0, 1.0], "all")
    assert select(labels, "all", True, 0) == ([], {"tie": 1})
    orders = {select(labels, "all", False, seed)[0][0].chosen for seed in range(20)}
    assert orders == {0, 1} and all(select(labels, "all", False, s)[0][0].is_tie for s in range(3))


def test_a_masked_candidate_is_neither_tied_nor_beaten() -> None:
    texts, masks = ["good", " \n", "cut", "bad"], candidate_masks(["good", " \n", "cut", "bad"], ["stop"] * 4)
    assert masks == [None, "empty", None, None]
    assert candidate_masks(["x"], ["abort"]) == ["aborted"]
    labels = from_scores([2.0, 9.0, float("nan"), 1.0], masks, *pairs_to_compare(texts, masks, "all", True, 0))
    assert labels.scores == (2.0, None, None, 1.0)
    kept, dropped = select(labels, "all", True, 0)
    assert [(p.chosen, p.rejected) for p in kept] == [(0, 3)]
    assert dropped == {"empty": 3, "unscored": 2}


def test_comparisons_that_run_in_a_circle_leave_nobody_best() -> None:
    circle = [Outcome(0, 1, 1.0), Outcome(1, 2, 1.0), Outcome(0, 2, 0.0)]
    assert select(from_outcomes(3, circle, {}), "best_worst", True, 0) == ([], {"cycle": 1})
    line = [Outcome(0, 1, 1.0), Outcome(1, 2, 1.0), Outcome(0, 2, 1.0)]
    kept, _ = select(from_outcomes(3, line, {}), "best_worst", True, 0)
    assert [(p.chosen, p.rejected) for p in kept] == [(0, 2)]


def test_a_pair_without_a_label_of_its_own_is_not_kept_by_the_labels_of_others() -> None:
    labels = from_outcomes(3, [Outcome(0, 1, 1.0), Outcome(1, 2, 1.0), Outcome(0, 2, None, "unparsed")], {})
    kept, _ = select(labels, "best_worst", True, 0)
    assert [(p.chosen, p.rejected) for p in kept] != [(0, 2)] and len(kept) == 1


def test_ranks_say_what_the_scores_said() -> None:
    for texts, scores in draws():
        ranked, dropped = rank(labelled(texts, scores), texts)
        if not ranked:
            assert sum(dropped.values()) == 1
            continue
        order, ranks = [i for i, _ in ranked], [r for _, r in ranked]
        assert set(ranks) == set(range(1, max(ranks) + 1)) and ranks == sorted(ranks)
        assert len({texts[i] for i in order}) == len(order) and all(scores[i] is not None for i in order)
        by_score = {(i, j) for i in order for j in order if scores[i] > scores[j]}  # type: ignore[operator]
        assert {(order[i], order[j]) for i, j in ranking_pairs(ranks)} == by_score and by_score


# --- judges ------------------------------------------------------------------------------------------------------


class FakeJudge:
    """A generator that answers what ``says`` makes of the question."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says, self.questions = says, list[str]()

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        assert request.greedy and request.num_samples == 1
        self.questions.append(request.prompt.text)
        ids = np.zeros(1, np.int32)
        answer = Trajectory(0, 0, ids, np.zeros(1, np.float32), self.says(request.prompt.text), "stop",
                            (VersionSpan(VERSION, 1),))  # fmt: skip
        group = TrajectoryGroup(request.group_id, request.prompt, (answer,))
        return GeneratedGroup(summarize(group, "judge", 0.0), encode_group(group))


def judged(says: Callable[[str], str], *texts: str, max_length: int = 1000) -> tuple[Labels, Any, FakeJudge]:
    judge = {"template": "Q {prompt} first<{a}> second<{b}>", "max_tokens": 8, "chat": False}
    config = config_of(label={"source": "judge", "judge": judge})
    assert config.label.judge is not None
    fake = FakeJudge(says)
    tokenizer = load_tokenizer(resolve_model("builtin:tiny-llama"))
    respondent = EngineRespondent(fake, tokenizer, max_length, config.label.judge.chat, "label.judge")
    labeller = JudgeLabeller(config, pair_judge(config.label.judge, respondent))
    labels, notes = asyncio.run(labeller.label(group_of(*texts), 0))
    return labels, notes, fake


def longer(question: str) -> str:
    first, second = (question.split(f"{place}<")[1].split(">")[0] for place in ("first", "second"))
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def test_a_judge_is_asked_in_both_orders_and_an_honest_one_is_believed() -> None:
    labels, notes, fake = judged(longer, "aa", "bbbb", "c")
    assert [o.value for o in labels.outcomes] == [0.0, 1.0, 1.0]
    assert labels.scores == (0.5, 1.0, 0.0)
    assert len(fake.questions) == 6 and len(notes["verdicts"]) == 3
    assert {"Q 2 + 2? first<aa> second<bbbb>", "Q 2 + 2? first<bbbb> second<aa>"} <= set(fake.questions)


@pytest.mark.parametrize(
    ("says", "reason"),
    [(lambda _: "[[A]]", "inconsistent"), (lambda _: "Both have merit.", "unparsed")],
    ids=["prefers a place", "mumbles"],
)
def test_a_judge_that_cannot_be_used_is_masked_and_counted(says: Callable[[str], str], reason: str) -> None:
    labels, _, _ = judged(says, "aa", "bbbb")
    assert labels.outcomes == (Outcome(0, 1, None, reason),) and labels.scores == (None, None)
    assert select(labels, "all", True, 0) == ([], {reason: 1})


def test_what_does_not_fit_the_judge_is_not_asked() -> None:
    labels, _, fake = judged(longer, "aa", "b" * 200, max_length=100)
    assert labels.outcomes == (Outcome(0, 1, None, "too_long"),) and not fake.questions


# --- functions ---------------------------------------------------------------------------------------------------


class FakeScorer:
    async def score(self, group: GeneratedGroup) -> GroupRewards:
        failures = ((1, RewardFailure("f", "raised", "KeyError")), (2, RewardFailure("f", "abstained", "None")))
        totals = np.array([1.0, np.nan, np.nan, 0.0])
        return GroupRewards(group.summary.group_id, totals, {"f": totals}, failures)


def test_a_failed_and_an_abstaining_reward_are_told_apart_and_never_count_as_a_loss() -> None:
    config = config_of(keep={"pairs": "all"})
    labels, notes = asyncio.run(ScoreLabeller(config, FakeScorer()).label(group_of("a", "b", "c", "d"), 0))
    kept, dropped = select(labels, "all", True, 0)
    assert [(p.chosen, p.rejected) for p in kept] == [(0, 3)]
    assert dropped == {"failed": 3, "abstained": 2}
    assert notes == {"failures": [[1, "f", "raised", "KeyError"]]}


class OneWorker:
    """A WorkerGroup of one that runs here."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __len__(self) -> int:
        return 1

    async def call(self, index: int, method: str, *args: Any, deadline_s: float) -> Any:
        assert (index, method) == (0, "compare")
        return await compare(self.function, *args, 10.0)


def test_a_function_of_pairs_gets_columns_and_seeds_that_only_the_run_decides(functions: Callable[[str], str]) -> None:
    function = load_pair_function(RewardSettings(function=functions("noisy_human")), "label.pair.function")

    def values(run_seed: int, turn: int, *texts: str, source: Any = "q") -> list[float | None]:
        pair = {"function": functions("noisy_human")}
        config = config_of(run={"name": "x", "seed": run_seed}, label={"source": "function", "pair": pair})
        labeller = PairLabeller(config, OneWorker(function), 10.0)  # type: ignore[arg-type]
        labels, _ = asyncio.run(labeller.label(group_of(*texts, source=source), turn))
        assert all((o.value is None) == (o.reason == "abstained") for o in labels.outcomes)
        return [o.value for o in labels.outcomes]

    texts = [f"t{i}" for i in range(8)]
    assert values(0, 0, *texts) == values(0, 0, *texts) and set(values(0, 0, *texts)) == {0.0, 1.0}
    assert values(0, 0, *texts) != values(1, 0, *texts) and values(0, 0, *texts) != values(0, 1, *texts)
    assert values(0, 0, "?", "a") == [None]


def test_a_function_of_pairs_sees_messages_where_the_prompt_is_messages() -> None:
    def is_short(prompts: list[Any], completions_a: list[Any], completions_b: list[Any]) -> list[float]:
        assert prompts[0][0]["role"] == "user"
        return [float(len(a[0]["content"]) < len(b[0]["content"])) for a, b in zip(completions_a, completions_b)]

    function = load_pair_function(RewardSettings(function="bare_number"), "label.pair.function")
    function = dataclasses.replace(
        function, function=functools.partial(is_short), accepts=frozenset({"prompts", "completions_a", "completions_b"})
    )
    group = group_of("ab", "a", source=[{"role": "user", "content": "q"}])
    first, second = group.trajectories
    answers = [(first, second), (second, first)]
    assert asyncio.run(compare(function, group.prompt, answers, [0, 0], 10.0)) == [0.0, 1.0]


@pytest.mark.parametrize(("name", "says"), [("unsure", "0.7"), ("one", "takes no"), ("needs_grade", "grade")])
def test_a_function_of_pairs_is_tried_before_anything_starts(
    name: str, says: str, functions: Callable[[str], str]
) -> None:
    field = "label.pair.function"
    function = load_pair_function(RewardSettings(function=functions(name)), field)
    with pytest.raises(InputError, match=says) as refused:
        probe_pair_function(function, [group_of("a", "b").prompt], field, 10.0)
    assert refused.value.field == field


# --- bad input ---------------------------------------------------------------------------------------------------

JUDGE = {"source": "judge", "judge": {"template": "{a} {b}"}}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"lable": {}}, "lable"),
        ({"label": {"source": "function"}}, "label.rewards"),
        ({"label": {**JUDGE, "rewards": [{"function": "regex"}]}}, "nothing else"),
        ({"label": {"source": "judge", "judge": {"template": "{a} or {a}?"}}}, "exactly once"),
        ({"keep": {"pairs": "best_worst", "drop_ties": False}}, "a tie has no best"),
        ({"output": {"rows": "rankings"}, "keep": {"pairs": "random"}}, "no ranking"),
        ({"sampling": {"num_candidates": 1}}, "num_candidates"),
        ({"sampling": {"temperatures": []}}, "temperatures"),
        ({"generator": {"sampling": {"temperature": 0.5}}}, "generator.sampling"),
        ({"label": JUDGE, "sampling": {"stop": ["."]}}, "label.judge.path"),
        ({"prompts": {"train": {"path": "x"}, "eval": {"path": "y"}}}, "prompts.eval"),
        ({"model": {"path": "x", "max_length": 64}, "sampling": {"max_tokens": 64}}, "no room"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config_of(**sections)


@pytest.mark.parametrize(
    ("sections", "resume", "field"),
    [
        ({}, True, "run.name"),
        ({"model": {"path": "no/such/folder"}}, False, "model.path"),
        ({"label": {"source": "function", "rewards": [{"function": "no_such_function"}]}}, False, "rewards."),
        ({"label": {"source": "judge", "judge": {"path": "no/such/judge"}}}, False, "label.judge.path"),
        ({"label": {"source": "judge", "judge": {"max_tokens": 4096}}}, False, "label.judge.max_tokens"),
        ({"label": {"source": "reward_model", "reward_model": {"name": "rm", "path": "builtin:tiny-llama"}}}, False,
         "label.reward_model.path"),
        ({"sampling": {"max_tokens": 4096}}, False, "sampling.max_tokens"),
        ({"output": {"path": __file__}}, False, "output.path"),
    ],
)  # fmt: skip
def test_a_bad_input_is_refused_before_a_folder_is_made(
    sections: dict[str, Any], resume: bool, field: str, tmp_path: Path
) -> None:
    config = config_of(run={"name": "bad", "directory": str(tmp_path)}, **sections)
    with pytest.raises(InputError) as refused:
        label(config, Console(quiet=True), resume)
    assert refused.value.field.startswith(field)
    assert not list(tmp_path.iterdir())


def test_text_prompts_and_messages_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(run={"name": "x", "directory": str(tmp_path)}, prompts={"train": {"path": str(file)}})
    with pytest.raises(InputError, match="some are messages"):
        label(config, Console(quiet=True))


def test_a_record_that_a_kill_tore_is_written_again(tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    records = RecordFile(file)
    for position in (3, 1):
        records.append({"position": position, "text": "é" * 9})
    records.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    records = RecordFile(file)
    assert records.positions == {3}
    records.append({"position": 1, "text": "é" * 9})
    assert [r["position"] for r in records] == [1, 3]
    records.close()
    assert file.read_bytes() == whole


def test_a_record_is_found_where_it_was_written_whoever_wrote_before_it(tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    ours, theirs = RecordFile(file), RecordFile(file)
    ours.append({"position": 0})
    theirs.append({"position": 1, "text": "é" * 9})
    ours.append({"position": 2})
    assert [r["position"] for r in ours] == [0, 2] and [r["position"] for r in theirs] == [1]
    ours.append({"position": 0, "again": True})
    assert next(iter(ours))["again"], "the last record of a position counts"
    ours.close()
    theirs.close()


HOLD = """
import sys
from pathlib import Path
from launch.run_folder import only_process_in
with only_process_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_process_and_the_second_is_told_which(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {first.pid} on .* works in {tmp_path}.*--resume"):
            with only_process_in(tmp_path):
                pytest.fail("two processes hold one folder")
        first.kill()
        first.wait(RUN_S)
        with only_process_in(tmp_path):
            assert not is_taken(tmp_path), "a lock alone is no run"


def test_neither_a_resumed_run_nor_a_new_one_begins_beside_another(tmp_path: Path) -> None:
    config = config_of(run={"name": "one", "directory": str(tmp_path)})
    (tmp_path / "one").mkdir()
    with only_process_in(tmp_path / "one"), pytest.raises(InputError, match="works in"):
        label(config, Console(quiet=True))
    (tmp_path / "one" / "label.json").write_text("{}")
    with only_process_in(tmp_path / "one"), pytest.raises(InputError, match="works in"):
        label(config, Console(quiet=True), resume=True)
    assert not (tmp_path / "one" / "labelled.jsonl").exists()


def test_a_file_that_came_while_the_run_went_on_is_not_replaced_and_a_kill_before_the_rename_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = tmp_path / "run", tmp_path / "out.jsonl"
    folder.mkdir()

    def write(text: str) -> None:
        write_preferences(target, iter([{"text": text}]), pa.schema([]), True, folder)

    target.write_text("theirs")
    with pytest.raises(InputError, match="output.path.*did not write it"):
        write("ours")
    assert target.read_text() == "theirs" and sorted(f.name for f in tmp_path.iterdir()) == ["out.jsonl", "run"]
    target.unlink()
    write("first")

    def killed(source: Path, place: Path) -> None:
        if place == target:
            raise KeyboardInterrupt
        os.rename(source, place)

    monkeypatch.setattr("launch.run_folder.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write("second")
    monkeypatch.undo()
    assert "first" in target.read_text()
    write("second")
    assert "second" in target.read_text()


# --- what a run is ------------------------------------------------------------------------------------------------

REWARD_MODEL = {"name": "rm", "path": "/models/rm", "token_budget": 4096}
JUDGE = {"path": "/models/judge", "system": "You judge."}


def decides(**labeller: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    (source,) = labeller
    return label_settings(config_of(label={"source": source, **labeller}))


def test_what_decides_no_label_is_no_part_of_what_a_run_is() -> None:
    running = {"token_budget": 9, "num_workers": 3, "deadline_s": 7.0, "gpus_per_worker": 0.5}
    ours, files = decides(reward_model=REWARD_MODEL)
    assert decides(reward_model=REWARD_MODEL | running)[0] == ours
    assert decides(reward_model=REWARD_MODEL | {"path": "/moved/rm"})[0] == ours and files
    assert decides(reward_model=REWARD_MODEL | {"clip": 1.0})[0] != ours
    ours, _ = decides(judge=JUDGE)
    assert decides(judge=JUDGE | {"generator": {"max_num_seqs": 8, "gpu_memory_utilization": 0.5}})[0] == ours
    assert decides(judge=JUDGE | {"system": "Judge!"})[0] != ours
    served = {"base_url": "http://here/v1", "model": "m"}
    ours, _ = decides(judge={"endpoint": served})
    assert decides(judge={"endpoint": served | {"base_url": "http://there/v1", "num_at_once": 2}})[0] == ours
    assert decides(judge={"endpoint": served | {"parameters": {"top_p": 0.5}}})[0] != ours


def test_a_run_that_was_started_with_something_else_says_with_what(tmp_path: Path) -> None:
    manifest = tmp_path / "label.json"
    secret = "hf_" + 30 * "x"

    def identity(system: str, key: str = secret, content: str = "a") -> RunIdentity:
        settings = {"label": {"judge": {"system": system, "args": {"key": key}}}, "run.seed": 5}
        return RunIdentity({"label": f"{system}{key}{content}", "run.seed": "5"}, settings)

    manifest.write_text(json.dumps(identity("Judge.").to_json()))
    assert secret not in manifest.read_text().replace(identity("Judge.").digests["label"], "")
    identity("Judge.").check(manifest)
    with pytest.raises(InputError) as refused:
        identity("Judge!").check(manifest)
    assert str(refused.value).startswith("label.judge.system = 'Judge!': the run was started with 'Judge.'; restore it")
    for same_settings in (identity("Judge.", content="b"), identity("Judge.", key="hf_" + 30 * "y")):
        with pytest.raises(InputError, match="no setting that is written down differs.*digest Judge"):
            same_settings.check(manifest)
    manifest.write_text(json.dumps({"identity": {"label": "old", "run.seed": "5"}}))
    with pytest.raises(InputError, match="started with another one .digest old"):
        identity("Judge.").check(manifest)


# --- whole runs --------------------------------------------------------------------------------------------------

RUN = """
import json, sys
from rich.console import Console
from launch.label import label
from launch.label_config import LabelConfig
label(LabelConfig.model_validate(json.loads(sys.argv[1])), Console(), sys.argv[2] == "resume")
"""


def run(raw: dict[str, Any], resume: bool = False) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, json.dumps(raw), "resume" if resume else "new"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.timeout(2 * RUN_S + 60)
def test_a_run_is_complete_and_the_same_after_a_kill(tmp_path: Path, functions: Callable[[str], str]) -> None:
    raw = raw_config(
        run={"name": "whole", "directory": str(tmp_path), "seed": 5, "num_prompts": 30},
        sampling={"num_candidates": 3, "temperatures": [1.0, 0.5], "max_tokens": 10},
        label={"source": "function", "rewards": [{"function": functions("letters")}, {"function": "bare_number"}]},
        keep={"pairs": "all"},
        generator={"kv_cache_gib": 0.25, "max_num_seqs": 32},
        cluster={"backend": "in_process", "device": "cpu"},
    )
    run(raw)
    folder = tmp_path / "whole"
    output, records = folder / "preferences.parquet", folder / "labelled.jsonl"
    table = pq.read_table(output)
    rows = table.to_pylist()
    check_rows(rows, json.loads(table.schema.metadata[METADATA_KEY]), functions("letters"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_prompts"] == 30 and summary["num_candidates"] == 90 and summary["num_rows"] == len(rows)
    assert len(rows) + sum(summary["dropped"].values()) == 3 * 30
    gap = np.mean([len(r["chosen_ids"]) - len(r["rejected_ids"]) for r in rows])
    assert summary["mean_length_difference"] == pytest.approx(gap)

    # A kill: some records are missing, the last one is torn; a mark shows which ones are not sampled again.
    lines = records.read_text().splitlines()
    marked = json.loads(lines[0]) | {"prompt_ids": [7]}
    records.write_text("\n".join([json.dumps(marked), *lines[1:12], lines[12][:40]]))
    output.unlink()
    with pytest.raises(InputError, match="was started with 5") as refused:
        label(LabelConfig.model_validate(raw | {"run": {**raw["run"], "seed": 6}}), Console(quiet=True), resume=True)
    assert refused.value.field == "run.seed"
    run(raw, resume=True)
    again = pq.read_table(output).to_pylist()
    at = marked["position"]
    assert [r for r in again if r["position"] != at] == [r for r in rows if r["position"] != at]
    assert all(r["prompt_ids"] == [7] for r in again if r["position"] == at)
    assert len(records.read_text().splitlines()) == 30

    with pytest.raises(InputError, match="exists already"):
        label(LabelConfig.model_validate(raw), Console(quiet=True))
    # A finished run that is resumed only writes again, here as rankings: no engine starts.
    label(LabelConfig.model_validate(raw | {"output": {"rows": "rankings"}}), Console(quiet=True), resume=True)
    rankings = pq.read_table(output).to_pylist()
    by_position = {r["position"]: r for r in rankings}
    assert set(by_position) == {r["position"] for r in again}
    for row in again:
        ranking = by_position[row["position"]]
        place = dict(zip(ranking["completions"], ranking["ranks"], strict=True))
        assert place[row["chosen"]] < place[row["rejected"]]


def check_rows(rows: list[dict[str, Any]], provenance: dict[str, Any], function: str) -> None:
    """Columns, texts and ids agree; what is preferred scores higher; who sampled and who labelled stands there."""
    tokenizer = load_tokenizer(resolve_model("builtin:tiny-llama"))
    assert len(rows) > 20 and [r["position"] for r in rows] == sorted(r["position"] for r in rows)
    assert len({r["chosen_seed"] for r in rows} | {r["rejected_seed"] for r in rows}) > len(rows) / 2
    assert {r["turn"] for r in rows} == {0, 1, 2}  # 30 prompts of 10 questions
    for row in rows:
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) == row[side] != ""
            letters = sum(c.isascii() and c.isalpha() for c in row[side])
            assert letters <= row[f"{side}_score"] <= letters + 1  # the second function gives 0 or 1
            assert row[f"{side}_temperature"] == [1.0, 0.5, 1.0][row[f"{side}_index"]]
            ended = row[f"{side}_ids"][-1] == tokenizer.eos_token_id
            assert row[f"{side}_finish_reason"] == ("stop" if ended else "length")
        assert row["chosen_score"] > row["rejected_score"] and not row["is_tie"]
        assert row["label_source"] == "function" and len(row["policy_digest"]) == 32 and row["label_version"]
        assert "answer" in json.loads(row["columns"])
        comparison = read_comparison(row, "row", tokenizer=tokenizer, form=PromptFormat())
        assert comparison.pairs == ((0, 1),) and comparison.prompt_id == row["prompt_id"]
        assert comparison.prompt_ids.tolist() == row["prompt_ids"]
    assert provenance["identity"]["model.path"] == rows[0]["policy_digest"]
    assert provenance["config"]["label"]["rewards"][0]["function"] == function
    assert provenance["config"]["run"]["seed"] == 5 and provenance["versions"]["torch"]
