"""What judges say: verdicts and marks are read or counted by kind; both orders are combined by a rule with a name."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from trainers.asking import fill_template
from trainers.experience import FailureKind
from trainers.rubric import AxisSettings, RubricSettings, Unmarked, weighted_mean
from trainers.verdicts import IDENTICAL, Judgement, Reading, Unread, Verdict, combine, judge_report, read_verdict

PLACES: tuple[Verdict, ...] = ("first", "second", "tie")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "first"), ("I prefer the second.\n\n[[ b ]]", "second"), ("[[C]]", "tie"), ("fine: [[Tie]]", "tie"),
        ("A", "first"), (" b. ", "second"), ("**A**", "first"), ("tie", "tie"),
        ("Reasons...\nVerdict: B", "second"), ("Final verdict: **A**.", "first"),
        ("[[A]], I say [[A]]", "first"), ("Verdict: A\n[[B]]", "second"),
    ],
)  # fmt: skip
def test_a_verdict_is_read_only_where_there_is_one(text: str, verdict: Verdict) -> None:
    assert read_verdict(text) == Reading(verdict)
    assert read_verdict(text, cut_off=True) == Reading(verdict), "what was said before the end counts"


@pytest.mark.parametrize(
    ("text", "cut_off", "kind"),
    [
        ("[[A]] at first, but then [[B]]", False, "contradictory"), ("Verdict: A\nVerdict: B", True, "contradictory"),
        ("", False, "empty"), (" \n", True, "empty"), ("A good answer.", False, "no_verdict"),
        ("Answer A is not better", False, "no_verdict"), ("[[D]]", False, "no_verdict"), ("AB", False, "no_verdict"),
        ("Let me think about both", True, "cut_off"),
    ],
)  # fmt: skip
def test_a_verdict_that_cannot_be_read_has_a_kind(text: str, cut_off: bool, kind: Unread) -> None:
    assert read_verdict(text, cut_off) == Reading(None, kind)


def test_the_two_rules_of_combining_both_orders_differ_only_where_the_judge_contradicts_itself() -> None:
    consistent = {("first", "second"): 1.0, ("second", "first"): 0.0, ("tie", "tie"): 0.5}
    for orders in itertools.product((*PLACES, None), repeat=2):
        masked, tie = combine(*orders, "masked"), combine(*orders, "tie")
        if None in orders:
            assert masked == tie == (None, "unparsed")
        elif orders in consistent:
            assert masked == tie == (consistent[orders], None)  # type: ignore[index]
        else:
            assert masked == (None, "inconsistent") and tie == (0.5, None)


def test_exchanging_the_answers_turns_the_outcome_round() -> None:
    for ab, ba in itertools.product((*PLACES, None), repeat=2):
        for rule in ("masked", "tie"):
            value, other = combine(ab, ba, rule).value, combine(ba, ab, rule).value  # type: ignore[arg-type]
            assert other == (None if value is None else 1.0 - value)


def test_the_report_counts_replies_that_could_not_be_read_and_silences_by_kind() -> None:
    found = [
        Judgement.of(("[[A]]", "[[B]]")), Judgement.of(("[[A]]", "[[A]]")), Judgement.of(("", "[[B]]")),
        Judgement.of(("I th", "[[A]] [[B]]"), (True, False)), IDENTICAL, Judgement(None, (None, None), "too_long"),
        Judgement(None, (None, None), "timeout"),
    ]  # fmt: skip
    report = judge_report(found)
    assert [j.outcome for j in found] == [1.0, 0.5, None, None, 0.5, None, None]
    assert report["unread"] == {"empty": 1, "cut_off": 1, "contradictory": 1}
    assert report["silent"] == {"too_long": 1, "timeout": 1}
    assert (report["num_asked"], report["num_unparsed"], report["num_identical"]) == (4, 2, 1)
    assert report["consistency"].value == 0.5 and report["consistency"].n == 2


def test_pairs_of_one_prompt_are_one_observation_of_the_judge_and_so_are_the_verdicts_of_one_pair() -> None:
    honest, placed = Judgement.of(("[[A]]", "[[B]]")), Judgement.of(("[[A]]", "[[A]]"))
    half_tied, tied = Judgement.of(("[[A]]", "[[C]]")), Judgement.of(("[[C]]", "[[C]]"))
    few = [honest, placed, placed, honest, honest, placed, honest, honest]
    prompts = [*range(len(few))]
    once = judge_report(few, prompts)
    for copies in (10, 100):  # the same pairs again: nothing new is known of the judge
        again = judge_report(few * copies, prompts * copies)
        assert again["consistency"] == once["consistency"] and again["first_place"] == once["first_place"]
    assert once["consistency"].value == 5 / 8 and once["first_place"].value == (5 * 0.5 + 3 * 1.0) / 8
    assert once["first_place"].n == 8, "not 16: the second verdict of a pair is no second observation"
    alone = judge_report([half_tied, tied, honest])
    assert alone["first_place"].value == 0.75 and alone["first_place"].n == 2 and alone["consistency"].n == 3


def test_the_intervals_of_the_judge_hold_what_they_promise() -> None:
    random, num_held = np.random.default_rng(3), 0
    honest, placed = Judgement.of(("[[A]]", "[[B]]")), Judgement.of(("[[A]]", "[[A]]"))
    for _ in range(200):  # 40 prompts of 6 pairs that go alike: half of the prompts mislead the judge
        misled = random.random(40) < 0.5
        said = [placed if m else honest for m in misled for _ in range(6)]
        found = judge_report(said, np.repeat(range(40), 6).tolist())
        num_held += found["consistency"].low <= 0.5 <= found["consistency"].high
        assert found["first_place"].low <= found["first_place"].value <= found["first_place"].high
    assert num_held >= 180, "Wilson's over 240 pairs holds it in about 60 % of the runs"


def test_an_answer_that_looks_like_a_place_in_the_template_stays_as_it_is() -> None:
    assert fill_template("{prompt}: {a} or {b}?", prompt="{a}", a="{b}", b="x") == "{a}: {b} or x?"
    asked = RubricSettings().ask("{answer}", "helpful: 10 {axes}")
    assert "[Prompt]\n{answer}\n" in asked and "[Answer]\nhelpful: 10 {axes}\n" in asked


# --- rubrics --------------------------------------------------------------------------------------


def test_each_axis_is_read_apart_and_a_mark_becomes_a_share_of_the_scale() -> None:
    marks = RubricSettings().read("**Helpful**: 10/10\n- honest = 1\n\"harmless\": 5.5,")
    assert {axis: mark.value for axis, mark in marks.items()} == {"helpful": 1.0, "honest": 0.0, "harmless": 0.5}
    marks = RubricSettings().read("helpful: 4\nharmless: four")
    assert marks["helpful"].value == pytest.approx(1 / 3)
    assert (marks["honest"].failure, marks["harmless"].failure) == ("missing", "no_number")


@pytest.mark.parametrize(
    "text", ["helpful: 7", "**Helpful:** 7", "**Helpful (1-10):** 7", "Helpful (of 10): 7/10", "*helpful* : `7`",
             "helpful: [[7]]", "Helpful:\n\n7", '{"helpful": 7, "honest": 3}'],
)  # fmt: skip
def test_a_mark_is_read_in_whatever_dress_it_comes(text: str) -> None:
    assert RubricSettings().read(text)["helpful"].value == pytest.approx(6 / 9)


@pytest.mark.parametrize(
    ("text", "cut_off", "kind"),
    [
        ("helpful: 5/5", False, "out_of_range"), ("helpful: 4/100", False, "out_of_range"),
        ("", False, "empty"), ("unhelpful: 3", False, "missing"), ("I would say", True, "cut_off"),
        ("helpful: very", False, "no_number"), ("helpful: 11", False, "out_of_range"),
        ("helpful: -1", False, "out_of_range"), ("helpful: 3\nhelpful: 4", False, "contradictory"),
    ],
)  # fmt: skip
def test_a_mark_that_cannot_be_read_has_a_kind_and_is_never_the_lowest_one(
    text: str, cut_off: bool, kind: Unmarked
) -> None:
    mark = RubricSettings().read(text, cut_off)["helpful"]
    assert mark.value is None and mark.failure == kind


def test_a_mark_that_is_said_twice_alike_is_one_mark_and_a_word_before_it_does_no_harm() -> None:
    mark = RubricSettings().read("helpful: it tries, so I say\nhelpful: 7\nhelpful = [[7]]")["helpful"]
    assert mark.value == pytest.approx(6 / 9)


def test_the_mean_over_axes_ignores_an_axis_that_is_only_measured() -> None:
    axes = (AxisSettings(name="a", question="?", weight=3), AxisSettings(name="b", question="?"),
            AxisSettings(name="c", question="?", weight=0))  # fmt: skip
    assert weighted_mean({"a": 1.0, "b": 0.0, "c": math.nan}, axes) == 0.75
    assert math.isnan(weighted_mean({"a": 1.0, "b": math.nan, "c": 1.0}, axes))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lowest": 5, "highest": 5}, "must be below"),
        ({"axes": [{"name": "a", "question": "?"}, {"name": "a", "question": "!"}]}, "names must differ"),
        ({"axes": [{"name": "a", "question": "?", "weight": 0}]}, "weight 0"),
        ({"template": "{answer} {axes}"}, "{form} must stand"),
    ],
)  # fmt: skip
def test_a_rubric_that_marks_nothing_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RubricSettings.model_validate(settings)


def test_every_kind_of_a_judge_s_failure_is_one_that_a_reward_may_have() -> None:
    assert {*get_args(Unmarked)} <= {*get_args(FailureKind)}
