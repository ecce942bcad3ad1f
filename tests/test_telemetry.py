"""Laws of what a run leaves behind, with real W&B (offline), real Parquet and real files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import wandb
from rich.console import Console

from launch.config import TelemetrySettings
from launch.inspect_run import inspect_run, thin
from launch.journal import read_rows
from launch.plots import before_after, before_after_table, reward_plot, smooth
from launch.progress import Progress, duration
from launch.redaction import REDACTED, redact
from launch.telemetry import Telemetry
from trainers.errors import InputError
from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
)

NAN = float("nan")
OFF = TelemetrySettings(wandb="disabled")
OFFLINE = TelemetrySettings(wandb="offline", num_sample_rows=2)


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B key of the person who runs the tests is seen."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setattr(sys, "argv", ["burnish"])
    yield
    wandb.teardown()


def a_group(group_id: str = "0", num_samples: int = 2) -> TrajectoryGroup:
    span = (VersionSpan(WeightVersion(0, 3), 2), VersionSpan(WeightVersion(0, 4), 1))
    return TrajectoryGroup(
        group_id,
        Prompt("p", np.array([1, 2], np.int32), "What is 1+1?"),
        tuple(
            Trajectory(i, 2**40 + i, np.array([5, 6, 7 + i], np.int32), np.array([-0.5, -1, -2], np.float32),
                       f"answer {i} [/b]", "stop", span)
            for i in range(num_samples)
        ),
    )


def rewards_of(group_id: str = "0") -> GroupRewards:
    return GroupRewards(group_id, np.array([1.0, NAN]), {"exact": np.array([1.0, NAN]), "short": np.array([0.5, 0.25])})


def lines(path: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def everything_under(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink())


# --- rows -------------------------------------------------------------------------------------


def test_nan_and_infinities_are_null_in_every_file(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    t.step(1, {"reward": NAN, "kl": float("inf"), "loss": float(np.float32("nan")), "entropy": np.float64(0.5)})
    t.event("alarm", value=NAN, many=[1.0, -float("inf")], array=np.array([NAN, 2.0]), kind_of=Path("x"))
    t.close()
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert (row["step"], row["reward"], row["kl"], row["loss"], row["entropy"]) == (1, None, None, None, 0.5)
    event = lines(tmp_path / "events.jsonl")[-1]
    assert (event["value"], event["many"], event["array"], event["step"]) == (None, [1.0, None], [None, 2.0], 1)


def test_a_metric_without_a_definition_is_refused_and_leaves_no_row(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    with pytest.raises(ValueError, match="'rewrd' is not in"):
        t.step(1, {"rewrd": 1.0})
    t.close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_a_step_is_recorded_once(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    t.step(1, {"reward": 1.0})
    with pytest.raises(ValueError, match="step 1 comes after step 1"):
        t.step(1, {"reward": 1.0})
    t.close()


def test_a_row_is_on_disk_when_step_returns_even_if_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from launch.telemetry import Telemetry; from launch.config import TelemetrySettings\n"
        "t = Telemetry(Path(sys.argv[1]), {}, TelemetrySettings(wandb='disabled'))\n"
        "for i in range(1, 6): t.step(i, {'reward': float(i)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent.parent, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes, as on a full disk."""
    keep = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, keep[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, keep)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("room", [-1, 0, 1, 10])  # bytes of the next row that fit; -1: all but its end of line
def test_what_a_full_disk_refuses_is_written_when_there_is_room_again(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.telemetry.time.time", lambda: 0.5)  # all rows are equally long
    t = Telemetry(tmp_path, {}, OFF)
    t.step(1, {"reward": 1.0})
    length = (tmp_path / "metrics.jsonl").stat().st_size
    with full_after(length + (length - 1 if room < 0 else room)):
        for step in (2, 3):
            t.trajectories(step, [a_group()], [rewards_of()], {})
            t.step(step, {"reward": float(step)})
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == ([1, 2] if room < 0 else [1])
    assert not list((tmp_path / "trajectories").iterdir()), "no torn table is left"
    t.trajectories(4, [a_group()], [rewards_of()], {})
    t.step(4, {"reward": 4.0})
    t.close()
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    names = [f"step-{step:06d}.parquet" for step in (2, 3, 4)]
    assert sorted(f.name for f in (tmp_path / "trajectories").iterdir()) == names
    assert not [e for e in read_rows(tmp_path / "events.jsonl") if e["kind"] == "record_lost"]


def test_what_a_disk_that_stays_full_loses_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    t.step(1, {"reward": 1.0})
    events = (tmp_path / "events.jsonl").stat().st_size
    with full_after(events + 300):  # one more event
        t.trajectories(2, [a_group()], [rewards_of()], {})
        for step in (2, 3, 4, 5, 6, 7, 8, 9):
            t.step(step, {"reward": 1.0})
        t.close()
    lost = [e["file"] for e in read_rows(tmp_path / "events.jsonl") if e["kind"] == "record_lost"]
    assert lost == ["step-000002.parquet"]
    assert "are lost: the disk is still full" in caplog.text
    waits = [r for r in caplog.records if "metrics.jsonl wait for room" in r.getMessage()]
    assert len(waits) == 1, "said once"


def test_a_table_that_waits_for_room_goes_with_the_lineage_that_is_left(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    with full_after(10):
        for step in (1, 2):
            t.trajectories(step, [a_group()], [rewards_of()], {})
    t.go_back(1)
    t.close()
    assert [f.name for f in (tmp_path / "trajectories").iterdir()] == ["step-000001.parquet"]


# --- resume -----------------------------------------------------------------------------------


def test_a_resume_keeps_every_step_once_and_sets_later_rows_aside(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    for step in range(6):
        t.step(step, {"reward": float(step)})
    t.trajectories(2, [a_group()], [rewards_of()], {})
    t.trajectories(4, [a_group()], [rewards_of()], {})
    t.close()
    t = Telemetry(tmp_path, {}, OFF, resume_step=3)
    t.step(4, {"reward": 40.0})
    t.close()
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["reward"]) for r in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [r["step"] for r in lines(tmp_path / "metrics.superseded.jsonl")] == [4, 5]
    names = sorted(p.name for p in (tmp_path / "trajectories").iterdir())
    assert names == ["step-000002.parquet", "step-000004.parquet.superseded"]


def test_a_torn_last_line_is_dropped_by_readers_and_on_resume(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    t.step(1, {"reward": 1.0})
    t.step(2, {"reward": 2.0})
    t.event("push")
    t.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole + whole.splitlines()[-1][:-7])
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    t = Telemetry(tmp_path, {}, OFF, resume_step=2)
    t.step(3, {"reward": 3.0})
    t.close()
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [e["kind"] for e in read_rows(tmp_path / "events.jsonl")] == ["recording", "push", "recording"]


def test_a_resume_keeps_the_wandb_run(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFFLINE)
    first = t.wandb_id
    t.step(1, {"reward": 1.0})
    t.close()
    for given in (None, first):  # found in the folder, or given from the checkpoint
        t = Telemetry(tmp_path, {}, OFFLINE, wandb_id=given, resume_step=1)
        assert t.wandb_id == first
        t.close()
    names = [p.name for p in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert names == [f"run-{first}.wandb"] * 3


# --- W&B --------------------------------------------------------------------------------------


def test_no_secret_reaches_wandb(tmp_path: Path) -> None:
    marker, secret = "visible-marker", "zq7-never-seen"
    hexkey = "0123456789abcdef" * 2 + "01234567"
    config = {
        "run": {"name": marker},
        "telemetry": {"WANDB_API_KEY": secret, "deep": [{"hfToken": secret}, {"Password": secret}]},
        "rewards": [{"args": {"client_secret": {"a": secret}, "judge": hexkey, "url": f"https://me:{secret}@host/"}}],
        "generator": {"sampling": {"max_tokens": 256}},
    }
    t = Telemetry(tmp_path, config, OFFLINE)
    t.step(1, {"reward": 1.0})
    t.close()
    seen = everything_under(tmp_path)
    assert marker.encode() in seen and b"max_tokens" in seen
    assert secret.encode() not in seen and hexkey.encode() not in seen


def test_a_secret_on_the_command_line_does_not_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["burnish", "train", "rewards.0.args.api_key=zq7-never-seen"])
    t = Telemetry(tmp_path, {}, OFFLINE)
    t.step(1, {"reward": 1.0})
    t.close()
    assert b"zq7-never-seen" not in everything_under(tmp_path)


def test_redaction_spares_counts_of_tokens_and_ordinary_text() -> None:
    config = {"max_tokens": 256, "token_budget": 4096, "aggregation": "token", "tokenizer": "a/b", "api_key": None,
              "password": 1234, "token": 5, "top": [{"num_tokens": 1.5}]}
    assert redact(config) == {**config, "password": REDACTED, "token": REDACTED}


def test_without_a_key_wandb_is_offline_and_online_falls_back_with_an_event(tmp_path: Path) -> None:
    for asked, num_falls in (("auto", 0), ("online", 1)):
        folder = tmp_path / asked
        t = Telemetry(folder, {}, TelemetrySettings.model_validate({"wandb": asked}))
        t.close()
        events = lines(folder / "events.jsonl")
        assert [e["kind"] for e in events].count("wandb_fallback") == num_falls
        assert events[-1]["wandb"] == "offline"
        assert list((folder / "wandb").glob("offline-run-*"))


def test_an_unreachable_server_costs_a_bounded_time_and_ends_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("launch.telemetry.WANDB_INIT_TIMEOUT_S", 2.0)
    t = Telemetry(tmp_path, {}, TelemetrySettings())
    t.step(1, {"reward": 1.0})
    t.close()
    events = lines(tmp_path / "events.jsonl")
    assert [e["kind"] for e in events] == ["wandb_fallback", "recording"]
    assert events[-1]["wandb"] == "offline" and events[-1]["wandb_id"] == t.wandb_id


def test_a_wandb_that_dies_does_not_stop_the_run(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path\n"
        "from launch.telemetry import Telemetry; from launch.config import TelemetrySettings\n"
        "t = Telemetry(Path(sys.argv[1]), {}, TelemetrySettings(wandb='offline'))\n"
        "t.step(1, {'reward': 1.0})\n"
        "ps = subprocess.run(['ps', '--ppid', str(os.getpid()), '-o', 'pid=,args='], capture_output=True, text=True)\n"
        "(core,) = [int(line.split()[0]) for line in ps.stdout.splitlines() if 'wandb-core' in line]\n"
        "os.kill(core, signal.SIGKILL)\n"
        "for step in range(2, 200): t.step(step, {'reward': 2.0})\n"
        "t.close()\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == list(range(1, 200))
    assert "wandb_fallback" in [e["kind"] for e in lines(tmp_path / "events.jsonl")]


def test_sample_tables_are_logged_at_tenth_and_evaluated_steps_only(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {"evaluation": {"every": 4}}, OFFLINE)
    for step in range(1, 11):
        t.trajectories(step, [a_group()], [rewards_of()], {"0": np.array([0.5, NAN])})
        t.step(step, {"reward": 1.0})
    t.close()
    tables = [json.loads(p.read_text()) for p in (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")]
    assert sorted(table["data"][0][0] for table in tables) == [4, 8, 10]
    assert all(len(table["data"]) == 2 for table in tables)


# --- trajectories -----------------------------------------------------------------------------


def test_trajectories_come_back_as_they_were_sampled(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    t.trajectories(10, [a_group("0"), a_group("1")], [rewards_of("0"), rewards_of("1")], {"1": np.array([0.5, NAN])})
    t.close()
    rows = pq.read_table(tmp_path / "trajectories" / "step-000010.parquet").to_pylist()
    assert [(r["group_id"], r["sample_index"]) for r in rows] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert rows[3]["completion_ids"] == [5, 6, 8] and rows[3]["prompt_ids"] == [1, 2]
    assert rows[0]["behavior_logprobs"] == [-0.5, -1.0, -2.0]
    assert rows[0]["version_spans"] == [{"incarnation": 0, "step": 3, "num_tokens": 2},
                                        {"incarnation": 0, "step": 4, "num_tokens": 1}]
    assert [r["reward"] for r in rows] == [1.0, None, 1.0, None]
    assert [r["rewards/short"] for r in rows] == [0.5, 0.25, 0.5, 0.25]
    assert [r["advantage"] for r in rows] == [None, None, 0.5, None]
    assert [p.name for p in (tmp_path / "trajectories").iterdir()] == ["step-000010.parquet"]


def test_rewards_of_other_groups_are_refused(tmp_path: Path) -> None:
    t = Telemetry(tmp_path, {}, OFF)
    with pytest.raises(ValueError, match="do not belong together"):
        t.trajectories(1, [a_group("0")], [rewards_of("1")], {})
    t.close()


# --- what people see --------------------------------------------------------------------------


def a_run(folder: Path, num_steps: int = 60) -> Path:
    t = Telemetry(folder, {}, OFF)
    t.step(0, {"eval/accuracy": 0.25, "eval/exact/mean": 0.25})
    for step in range(1, num_steps + 1):
        more = {"eval/accuracy": step / num_steps, "eval/exact/mean": 0.5} if step % 20 == 0 else {}
        t.step(step, {"reward": step / 10, "rewards/exact/mean": 0.5, "rewards/short/mean": 0.1, "kl": 0.01,
                      "completions/mean_length": 12.0 if step % 7 else NAN, **more})
    t.trajectories(num_steps, [a_group()], [rewards_of()], {"0": np.array([0.5, NAN])})
    t.event("push", num_bytes=5)
    assert "eval/accuracy" in text_of(t.summary())
    t.close()
    return folder


def text_of(*parts: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_inspect_shows_metrics_evaluation_samples_and_events(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    inspect_run(a_run(tmp_path / "r"), console, None, 1)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    evaluation = ("held-out evaluation, step 60", "eval/exact/mean")
    for part in ("61 steps recorded", *evaluation, "answer 0 [/b]", "num_bytes=5"):
        assert part in text
    assert "answer 1" not in text


def test_inspect_refuses_what_is_no_run_and_a_step_without_samples(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(InputError, match="not a run folder"):
        inspect_run(tmp_path, console, None, 4)
    with pytest.raises(InputError, match="no trajectories of this step"):
        inspect_run(a_run(tmp_path / "r"), console, 7, 4)


def test_thinning_keeps_first_and_last() -> None:
    rows = [{"step": i} for i in range(1000)]
    kept = thin(rows, 20)
    assert len(kept) == 20 and kept[0] == rows[0] and kept[-1] == rows[-1]
    assert thin(rows[:3], 20) == rows[:3]


def test_the_plot_is_a_png_for_one_run_and_for_several(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b")]
    for chosen in (runs[:1], runs):
        out = tmp_path / "plots" / f"{len(chosen)}.png"
        reward_plot(chosen, out)
        assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 10_000
    with pytest.raises(InputError, match="no metrics.jsonl"):
        reward_plot([tmp_path / "nothing"], tmp_path / "x.png")


def test_smoothing_leaves_a_constant_alone() -> None:
    assert smooth([0.3] * 5) == pytest.approx([0.3] * 5)


def test_before_and_after_are_joined_by_prompt(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    write("samples-before.jsonl", [{"prompt": p, "completion": "?", "reward": 0.0, "answer": "2"} for p in "ab"])
    with pytest.raises(InputError, match="samples-after.jsonl"):
        before_after(tmp_path)
    write("samples-after.jsonl", [{"prompt": "b", "completion": "two [2]", "reward": 1.0, "answer": "2"}])
    (row,) = before_after(tmp_path)
    assert (row["prompt"], row["before"], row["after"], row["reward_before"], row["reward_after"]) == (
        "b", "?", "two [2]", 0.0, 1.0)
    assert "two [2]" in text_of(before_after_table([row])) and "0 -> 1" in text_of(before_after_table([row]))


def test_plain_progress_is_one_line_a_step(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=20)
    shown = Progress(10, console, live=False)
    t = Telemetry(tmp_path, {}, OFF, watcher=shown)
    t.phase("generate", 1, 4)
    t.step(1, {"reward": 0.5, "time/step_s": 30.0, "throughput/generate_tokens_per_s": 850.0})
    t.event("alarm", what="[red]")
    t.close()
    shown.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "step 1/10  reward 0.500  tok/s 850  step 30.0s  ETA 4m30s", "alarm: what=[red]"]


def test_live_progress_shows_phases_and_closes_twice() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    shown = Progress(10, console, live=True)
    shown.phase("generate", 1, 4)
    shown.phase("evaluate", 1, 4)
    shown.step(1, {"reward": NAN, "time/step_s": NAN})
    shown.note("hello [b]")
    shown.close()
    shown.close()
    assert isinstance(console.file, io.StringIO)
    assert "hello [b]" in console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42s"), (187, "3m07s"), (7500, "2h05m"), (-1, "0s")])
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
