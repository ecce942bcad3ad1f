"""Preference learning on a model: one loss however the batch is cut up, and a rank that starts at its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import (
    TINY,
    bare_rank,
    comparisons,
    hf_model,
    one_by_one,
    policy,
    reference_of,
    settings,
    tokenizer,
)
from transformers import AutoModelForCausalLM

from actors.model_folders import resolve_model
from actors.modeling import PackedPolicy, load_policy
from actors.preference_learner import PreferenceLearner
from actors.preference_objective import PreferenceBatch
from trainers.comparisons import Comparison, write_comparisons
from trainers.metrics import check
from trainers.preference_losses import AnswerLogps, mismatched_kl, paired_outcome, unpaired_outcome
from trainers.preference_training import LOSSES, LossName
from trainers.reference_logps import reference_rows, write_reference

__all__ = ["policy", "tokenizer"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # relative to a parameter's largest gradient element

# --- one loss, however the batch is cut up --------------------------------------------------------


def naive(loss: str, batch: Sequence[Comparison]) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32, local_files_only=True)
    logps, made, reference = one_by_one(model, batch), settings(loss), reference_of(loss, batch)

    def picked(where: Sequence[tuple[int, int]]) -> AnswerLogps:
        lengths = torch.tensor([float(len(batch[i].completion_ids[k])) for i, k in where])
        theirs = None if reference is None else torch.tensor([float(reference[i][k]) for i, k in where])
        return AnswerLogps(torch.stack([logps[i][k] for i, k in where]), theirs, lengths)

    if loss == "kto":
        other = picked([(i, 1) for i in range(len(batch))])
        kl = mismatched_kl(float(other.ratio.detach().sum()), len(batch))
        label = torch.tensor([c.label is True for c in batch])
        judged = picked([(i, 0) for i in range(len(batch))])
        found = unpaired_outcome(judged, label, int(label.sum()), len(batch), kl, made)
    else:
        pairs = [(i, pair) for i, c in enumerate(batch) for pair in c.pairs]
        weights = torch.tensor([1 / (len(batch) * len(batch[i].pairs)) for i, _ in pairs], dtype=torch.float64)
        chosen, rejected = (picked([(i, pair[side]) for i, pair in pairs]) for side in (0, 1))
        found = paired_outcome(chosen, rejected, weights, made)
    found.loss.backward()
    return found.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed(
    policy: PackedPolicy, loss: str, batch: Sequence[Comparison], token_budget: int, share: bool, num_ranks: int = 1
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """(metrics, gradient, packs of a rank): what the ranks do, one after the other."""
    made = PreferenceBatch(batch, reference_of(loss, batch), settings(loss), share, CPU)
    policy.zero_grad()
    if made.needs_kl:
        total = 0.0
        for rank in range(num_ranks):
            for members in made.plan(rank, num_ranks, token_budget, mismatched=True):
                part = made.share(members, mismatched=True)
                with torch.no_grad():
                    total += float(made.mismatched_ratios(policy(part.pack, 1.0, with_entropy=False)[0], part))
        made.settle_kl(total)
    metrics = dict.fromkeys(made.nothing().metrics, 0.0)
    for rank in range(num_ranks):
        plan = made.plan(rank, num_ranks, token_budget)
        for members in plan:
            part = made.share(members)
            outcome = made.outcome(policy(part.pack, 1.0, with_entropy=False)[0], part)
            outcome.loss.float().backward()  # type: ignore[no-untyped-call]
            metrics = {name: value + float(outcome.metrics[name]) for name, value in metrics.items()}
    gradient = {n: p.grad.clone() for n, p in policy.hf_model.named_parameters() if p.grad is not None}
    return metrics, gradient, len(plan)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_do_not_depend_on_micro_batches_packing_or_ranks(
    loss: str, policy: PackedPolicy, tokenizer: Any
) -> None:
    batch = comparisons(loss, tokenizer)
    longest = max(c.cost(False) for c in batch)
    expected_loss, expected = naive(loss, batch)
    assert any(float(g.abs().max()) > 1e-4 for g in expected.values())
    counts = []
    for budget, share, num_ranks in ((4096, True, 1), (4096, False, 1), (longest, False, 1), (longest, True, 3)):
        metrics, gradient, num_packs = packed(policy, loss, batch, budget, share, num_ranks)
        counts.append(num_packs)
        assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)  # of ipo: the square of float32 margins
        assert gradient.keys() == expected.keys()
        for name, whole in expected.items():
            assert float((gradient[name] - whole).abs().max()) <= TOLERANCE * float(whole.abs().max()), name
    assert counts[0] == 1 < counts[2], "the budgets cut nothing up"


def test_a_rank_without_a_pair_left_runs_one_that_counts_for_nothing(policy: PackedPolicy, tokenizer: Any) -> None:
    for loss in ("sigmoid", "kto"):
        batch = comparisons(loss, tokenizer)[:1]
        alone, many = (packed(policy, loss, batch, 4096, True, ranks) for ranks in (1, 4))
        assert many[0] == pytest.approx(alone[0])
        assert all(torch.equal(many[1][name], gradient) for name, gradient in alone[1].items())


def test_chosen_and_rejected_stay_in_one_pack_with_their_prompt_computed_once(tokenizer: Any) -> None:
    batch = comparisons("sigmoid", tokenizer)
    made = PreferenceBatch(batch, reference_of("sigmoid", batch), settings("sigmoid"), True, CPU)
    parts = [made.share(m) for m in made.plan(0, 1, max(c.cost(True) for c in batch))]
    assert sorted(m for part in parts for m in part.members) == list(range(len(batch)))
    for part in parts:
        answers = [len(batch[m].completion_ids) for m in part.members]
        assert [len(block.completions) for block in part.pack.layout.blocks] == answers


# --- a rank -----------------------------------------------------------------------------------


def make_rank(folder: Path, policy: PackedPolicy, loss: str, monkeypatch: pytest.MonkeyPatch) -> PreferenceLearner:
    """A rank on the files of ``folder``."""
    tables = {name: folder / f"{name}.arrow" for name in ("train", "held_out")}
    rank = bare_rank(policy, settings(loss), tables, monkeypatch, lr=2e-3)
    files = [folder / f"reference.{name}.parquet" for name in ("train", "held_out")]
    rank._reference = {f.name.split(".")[1]: reference_rows(f) for f in files if f.exists()}
    return rank


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "orpo"])
def test_a_rank_starts_at_its_reference_learns_and_names_its_metrics_as_trl_does(
    loss: LossName, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(resolve_model(TINY), 256)
    for name, some in (("train", comparisons(loss, tokenizer, 24)), ("held_out", comparisons(loss, tokenizer, 8))):
        write_comparisons(some, tmp_path / f"{name}.arrow")
        if LOSSES[loss].has_reference:
            with torch.no_grad():
                rows = [np.array([float(x) for x in row]) for row in one_by_one(hf_model(), some)]
            write_reference(tmp_path / f"reference.{name}.parquet", rows, "key")
    rank = make_rank(tmp_path, policy, loss, monkeypatch)
    before = rank.evaluate()
    metrics = [rank.update([(8 * step + i) % 24 for i in range(8)], step) for step in range(9)]
    after = rank.evaluate()
    assert after["loss"] < before["loss"] and metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"] - 1e-6
    for name in [*metrics[0], *(f"eval/{name}" for name in after)]:
        check(name)
    common = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    own = {"sigmoid": {"rewards/accuracies"}, "kto": {"kl"}}.get(
        loss, {"rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    )
    assert after.keys() == common | own
    if loss == "sigmoid":
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if loss == "kto":
        assert before["loss"] == pytest.approx(0.5, abs=1e-6) and before["kl"] == pytest.approx(0, abs=1e-4)
    if LOSSES[loss].has_reference:
        assert before["rewards/chosen"] == pytest.approx(0, abs=1e-5)
