"""Laws of the fault schedule, of what counts as detected and recovered, and of the report: without a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos import plan
from scripts.chaos_report import Asked, difference, markdown, report
from scripts.chaos_run import Outcome, RunOutcome
from scripts.chaos_runs import EPOCH, EPOCH_STEPS, FAMILIES, commands
from scripts.count_prompts import Count
from scripts.faults import KINDS, MAX_GAP, Ends, Fault, Phase, deal, schedule
from scripts.injector import NobodyThereError, chosen, name_of
from scripts.recovery import NUM_SLOW_ROWS, Recovery
from scripts.run_files import RunTail

# --- the schedule -------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_schedule_and_another_seed_another_one() -> None:
    kinds = tuple(KINDS)
    assert schedule(3, 100, kinds) == schedule(3, 100, kinds)
    assert len({schedule(seed, 100, kinds) for seed in range(20)}) == 20


@pytest.mark.parametrize("num_faults", [1, 16, 37, 54])
def test_in_a_short_schedule_every_kind_comes_equally_often_and_only_in_its_phases(num_faults: int) -> None:
    for seed in range(10):
        faults = schedule(seed, num_faults, tuple(KINDS))
        counts = Counter(fault.kind for fault in faults)
        assert len(faults) == num_faults
        assert max(counts.values()) - min(counts[kind] for kind in KINDS) <= 1
        assert all(f.phase in KINDS[f.kind].phases and 0 <= f.choice < 1 and 1 <= f.gap <= MAX_GAP for f in faults)
        assert [fault.number for fault in faults] == list(range(num_faults))


def test_a_hundred_faults_have_at_least_five_of_each_kind_and_the_order_is_no_cycle() -> None:
    faults = schedule(0, 100, tuple(KINDS))
    assert min(Counter(fault.kind for fault in faults).values()) >= 5
    assert [f.kind for f in faults[:16]] != [f.kind for f in faults[16:32]]
    seen = {(fault.kind, fault.phase) for seed in range(10) for fault in schedule(seed, 100, tuple(KINDS))}
    assert seen == {(name, phase) for name, kind in KINDS.items() for phase in kind.phases}


def test_kinds_that_start_an_engine_or_the_run_again_come_half_as_often_in_a_long_schedule() -> None:
    for num_faults, costly, cheap in ((100, {5}, {6, 7}), (1000, {27}, {120})):
        counts = Counter(fault.kind for fault in schedule(1, num_faults, tuple(KINDS)))
        assert {counts[name] for name, kind in KINDS.items() if kind.is_costly and kind.target != "host"} == costly
        assert {counts[name] for name, kind in KINDS.items() if not kind.is_costly} == cheap
    assert not {"pause_generator", "kill_reward_worker", "fill_disk"} & {n for n, k in KINDS.items() if k.is_costly}


def test_every_fault_is_dealt_once_to_a_run_that_can_suffer_it_and_the_load_is_even() -> None:
    runs = {"a": {"kill_generator", "kill_driver"}, "b": {"kill_generator", "kill_driver"}, "c": {"kill_critic"}}
    faults = schedule(1, 60, ("kill_generator", "kill_driver", "kill_critic"))  # all of them costly
    dealt = deal(faults, runs)
    assert sorted((f for found in dealt.values() for f in found), key=lambda f: f.number) == list(faults)
    assert all(fault.kind in runs[name] for name, found in dealt.items() for fault in found)
    assert [len(dealt[name]) for name in "abc"] == [20, 20, 20]
    assert all([f.number for f in found] == sorted(f.number for f in found) for found in dealt.values())
    with pytest.raises(ValueError, match="no run can suffer kill_engine"):
        deal(schedule(0, 1, ("kill_engine",)), runs)


def test_the_long_plan_has_three_pairs_of_runs_that_differ_in_their_faults_alone() -> None:
    planned = plan(0, 100, tuple(FAMILIES))
    assert sum(len(p.faults) for p in planned) == 100
    pairs = {s: [p for p in planned if p.family == "async" and p.seed == s] for s in range(3)}
    for hit, unharmed in pairs.values():
        assert hit.faults and not unharmed.faults and hit.num_steps == unharmed.num_steps
        args = [commands(p.family, "name", Path("/d"), p.seed, None)(9, False) for p in (hit, unharmed)]
        assert args[0] == args[1]
    assert all(p.num_steps % EPOCH_STEPS == 0 for p in planned)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_run_of_the_plan_is_a_valid_configuration_of_whole_epochs(family: str) -> None:
    from launch.overrides import load_config

    words = commands(family, "run", Path("/d"), 0, Path("/model"))(EPOCH_STEPS, True)
    assert words[-1] == "--resume"
    at = words.index("train")
    config = load_config(words[at + 1], words[at + 2 : -1]).config
    assert config.prompts.train.size == EPOCH == EPOCH_STEPS * config.run.groups_per_step
    assert config.generator.num_workers == 2
    targets = {KINDS[kind].target for kind in FAMILIES[family].kinds}
    assert ("critic" in targets) <= config.algorithm.needs_critic
    assert ("reference" in targets) <= config.algorithm.needs_reference
    assert ("reward_models.0" in targets) <= bool(config.reward_models)
    assert ("engine" in targets) == (config.generator.engine == "beside")


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("ray::burnish-generator-1", "generator-1"),
        ("ray::burnish-generator-12.load_weights", "generator-12"),
        ("ray::burnish-reward_models-0-1.score", "reward_models.0-1"),
        ("ray::burnish-reward_workers-0()", "reward_workers-0"),
        ("ray::IDLE", None),
        ("python train.py run.name=burnish-generator-1", None),
    ],
)
def test_an_actor_is_known_by_its_title(title: str, name: str | None) -> None:
    assert name_of(title) == name


def test_a_choice_is_one_of_the_role_and_none_is_an_error() -> None:
    names = ["generator-10", "generator-2", "learner-0", "reward_models.0-0"]
    assert {chosen(names, "generator", c / 10) for c in range(10)} == {"generator-10", "generator-2"}
    assert chosen(names, "reward_models.0", 0.99) == "reward_models.0-0"
    with pytest.raises(NobodyThereError, match="no critic"):
        chosen(names, "critic", 0.5)


# --- recovery -----------------------------------------------------------------------------------


def fault(kind: str) -> Fault:
    return Fault(0, kind, KINDS[kind].phases[0], 0.0, 1)


def fed(kind: str, *rows: dict[str, Any], victims: tuple[str, ...] = ()) -> Recovery:
    """At 10, one second between rows."""
    recovery = Recovery(fault(kind), 10.0, victims)
    for second, row in enumerate(rows, 11):
        recovery.see({"time_unix": float(second), **row})
    return recovery


STEP = {"step": 5}


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **fields}


def test_what_was_recorded_before_the_fault_tells_nothing_of_it() -> None:
    recovery = Recovery(fault("kill_generator"), 10.0, ("generator-1",))
    recovery.see({"time_unix": 10.0, "kind": "worker_died", "worker": "generator-1"})
    assert recovery.detected_at is None and not recovery.lift


def test_a_dead_generator_is_detected_by_its_death_and_recovered_by_its_replacement() -> None:
    died, replaced = event("worker_died", worker="generator-1", reason="gone"), event("worker_replaced",
                                                                                    worker="generator-1")  # fmt: skip
    other = event("worker_died", worker="generator-0")
    recovery = fed("freeze_generator", other, STEP, died, STEP, replaced, STEP, victims=("generator-1",))
    assert (recovery.detected_at, recovery.recovered_at, recovery.reason) == (13.0, 15.0, "gone")
    assert not recovery.lift, "it stays frozen until another stands in its place"
    assert not any(recovery.may_end(code) for code in (-9, 0, 1))
    assert fed("kill_generator", died, STEP, victims=("generator-1",)).recovered_at is None


def test_a_paused_generator_is_let_go_when_it_is_suspected() -> None:
    suspect = event("worker_suspect", worker="generator-0")
    back = event("worker_recovered", worker="generator-0")
    recovery = fed("pause_generator", suspect, victims=("generator-0",))
    assert recovery.lift and recovery.recovered_at is None
    assert fed("pause_generator", suspect, back, victims=("generator-0",)).recovered_at == 12.0


def test_beside_a_slow_worker_steps_are_recorded() -> None:
    assert fed("slow_generator", *[STEP] * (NUM_SLOW_ROWS - 1), victims=("generator-0",)).recovered_at is None
    recovery = fed("slow_generator", *[STEP] * NUM_SLOW_ROWS, victims=("generator-0",))
    assert recovery.recovered_at == 10.0 + NUM_SLOW_ROWS and recovery.lift


def test_a_dead_rank_is_survived_in_the_run_or_by_a_resume() -> None:
    inside = fed("kill_learner", STEP, event("worker_died", role="learner", worker="learner-1"), STEP,
                 victims=("learner-1",))  # fmt: skip
    assert (inside.detected_at, inside.recovered_at) == (12.0, 13.0) and not inside.may_end(1)
    again = fed("freeze_learner", event("rank_died", role="learner", worker="learner-0", reason="no answer"),
                event("learner_restarted", role="learner"), STEP, victims=("learner-1",))  # fmt: skip
    assert (again.detected_at, again.recovered_at, again.reason) == (11.0, 13.0, "no answer"), "a peer was named"
    ended = fed("kill_learner", event("failed", error="WorkerDiedError: learner[1] died in update"),
                victims=("learner-1",))  # fmt: skip
    assert ended.may_end(1) and not ended.may_end(0) and ended.recovered_at is None
    silent = fed("kill_learner", event("failed", error="ValueError: something else"), victims=("learner-1",))
    assert not silent.may_end(1), "the error has to name the rank"
    slow = fed("kill_learner", event("checkpoint_waits", on="learner[1]"), STEP, victims=("learner-1",))
    assert slow.detected_at is None


def test_a_killed_driver_is_back_when_it_records_a_step_after_it_was_ready() -> None:
    recovery = fed("kill_driver", STEP, event("resumed"), event("ready"), STEP)
    assert recovery.recovered_at == 14.0 and recovery.detected_at is None
    assert fed("kill_driver").may_end(-9) and not fed("kill_driver").may_end(1)


def test_after_sigterm_the_run_has_to_say_that_it_stopped() -> None:
    stopping, stopped = event("stopping", signal="SIGTERM"), event("stopped")
    assert fed("terminate_driver", stopping, STEP, stopped).may_end(0)
    assert not fed("terminate_driver", stopping, STEP).may_end(0)
    assert not fed("terminate_driver", stopping, stopped).may_end(1)
    recovery = fed("terminate_driver", stopping, STEP, stopped, event("ready"), STEP)
    assert (recovery.detected_at, recovery.recovered_at) == (11.0, 15.0)


def test_a_full_disk_is_over_with_a_checkpoint_after_the_one_that_failed() -> None:
    recovery = fed("fill_disk", event("checkpoint", step=4), event("checkpoint_failed", reason="No space"))
    assert recovery.detected_at == 12.0 and recovery.lift and recovery.recovered_at is None
    done = fed("fill_disk", event("checkpoint_failed", reason="No space"), STEP, event("checkpoint", step=8))
    assert done.recovered_at == 13.0


def test_of_every_kind_something_is_missing_before_anything_was_seen() -> None:
    assert {KINDS[kind].ends for kind in KINDS} == set(Ends)
    for kind in KINDS:
        assert Recovery(fault(kind), 0.0, ("x-0",)).missing


# --- journals -----------------------------------------------------------------------------------


def test_a_journal_is_followed_over_torn_lines_and_a_resume_that_writes_it_anew(tmp_path: Path) -> None:
    tail, path = RunTail(tmp_path), tmp_path / "metrics.jsonl"

    def line(step: int) -> str:
        return json.dumps({"step": step, "time_unix": float(step)}) + "\n"

    def steps() -> list[int]:
        return [row["step"] for row in tail.rows()]

    assert steps() == []
    path.write_text(line(1) + line(2)[:9])
    assert steps() == [1]
    with path.open("a") as out:
        out.write(line(2)[9:] + line(3))
    assert steps() == [2, 3] and steps() == []
    fresh = path.with_suffix(".tmp")
    fresh.write_text(line(1) + json.dumps({"step": 2, "time_unix": 4.5}) + "\n")
    fresh.replace(path)
    assert steps() == [2]
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "ready", "time_unix": 4.4}) + "\n")
    with path.open("a") as out:
        out.write(line(5))
    assert [row.get("kind", row.get("step")) for row in tail.rows()] == ["ready", 5], "in the order of their time"


# --- the report ---------------------------------------------------------------------------------


def outcome(kind: str, detected: float | None, recovered: float, resumed: bool = False) -> Outcome:
    return Outcome(0, kind, Phase.SAMPLING.value, 3, ("generator-0",), detected, recovered, resumed, "")


def made_up(**changes: Any) -> dict[str, Any]:
    hit = [outcome("kill_generator", 1.0, 4.0), outcome("kill_generator", 3.0, 9.0), outcome("kill_driver", None, 20.0,
                                                                                             True)]  # fmt: skip
    runs = [RunOutcome(f"hit-{i}", 160, hit if i == 0 else hit[:1], 2) for i in range(3)]
    runs += [RunOutcome(f"calm-{i}", 160, [], 1) for i in range(3)]
    rewards = {run.name: 0.9 + 0.001 * i for i, run in enumerate(runs)}
    rewards |= changes.pop("rewards", {})
    counts = {run.name: Count(160, 640, 64, 10, 0, ()) for run in runs} | changes.pop("counts", {})
    asked = Asked(0, changes.pop("num_faults", 5), 1, ("kill_generator", "kill_driver"), True)
    for name, problem in changes.items():
        next(run for run in runs if run.name == name.replace("_", "-")).problem = problem
    return report(asked, runs, counts, rewards, "nothing")


def failed(found: dict[str, Any]) -> list[str]:
    return [check["check"] for check in found["checks"] if not check["passed"]]


def test_a_report_passes_only_when_every_check_does() -> None:
    assert made_up()["passed"] and failed(made_up()) == []
    assert failed(made_up(num_faults=6)) == ["at least 6 faults"]
    assert failed(made_up(hit_1="it hung")) == ["each run ended by itself"]
    assert failed(made_up(counts={"hit-0": Count(1, 4, 4, 0, 0, ("a hole",))})) == ["every prompt once an epoch"]
    assert failed(made_up(rewards={"hit-0": 0.5})) == ["reward difference within ±0.05"]


def test_a_run_that_was_not_counted_is_not_taken_as_right() -> None:
    asked = Asked(0, 0, 0, (), False)
    assert not report(asked, [RunOutcome("a", 1)], {}, {}, "")["passed"]


def test_the_report_has_median_and_maximum_by_kind_and_is_plain_json() -> None:
    found = made_up()
    row = found["kinds"]["kill_generator"]
    assert row["num"] == 4 and row["detected_s"] == {"median": 1.0, "max": 3.0}
    assert row["recovered_s"] == {"median": 4.0, "max": 9.0}
    assert found["kinds"]["kill_driver"]["detected_s"] is None and found["kinds"]["kill_driver"]["num_resumed"] == 1
    assert json.loads(json.dumps(found, allow_nan=False))["passed"]
    text = markdown(found)
    assert "Chaos: passed" in text and "| kill_generator | kill generator | 4 | 1.0, 3.0 | 4.0, 9.0 | 0 |" in text
    assert "FAILED" in markdown(made_up(hit_1="it hung")) and "hit-1: it hung" in markdown(made_up(hit_1="it hung"))


def test_the_difference_is_that_of_the_means_and_knows_how_little_three_runs_say() -> None:
    found = difference([0.9, 0.92, 0.94], [0.9, 0.92, 0.94])
    assert found.value == pytest.approx(0.0) and found.low == pytest.approx(-found.high)
    assert found.high == pytest.approx(2.776 * 0.02 * math.sqrt(2 / 3), rel=0.01)  # t of 4 degrees of freedom
    assert difference([0.9], [0.8]).high == math.inf
    assert difference([0.9, 0.9], [0.8, 0.8]).value == pytest.approx(0.1)
