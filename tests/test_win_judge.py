"""A judge of pairs as a reward: the share of the others that a sample beats, in both orders."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_ai_feedback import Says, group_of

from actors.judge_settings import JudgeRewardSettings
from actors.judge_worker import reward_judge
from launch.overrides import load_config
from trainers.asking import Reply
from trainers.errors import InputError
from trainers.experience import GroupRewards, TrajectoryGroup

TEMPLATE = "<{a}> or <{b}>"


def settings(**keys: Any) -> JudgeRewardSettings:
    return JudgeRewardSettings.model_validate(
        {"path": "/models/judge", "pairwise": True, "template": TEMPLATE, "max_tokens": 8, **keys}
    )


def longer(text: str) -> str:
    a, b = (part.partition(">")[0] for part in text.split("<")[1:])
    return "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"


def scored(group: TrajectoryGroup, says: Any = longer, **keys: Any) -> tuple[GroupRewards, Says]:
    respondent = Says(says)
    return asyncio.run(reward_judge(settings(**keys), respondent).score(group)), respondent


def test_the_reward_is_the_share_of_the_others_that_a_sample_beats() -> None:
    found, asked = scored(group_of("aaa", "a", "bbb", "cc"), weight=2.0)
    assert found.parts["judge_wins"].tolist() == pytest.approx([2.5 / 3, 0.0, 2.5 / 3, 1 / 3])
    assert found.totals.tolist() == pytest.approx((2 * found.parts["judge_wins"]).tolist())
    assert len(asked.questions) == 4 * 3 and not found.failures and not found.measured


def test_a_favourite_place_wins_nothing_and_equal_texts_tie_unasked() -> None:
    found, asked = scored(group_of("x", "yy"), lambda text: "[[A]]")
    assert found.totals.tolist() == [0.5, 0.5] and len(asked.questions) == 2
    found, asked = scored(group_of("same", "same"))
    assert found.totals.tolist() == [0.5, 0.5] and not asked.questions


def test_what_cannot_be_compared_is_masked_with_its_kind_and_the_others_are_compared_without_it() -> None:
    def says(text: str) -> Any:
        if "late" in text:
            return Reply("", "timeout", "no answer in 5 s")
        return "Hm." if "mumble" in text else longer(text)

    found, _ = scored(group_of("xxx", "x", "late", "mumble", "", "gone", aborted=(5,)), says)
    assert found.parts["judge_wins"][:2].tolist() == [1.0, 0.0]
    assert np.isnan(found.totals[2:]).all() and np.isnan(found.parts["judge_wins"][2:]).all()
    kinds = {i: failure.kind for i, failure in found.failures}
    assert kinds == {2: "timeout", 3: "missing", 4: "not_a_number", 5: "not_a_number"}
    alone, _ = scored(group_of("x"))
    assert [failure.kind for _, failure in alone.failures] == ["abstained"]


def test_with_weight_0_it_is_only_measured() -> None:
    found, _ = scored(group_of("xx", "x"), weight=0.0)
    assert found.totals.tolist() == [0.0, 0.0] and found.measured == ("judge_wins",)
    assert found.parts["judge_wins"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rubric": {"highest": 5}}, "samples are compared and not marked"),
        ({"pairwise": False}, "it is for pairs"),
        ({"template": "{a} {a} {b}"}, "exactly once"),
        ({"template": "{a} {b} {principle}"}, "nothing is put"),
    ],
)
def test_a_judge_compares_or_marks(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(**keys)


JUDGE = "judges=[{path: builtin:tiny-llama, pairwise: true}]"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("evaluation.every=1",), "would show nothing"),
        (("algorithm.name=remax",), "nothing to be compared with"),
        (("algorithm.name=reinforce_plus_plus", "run.samples_per_prompt=1"), "one sample"),
    ],
)
def test_where_there_is_nothing_to_compare_with_it_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError) as refused:
        load_config("cpu-two-by-two", ["rewards=[]", "evaluation.every=0", JUDGE, *overrides])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_its_part_has_a_name_and_online_dpo_takes_it() -> None:
    config = load_config("cpu-online-dpo", ["rewards=[]", JUDGE, "evaluation.every=0"]).config
    assert config.reward_names == ["judge_wins"]


@pytest.mark.parametrize("recipe", ["cpu-eval", "cpu-compare"])
def test_it_is_refused_where_policies_are_compared_of_each_of_which_it_would_say_one_half(recipe: str) -> None:
    with pytest.raises(InputError, match="says nothing across policies"):
        load_config(recipe, [JUDGE])
