"""The reference of offline preference learning: asked once, kept, told apart from that of other data or models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import TINY, comparisons, hf_model, one_by_one, tokenizer

from actors.model_folders import resolve_model
from cluster.host import num_cpus
from cluster.layout import NodeSupply
from launch.model_facts import check_model_folder
from launch.preference_task import PreferenceTask
from launch.tuning_config import TuningConfig
from launch.tuning_task import BaseModelFolder, Site
from trainers.comparisons import ComparisonTable
from trainers.errors import VerificationError
from trainers.planted_pairs import labelled_rows
from trainers.reference_logps import read_reference, reference_key, reference_rows, write_reference

__all__ = ["tokenizer"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


class Events:
    """What a run is told, in place of its telemetry."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def phase(self, name: str, done: int, total: int) -> None:
        self.events.append({"kind": "phase", "name": name, "done": done, "total": total})

    def sources(self) -> list[tuple[str, str]]:
        return [(e["data"], e["source"]) for e in self.events if e["kind"] == "reference"]


def task_of(tmp_path: Path, tokenizer: Any, loss: str = "sigmoid", num: int = 12, **sections: Any) -> PreferenceTask:
    base = resolve_model(TINY)
    function = f"trainers.planted_pairs:{'labelled' if loss == 'kto' else 'preference'}_rows"
    raw: dict[str, Any] = {
        "run": {"name": "x", "num_steps": 2, "batch_size": 4, "directory": str(tmp_path / "runs")},
        "model": {"path": base, "max_length": 128, "dtype": "float32"},
        "data": {"train": [{"function": function, "args": {"num": num, "seed": 1}}], "format": {"chat": False}},
        "algorithm": {"name": "dpo", "loss": loss},
        "cluster": {"backend": "in_process", "device": "cpu"},
        **sections,
    }
    config = TuningConfig.model_validate(raw)
    return PreferenceTask(config, BaseModelFolder(base, check_model_folder(base), 128, tokenizer))


def settled(task: PreferenceTask, folder: Path) -> Events:
    """The run folder as the ranks find it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = Events()
    site: Any = Site(None, [NodeSupply("this process", num_cpus(), 0)], told)  # type: ignore[arg-type]
    task.write(folder)
    asyncio.run(task.before_ranks(site, folder))
    return told


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_the_reference_is_asked_once_and_its_answers_are_used_again(
    loss: str, tokenizer: Any, tmp_path: Path
) -> None:
    task = task_of(tmp_path, tokenizer, loss, num=40, evaluation={"size": 8})
    told = settled(task, tmp_path / "first")
    assert told.sources() == [("train", "computed"), ("held_out", "computed")]
    kwargs = task.rank_kwargs(tmp_path / "first")
    for name, file in kwargs["reference"].items():
        table = ComparisonTable(tmp_path / "first" / f"{name}.arrow")
        with torch.no_grad():
            expected = one_by_one(hf_model(), [table[i] for i in range(len(table))])
        for row, theirs in zip(reference_rows(Path(file)), expected, strict=True):
            np.testing.assert_allclose(row, [float(x) for x in theirs], rtol=1e-5)
    again = task_of(tmp_path, tokenizer, loss, num=40, evaluation={"size": 8})
    assert settled(again, tmp_path / "second").sources() == [("train", "cache"), ("held_out", "cache")]
    for name in ("train", "held_out"):
        first, second = (reference_rows(tmp_path / f / f"reference.{name}.parquet") for f in ("first", "second"))
        assert [row.tolist() for row in first] == [row.tolist() for row in second]


def test_a_damaged_file_of_the_reference_is_computed_again(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer)
    settled(task, tmp_path / "first")
    cache = sorted((tmp_path / "runs" / "reference-logprobs").iterdir())
    assert len(cache) == 2
    rows = reference_rows(tmp_path / "first" / "reference.train.parquet")
    (damaged,) = [f for f in cache if len(reference_rows(f)) == len(rows)]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    told = settled(task, tmp_path / "second")
    assert ("train", "damaged") in told.sources() and ("train", "computed") in told.sources()
    assert ("held_out", "cache") in told.sources()
    again = reference_rows(tmp_path / "second" / "reference.train.parquet")
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def test_a_file_of_the_reference_says_what_it_is_of(tokenizer: Any, tmp_path: Path) -> None:
    some = comparisons("sigmoid", tokenizer, 4)
    rows = [np.zeros(len(c.completion_ids)) - 1.5 for c in some]
    key = reference_key(some, "model", "float32")
    other = [reference_key(some, "other", "float32"), reference_key(some, "model", "bfloat16"),
             reference_key(some[::-1], "model", "float32"), reference_key(some[:3], "model", "float32")]  # fmt: skip
    assert len({key, *other}) == 5
    file = tmp_path / "x" / f"{key}.parquet"
    write_reference(file, rows, key)
    assert [row.tolist() for row in read_reference(file, some, key)] == [row.tolist() for row in rows]
    with pytest.raises(VerificationError, match="not of"):
        read_reference(file, some, other[0])
    with pytest.raises(VerificationError, match="rows of other answers"):
        read_reference(file, some[:3], key)
    file.write_text("no parquet")
    with pytest.raises(VerificationError, match="cannot be read"):
        reference_rows(file)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_a_loss_without_a_reference_loads_none(loss: str, tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer, loss)
    assert settled(task, tmp_path / "run").events == []
    assert task.rank_kwargs(tmp_path / "run")["reference"] == {}
    assert not (tmp_path / "runs").exists()


# --- the task -----------------------------------------------------------------------------------


def test_a_task_holds_prompts_out_only_where_it_evaluates(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer)
    held, learned = ({c.prompt_id for c in some} for some in (task._held_out, task._train))
    assert held and not held & learned and sum(task.sizes) + task.report["num_held_out"] == 12
    whole = task_of(tmp_path, tokenizer, evaluation={"every": 0})
    assert whole.sizes == [12] and whole.report["num_held_out"] == 0
    assert "12 comparisons of" in whole.summary and whole.payload([(0, 3), (0, 5)], 0) == [3, 5]
    labelled = task_of(tmp_path, tokenizer, "kto", evaluation={"every": 0})
    assert "desirable" in labelled.summary and labelled.report["num_desirable"] == sum(
        bool(row["label"]) for row in labelled_rows(12, 1)
    )


def test_other_labels_are_other_data_for_a_checkpoint_and_the_same_for_the_reference(tokenizer: Any) -> None:
    from dataclasses import replace

    from trainers.comparisons import digest

    some = comparisons("kto", tokenizer)
    turned = [replace(some[0], label=not some[0].label), *some[1:]]
    assert digest(some) != digest(turned)
    assert reference_key(some, "m", "float32") == reference_key(turned, "m", "float32")
