"""A reward model's gradient and step: those of the naive loss, however the batch is cut up."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from reward_model_kit import (
    DEADLINE_S,
    make_folder,
    make_learner,
    planted,
    settings,
)

from cluster.rendezvous import free_port
from trainers.comparisons import ComparisonTable, write_comparisons
from trainers.reward_training import RewardTrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

FP32_TOLERANCE = 2e-5  # on scores of size 1
GRADIENT_TOLERANCE = 1e-5  # relative to a parameter's largest gradient element

ALGORITHM = RewardTrainingSettings(centering_coef=0.05, label_smoothing=0.1)
BATCH = list(range(11))
HEAD_LR_FACTOR = 8.0
BUDGETS = ((4096, True), (4096, False), (400, True), (400, False))


def rank_main(rank: int, ranks: int, zero_stage: int, port: int, folder: str) -> None:
    """One rank; rank 0 leaves its gradients in ``folder``."""
    torch.set_num_threads(1)
    learner = make_learner(
        f"{folder}/model", Path(folder), rank, ranks, port, zero_stage=zero_stage, algorithm=ALGORITHM,
        head_lr_factor=HEAD_LR_FACTOR,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for token_budget, share in BUDGETS:
        learner.settings, learner.share_prompts = settings(ranks, zero_stage, token_budget), share
        found[f"{token_budget}/{share}"] = learner.gradients(BATCH)
    found["one comparison"] = learner.gradients(BATCH[:1])
    found["scores"] = learner.score("train")
    before = learner.weights.whole_state(torch.float32)
    learner.update(BATCH, 0)
    after = learner.weights.whole_state(torch.float32)
    learner.begin_save(f"{folder}/state-{ranks}-{zero_stage}")
    assert learner.save_outcome(DEADLINE_S).error is None
    torch.distributed.barrier()
    learner.update(BATCH, 1)
    found["next"] = learner.weights.whole_state(torch.float32)
    learner.load(f"{folder}/state-{ranks}-{zero_stage}")
    learner.update(BATCH, 1)
    found["next after a load"] = learner.weights.whole_state(torch.float32)
    if rank == 0:
        found["moved"] = {name: float((after[name] - before[name]).abs().max()) for name in before}
        torch.save(found, Path(folder) / f"found-{ranks}-{zero_stage}.pt")
    learner.close()


@functools.cache
def data_folder() -> tempfile.TemporaryDirectory[str]:
    root = tempfile.TemporaryDirectory(prefix="burnish-reward-")
    make_folder(Path(root.name) / "model")
    write_comparisons(planted(11, seed=4), Path(root.name) / "train.arrow")
    return root


@functools.cache
def run(ranks: int, zero_stage: int) -> Any:
    root = data_folder().name
    wrong = run_ranks(rank_main, ranks, ranks, zero_stage, free_port(), root, deadline_s=DEADLINE_S)
    if wrong is not None:
        return f"{ranks} ranks, ZeRO {zero_stage}: {wrong}"
    return torch.load(Path(root) / f"found-{ranks}-{zero_stage}.pt", weights_only=False)


def naive(indices: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients), text by text, float64, transformers' own attention: the mean over comparisons of the mean
    over their pairs.
    """
    from transformers import AutoModelForSequenceClassification

    root = Path(data_folder().name)
    model = AutoModelForSequenceClassification.from_pretrained(root / "model", dtype=torch.float64)
    table, smoothing, total = ComparisonTable(root / "train.arrow"), ALGORITHM.label_smoothing, 0.0
    for index in indices:
        c = table[index]
        scores = [
            model(torch.from_numpy(np.concatenate([c.prompt_ids, a]).astype(np.int64))[None]).logits[0, 0]
            for a in c.completion_ids
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for pair, (better, worse) in enumerate(c.pairs):
            d = scores[better] - scores[worse] - (c.margins[pair] if c.margins else 0.0)
            log_p, log_q = -torch.log1p(torch.exp(-d)), -torch.log1p(torch.exp(d))
            loss = loss - (1 - smoothing) * log_p - smoothing * log_q
            loss = loss + ALGORITHM.centering_coef * (scores[better] + scores[worse]) ** 2
        loss = loss / len(c.pairs) / len(indices)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert list(found) == list(expected)
    return max(
        float((found[n].double() - e.double()).abs().max() / e.double().abs().max()) for n, e in expected.items()
    )


@pytest.mark.parametrize("where", [(1, 0), (2, 2), (2, 3)])
def test_gradient_and_step_are_those_of_the_naive_loss_whatever_the_packing_ranks_and_zero_stage(
    where: tuple[int, int],
) -> None:
    found = run(*where)
    assert isinstance(found, dict), found
    loss, expected = naive(BATCH)
    for token_budget, share in BUDGETS:
        metrics, gradients = found[f"{token_budget}/{share}"]
        assert largest_error(gradients, expected) <= GRADIENT_TOLERANCE, (token_budget, share)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        whole = found["4096/True"][0]
        for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "center_rewards_loss"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    assert largest_error(found["one comparison"][1], naive(BATCH[:1])[1]) <= GRADIENT_TOLERANCE
    # AdamW's first step is the learning rate itself, whatever the gradient: only the head's is another one.
    for name, moved in found["moved"].items():
        assert moved == pytest.approx(1e-3 * (HEAD_LR_FACTOR if name == "score.weight" else 1), rel=0.05), name
    for name, tensor in found["next"].items():  # backbone and head are two groups of the optimizer
        assert torch.equal(found["next after a load"][name], tensor), name
    baseline = run(1, 0)["scores"]
    for a, b in zip(found["scores"], baseline, strict=True):
        np.testing.assert_allclose(a, b, atol=FP32_TOLERANCE)
