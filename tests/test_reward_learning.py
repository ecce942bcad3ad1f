"""A reward model learns a planted preference, alone and as the task of a run: statistics, report, rows refused."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reward_model_kit import (
    TINY,
    make_learner,
    padded_scores,
    planted,
    sampled,
)

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_model import RewardModel
from actors.scalar_model import scalar_pad_token_id
from actors.settings import RewardModelSettings
from trainers.comparisons import Comparison, ComparisonTable, write_comparisons
from trainers.errors import InputError
from trainers.reward_report import judge

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A learner on a causal model whose pad token is EOS, before and after training, and what it exported."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(resolve_model(TINY), root / "base")
    tokenizer = load_tokenizer(resolve_model(TINY))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(root / "base")
    held_out = planted(60, seed=3)
    write_comparisons(planted(240, seed=2), root / "train.arrow")
    write_comparisons(held_out, root / "held_out.arrow")
    learner = make_learner(str(root / "base"), root, lr=2e-3)
    before = learner.score("held_out")
    metrics = [learner.update(list(range(step * 24 % 240, step * 24 % 240 + 24)), step) for step in range(60)]
    scores = learner.score("held_out")
    learner.export(str(root / "export"))
    yield SimpleNamespace(root=root, learner=learner, held_out=held_out, before=before, scores=scores, metrics=metrics)
    learner.close()


def test_the_first_loss_is_ln_2_and_the_first_accuracy_a_coin_flip(trained: SimpleNamespace) -> None:
    first = trained.metrics[0]
    # Some pairs have a margin, so ask without: the scores of a new head are 0.
    assert all((s == 0).all() for s in trained.before)
    report = judge(trained.held_out, trained.before)
    assert report.loss == pytest.approx(math.log(2), abs=1e-12)
    assert report.accuracy.value == 0.5 == pytest.approx(first["accuracy"])
    batch = [i for i in range(24) if trained.learner.train[i].margins is None]
    fresh = make_first_loss(trained, batch)
    assert fresh == pytest.approx(math.log(2), abs=1e-7)


def make_first_loss(trained: SimpleNamespace, batch: list[int]) -> float:
    """Loss of a new head on ``batch``: the trained head is set to zero for it, and back."""
    weight = trained.learner.engine.engine.module.hf_model.score.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    metrics, _ = trained.learner.gradients(batch)
    with torch.no_grad():
        weight.copy_(kept)
    return float(metrics["loss"])


def test_training_recovers_the_planted_preference(trained: SimpleNamespace) -> None:
    report = judge(trained.held_out, trained.scores)
    assert report.accuracy.value > 0.9 and report.accuracy.low > 0.8
    assert report.loss < 0.35
    last = trained.metrics[-1]
    assert last["accuracy"] > 0.9 and last["margin"] > 1.0 and last["loss"] < 0.5
    assert last["min_reward"] < last["mean_reward"] < last["max_reward"]
    assert trained.metrics[0]["grad_norm"] > 0 and last["learner/shared_prompt_fraction"] > 0


def test_an_export_pads_with_another_token_than_eos_and_scores_alike_in_padded_batches(
    trained: SimpleNamespace,
) -> None:
    export, tokenizer = str(trained.root / "export"), load_tokenizer(str(trained.root / "export"))
    config = json.loads((trained.root / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    ours = np.concatenate(trained.scores)
    np.testing.assert_allclose(padded_scores(export, trained.held_out), ours, rtol=1e-4, atol=1e-4)
    # What would happen otherwise: the score would be read one token before the end.
    wrong = padded_scores(export, trained.held_out, tokenizer.eos_token_id)
    assert np.abs(wrong - ours).max() > 0.05


def test_a_tokenizer_with_no_token_left_to_pad_with_is_refused() -> None:
    only = SimpleNamespace(eos_token_id=2, pad_token_id=2, unk_token_id=None, bos_token_id=2, all_special_ids=[2])
    with pytest.raises(InputError, match="only special token is EOS"):
        scalar_pad_token_id(only, "model.path", "x")


# --- the task -----------------------------------------------------------------------------------


def test_a_task_splits_by_prompt_trains_and_leaves_statistics_and_report(tmp_path: Path, trained: Any) -> None:
    from launch.model_facts import check_model_folder
    from launch.reward_task import RewardTask
    from launch.tuning_config import TuningConfig
    from launch.tuning_task import BaseModelFolder

    base = str(trained.root / "base")
    rows = [{"prompt": f"p{i % 40}", "chosen": f"z{i}", "rejected": f"a{i}"} for i in range(80)]
    rows.append({"prompt": "p" * 300, "chosen": "z", "rejected": "a"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [{"prompt": "q", "completion": "z" * i + "a"} for i in range(5)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    config = TuningConfig.model_validate({
        "run": {"name": "x", "num_steps": 2, "batch_size": 8},
        "model": {"path": base, "max_length": 64},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "format": {"chat": False}},
        "algorithm": {"name": "reward", "reference_samples": str(tmp_path / "samples.jsonl")},
        "evaluation": {"size": 20},
    })  # fmt: skip
    task = RewardTask(config, BaseModelFolder(base, check_model_folder(base), 64, load_tokenizer(base)))
    assert task.sizes == [60] and task.report["num_held_out"] == 20
    assert task.report["num_too_long"]["data.train.0"] == 1 and "1 rows left out" in task.summary
    task.write(tmp_path)
    ids = [{ComparisonTable(tmp_path / f"{n}.arrow")[i].prompt_id for i in range(m)} for n, m in
           (("train", 60), ("held_out", 20))]  # fmt: skip
    assert not ids[0] & ids[1]
    assert task.payload([(0, 3), (0, 5)], 0) == [3, 5]

    trained.learner.data_folder = tmp_path

    async def call(method: str, *args: Any) -> Any:
        return getattr(trained.learner, method)(*args)

    fleet: Any = SimpleNamespace(call=call)
    metrics = asyncio.run(task.evaluate(fleet, 0))
    assert 0 <= metrics["eval/pair_accuracy_low"] <= metrics["eval/pair_accuracy"] <= metrics["eval/pair_accuracy_high"]
    export = tmp_path / "export"
    trained.learner.export(str(export))
    asyncio.run(task.after_training(fleet, export))
    stats = json.loads((export / "reward_stats.json").read_text())
    scores = np.concatenate(trained.learner.score("reference_samples"))
    assert (stats["mean"], stats["num"]) == (pytest.approx(float(scores.mean()), rel=1e-6), 5)
    assert stats["std"] == pytest.approx(float(scores.std()), rel=1e-5)
    report = json.loads((export / "reward_report.json").read_text())
    assert report["accuracy"]["value"] == metrics["eval/pair_accuracy"] and report["num_pairs"] == 20
    assert report["reliability"] and report["accuracy_by_length_difference"] and report["scores"]["margin"]["num"] == 20
    assert (export / "reward_report.svg").read_text().count("Reliability") >= 1

    # The statistics normalise the very samples they were made of to mean 0 and deviation 1.
    model = RewardModel(RewardModelSettings(name="rm", path=str(export), normalize=True), base, "float32", "cpu")
    tokenizer = load_tokenizer(base)
    texts = [np.array([*tokenizer.encode(s["completion"]), tokenizer.eos_token_id], dtype=np.int32) for s in samples]
    part = model.score_groups([sampled("q", texts)])[0].parts["rm"]
    assert part.mean() == pytest.approx(0, abs=1e-4) and part.std() == pytest.approx(1, abs=1e-4)


def task_of(rows: list[dict[str, Any]], tmp_path: Path, grouped: bool = False, **data: Any) -> Any:
    from launch.model_facts import check_model_folder
    from launch.reward_task import RewardTask
    from launch.tuning_config import TuningConfig
    from launch.tuning_task import BaseModelFolder

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = resolve_model(TINY)
    config = TuningConfig.model_validate({
        "run": {"name": "x", "num_steps": 2, "batch_size": 8}, "model": {"path": base},
        "algorithm": {"name": "reward", "group_by_prompt": grouped},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "format": {"chat": False}, **data},
    })  # fmt: skip
    return RewardTask(config, BaseModelFolder(base, check_model_folder(base), 64, load_tokenizer(base)))


def test_a_task_may_learn_from_all_rows_of_a_prompt_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": c, "rejected": r} for i in range(4) for c, r in ("ab", "bc", "ac")]
    apart, together = task_of(rows, tmp_path), task_of(rows, tmp_path, grouped=True)
    assert sum(apart.sizes) + apart.report["num_held_out"] == 12
    assert sum(together.sizes) + together.report["num_held_out"] == 4 and together.report["num_pairs"] == 9


def test_a_task_refuses_rows_it_cannot_learn_from(tmp_path: Path) -> None:
    good = [{"prompt": f"p{i}", "chosen": "z", "rejected": "a"} for i in range(3)]
    with pytest.raises(InputError, match=r"rows.jsonl:4 = .*identical"):
        task_of([*good, good[0] | {"rejected": "z"}], tmp_path)
    with pytest.raises(InputError, match="nothing is left of it once prompts are held out"):
        task_of(good[:1], tmp_path)
    with pytest.raises(InputError, match="has no prompt that is not in data.train too"):
        task_of(good, tmp_path, eval={"path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(InputError, match="each is too long to learn from"):
        task_of([row | {"chosen": "z" * 70} for row in good], tmp_path)
    pairs = {"function": "trainers.planted_pairs:preference_rows", "args": {"num": 30, "seed": 1}}
    task = task_of(good, tmp_path, train=[pairs | {"args": {"num": 30, "seed": 1, "noise": 0}}], eval=None)
    assert task.sizes[0] + task.report["num_held_out"] + task.report["num_too_long"]["data.train.0"] == 30


def test_the_accuracy_of_a_report_is_as_certain_as_its_prompts_are_many() -> None:
    answer = np.zeros(3, dtype=np.int32)
    pair = [Comparison(f"p{i % 10}", answer, (answer, answer), ((0, 1),)) for i in range(200)]
    # Pairs of one prompt stand or fall together: 200 pairs say no more than 10 prompts.
    scores = [np.array([1.0, 0.0]) if i % 10 < 7 else np.array([0.0, 1.0]) for i in range(200)]
    report, apart = (
        judge(pair, scores),
        judge([Comparison(f"q{i}", answer, (answer, answer), ((0, 1),)) for i in range(200)], scores),
    )
    assert report.accuracy.value == apart.accuracy.value == 0.7
    assert (report.accuracy.n, apart.accuracy.n) == (10, 200)
    assert report.accuracy.high - report.accuracy.low > 3 * (apart.accuracy.high - apart.accuracy.low)
    assert report.loss == pytest.approx(0.7 * np.logaddexp(0, -1) + 0.3 * np.logaddexp(0, 1))
    with pytest.raises(ValueError, match="one score for each answer"):
        judge(pair, scores[1:])
