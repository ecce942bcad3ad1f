"""Laws of a run that an alarm ends: where it goes back to, what it keeps, and that it does so once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from test_end_to_end import RECIPE, RUN_S, SMALL, Start, check_lineage, start

from cluster.checkpoints import CheckpointStore
from launch.alarm_watch import AlarmWatch
from launch.overrides import load_config
from launch.resuming import newest_checkpoint
from launch.rolling_back import WatchedRecorder, newest_before
from launch.telemetry import Telemetry
from trainers.alarms import AlarmBoard, AlarmSettings

__all__ = ["start"]  # a fixture

BAD = {"sampling/sampling_logp_difference/mean": 0.5}  # three such rows are an alarm
GOOD = {"sampling/sampling_logp_difference/mean": 0.001}


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_a_run_goes_back_once_to_before_the_trouble_and_then_stops_with_a_checkpoint(start: Start) -> None:
    # The policy is the reference at step 1 and, with this learning rate, nowhere near it from step 2 on.
    rewards = '[{name: has_letter, function: regex, args: {pattern: "[a-k]"}},' \
              ' {name: gold, function: regex, args: {pattern: "[l-z]"}, weight: 0}]'  # fmt: skip
    run = start(
        "watched", *SMALL[:3], "cluster.backend=in_process", "telemetry.wandb=disabled", "run.num_steps=6",
        "evaluation.every=2", "checkpoint.every=1", "checkpoint.keep=9", f"rewards={rewards}",
        "algorithm.kl_coef=0.000001", "learner.optimizer.lr=0.01", "alarms.kl_budget=0.005", "alarms.kl_per=token",
        "alarms.actions={kl_budget: roll_back}",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, 4, lambda step: 0 if step == 1 else 1)
    events = run.rows("events.jsonl")
    alarms = [(e["step"], e["since"], e["action"]) for e in events if e["kind"] == "alarm" and e["name"] == "kl_budget"]
    assert alarms == [(4, 2, "roll_back"), (4, 2, "stop")]
    (back,) = [e for e in events if e["kind"] == "rolling_back"]
    assert (back["to"], back["alarms"]) == (1, ["kl_budget"])
    assert [e["version"] for e in events if e["kind"] == "ready"] == ["0.0", "1.1"]
    assert events[-1]["kind"] == "stopped" and "failed" not in {e["kind"] for e in events}
    assert not (run.folder / "export").exists()

    rows = {row["step"]: row for row in run.rows("metrics.jsonl")}
    left = {row["step"]: row for row in run.rows("metrics.superseded.jsonl")}
    assert list(rows) == [0, 1, 2, 3, 4] and list(left) == [2, 3, 4]
    for name in ("reward", "completions/mean_length"):
        assert rows[2][name] == left[2][name], "the same weights sample the same"
    assert rows[2]["entropy"] == pytest.approx(left[2]["entropy"], rel=1e-4)
    saved = [(e["step"]) for e in events if e["kind"] == "checkpoint"]
    assert saved == [1, 2, 3, 2, 3, 4], "none of the row that asked to go back"
    checkpoint = CheckpointStore(run.folder / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step == 4
    assert checkpoint.metadata["alarms"]["alarms"]["kl_budget"]["raised"]

    # The run that was started again still compares with step 0, which it did not evaluate.
    assert "eval/win_rate" not in rows[0] and {"eval/distinct_2", "eval/clipped_ratio"} <= rows[0].keys()
    for step in (2, 4):
        assert rows[step]["eval/win_rate_low"] <= rows[step]["eval/win_rate"] <= rows[step]["eval/win_rate_high"]
    assert rows[2]["eval/win_rate"] == left[2]["eval/win_rate"]
    assert len(checkpoint.metadata["first_evaluation"]["rewards"]) == rows[0]["eval/num_prompts"]

    assert 0.0 < rows[1]["learner/parameters_changed_fraction"] <= 1.0
    assert "learner/parameters_changed_fraction" not in rows[3], "measured once a start"
    assert rows[1]["failures/masked_fraction"] == 0.0
    for row, prefix in ((rows[0], "eval/"), (rows[2], "eval/"), (rows[1], "rewards/")):
        total = row["reward" if prefix == "rewards/" else "eval/reward"]
        assert total == pytest.approx(row[f"{prefix}has_letter/mean"]), "gold is measured and weighs nothing"
        assert f"{prefix}gold/mean" in row
    assert rows[1]["rewards/gold/mean"] > 0.0


# --- without a run ------------------------------------------------------------------------------


class Files:
    """As much of telemetry as alarms need."""

    def __init__(self, folder: Path) -> None:
        self.path, self.steps = folder / "events.jsonl", list[int]()

    def step(self, step: int, metrics: Any) -> None:
        self.steps.append(step)

    def event(self, kind: str, **fields: Any) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"kind": kind, **fields}) + "\n")

    def alert(self, title: str, text: str) -> None: ...

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


def store_of(folder: Path, steps: Sequence[int]) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints", keep=9)
    for step in steps:
        (store.begin(step) / "weights").write_bytes(bytes([step]))
        store.commit(step, {})
    return store


def recorded(folder: Path, store: CheckpointStore, rows: Sequence[dict[str, float]], action: str) -> tuple[Any, ...]:
    """(target, number of calls of stop, files) after ``rows``, from step 1 on."""
    files, stops = Files(folder), list[int]()
    watch = AlarmWatch(AlarmBoard(AlarmSettings.model_validate({"action": action})), files, folder)
    recorder = WatchedRecorder(cast(Telemetry, files), watch, store, lambda: stops.append(1))
    for step, row in enumerate(rows, 1):
        recorder.step(step, row)
    assert files.steps == list(range(1, len(rows) + 1))
    return recorder.target, len(stops), files


def test_the_newest_checkpoint_from_before_the_first_sign_is_chosen(tmp_path: Path) -> None:
    store = store_of(tmp_path, [2, 3, 5, 6])
    target, stops, files = recorded(tmp_path, store, [GOOD] * 4 + [BAD] * 3, "roll_back")
    assert (target, stops) == (3, 1), "the checkpoint of step 5 is of the first bad row"
    (event,) = files.rows("rolling_back")
    assert (event["to"], event["since"]) == (3, 5)


def test_a_damaged_checkpoint_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    store = store_of(tmp_path, [2, 3, 5])
    (tmp_path / "checkpoints" / "step-000003" / "weights").write_bytes(b"?")
    assert newest_before(store, 5) == 2
    assert newest_before(store, 2) is None


def test_without_a_checkpoint_from_before_it_the_run_stops_and_says_why(tmp_path: Path) -> None:
    target, stops, files = recorded(tmp_path, store_of(tmp_path, [2]), [GOOD] + [BAD] * 3, "roll_back")
    assert (target, stops) == (None, 1)
    (event,) = files.rows("roll_back_failed")
    assert "before step 2; there are: 2" in event["reason"]
    assert len(files.rows("stopping")) == 1


@pytest.mark.parametrize(("action", "expected"), [("record", 0), ("stop", 1)])
def test_an_alarm_stops_the_loop_only_where_it_should(tmp_path: Path, action: str, expected: int) -> None:
    target, stops, files = recorded(tmp_path, store_of(tmp_path, [1]), [GOOD, BAD, BAD, BAD, BAD], action)
    assert (target, stops, len(files.rows("stopping"))) == (None, expected, expected)


def test_a_run_killed_while_it_goes_back_resumes_from_where_it_was_going(tmp_path: Path) -> None:
    config = load_config(RECIPE).config
    store_of(tmp_path, [2, 3, 5, 6])
    files = Files(tmp_path)

    def found() -> int:
        checkpoint = newest_checkpoint(config, tmp_path)
        assert checkpoint is not None
        return checkpoint.step

    files.event("checkpoint", step=6)
    assert found() == 6
    files.event("rolling_back", to=3, since=5)
    assert found() == 3
    files.event("checkpoint", step=5)
    assert found() == 6, "a commit since then has cleared what was later than it"
