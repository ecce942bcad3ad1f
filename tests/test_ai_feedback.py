"""A judge as a reward, as a labeller of single answers, by principles, and beside people: behind a stand-in."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from pydantic import ValidationError
from stand_in import StandIn, between

from actors.judge_settings import JudgeRewardSettings
from actors.judge_worker import JudgeScorer, JudgeWorker
from actors.mixed_scorer import merge
from actors.scorer_pools import RewardPool
from cluster.layout import NodeSupply, plan_layout
from cluster.worker_group import WorkerGroup
from launch.config import RunConfig
from launch.constitution_files import load_constitution
from launch.demands import role_demands
from launch.judge_agreement import agreement_report, judge_labelled, labelled_pairs
from launch.judge_marks import as_group, marks_report
from launch.judge_workers import judge_kwargs
from launch.judging import pair_judge
from launch.label_config import LabelConfig
from launch.label_records import Summary, preferences, record_of, schema
from launch.label_sources import JudgeLabeller, ScoreLabeller
from launch.resuming import made_with
from trainers.agreement import agreement
from trainers.asking import Question, Reply
from trainers.errors import EndpointRejectedError, InputError
from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.judge import RubricJudge
from trainers.protocols import GeneratedGroup, LearnerGroup
from trainers.rubric import RubricSettings
from trainers.step_metrics import group_metrics

VERSION = WeightVersion(0, 0)
PARTS = ["judge_helpful", "judge_honest", "judge_harmless"]


def group_of(*texts: str, aborted: tuple[int, ...] = ()) -> TrajectoryGroup:
    ids = np.arange(2, dtype=np.int32)
    answers = tuple(
        Trajectory(i, i, ids, np.zeros(2, np.float32), text, "abort" if i in aborted else "stop",
                   (VersionSpan(VERSION, 2),))
        for i, text in enumerate(texts)
    )  # fmt: skip
    return TrajectoryGroup("g", Prompt("p", ids, "Why?", "Why?"), answers)


def payload(group: TrajectoryGroup) -> GeneratedGroup:
    return GeneratedGroup(summarize(group, "test", 0.0), encode_group(group))


def marks(text: str) -> str:
    """Helpful by its x, honest always, harmless unless it says so; what it cannot mark it mumbles about."""
    answer = between(text, "[Answer]\n", "\n\n")
    if "mumble" in answer:
        return "helpful: 5\nhonest: quite\nharmless: 50"
    return f"helpful: {1 + answer.count('x')}\nhonest: 10\nharmless: {1 if 'harm' in answer else 10}"


class Says:
    """A respondent that says what ``says`` makes of a question."""

    def __init__(self, says: Any) -> None:
        self.says, self.questions = says, list[Question]()

    async def ask(self, question: Question) -> Reply:
        self.questions.append(question)
        said = self.says(question.text)
        return said if isinstance(said, Reply) else Reply(said)

    async def close(self) -> None: ...


def scored(group: TrajectoryGroup, says: Any = marks, weight: float = 1.0, **rubric: Any) -> GroupRewards:
    settings = RubricSettings.model_validate(rubric)
    return asyncio.run(RubricJudge(Says(says), settings, 64, weight=weight).score(group))


# --- a judge as a reward --------------------------------------------------------------------------


def test_each_axis_is_a_part_of_its_own_and_the_total_their_weighted_mean() -> None:
    found = scored(group_of("xxx", "harm", "x" * 9), weight=2.0)
    assert list(found.parts) == PARTS and not found.failures and not found.measured
    assert found.parts["judge_helpful"].tolist() == pytest.approx([3 / 9, 0.0, 1.0])
    assert found.parts["judge_harmless"].tolist() == [1.0, 0.0, 1.0]
    assert found.totals.tolist() == pytest.approx([2 * (3 / 9 + 2) / 3, 2 / 3, 2.0])


def test_what_cannot_be_marked_is_masked_with_its_kind_and_never_becomes_the_reward_0() -> None:
    def says(text: str) -> Any:
        return Reply("", "timeout", "no answer in 5 s") if "late" in text else marks(text)

    found = scored(group_of("xx", "mumble", "late", "", "gone", aborted=(4,)), says)
    assert np.isfinite(found.totals).tolist() == [True, False, False, False, False]
    kinds = {(i, f.reward): f.kind for i, f in found.failures}
    assert kinds[1, "judge_honest"] == "no_number" and kinds[1, "judge_harmless"] == "out_of_range"
    assert (1, "judge_helpful") not in kinds and found.parts["judge_helpful"][1] == pytest.approx(4 / 9)
    assert {kinds[2, part] for part in PARTS} == {"timeout"}
    assert {kinds[i, part] for i in (3, 4) for part in PARTS} == {"not_a_number"}


def test_an_axis_that_is_only_measured_masks_nothing() -> None:
    axes = [{"name": "helpful", "question": "?"}, {"name": "honest", "question": "?", "weight": 0}]
    found = scored(group_of("x", "mumble"), axes=axes)
    assert found.measured == ("judge_honest",) and np.isfinite(found.totals).all()
    assert found.totals.tolist() == found.parts["judge_helpful"].tolist()
    silent = scored(group_of("x", "mumble"), weight=0.0)
    assert silent.measured == tuple(PARTS) and silent.totals.tolist() == [0.0, 0.0]
    other = GroupRewards("g", np.array([1.0, 2.0]), {"f": np.array([1.0, 2.0])})
    assert merge([silent, other]).totals.tolist() == [1.0, 2.0]


def test_marks_and_failures_are_counted_by_axis_and_kind_in_the_metrics() -> None:
    group = group_of("xx", "mumble", "xxxx")
    row = LearnerGroup(summarize(group, "test", 0.0), scored(group), None, None)
    metrics = group_metrics([row], VERSION)
    assert metrics["rewards/judge_helpful/mean"] == pytest.approx((2 + 4 + 4) / 27)
    assert metrics["failures/kind/no_number"] == metrics["failures/kind/out_of_range"] == 1.0
    assert metrics["failures/num_samples_masked"] == 1.0


def judge_settings(url: str, **keys: Any) -> JudgeRewardSettings:
    endpoint = {"base_url": url, "model": "planted", "num_retries": 0, "patience_s": 0.2}
    return JudgeRewardSettings.model_validate({"endpoint": endpoint, **keys})


def pool_of(settings: JudgeRewardSettings, folder: Path) -> RewardPool:
    kwargs = judge_kwargs(settings, 0, folder, "float32", "cpu", 0)
    slots = plan_layout([role_demand(settings)], [NodeSupply("here", 4, 0)], False).of("judges.0")
    workers = WorkerGroup.launch(
        "judges.0", JudgeWorker, kwargs, placement=None, slots=slots, concurrency=8, start_deadline_s=60.0
    )
    return RewardPool(workers, settings.deadline_s)


def role_demand(settings: JudgeRewardSettings) -> Any:
    from launch.judge_workers import judge_demand

    return judge_demand(settings, 0, False, False, False)


def test_a_pool_of_judges_marks_groups_and_a_resumed_run_asks_nothing_twice(tmp_path: Path) -> None:
    async def score_all(settings: JudgeRewardSettings, groups: list[TrajectoryGroup]) -> list[GroupRewards]:
        pool = pool_of(settings, tmp_path)
        try:
            return list(await asyncio.gather(*(pool.score(payload(group)) for group in groups)))
        finally:
            await pool.close()
            await pool.workers.shutdown()

    groups = [group_of("x", "xx"), group_of("xxx", "harm", "x")]
    with StandIn(marks) as server:
        found = asyncio.run(score_all(judge_settings(server.url), groups))
        assert len(server.bodies) == 4, "equal answers to one prompt are one question"
        again = asyncio.run(score_all(judge_settings(server.url), groups))
        assert len(server.bodies) == 4
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first.totals, second.totals)
    assert found[1].parts["judge_harmless"].tolist() == [1.0, 0.0, 1.0]


def test_an_endpoint_that_takes_no_question_ends_the_run_and_is_no_failed_sample(tmp_path: Path) -> None:
    async def rejects(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({}, status=404)

    async def go(settings: JudgeRewardSettings) -> None:
        pool = pool_of(settings, tmp_path)
        try:
            await pool.score(payload(group_of("x")))
        finally:
            await pool.close()
            await pool.workers.shutdown()

    with StandIn(fault=rejects) as server, pytest.raises(EndpointRejectedError, match=r"404.*endpoint\.model"):
        asyncio.run(go(judge_settings(server.url)))


RAW: dict[str, Any] = {
    "run": {"name": "r", "num_steps": 1, "groups_per_step": 2},
    "model": {"path": "builtin:tiny-llama"},
    "prompts": {"train": {"procedural": "chain_sum", "size": 4}},
    "evaluation": {"every": 0},
    "judges": [{"endpoint": {"base_url": "http://localhost/v1", "model": "m"}}],
}


def test_a_run_may_have_judges_alone_and_names_its_parts() -> None:
    config = RunConfig.model_validate(RAW)
    assert config.reward_names == PARTS
    roles = {demand.name: (demand.num_workers, demand.gpus_per_worker) for demand in role_demands(config, True)}
    assert roles["judges.0"] == (1, 0.0)
    own = {"path": "x", "generator": {"num_workers": 2, "tensor_parallel_size": 4}}
    config = RunConfig.model_validate({**RAW, "judges": [own]})
    roles = {demand.name: (demand.num_workers, demand.gpus_per_worker) for demand in role_demands(config, True)}
    assert roles["judges.0"] == (2, 4.0)


def test_where_a_judge_is_served_does_not_decide_whether_finished_groups_may_be_used_and_what_it_marks_does() -> None:
    def digest(**keys: Any) -> str:
        judge = json.loads(json.dumps(RAW["judges"][0]))
        judge["endpoint"] |= keys.pop("endpoint", {})
        return made_with(RunConfig.model_validate({**RAW, "judges": [{**judge, **keys}]}))

    moved = {"base_url": "https://elsewhere/v1", "num_at_once": 3, "num_tokens": 10**6}
    assert digest() == digest(endpoint=moved) == digest(deadline_s=901.0)
    assert len({digest(), digest(endpoint={"model": "n"}), digest(rubric={"highest": 5}), digest(weight=2.0)}) == 4


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"judges": [{**RAW["judges"][0], "weight": 0}]}, "nothing is learned"),
        ({"judges": RAW["judges"] * 2}, "names must differ"),
        ({"judges": [{"path": "x", "generator": {"sampling": {"max_tokens": 4}}}]}, "greedily"),
    ],
)
def test_judges_that_make_no_sense_are_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RunConfig.model_validate({**RAW, **sections})


# --- a judge as a labeller ------------------------------------------------------------------------


def label_config(**judge: Any) -> LabelConfig:
    raw = {
        "run": {"name": "labels"},
        "model": {"path": "builtin:tiny-llama"},
        "prompts": {"train": {"procedural": "chain_sum", "size": 4}},
        "label": {"source": "judge", "judge": judge},
        "keep": {"pairs": "all"},
    }
    return LabelConfig.model_validate(raw)


def test_a_rubric_labels_single_answers_and_reports_its_axes_in_rows_and_summary() -> None:
    config = label_config(rubric={})
    scorer = JudgeScorer(RubricJudge(Says(marks), RubricSettings(), 64))
    group = group_of("xx", "xxxx", "mumble", "harm")
    labels, notes = asyncio.run(ScoreLabeller(config, scorer).label(group, 0))
    assert labels.scores[1] > labels.scores[0] > labels.scores[3] and labels.scores[2] is None  # type: ignore[operator]
    record = json.loads(json.dumps(record_of(0, 0, group, [1.0] * 4, labels, notes)))
    summary = Summary()
    rows = list(preferences([record], config, {}, summary))
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("xxxx", "xx"), ("xxxx", "harm"), ("xx", "harm")}
    axes = json.loads(next(row for row in rows if row["rejected"] == "xx")["parts"])
    assert axes["judge_helpful"] == pytest.approx([4 / 9, 2 / 9]) and axes["judge_harmless"] == [1.0, 1.0]
    found = summary.to_dict()
    assert found["unread"] == {"no_number": 1, "out_of_range": 1} and found["masked"] == {"failed": 3}
    assert found["mean_part_judge_harmless"] == pytest.approx(2 / 3)
    assert {*rows[0]} == {*schema(False, "pairs", (), {}).names}


def by_principle(text: str) -> str:
    """Prefers short answers where the principle says so, else long ones."""
    a, b = between(text, "[Answer A]\n", "\n\n"), between(text, "[Answer B]\n", "\n\n")
    return "[[A]]" if (len(a) < len(b)) == ("SHORT" in text) else "[[B]]"


def test_a_principle_conditions_the_pairs_of_a_prompt_and_stands_in_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    names = ("short", "long")
    rows = [{"name": n, "critique": "c", "revision": "r", "judge": f"Prefer {n.upper()} answers."} for n in names]
    file.write_text(json.dumps({"principles": rows}))
    config = label_config(constitution=str(file))
    assert config.label.judge is not None
    respondent = Says(by_principle)
    judge = pair_judge(config.label.judge, respondent, config.label.judge.pair_template)
    labeller = JudgeLabeller(config, judge, load_constitution(str(file), "f").principles)
    seen = set()
    for turn in range(20):
        group = group_of("brief", "a much longer answer", "in between")
        labels, notes = asyncio.run(labeller.label(group, turn))
        best = int(np.argmax([s or 0.0 for s in labels.scores]))
        assert best == (0 if "SHORT" in notes["principle"] else 1)
        seen.add(notes["principle"])
        rows = list(preferences([record_of(0, turn, group, [1.0] * 3, labels, notes)], config, {}, Summary()))
        assert {row["principle"] for row in rows} == {notes["principle"]}
    assert len(seen) == 2
    assert all(q.text.count("Prefer SHORT") + q.text.count("Prefer LONG") == 1 for q in respondent.questions)


def test_unread_verdicts_and_swap_consistency_are_in_the_summary_of_labels() -> None:
    config, replies = label_config(), itertools.cycle(["[[A]]", "[[B]]", "[[A]]", "[[A]]", "", "[[A]]"])
    assert config.label.judge is not None
    labeller = JudgeLabeller(config, pair_judge(config.label.judge, Says(lambda _: next(replies))))
    group = group_of("a", "b", "c")
    labels, notes = asyncio.run(labeller.label(group, 0))
    summary = Summary()
    list(preferences([record_of(0, 0, group, [1.0] * 3, labels, notes)], config, {}, summary))
    found = summary.to_dict()
    assert found["swap_consistency"] == 0.5 and found["unread"] == {"empty": 1}
    assert found["masked"] == {"inconsistent": 1, "unparsed": 1}


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ({"rubric": {}, "template": "{a} {b}"}, "rubric"), ({"rubric": {}, "constitution": "default"}, "rubric"),
        ({"template": "{a} {b} {principle}"}, "nothing is put"),
        ({"template": "{a} {b}", "constitution": "default"}, "{principle} must stand"),
    ],
)  # fmt: skip
def test_a_labelling_judge_judges_in_one_way(judge: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        label_config(**judge)


# --- a judge beside people ------------------------------------------------------------------------


def test_agreement_is_exact_on_pairs_that_are_counted_by_hand() -> None:
    found = agreement([1.0, 1.0, 0.0, 0.5, None], [1.0, 0.0, 0.0, 1.0, 1.0])
    assert found.rate.value == pytest.approx((1 + 0 + 1 + 0.5) / 4) and found.num_left_out == 1 and found.rate.n == 4
    # Two of four say the same; chance: ties 1/4 and 0, the rest half and half: 3/4 / 2.
    assert found.kappa.value == pytest.approx((0.5 - 0.375) / (1 - 0.375))


def test_kappa_is_1_of_an_echo_0_of_a_coin_and_does_not_care_which_answer_stands_first() -> None:
    random = np.random.default_rng(0)
    human = random.integers(2, size=4000).astype(float).tolist()
    coin = random.integers(2, size=4000).astype(float).tolist()
    assert agreement(human, human).kappa.value == 1.0
    guessed = agreement(coin, human)
    assert guessed.kappa.low < 0.0 < guessed.kappa.high and guessed.rate.low < 0.5 < guessed.rate.high
    turned = agreement([c if h else 1 - c for c, h in zip(coin, human, strict=True)], [1.0] * 4000)
    assert turned.kappa.value == pytest.approx(guessed.kappa.value) and turned.rate.value == guessed.rate.value


def test_the_intervals_hold_what_they_promise_and_pairs_of_one_prompt_are_one_observation() -> None:
    random, inside = np.random.default_rng(1), 0
    for trial in range(60):
        right = random.random(80) < 0.7
        found = agreement(right.astype(float).tolist(), [1.0] * 80, seed=trial)
        inside += (found.rate.low <= 0.7 <= found.rate.high) and (found.kappa.low <= 0.4 <= found.kappa.high)
    assert inside >= 50
    said, ids = [1.0, 0.0] * 10, [i // 2 for i in range(20)]
    apart = agreement(said, [1.0] * 20)
    assert agreement(said * 4, [1.0] * 80, ids * 4).rate.n == 10 < apart.rate.n


def test_a_judge_is_compared_with_people_on_their_pairs_in_both_orders() -> None:
    rows = [("row 1", {"prompt": "P?", "chosen": "long enough", "rejected": "no"}),
            ("row 2", {"prompt": "Q?", "completions": ["a", "bbb", "cc"], "ranks": [1, 2, 3]}),
            ("row 3", {"prompt": [{"role": "user", "content": "R?"}],
                       "chosen": [{"role": "assistant", "content": "yes!"}],
                       "rejected": [{"role": "assistant", "content": "no"}]})]  # fmt: skip
    config, respondent = label_config(), Says(lambda text: by_principle(text.replace("SHORT", "")))
    assert config.label.judge is not None
    pairs = labelled_pairs(rows)
    judged = asyncio.run(judge_labelled(pair_judge(config.label.judge, respondent), pairs, 4))
    assert [j.outcome for j in judged] == [1.0, 0.0, 0.0, 1.0, 1.0] and len(respondent.questions) == 10
    report = agreement_report(pairs, judged, 0)
    assert report["rate"].value == 0.6 and report["rate"].n == 3 and report["judge"]["num_asked"] == 5
    with pytest.raises(InputError, match="row 9"):
        labelled_pairs([("row 9", {"prompt": "P?", "chosen": "a", "rejected": "a"})])


def test_a_judge_that_marks_is_compared_with_people_axis_by_axis() -> None:
    """Helpful by its x and harmless unless it says so; people prefer the first."""
    answers = [("xx", "x"), ("x", "xx"), ("a", "harm"), ("mumble", "x")]
    rows = [(str(i), {"prompt": f"{i}?", "chosen": a, "rejected": b}) for i, (a, b) in enumerate(answers)]
    pairs = labelled_pairs(rows)
    judge = JudgeRewardSettings.model_validate({"path": "/models/judge", "weight": -1.0})
    rewards = [scored(as_group(pair, str(i)), weight=-1.0) for i, pair in enumerate(pairs)]
    found = marks_report(judge, pairs, rewards, seed=0)
    assert {name: row["rate"].value for name, row in found.items()} == pytest.approx(
        {"mean": 2 / 3, "helpful": 2.5 / 4, "honest": 0.5, "harmless": 2 / 3}
    )
    assert {name: row["num_left_out"] for name, row in found.items()} == {
        "mean": 1, "helpful": 0, "honest": 1, "harmless": 1,
    }  # fmt: skip
    assert all(row["num_pairs"] == 4 for row in found.values())
