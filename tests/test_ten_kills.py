"""A synchronous run that is killed at ten random moments and resumed each time is the run that was left alone.

One generator that samples one sequence at a time and one rank: then nothing depends on what is computed beside what,
so the promise is equality of bits, of prompts, of samples and of the final weights and optimizer state.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from test_end_to_end import RUN_S, SMALL, Run, Start, start, trajectories  # noqa: F401 - the fixture

from cluster.checkpoints import CheckpointStore

NUM_STEPS, NUM_KILLS = 14, 10
WHOM = ("driver", "learner", "everything")
FIXED = (
    *SMALL, f"run.num_steps={NUM_STEPS}", "run.groups_per_step=2", "generator.max_num_seqs=1", "model.dtype=float32",
    "checkpoint.every=1", "learner.optimizer.lr=1e-3",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout((NUM_KILLS + 3) * RUN_S)]


def spread_reward(folder: Path) -> str:
    """``rewards.0.function``: a reward under which samples hardly ever tie, so every step moves the weights."""
    (folder / "score.py").write_text(
        "def residue(completion_ids, **columns):\n    return [sum(map(int, ids)) % 97 / 97 for ids in completion_ids]\n"
    )
    return f"{folder}/score.py:residue"


def kill(run: Run, whom: str) -> None:
    """``kill -9``.  A lost learner rank leaves the driver alive, which starts another one."""
    if whom == "learner":
        for child in psutil.Process(run.process.pid).children(recursive=True):
            if any("burnish-learner-" in part for part in child.cmdline()):
                child.kill()
        return
    run.kill()
    if whom == "everything":
        for child in run.children:
            if child.is_running():
                child.kill()


def has_ended(run: Run, within_s: float) -> bool:
    try:
        run.process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_run_killed_at_ten_random_moments_trains_what_an_undisturbed_one_trains_bit_for_bit(
    start: Start, tmp_path: Path  # noqa: F811
) -> None:
    reward = (f"rewards.0.function={spread_reward(tmp_path)}", "rewards.0.args={}")
    calm = start("calm", *FIXED, *reward)
    assert calm.end() == 0, calm.tail()

    chance = random.Random(0)
    run, killed = start("killed", *FIXED, *reward), list[str]()
    for number in range(NUM_KILLS):
        step = number + 1
        run.until("metrics.jsonl", lambda row, step=step: row["step"] >= step)  # type: ignore[misc]
        if has_ended(run, chance.uniform(0, 1)):  # a moment, whatever the run is doing then
            pytest.fail(f"the run was through before kill {number}:\n{run.tail()}")
        whom = WHOM[number % len(WHOM)]
        kill(run, whom)
        killed.append(whom)
        if whom != "learner":
            run = start("killed", *FIXED, *reward, "--resume")
    assert run.end() == 0, run.tail()

    kinds = [event["kind"] for event in run.rows("events.jsonl")]
    assert kinds.count("resumed") == NUM_KILLS - killed.count("learner")
    assert kinds.count("learner_restarted") == killed.count("learner")
    for step in range(1, NUM_STEPS + 1):
        ours, theirs = trajectories(run.folder, step), trajectories(calm.folder, step)
        for name in ("group_id", "seed", "prompt_ids", "completion_ids", "reward"):
            assert [row[name] for row in ours] == [row[name] for row in theirs], f"{name} of step {step}"
    states = []
    for folder in (run.folder, calm.folder):
        last = CheckpointStore(folder / "checkpoints").latest()
        assert last is not None and last.step == NUM_STEPS
        states.append(load_file(last.path / "learner" / "rank-0000.safetensors"))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.equal(states[1][name]), f"{name} is not the same bit for bit"
    before = min((calm.folder / "checkpoints").glob("*/learner/rank-0000.safetensors"))  # the newest two are kept
    first = load_file(before)
    assert any(not first[name].equal(tensor) for name, tensor in states[1].items()), "the weights never moved"
