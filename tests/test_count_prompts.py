"""The counter of prompts on run folders that are made up: it finds every way to train on a prompt twice or never."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.count_prompts import count_prompts

EPOCH, GROUPS, SAMPLES = 6, 2, 3  # prompts, groups a step, samples a group


def prompt_at(position: int) -> list[int]:
    """Another order every epoch."""
    epoch, place = divmod(position, EPOCH)
    return [100, (place * (1 if epoch % 2 == 0 else 5)) % EPOCH]


def write_batch(folder: Path, step: int, positions: Iterable[int], suffix: str = "") -> None:
    rows = [(str(p), i, prompt_at(p)) for p in positions for i in range(SAMPLES)]
    table = pa.table(
        {"group_id": [r[0] for r in rows], "sample_index": [r[1] for r in rows], "prompt_ids": [r[2] for r in rows]}
    )
    (folder / "trajectories").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "trajectories" / f"step-{step:06d}.parquet{suffix}")


def write_steps(folder: Path, steps: Iterable[int]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole epochs, and step 0 with an evaluation."""
    for step in range(1, 7):
        write_batch(tmp_path, step, range((step - 1) * GROUPS, step * GROUPS))
    write_steps(tmp_path, range(7))
    return tmp_path


def problems(folder: Path, epoch_size: int | None = EPOCH) -> str:
    return "\n".join(count_prompts(folder, epoch_size).problems)


def test_every_prompt_once_an_epoch_is_right_in_any_order(folder: Path) -> None:
    count = count_prompts(folder, EPOCH)
    assert count.problems == ()
    assert (count.num_steps, count.num_groups, count.num_prompts, count.num_epochs) == (6, 12, EPOCH, 2)
    write_batch(folder, 1, [3, 0])
    write_batch(folder, 2, [1, 2])
    assert problems(folder) == "" == problems(folder, None)


def test_a_part_of_an_epoch_at_the_end_is_right(folder: Path) -> None:
    write_batch(folder, 7, [12, 13])
    write_steps(folder, range(8))
    assert problems(folder) == "" and count_prompts(folder, EPOCH).num_epochs == 2


def test_a_prompt_that_was_trained_on_twice_is_found(folder: Path) -> None:
    write_batch(folder, 4, [5, 7])  # 5 again in place of 6
    found = problems(folder)
    assert "1 x group trained on more than once: 5 at steps [3, 4]" in found
    assert "1 x position of the stream that was skipped: 6" in found
    assert "prompt not trained on 2 or 3 times" in found


def test_a_prompt_that_stands_under_two_positions_is_found(folder: Path) -> None:
    table = pq.read_table(folder / "trajectories" / "step-000002.parquet").to_pylist()
    for row in table[:SAMPLES]:
        row["prompt_ids"] = prompt_at(0)
    pq.write_table(pa.Table.from_pylist(table), folder / "trajectories" / "step-000002.parquet")
    assert "prompt not trained on 2 or 3 times" in problems(folder)


def test_a_prompt_that_never_came_is_found_when_the_epoch_is_known(folder: Path) -> None:
    assert f"{EPOCH} prompts were trained on; an epoch has {EPOCH + 1}" in problems(folder, EPOCH + 1)


def test_a_hole_in_the_steps_is_found(folder: Path) -> None:
    (folder / "trajectories" / "step-000003.parquet").unlink()
    assert "1 x step without a batch: 3" in problems(folder)
    write_steps(folder, [1, 2, 4, 5, 6])
    assert "are not 1, 2, 3 ...: 1, 2, 4, 5, 6" in problems(folder)


def test_a_step_that_was_recorded_twice_is_found(folder: Path) -> None:
    write_steps(folder, [1, 2, 3, 3, 4, 5, 6])
    assert "are not 1, 2, 3" in problems(folder)


def test_a_superseded_batch_is_not_counted_and_without_its_suffix_it_is(folder: Path) -> None:
    for step in (7, 8):
        write_batch(folder, step, [0, 1], ".superseded")
    count = count_prompts(folder, EPOCH)
    assert count.problems == () and count.num_superseded == 2 and count.num_groups == 12
    write_batch(folder, 7, [0, 1])
    assert "1 x batch without a step in metrics.jsonl: 7" in problems(folder)
    write_steps(folder, range(8))
    assert "2 x group trained on more than once" in problems(folder)


def test_a_group_whose_samples_do_not_belong_together_is_found(folder: Path) -> None:
    path = folder / "trajectories" / "step-000001.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[:-1]), path)
    assert "has a sample twice or lacks one" in problems(folder)
    rows[-1]["sample_index"] = 0
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert "has a sample twice or lacks one" in problems(folder)
    rows[-1] |= {"sample_index": SAMPLES - 1, "prompt_ids": [7]}
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert "group 1 of step 1 has 2 prompts" in problems(folder)


def test_the_command_says_it_in_its_exit_code(folder: Path) -> None:
    command = [sys.executable, "-m", "scripts.count_prompts", str(folder), "--epoch-size", str(EPOCH)]
    fine = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert fine.returncode == 0 and "every prompt once an epoch" in fine.stdout
    (folder / "trajectories" / "step-000003.parquet").unlink()
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 1 and "step without a batch" in wrong.stderr
