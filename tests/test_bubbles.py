"""The bubble table: sums by role, the metrics of a step, and each rule of what would help."""

from __future__ import annotations

import re

import pytest

from launch.config import RunConfig
from launch.config_keys import slot_at
from trainers.accounting import USEFUL, Cause
from trainers.bubbles import _OWN, _WAIT, RoleTime, Setting, advice, by_role, metrics
from trainers.metrics import check
from trainers.time_ledger import Entry
from trainers.waiting import WAITED_FOR

WORK = {
    "generator": Cause.GENERATE, "learner": Cause.LEARN, "reward_workers": Cause.SCORE, "reference": Cause.REFERENCE,
    "critic": Cause.VALUES,
}  # fmt: skip


def role_time(role: str, useful: int, *losses: tuple[Cause, str, int], num_workers: int = 1) -> RoleTime:
    return RoleTime(role, num_workers, {(WORK[role], ""): useful} | {(c, w): t for c, w, t in losses})


def waits(role: str, whom: str, percent: int = 40) -> RoleTime:
    return role_time(role, 100 - percent, (Cause.WAIT, whom, percent))


def test_workers_of_a_role_are_added_up_and_keep_their_order() -> None:
    totals = {
        "learner-0": {(Cause.LEARN, ""): 30, (Cause.WAIT, "generator"): 10},
        "generator-1": {(Cause.GENERATE, ""): 5, (Cause.IDLE, ""): 35},
        "generator-0": {(Cause.GENERATE, ""): 40},
    }
    roles = {"generator-0": "generator", "generator-1": "generator", "learner-0": "learner"}
    generator, learner = by_role(totals, roles)
    assert (generator.role, generator.num_workers, generator.wall) == ("generator", 2, 80)
    assert generator.useful_fraction == 45 / 80
    assert generator.losses == [(Cause.IDLE, "", 35 / 80)]
    assert learner.losses == [(Cause.WAIT, "generator", 0.25)]


def test_a_role_without_time_has_no_fractions_and_no_division_by_zero() -> None:
    assert RoleTime("learner", 1, {}).useful_fraction == 0.0
    assert metrics([], {"learner-0": "learner"}) == {}


def test_a_step_s_metrics_are_in_the_dictionary_and_the_causes_of_a_role_sum_to_one() -> None:
    entries = [
        Entry("generator-0", Cause.GENERATE, "", 0, 30, {}),
        Entry("generator-0", Cause.WAIT, "learner", 30, 60, {}),
        Entry("generator-1", Cause.WAIT, "push", 0, 20, {}),
        Entry("generator-1", Cause.PAUSE, "", 20, 60, {}),
    ]
    found = metrics(entries, {"generator-0": "generator", "generator-1": "generator", "learner-0": "learner"})
    assert found == {
        "accounting/generator/useful_fraction": 30 / 120,
        "accounting/generator/generate_fraction": 30 / 120,
        "accounting/generator/pause_fraction": 40 / 120,
        "accounting/generator/wait_fraction": 50 / 120,
        "accounting/generator/wait_for_learner_fraction": 30 / 120,
        "accounting/generator/wait_for_push_fraction": 20 / 120,
    }
    for name in found:
        check(name)
    causes = [v for name, v in found.items() if "useful" not in name and "wait_for" not in name]
    assert sum(causes) == pytest.approx(1.0)


# --- what would help: one test a rule -------------------------------------------------------------

SYNCHRONOUS, STALE = Setting(max_staleness=0), Setting(max_staleness=1)


def test_generators_that_wait_for_the_learner_of_a_synchronous_run_should_overlap_with_it() -> None:
    said = advice(waits("generator", "learner"), SYNCHRONOUS)
    assert said.startswith("run.max_staleness=1") and said.endswith("learner.num_workers")


def test_generators_that_wait_though_they_run_ahead_need_more_learner_ranks() -> None:
    said = advice(waits("generator", "learner"), STALE)
    assert "learner.num_workers" in said and "max_staleness" not in said


def test_a_learner_that_waits_for_generators_needs_more_of_them_and_first_an_overlap_if_there_is_none() -> None:
    assert "run.max_staleness=1" in advice(waits("learner", "generator"), SYNCHRONOUS)
    said = advice(waits("learner", "generator"), STALE)
    assert "generator.num_workers" in said and "max_staleness" not in said


def test_where_roles_share_a_device_more_workers_are_not_advised_to_a_synchronous_run() -> None:
    said = advice(waits("learner", "generator"), Setting(0, shares_devices=True))
    assert "max_staleness" in said and "num_workers" not in said


def test_generators_that_wait_for_the_longest_sample_of_another_need_an_overlap_or_shorter_samples() -> None:
    assert "run.max_staleness=1" in advice(waits("generator", "generator"), SYNCHRONOUS)
    assert "max_tokens" in advice(waits("generator", "generator"), STALE)


def test_ranks_that_wait_for_a_rank_need_even_shares() -> None:
    assert "token_budget" in advice(waits("learner", "learner"), STALE)


@pytest.mark.parametrize(
    ("whom", "key"),
    [
        ("score", "reward_workers.num_workers"), ("reference", "reference.num_workers"), ("critic", "critic.overlap"),
        ("push", "push.backend"), ("checkpoint", "checkpoint.every"), ("evaluation", "evaluation.every"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["generator", "learner"])
def test_a_wait_for_a_stage_has_the_remedy_of_that_stage(role: str, whom: str, key: str) -> None:
    assert key in advice(waits(role, whom), STALE)


@pytest.mark.parametrize(
    ("cause", "key"),
    [
        (Cause.PUSH, "push.backend"), (Cause.PAUSE, "push.backend"), (Cause.CHECKPOINT, "checkpoint.every"),
        (Cause.EVALUATE, "evaluation.every"), (Cause.PREFILL_AGAIN, "events.jsonl"),
        (Cause.IDLE, "controller"),
    ],
)  # fmt: skip
def test_a_loss_of_its_own_has_its_remedy(cause: Cause, key: str) -> None:
    assert key in advice(role_time("generator", 70, (cause, "", 30)), STALE)


def test_a_start_however_long_is_no_loss() -> None:
    slow = role_time("learner", 60, (Cause.START, "", 900), (Cause.WAIT, "start", 100), (Cause.WAIT, "score", 40))
    assert slow.running.losses == [(Cause.WAIT, "score", 0.4)] and slow.running.useful_fraction == 0.6
    assert "reward_workers.num_workers" in advice(slow, STALE)
    assert advice(RoleTime("learner", 1, {(Cause.START, ""): 5}), STALE).startswith("nothing")


def test_the_largest_loss_decides_and_small_ones_call_for_nothing() -> None:
    both = role_time("learner", 60, (Cause.WAIT, "score", 15), (Cause.WAIT, "generator", 25))
    assert "generator.num_workers" in advice(both, STALE)
    small = role_time("learner", 82, (Cause.WAIT, "score", 9), (Cause.WAIT, "generator", 9))
    assert advice(small, STALE) == "nothing: no loss above 10 %"


def test_a_role_that_feeds_the_others_is_told_only_when_it_holds_them_up_or_is_too_many() -> None:
    assert advice(role_time("reward_workers", 95, (Cause.WAIT, "generator", 5)), STALE).startswith("more of them")
    assert advice(waits("reward_workers", "generator", 50), STALE).startswith("nothing")
    several = role_time("reference", 30, (Cause.WAIT, "generator", 70), num_workers=4)
    assert advice(several, STALE) == "fewer of them: 2 of 4 would do"


def test_there_is_a_rule_for_every_way_to_lose_time() -> None:
    assert set(_OWN) == set(Cause) - USEFUL - {Cause.WAIT, Cause.START}
    assert set(_WAIT) | {"generator", "learner", "start"} == set(WAITED_FOR)
    for role in ("generator", "learner"):
        for whom in WAITED_FOR:
            assert advice(waits(role, whom), SYNCHRONOUS)


def test_every_key_that_is_advised_exists() -> None:
    said = [*_WAIT.values(), *_OWN.values()]
    said += [advice(waits(r, w), s) for r in ("generator", "learner") for w in WAITED_FOR for s in (SYNCHRONOUS, STALE)]
    keys = {key for text in said for key in re.findall(r"\b([a-z_]+\.[a-z_.]+[a-z_])", text)} - {"events.jsonl"}
    assert {"run.max_staleness", "generator.num_workers", "learner.num_workers"} <= keys
    assert not [key for key in keys if slot_at(RunConfig, tuple(key.split("."))) is None]
