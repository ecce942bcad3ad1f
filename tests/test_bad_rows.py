"""Rows that cannot be learned from: told all at once, or dropped and counted; a dataset of another kind never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preference_kit import TINY, tokenizer

from actors.model_folders import resolve_model
from launch.bad_rows import NUM_TOLD, read_rows
from launch.model_facts import check_model_folder
from launch.preference_task import PreferenceTask
from launch.reward_task import RewardTask
from launch.sft_task import SFTTask
from launch.tuning_config import TuningConfig
from launch.tuning_task import BaseModelFolder
from trainers.errors import InputError, RowKindError

__all__ = ["tokenizer"]  # a fixture

Row = dict[str, Any]
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD = {"prompt": "p", "chosen": "a", "rejected": "a"}
LABELLED = {"prompt": "p", "completion": "a", "label": True}
TASKS: dict[str, Any] = {"dpo": PreferenceTask, "reward": RewardTask, "sft": SFTTask}


def pairs(num: int, *bad: int, but: Row = BAD) -> list[Row]:
    """Pairs of ``num`` prompts, in which the rows ``bad`` (counted from 1) are ``but``."""
    return [but if i in bad else PAIR | {"prompt": f"p{i}"} for i in range(1, num + 1)]


def task_of(folder: Path, tokenizer: Any, rows: list[Row], name: str = "dpo", **data: Any) -> Any:
    file, base = folder / "rows.jsonl", resolve_model(TINY)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "run": {"name": "x", "num_steps": 2, "batch_size": 2}, "model": {"path": base, "max_length": 64},
        "data": {"train": [{"path": str(file)}], "format": {"chat": False}, **data},
        "algorithm": {"name": name}, "evaluation": {"every": 0}, "cluster": {"backend": "in_process", "device": "cpu"},
    }  # fmt: skip
    if name == "reward":
        raw["evaluation"] = {}
    return TASKS[name](
        TuningConfig.model_validate(raw), BaseModelFolder(base, check_model_folder(base), 64, tokenizer)
    )


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_all_bad_rows_are_told_at_once_with_their_lines_and_reasons(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows = pairs(20, 3, 5, 8, 11, 12, 13, 17)
    rows[4] = {"prompt": "p", "chosen": "a"}
    with pytest.raises(InputError) as refused:
        task_of(tmp_path, tokenizer, rows, name)
    assert refused.value.field == "data.train.0" and refused.value.value == "7 of 20 rows"
    places = [f"rows.jsonl:{line}: " in refused.value.reason for line in (3, 5, 8, 11, 12, 13, 17)]
    assert places == [True] * NUM_TOLD + [False] * 2 and refused.value.reason.endswith("and 2 more")
    assert "chosen and rejected are identical" in str(refused.value) and "has no column rejected" in str(refused.value)
    assert "data.on_bad_row=drop" in refused.value.remedy and "\n" not in str(refused.value)


def test_one_bad_row_is_refused_by_its_own_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="leave the row out; or set data.on_bad_row=drop") as refused:
        task_of(tmp_path, tokenizer, pairs(4, 2))
    assert refused.value.field.endswith("rows.jsonl:2") and refused.value.reason == "chosen and rejected are identical"


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_dropped_rows_are_counted_and_the_rest_is_what_it_would_be_without_them(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    task = task_of(tmp_path, tokenizer, pairs(20, 2, 3), name, on_bad_row="drop")
    good = [row for row in pairs(20, 2, 3) if row != BAD]
    without = task_of(tmp_path, tokenizer, good, name)
    assert task.digest == without.digest and task.sizes == without.sizes
    assert task.report["num_bad"] == {"data.train.0": 2} and without.report["num_bad"] == {"data.train.0": 0}
    assert task.summary.endswith("; 2 bad rows dropped: chosen and rejected are identical (2)")
    assert "bad" not in without.summary


def test_more_than_half_are_not_dropped(tmp_path: Path, tokenizer: Any) -> None:
    assert task_of(tmp_path, tokenizer, pairs(4, 1, 2), on_bad_row="drop").sizes == [2]
    with pytest.raises(InputError, match="3 of 5 rows.*more than half, so none is dropped") as refused:
        task_of(tmp_path, tokenizer, pairs(5, 1, 2, 3), on_bad_row="drop")
    assert "on_bad_row" not in refused.value.remedy


@pytest.mark.parametrize("how", ["refuse", "drop"])
@pytest.mark.parametrize(("name", "row"), [("dpo", LABELLED), ("dpo", {"text": "t"}), ("sft", {"question": "q"})])
def test_a_dataset_of_another_kind_is_refused_whatever_is_asked_for(
    how: str, name: str, row: Row, tmp_path: Path, tokenizer: Any
) -> None:
    rows = pairs(9, 7, but=row) if name == "dpo" else [{"text": "t"}, row]
    with pytest.raises(RowKindError):
        task_of(tmp_path, tokenizer, rows, name, on_bad_row=how)


def test_examples_of_sft_are_dropped_and_counted_beside_those_that_are_too_long(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": "fine"}, {"text": ["no"]}, {"text": "long " * 200}, {"text": "fine too"}, {"text": "good"}]
    task = task_of(tmp_path, tokenizer, rows, "sft", on_bad_row="drop")
    assert task.sizes == [3] and task.report["left_out"] == {"train-0": {"too_long": 1, "bad_row": 1}}
    assert "1 bad_row" in task.summary
    with pytest.raises(InputError, match="rows.jsonl:2"):
        task_of(tmp_path, tokenizer, rows, "sft")


def test_rows_are_read_once_and_in_their_order() -> None:
    seen: list[int] = []

    def read(where: str, row: Row) -> int:
        seen.append(row["i"])
        if row["i"] == 3:
            raise InputError(where, 3, "is 3", "give another")
        return int(row["i"])

    rows = [(f"f:{i}", {"i": i}) for i in range(8)]
    found, bad = read_rows(rows, read, "data", "drop")
    assert seen == [*range(8)] and found == [0, 1, 2, 4, 5, 6, 7] and bad.reasons == {"is 3": 1}
