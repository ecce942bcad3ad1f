"""Laws of the alarms: each goes off on its planted fault, once, and on nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.alarm_watch import AlarmWatch, Verdict
from launch.config import RunConfig
from launch.config_keys import slot_at
from launch.tuning_config import TuningConfig
from trainers.alarms import ALARMS, Alarm, AlarmBoard, AlarmSettings, Row, markdown
from trainers.metrics import check

PAGE = Path(__file__).parent.parent / "docs" / "alarms.md"
NAN, INF = float("nan"), float("inf")

# A healthy run as far as one row shows it; every metric that any alarm reads is there.
HEALTHY: dict[str, float] = {
    "staleness/max": 0.0,
    "kl": 0.1, "completions/mean_length": 100.0, "entropy": 1.0, "clip_ratio/region_mean": 0.05,
    "ratio/first_minibatch_max_deviation": 1e-4, "sampling/sampling_logp_difference/mean": 0.004,
    "completions/clipped_ratio": 0.1, "eval/mean_length": 100.0, "eval/win_rate": 0.5, "eval/accuracy": 0.5,
    "frac_reward_zero_std": 0.3, "critic/explained_variance": 0.5, "grad_norm": 1.0,
    "learner/parameters_changed_fraction": 0.99, "reward": 0.0, "eval/gold/mean": 0.0, "failures/masked_fraction": 0.0,
    "disagreement/top_quartile": 0.3,
    **{f"{prefix}rewards/{name}": 0.0 for prefix in ("", "eval/") for name in ("chosen", "rejected", "margins")},
}  # fmt: skip
RISING = [0.1 * i for i in range(40)]
# What makes each alarm go off: the metrics that leave the healthy row, step by step.
PLANTED: dict[str, dict[str, list[float]]] = {
    "kl_budget": {"kl": [0.3 * i for i in range(40)]},
    "entropy_collapse": {"entropy": [0.7**i for i in range(40)]},
    "clip_fraction": {"clip_ratio/region_mean": [0.4] * 40},
    "first_minibatch_ratio": {"ratio/first_minibatch_max_deviation": [0.3] * 40},
    "logprob_mismatch": {"sampling/sampling_logp_difference/mean": [0.5] * 40},
    "truncation": {"completions/clipped_ratio": [0.9] * 40},
    "length_without_wins": {"eval/mean_length": [100 + 10.0 * i for i in range(40)]},
    "dead_groups": {"frac_reward_zero_std": [1.0] * 40},
    "explained_variance": {"critic/explained_variance": [-0.4] * 40},
    "no_gradient": {"grad_norm": [0.0] * 40},
    "proxy_up_gold_down": {"reward": RISING, "eval/gold/mean": [-x for x in RISING]},
    "proxy_up_disagreement_up": {"reward": RISING, "disagreement/top_quartile": RISING},
    "failed_rewards": {"failures/masked_fraction": [0.5] * 40},
    "falling_likelihood": {
        "eval/rewards/chosen": [-x for x in RISING],
        "eval/rewards/rejected": [-3 * x for x in RISING],
        "eval/rewards/margins": [2 * x for x in RISING],
    },
}
# Change for the better, of the same metrics.
HARMLESS: dict[str, dict[str, list[float]]] = {
    "a policy that grows sure of itself": {"entropy": [max(0.1, 0.9**i) for i in range(40)]},
    "longer answers that win more": {
        "eval/mean_length": [100 + 10.0 * i for i in range(40)],
        "eval/win_rate": [0.5 + 0.01 * i for i in range(40)],
    },
    "proxy and gold rise together": {"reward": RISING, "eval/gold/mean": RISING},
    "the proxy rises and the gold is flat": {"reward": RISING},
    "the proxy rises and its models agree more and more": {
        "reward": RISING, "disagreement/top_quartile": [1 / (1 + x) for x in RISING],
    },
    "the models part over a reward that does not rise": {"disagreement/top_quartile": RISING},
    "gold dips once": {"reward": RISING, "eval/gold/mean": [x - 0.5 * (i == 20) for i, x in enumerate(RISING)]},
    "the gold falls with the proxy, which jumped before": {
        "reward": [0.0] + [10 - x for x in RISING],
        "eval/gold/mean": [-x for x in RISING],
    },
    "both fall": {"reward": [-x for x in RISING], "eval/gold/mean": [-x for x in RISING]},
    "the critic warms up": {"critic/explained_variance": [-1 + 0.06 * i for i in range(40)]},
    "the margin grows and the chosen answers become likelier": {
        "eval/rewards/chosen": RISING,
        "eval/rewards/rejected": [-x for x in RISING],
        "eval/rewards/margins": [2 * x for x in RISING],
    },
    "both kinds of answers become less likely, and the margin does not grow": {
        "eval/rewards/chosen": [-x for x in RISING],
        "eval/rewards/rejected": [-x for x in RISING],
    },
    "one dead step": {"grad_norm": [1.0] * 7 + [0.0] + [1.0] * 32},
}


def series(changes: dict[str, list[float]]) -> list[Row]:
    length = min((len(values) for values in changes.values()), default=40)
    return [HEALTHY | {name: values[i] for name, values in changes.items()} for i in range(length)]


def observe(board: AlarmBoard, rows: Iterable[Row], first: int = 1) -> list[Alarm]:
    return [alarm for step, row in enumerate(rows, first) for alarm in board.observe(step, row)]


def names(alarms: Sequence[Alarm]) -> list[str]:
    return [alarm.name for alarm in alarms]


def steps_of(values: Sequence[float | None], name: str = "truncation", **settings: Any) -> list[int]:
    """Steps at which the only alarm that is on, on one metric, goes off."""
    metric = ALARMS[name].reads[0]
    rows = [{metric: value} for value in values]
    return [alarm.step for alarm in observe(AlarmBoard(AlarmSettings(**settings)), rows) if alarm.name == name]


# --- the list ---------------------------------------------------------------------------------


def test_every_alarm_has_a_planted_fault_and_a_threshold() -> None:
    assert set(PLANTED) == set(ALARMS)
    for name, rule in ALARMS.items():
        assert AlarmSettings().threshold(name) is not None
        assert rule.name == name and rule.meaning and rule.remedy and rule.for_steps >= 1
        assert set(rule.reads) <= set(HEALTHY)


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_reads_only_metrics_that_a_run_may_record(name: str) -> None:
    for metric in ALARMS[name].reads:
        check(metric)


@pytest.mark.parametrize("name", ALARMS)
def test_a_remedy_names_only_keys_that_exist(name: str) -> None:
    sections = "|".join(RunConfig.model_fields)
    kinds = (RunConfig, TuningConfig)
    for key in re.findall(rf"\b((?:{sections})(?:\.[a-z_]+)+)", ALARMS[name].remedy):
        assert any(slot_at(kind, tuple(key.split("."))) is not None for kind in kinds), key


def test_the_page_is_the_generated_text() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m trainers.alarms"


def test_every_alarm_is_one_row_of_the_page() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row)[0] for row in rows] == list(ALARMS)
    assert all(row.replace("\\|", "").count("|") == 7 for row in rows)


# --- firing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported_once_by_its_own_alarm_alone(name: str) -> None:
    rows = series(PLANTED[name])
    alarms = observe(AlarmBoard(AlarmSettings()), rows)
    assert names(alarms) == [name]
    (alarm,) = alarms
    rule = ALARMS[name]
    assert alarm.step - alarm.since == rule.for_steps - 1
    assert alarm.since > rule.after_step
    assert alarm.threshold == AlarmSettings().threshold(name)
    assert (alarm.value >= alarm.threshold) if rule.fires == "above" else (alarm.value <= alarm.threshold)
    assert (alarm.meaning, alarm.remedy, alarm.action) == (rule.meaning, rule.remedy, "record")


@pytest.mark.parametrize("story", HARMLESS)
def test_no_alarm_goes_off_in_a_healthy_run(story: str) -> None:
    assert observe(AlarmBoard(AlarmSettings()), series({})) == []
    assert observe(AlarmBoard(AlarmSettings()), series(HARMLESS[story])) == []


@pytest.mark.parametrize("name", PLANTED)
def test_an_alarm_without_a_threshold_is_off(name: str) -> None:
    assert observe(AlarmBoard(AlarmSettings.model_validate({name: None})), series(PLANTED[name])) == []


def test_two_faults_at_once_are_two_alarms_of_the_same_row() -> None:
    rows = series(PLANTED["clip_fraction"] | PLANTED["logprob_mismatch"])
    alarms = observe(AlarmBoard(AlarmSettings()), rows)
    assert [(a.name, a.step) for a in alarms] == [("clip_fraction", 3), ("logprob_mismatch", 3)]


def test_a_mismatch_that_lag_explains_is_not_looked_at() -> None:
    far = {"sampling/sampling_logp_difference/mean": [0.5] * 9}
    assert observe(AlarmBoard(AlarmSettings()), series(far | {"staleness/max": [2.0] * 9})) == []
    lag = [0.0, 0.0, 1.0, 3.0, 0.0, 2.0, 0.0, 0.0, 1.0]  # three batches without lag, by the fifth row
    assert [a.step for a in observe(AlarmBoard(AlarmSettings()), series(far | {"staleness/max": lag}))] == [5]


def test_patience_is_a_count_of_consecutive_rows() -> None:
    assert ALARMS["truncation"].for_steps == 5
    assert steps_of([0.9] * 4 + [0.1] + [0.9] * 4) == []
    assert steps_of([0.9] * 4 + [0.1] + [0.9] * 5) == [10]


def test_a_value_at_the_threshold_counts() -> None:
    assert steps_of([0.8] * 5) == [5]
    assert steps_of([0.799] * 9) == []


def test_a_raised_alarm_is_silent_until_the_number_is_well_on_the_good_side() -> None:
    bad, nearly, good = [0.9] * 5, [0.75] * 5, [0.5]
    assert steps_of(bad * 3) == [5]
    assert steps_of(bad + nearly + bad) == [5], "0.75 is below 0.8, but not by the margin"
    assert steps_of(bad + good + bad) == [5, 11]
    assert steps_of(bad + good + bad[:4]) == [5], "after it has cleared, patience starts again"


def test_hysteresis_works_downwards_and_near_zero() -> None:
    bad, nearly, good = [-0.1] * 5, [0.01] * 5, [0.2]
    warm = [0.5] * ALARMS["explained_variance"].after_step
    assert steps_of(warm + bad + nearly + bad, "explained_variance") == [25]
    assert steps_of(warm + bad + good + bad, "explained_variance") == [25, 31]
    assert steps_of([0.0] * 3 + [1e-9] + [0.0] * 3, "no_gradient") == [3, 7]


def test_a_critic_is_not_judged_before_it_is_warm() -> None:
    assert steps_of([-1.0] * 40, "explained_variance") == [25]


def test_a_critic_that_warms_up_before_the_policy_moves_is_judged_as_much_later() -> None:
    rows: list[Row] = [{"critic/explained_variance": -1.0, "completions/clipped_ratio": 0.9}] * 60
    alarms = observe(AlarmBoard(AlarmSettings(), value_warmup_steps=30), rows)
    assert [(a.name, a.since) for a in alarms] == [("truncation", 1), ("explained_variance", 51)]


def test_a_change_measured_once_holds_until_it_is_measured_again() -> None:
    nothing, moving, idle = {"learner/parameters_changed_fraction": 0.0}, {"grad_norm": 1.0}, dict[str, float]()

    def run(rows: list[Row]) -> list[tuple[str, int]]:
        return [(a.name, a.step) for a in observe(AlarmBoard(AlarmSettings()), rows)]

    assert run([nothing | moving, idle, moving, moving]) == [("no_gradient", 4)]
    assert run([nothing | moving, moving, {"learner/parameters_changed_fraction": 0.5} | moving, moving, moving]) == []
    assert run([{"learner/parameters_changed_fraction": 0.5}, *[{"grad_norm": 0.0}] * 3]) == [("no_gradient", 4)]


def test_unchanged_parameters_are_found_whatever_the_gradient_says() -> None:
    rows = [{"grad_norm": 1.0, "learner/parameters_changed_fraction": 0.0}] * 3
    assert names(observe(AlarmBoard(AlarmSettings()), rows)) == ["no_gradient"]


def test_kl_is_counted_over_a_sequence_or_a_token() -> None:
    rows = [{"kl": 0.3, "completions/mean_length": 200.0}] * 3
    (alarm,) = observe(AlarmBoard(AlarmSettings(kl_budget=59)), rows)
    assert alarm.value == pytest.approx(60)
    assert observe(AlarmBoard(AlarmSettings(kl_budget=61)), rows) == []
    (alarm,) = observe(AlarmBoard(AlarmSettings(kl_budget=0.25, kl_per="token")), rows)
    assert alarm.value == pytest.approx(0.3)


def test_entropy_is_compared_with_the_first_row_that_has_one() -> None:
    assert steps_of([NAN, 0.0, 0.1, *[0.004] * 3], "entropy_collapse") == [6]
    assert steps_of([NAN, 0.0, 0.1, *[0.006] * 3], "entropy_collapse") == []


def test_length_is_measured_from_the_last_gain_and_accuracy_gives_way_to_a_win_rate() -> None:
    def run(rows: list[Row]) -> list[int]:
        return [a.step for a in observe(AlarmBoard(AlarmSettings()), rows)]

    wins: list[Row] = [
        {"eval/mean_length": 10.0, "eval/win_rate": 0.5},
        {"eval/mean_length": 20.0, "eval/win_rate": 0.6},
    ]
    assert run([*wins, *[{"eval/mean_length": 29.0, "eval/win_rate": 0.61}] * 3]) == []
    assert run([*wins, *[{"eval/mean_length": 31.0, "eval/win_rate": 0.61}] * 3]) == [4]
    flat: list[Row] = [{"eval/mean_length": 20.0, "eval/win_rate": 0.5}] * 3
    assert run([{"eval/mean_length": 10.0, "eval/accuracy": 0.9}, *flat]) == [], "another score, another baseline"
    between: list[Row] = [{"eval/mean_length": 20.0, "eval/accuracy": 0.9}]
    assert run([{"eval/mean_length": 10.0, "eval/win_rate": 0.5}, *between, *flat]) == [4]
    # accuracy stands in until there is a win rate, and then is not looked at
    start: list[Row] = [{"eval/mean_length": 10.0, "eval/accuracy": 0.5}]
    longer: list[Row] = [{"eval/mean_length": 10.0 * i, "eval/accuracy": 0.5, "eval/win_rate": 0.5 + 0.05 * i}
                         for i in range(2, 8)]  # fmt: skip
    assert run(start + longer) == []
    assert run(start + [{**row, "eval/win_rate": NAN} for row in longer]) == [3]


def test_a_trend_needs_a_window_of_readings_and_averages_the_proxy_between_them() -> None:
    rows: list[Row] = []
    for i in range(12):
        noise = 8.0 if i % 2 else -8.0
        rows += [{"reward": i - noise / 2}] * 2  # any one row of the three goes up and down
        rows.append({"reward": i + noise, "eval/truth/mean": -float(i)})
    board = AlarmBoard(AlarmSettings(gold_metric="eval/truth/mean", trend_window=6))
    (alarm,) = observe(board, rows)
    assert (alarm.name, alarm.value, alarm.since, alarm.step) == ("proxy_up_gold_down", 1.0, 18, 21)


# --- rows that lack a number ------------------------------------------------------------------


def test_falling_likelihood_is_read_from_evaluations_or_else_from_ten_training_rows_at_a_time() -> None:
    falling = {"rewards/chosen": -1.0, "rewards/rejected": -3.0, "rewards/margins": 2.0}
    noise = [(-1) ** i for i in range(80)]  # rows are of other pairs, and no two of them in a row agree

    def rows(prefix: str, slope: float) -> list[Row]:
        return [{prefix + n: (slope * i * x) + noise[i] for n, x in falling.items()} for i in range(80)]

    def fired(series: list[Row]) -> list[int]:
        return [a.step for a in observe(AlarmBoard(AlarmSettings()), series) if a.name == "falling_likelihood"]

    assert fired(rows("", 0.1)) == [50], "the fifth reading of ten rows: two trends of four in a row"
    assert fired(rows("eval/", 4.0)) == [5]
    assert fired(rows("", 0.1)[:40] + rows("", -0.1)) == []
    # Once a run evaluates, its training rows no longer count, nor what they showed before.
    assert fired([*rows("", 0.1)[:40], {"eval/" + n: 0.0 for n in falling}, *rows("", 0.1)[40:]]) == []


@pytest.mark.parametrize("missing", [NAN, None])
def test_a_missing_number_neither_fires_nor_clears_nor_interrupts(missing: float | None) -> None:
    assert steps_of([missing] * 20) == []
    assert steps_of([0.9, 0.9, missing, missing, 0.9, 0.9, 0.9]) == [7]
    assert steps_of([0.9] * 5 + [missing] * 5 + [0.9] * 5) == [5]


def test_an_absent_metric_is_like_a_missing_number() -> None:
    board = AlarmBoard(AlarmSettings())
    rows: list[Row] = [{}, {"grad_norm": 1.0}] * 20
    assert observe(board, rows) == []
    for name, changes in PLANTED.items():
        sparse = [row for full in series(changes) for row in ({}, full, {})]
        found = [a for a in observe(AlarmBoard(AlarmSettings()), sparse) if a.name == name]
        assert len(found) == 1, name


def test_an_infinite_number_is_compared_but_is_no_baseline() -> None:
    assert steps_of([INF] * 3, "logprob_mismatch") == [3]
    assert steps_of([INF, *[1.0] * 9], "entropy_collapse") == []
    nothing: Row = {"kl": INF, "completions/mean_length": 0.0}  # their product is not a number
    assert observe(AlarmBoard(AlarmSettings()), [nothing] * 9) == []
    rows = series({"reward": RISING, "eval/gold/mean": [INF, -INF] * 20})
    board = AlarmBoard(AlarmSettings())
    assert observe(board, rows) == []
    json.dumps(board.state_dict(), allow_nan=False)


# --- settings ---------------------------------------------------------------------------------


def test_an_alarm_has_its_own_action_or_the_common_one() -> None:
    rows = series(PLANTED["clip_fraction"] | PLANTED["logprob_mismatch"])
    settings = AlarmSettings(action="stop", actions={"logprob_mismatch": "roll_back"})
    assert [a.action for a in observe(AlarmBoard(settings), rows)] == ["stop", "roll_back"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match="actions=kl_budgt.*the nearest is kl_budget"):
        AlarmSettings(actions={"kl_budgt": "stop"})
    with pytest.raises(ValidationError, match="gold_metric=eval/gld: is no metric"):
        AlarmSettings(gold_metric="eval/gld")
    with pytest.raises(ValidationError, match="extra_forbidden"):
        AlarmSettings.model_validate({"kl_budgt": 1.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("truncation", 0.0),
        ("truncation", 1.5),
        ("kl_budget", NAN),
        ("length_without_wins", 1.0),
        ("trend_window", 3),
        ("action", "restart"),
        ("explained_variance", 1.0),
    ],
)
def test_a_threshold_that_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        AlarmSettings.model_validate({key: value})


# --- resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED)
def test_a_run_in_pieces_gives_the_alarms_of_the_whole(name: str) -> None:
    rows = series(PLANTED[name])
    whole = observe(AlarmBoard(AlarmSettings()), rows)
    for cut in range(1, len(rows)):
        first, second = AlarmBoard(AlarmSettings()), AlarmBoard(AlarmSettings())
        before = observe(first, rows[:cut])
        state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
        second.load_state_dict(state)
        assert before + observe(second, rows[cut:], cut + 1) == whole, f"cut after step {cut}"


def test_a_saved_state_does_not_change_afterwards() -> None:
    board = AlarmBoard(AlarmSettings())
    rows = series(PLANTED["proxy_up_gold_down"])
    observe(board, rows[:5])
    state = board.state_dict()
    text = json.dumps(state)
    observe(board, rows[5:9], 6)
    assert json.dumps(state) == text
    board.load_state_dict(state)
    assert names(observe(board, rows[5:], 6)) == ["proxy_up_gold_down"]
    assert json.dumps(state) == text


def test_an_alarm_that_was_off_in_the_saved_run_starts_afresh() -> None:
    old = AlarmBoard(AlarmSettings(truncation=None))
    observe(old, [{"completions/clipped_ratio": 0.9}] * 4)
    new = AlarmBoard(AlarmSettings(clip_fraction=None))
    new.load_state_dict(old.state_dict())
    assert [a.step for a in observe(new, [{"completions/clipped_ratio": 0.9}] * 6, 5)] == [9]


def test_steps_only_grow_until_a_state_is_loaded() -> None:
    board = AlarmBoard(AlarmSettings())
    board.observe(3, HEALTHY)
    with pytest.raises(ValueError, match="step 3 comes after step 3"):
        board.observe(3, HEALTHY)


# --- the watch --------------------------------------------------------------------------------


class Outlet:
    """Writes events.jsonl as telemetry does, and keeps alerts."""

    def __init__(self, folder: Path) -> None:
        self.path, self.heard = folder / "events.jsonl", list[tuple[str, dict[str, Any]]]()

    def event(self, kind: str, **fields: Any) -> None:
        self.heard.append((kind, fields))
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"kind": kind, **fields}) + "\n")

    def alert(self, title: str, text: str) -> None:
        self.heard.append(("alert", {"title": title, "text": text}))


def watched(folder: Path, rows: Sequence[Row], **settings: Any) -> tuple[list[Verdict], Outlet]:
    outlet = Outlet(folder)
    watch = AlarmWatch(AlarmBoard(AlarmSettings(**settings)), outlet, folder)
    return [v for step, row in enumerate(rows, 1) if (v := watch.observe(step, row)) is not None], outlet


BOTH = series(PLANTED["clip_fraction"] | PLANTED["logprob_mismatch"])


def test_an_alarm_is_an_event_first_and_then_an_alert(tmp_path: Path) -> None:
    verdicts, outlet = watched(tmp_path, series(PLANTED["clip_fraction"]))
    rule = ALARMS["clip_fraction"]
    (event, fields), (alert, message) = outlet.heard
    assert (event, alert) == ("alarm", "alert")
    assert fields == {
        "name": "clip_fraction", "step": 3, "since": 1, "value": 0.4, "threshold": 0.3, "action": "record",
        "meaning": rule.meaning, "remedy": rule.remedy,
    }  # fmt: skip
    assert message["title"] == "alarm: clip_fraction"
    assert "step 3: 0.4, threshold 0.3" in message["text"] and rule.remedy in message["text"]
    assert [(v.action, v.since, names(v.alarms)) for v in verdicts] == [("record", 1, ["clip_fraction"])]


@pytest.mark.parametrize(
    ("actions", "strongest"),
    [
        ({}, "record"),
        ({"clip_fraction": "stop"}, "stop"),
        ({"clip_fraction": "stop", "logprob_mismatch": "roll_back"}, "roll_back"),
    ],
)
def test_the_strongest_action_of_a_row_is_asked_for(tmp_path: Path, actions: dict[str, str], strongest: str) -> None:
    (verdict,), outlet = watched(tmp_path, BOTH, actions=actions)
    assert verdict.action == strongest
    assert [fields["name"] for kind, fields in outlet.heard if kind == "alarm"] == names(verdict.alarms)
    assert names(verdict.alarms) == ["clip_fraction", "logprob_mismatch"]


def test_the_run_goes_back_to_before_the_first_sign(tmp_path: Path) -> None:
    ratio = {"ratio/first_minibatch_max_deviation": [0.0, 0.0, *[0.3] * 38]}
    (verdict,), _ = watched(tmp_path, series(PLANTED["clip_fraction"] | ratio), action="roll_back")
    assert [(a.name, a.since, a.step) for a in verdict.alarms] == [
        ("clip_fraction", 1, 3),
        ("first_minibatch_ratio", 3, 3),
    ]
    assert verdict.since == 1


def test_a_row_without_an_alarm_asks_for_nothing(tmp_path: Path) -> None:
    assert watched(tmp_path, series({}), action="stop")[0] == []


def test_a_roll_back_that_did_not_help_becomes_a_stop(tmp_path: Path) -> None:
    first, _ = watched(tmp_path, BOTH, actions={"clip_fraction": "roll_back"})
    again, outlet = watched(tmp_path, BOTH, actions={"clip_fraction": "roll_back"})  # a new process, rolled back
    other, _ = watched(tmp_path, BOTH, actions={"logprob_mismatch": "roll_back"})
    assert [v[0].action for v in (first, again, other)] == ["roll_back", "stop", "roll_back"]
    assert outlet.heard[0][1]["action"] == "stop"


def test_nor_does_one_process_roll_back_twice_for_the_same_alarm(tmp_path: Path) -> None:
    bad, good = BOTH[:3], series({})[:1]
    verdicts, _ = watched(tmp_path, [*bad, *good, *bad, *good, *bad], actions={"clip_fraction": "roll_back"})
    assert [v.action for v in verdicts] == ["roll_back", "stop", "stop"]
