"""The law of the learner: a batch has one gradient, however it is cut up.

One recorded batch (uneven groups, a masked, an aborted and an empty sample, a group without a spread) goes
through real DeepSpeed learners in processes of their own: 1 rank and ZeRO 0, then 2 ranks and ZeRO 0 to 3, each
with several token budgets, with and without shared prompts.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import model_of_rank, run_ranks

from actors.model_folders import resolve_model
from actors.settings import LearnerSettings, OptimizerSettings, SamplingSettings
from cluster.rendezvous import Rendezvous, free_port
from trainers.advantages import group_relative
from trainers.algorithms import AlgorithmSettings
from trainers.correction import CorrectionSettings
from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    decode_group,
    decode_logprobs,
    encode_group,
    encode_logprobs,
    summarize,
)
from trainers.losses import token_weights
from trainers.protocols import LearnerGroup

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "builtin:tiny-llama"
DEADLINE_S = 240.0  # for the ranks of one task, and for each of their collectives; idle, they take seconds
TOLERANCE = 1e-5  # relative to a parameter's largest gradient element
MAX_TOKENS = 32
TEMPERATURE = 0.7
LR = 1e-3
ABORTED = (3, 3)  # group, sample
SHARDED = (0, 1, 2, 3)  # ZeRO stages that two ranks try

ALGORITHMS = {
    "grpo": AlgorithmSettings(),
    "kl-entropy": AlgorithmSettings(kl_coef=0.3, entropy_coef=0.05, aggregation="token"),
    "rloo-k2": AlgorithmSettings(
        kl_coef=0.1, kl_estimator="k2", baseline="leave_one_out", scale="none", aggregation="constant"
    ),
    "kl-in-reward": AlgorithmSettings(kl_coef=0.1, kl_estimator="k1", kl_placement="reward", scale="none"),
    "token-truncate": AlgorithmSettings(
        kl_coef=0.3, entropy_coef=0.05, correction=CorrectionSettings(kind="token_truncate", cap=1.2)
    ),
    "sequence-mask": AlgorithmSettings(correction=CorrectionSettings(kind="sequence_mask", high=2.0)),
    "cispo": AlgorithmSettings(aggregation="token", correction=CorrectionSettings(kind="cispo", cap=1.2)),
    "online-dpo": AlgorithmSettings.model_validate({"name": "online_dpo"}),
}
SEVERAL_UPDATES = AlgorithmSettings(num_minibatches=2, num_epochs=2, kl_coef=0.1)
WEIGHTS: dict[str, list[float]] = {}  # by kind of correction: those of the naive loss
# (token budget, share prompts); the longest sample has 29 tokens.
PACKINGS = ((4096, True), (4096, False), (64, True), (30, False))


def recorded_batch() -> list[LearnerGroup]:
    """The same on every rank: prompts of P tokens, completions of T, rewards (NaN: masked)."""
    draw = np.random.default_rng(11)
    version = WeightVersion(0, 3)
    nan = float("nan")
    rows = [
        (7, (5, 9, 1, 12, 3), (1.0, 0.0, nan, 0.5, 1.0)),
        (12, (4, 17), (0.0, 1.0)),
        (5, (6, 6, 2, 11), (1.0, 1.0, 1.0, 1.0)),
        (9, (8, 0, 13, 6), (0.2, 0.0, 0.9, 9.0)),  # the last one is aborted: its reward must not count
    ]
    groups = []
    for g, (num_prompt, lengths, rewards) in enumerate(rows):
        prompt = Prompt(f"p{g}", draw.integers(3, 259, num_prompt, dtype=np.int32), "?")
        trajectories = tuple(
            Trajectory(
                sample_index=i,
                seed=i,
                completion_ids=draw.integers(3, 259, t, dtype=np.int32),
                behavior_logprobs=draw.normal(-5.8, 0.1, t).astype(np.float32),
                text="",
                finish_reason="abort" if (g, i) == ABORTED else "stop",
                version_spans=(VersionSpan(version, t),),
            )
            for i, t in enumerate(lengths)
        )
        group = TrajectoryGroup(f"g{g}", prompt, trajectories)
        reference = encode_logprobs([draw.normal(-5.8, 0.5, t).astype(np.float32) for t in lengths])
        totals = np.array(rewards)
        groups.append(
            LearnerGroup(
                summarize(group, "generator-0", 0.0),
                GroupRewards(f"g{g}", totals, {"r": totals}),
                encode_group(group),
                reference,
            )
        )
    return groups


def one_sample(group: LearnerGroup) -> LearnerGroup:
    """The group with all rewards but the first masked: some rank has nothing to compute."""
    totals = np.where(np.arange(group.rewards.totals.size) == 0, 1.0, np.nan)
    return replace(group, rewards=replace(group.rewards, totals=totals))


# --- in the ranks' processes ------------------------------------------------------------------


def learner_rank(rank: int, ranks: int, zero_stage: int, port: int, task: str, folder: str) -> None:
    """One rank of ``task``; rank 0 leaves what it found in ``folder``."""
    torch.set_num_threads(1)
    from actors.learner import DeepSpeedLearner

    model = model_of_rank(rank, zero_stage, resolve_model(MODEL), folder)
    learner = DeepSpeedLearner(
        rank, Rendezvous("127.0.0.1", port, ranks), model, settings(ranks, zero_stage),
        ALGORITHMS["grpo"], SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS),
        "float32", "cpu", num_steps=10, seed=99 if task == "resume" else 5,
    )  # fmt: skip
    found = {"laws": gradients_and_updates, "resume": resume}[task](learner, folder)
    if rank == 0:
        torch.save(found, Path(folder) / f"{task}.pt")
    learner.close()


def settings(ranks: int, zero_stage: int, token_budget: int = 4096) -> LearnerSettings:
    return LearnerSettings(
        num_workers=ranks,
        zero_stage=zero_stage,  # type: ignore[arg-type]
        token_budget=token_budget,
        logprob_chunk=16,
        # A large epsilon: Adam then is smooth in the gradient, so rounding stays rounding.
        optimizer=OptimizerSettings(lr=LR, eps=1e-2, max_grad_norm=0.1),
        start_deadline_s=DEADLINE_S,
    )


def gradients_and_updates(learner: Any, folder: str) -> dict[str, Any]:
    import actors.update_plan as module

    groups = recorded_batch()
    found: dict[str, Any] = {}
    for name, algorithm in ALGORITHMS.items():
        for token_budget, share in PACKINGS:
            configure(learner, algorithm, token_budget, share)
            found[f"{name}/{token_budget}/{share}"] = learner.gradients(groups)
    configure(learner, ALGORITHMS["grpo"], 30, True)
    skip, module.contributing = module.contributing, everyone
    found["without skipping"] = learner.gradients(groups)
    module.contributing = skip
    configure(learner, ALGORITHMS["grpo"], 30, True)
    found["nobody contributes"] = learner.gradients(groups[2:3])
    configure(learner, ALGORITHMS["kl-entropy"], 30, True)
    found["fewer samples than ranks"] = learner.gradients([one_sample(groups[0])])
    configure(learner, ALGORITHMS["grpo"], 30, True)
    found["one update"] = learner.update(groups, 0).metrics, learner.weights.whole_state(torch.float32)
    configure(learner, SEVERAL_UPDATES, 30, True)
    found["several updates"] = learner.update(groups, 1).metrics, learner.weights.whole_state(torch.float32)
    save(learner, f"{folder}/state")
    found["next update"] = learner.update(groups, 2).metrics, learner.weights.whole_state(torch.float32)
    learner.load(f"{folder}/state")
    found["next update again"] = learner.update(groups, 2).metrics, learner.weights.whole_state(torch.float32)
    return found


def save(learner: Any, directory: str) -> None:
    """Return when every rank's file is there."""
    learner.begin_save(directory)
    assert learner.save_outcome(DEADLINE_S).error is None
    torch.distributed.barrier()


def everyone(members: Sequence[int], weights: np.ndarray, *_: Any) -> list[int]:
    """``contributing`` without its skipping: all samples that weigh anything."""
    return [i for k, i in enumerate(members) if weights[k] > 0]


def resume(learner: Any, folder: str) -> dict[str, Any]:
    """A new process, another seed, perturbed weights: everything must come from the checkpoint."""
    groups = recorded_batch()
    learner.update(groups, 0)
    learner.load(f"{folder}/state")
    configure(learner, SEVERAL_UPDATES, 30, True)
    return {"next update": (learner.update(groups, 2).metrics, learner.weights.whole_state(torch.float32))}


def configure(learner: Any, algorithm: AlgorithmSettings, token_budget: int, share_prompts: bool) -> None:
    learner.algorithm, learner.share_prompts = algorithm, share_prompts
    learner.settings = settings(learner.engine.world_size, learner.engine.zero_stage, token_budget)


# --- in the test's process --------------------------------------------------------------------


@functools.cache
def folder_of(ranks: int, zero_stage: int) -> tempfile.TemporaryDirectory[str]:
    """Kept, with its checkpoint, as long as this process."""
    return tempfile.TemporaryDirectory(prefix=f"burnish-{ranks}x{zero_stage}-")


def run(ranks: int, zero_stage: int, task: str = "laws") -> dict[str, Any]:
    """What rank 0 found."""
    found = _run(ranks, zero_stage, task)
    if isinstance(found, str):
        pytest.fail(found)
    return found


@functools.cache
def _run(ranks: int, zero_stage: int, task: str) -> dict[str, Any] | str:
    """What rank 0 found, or what went wrong: the ranks are not done within the deadline, or failed."""
    resolve_model(MODEL)
    folder = folder_of(ranks, zero_stage).name
    wrong = run_ranks(learner_rank, ranks, ranks, zero_stage, free_port(), task, folder, deadline_s=DEADLINE_S)
    if wrong is not None:
        return f"{task}, {ranks} ranks, ZeRO {zero_stage}: {wrong}"
    return torch.load(Path(folder) / f"{task}.pt", weights_only=False)


def largest_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """max over parameters of max|a - b| / max|b|."""
    assert list(found) == list(expected)
    return max(
        float((found[n].double() - expected[n].double()).abs().max() / expected[n].double().abs().max())
        for n in expected
    )


def naive_correction(logp: torch.Tensor, behavior: np.ndarray, correction: CorrectionSettings) -> list[float]:
    """The importance weight of each token of one sample."""
    ratios = [math.exp(p - float(b)) for p, b in zip(logp.tolist(), behavior)]
    if correction.kind in ("token_truncate", "cispo"):
        return [min(q, correction.cap) for q in ratios]
    if correction.kind == "sequence_mask":
        product = math.prod(ratios)
        return [product if correction.low <= product <= correction.high else 0.0] * len(ratios)
    return [1.0] * len(ratios)


def naive_dpo_loss(totals: np.ndarray, kept: np.ndarray, ratios: Sequence[torch.Tensor], beta: float) -> Any:
    """Of the best and the worst sample of a group; None where all are worth the same."""
    order = sorted(np.flatnonzero(kept), key=lambda i: totals[i])
    best, worst = max(order, key=lambda i: (totals[i], -i)), order[0]
    if totals[best] == totals[worst]:
        return None
    return -torch.nn.functional.logsigmoid(beta * (ratios[best] - ratios[worst]))


def naive_gradient(groups: Sequence[LearnerGroup], algorithm: AlgorithmSettings) -> dict[str, torch.Tensor]:
    """Sample by sample, float64, with transformers' own model and attention."""
    from transformers import AutoModelForCausalLM

    pair_losses = []
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float64)
    lengths = [t for g in groups for t in g.summary.num_completion_tokens]
    whole = [[r != "abort" for r in g.summary.finish_reasons] & g.rewards.valid for g in groups]
    valid = [bool(v) for group in whole for v in group]
    weights = iter(token_weights(lengths, valid, algorithm.aggregation, MAX_TOKENS))
    for group, included in zip(groups, whole):
        decoded = decode_group(group.payload)
        prompt = torch.from_numpy(decoded.prompt.token_ids.astype(np.int64))
        references = decode_logprobs(group.reference_payload)
        scored = []
        for trajectory in decoded.trajectories:
            ids = torch.cat([prompt, torch.from_numpy(trajectory.completion_ids.astype(np.int64))])
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logp = logits.log_softmax(-1)
            scored.append((logp.gather(1, ids[len(prompt) :, None])[:, 0], -(logp.exp() * logp).sum(-1)))
        if algorithm.learns_from_pairs:
            kept = np.array(included) & (np.array(group.summary.num_completion_tokens) > 0)
            ratios = [lp.sum() - float(r.sum(dtype=np.float64)) for (lp, _), r in zip(scored, references)]
            loss = naive_dpo_loss(group.rewards.totals, kept, ratios, algorithm.kl_coef)
            pair_losses += [] if loss is None else [loss]
            continue
        rewards = group.rewards.totals
        if algorithm.kl_coef and algorithm.kl_placement == "reward":
            rewards = rewards - [
                algorithm.kl_coef * float((lp.detach() - torch.from_numpy(r.copy())).sum())
                for (lp, _), r in zip(scored, references)
            ]
        advantages = group_relative(rewards, included, algorithm.baseline, algorithm.scale)
        behaviors = [t.behavior_logprobs for t in decoded.trajectories]
        for (lp, entropy), reference, advantage, behavior in zip(scored, references, advantages, behaviors):
            weight = next(weights)
            if weight == 0:
                continue
            policy_term = lp if algorithm.correction.kind == "cispo" else torch.exp(lp - lp.detach())
            loss = -advantage * policy_term - algorithm.entropy_coef * entropy
            if algorithm.kl_coef and algorithm.kl_placement == "loss":
                d = lp - torch.from_numpy(reference.copy())
                k = d**2 / 2 if algorithm.kl_estimator == "k2" else torch.exp(-d) - 1 + d
                loss = loss + algorithm.kl_coef * k
            corrected = naive_correction(lp, behavior, algorithm.correction)
            WEIGHTS.setdefault(algorithm.correction.kind, []).extend(corrected)
            loss = loss * torch.tensor(corrected)
            (weight * loss.sum()).backward()
    if pair_losses:
        torch.stack(pair_losses).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_rank_and_zero_0_have_the_gradient_of_the_naive_loss(name: str) -> None:
    found = run(1, 0)[f"{name}/4096/True"]
    expected = naive_gradient(recorded_batch(), ALGORITHMS[name])
    assert min(g.abs().max() for g in expected.values()) > 1e-5  # else the law says nothing
    assert largest_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["token-truncate", "sequence-mask", "cispo"])
def test_the_corrections_have_something_to_correct_and_something_to_leave(name: str) -> None:
    correction = ALGORITHMS[name].correction
    naive_gradient(recorded_batch(), ALGORITHMS[name])
    weights = np.array(WEIGHTS[correction.kind])
    edge = np.isclose(weights, 0.0 if correction.masks else correction.cap, rtol=1e-4)
    assert 0.1 < edge.mean() < 0.9
    assert len(np.unique(weights.round(6))) > 5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_rank_has_one_gradient_whatever_the_packing(name: str) -> None:
    found = run(1, 0)
    for token_budget, share in PACKINGS[1:]:
        assert largest_error(found[f"{name}/{token_budget}/{share}"], found[f"{name}/4096/True"]) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", SHARDED)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_ranks_have_the_gradient_of_one_rank_and_zero_0(name: str, zero_stage: int) -> None:
    baseline, found = run(1, 0)[f"{name}/4096/True"], run(2, zero_stage)
    for token_budget, share in PACKINGS:
        assert largest_error(found[f"{name}/{token_budget}/{share}"], baseline) <= TOLERANCE, (token_budget, share)


@pytest.mark.parametrize("where", [(1, 0), (2, 2)])
def test_skipping_samples_without_an_advantage_leaves_the_gradient_unchanged(where: tuple[int, int]) -> None:
    found = run(*where)
    assert largest_error(found["grpo/30/False"], found["without skipping"]) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", SHARDED)
def test_with_fewer_samples_than_ranks_the_gradient_is_the_same(zero_stage: int) -> None:
    expected = run(1, 0)["fewer samples than ranks"]
    assert largest_error(run(2, zero_stage)["fewer samples than ranks"], expected) <= TOLERANCE


@pytest.mark.parametrize("where", [(1, 0), *((2, stage) for stage in SHARDED)])
def test_a_batch_without_any_spread_has_a_gradient_of_exactly_zero(where: tuple[int, int]) -> None:
    gradients = run(*where)["nobody contributes"]
    assert gradients and all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("where", [(1, 0), *((2, stage) for stage in SHARDED)])
def test_on_the_first_minibatch_the_ratio_is_1_and_nothing_is_clipped(where: tuple[int, int]) -> None:
    metrics, _ = run(*where)["one update"]
    assert metrics["ratio/first_minibatch_max_deviation"] == 0.0
    assert metrics["ratio/mean"] == 1.0
    assert metrics["clip_ratio/region_mean"] == 0.0
    several, _ = run(*where)["several updates"]
    # Scored once in another packing: the dtype's rounding remains.
    assert several["ratio/first_minibatch_max_deviation"] <= 1e-5
    assert several["ratio/max"] > 1.0 + 1e-4  # later minibatches do move


@pytest.mark.parametrize("what", ["one update", "several updates", "next update"])
@pytest.mark.parametrize("zero_stage", SHARDED)
def test_after_updates_the_parameters_agree_across_ranks_and_zero_stages(zero_stage: int, what: str) -> None:
    (metrics, parameters), (expected_metrics, expected) = run(2, zero_stage)[what], run(1, 0)[what]
    moved = max(float((expected[n] - run(1, 0)["one update"][1][n]).abs().max()) for n in expected)
    assert moved > 1e-6 or what == "one update"
    difference = max(float((parameters[n] - expected[n]).abs().max()) for n in expected)
    assert difference <= 1e-3 * LR  # an update moves an element by up to LR
    names = (
        "loss", "entropy", "kl", "grad_norm", "ratio/mean", "clip_ratio/region_mean", "sampling/effective_sample_size",
        "sampling/mismatch_kl/k1", "sampling/mismatch_kl/k3", "sampling/importance_sampling_ratio/max",
    )  # fmt: skip
    for name in names:
        if name != "kl" or what != "one update":  # which has no KL term, so none is measured
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("where", [(1, 0), *((2, stage) for stage in SHARDED)])
def test_a_loaded_checkpoint_makes_the_same_next_update(where: tuple[int, int]) -> None:
    found = run(*where)
    _same_update(found["next update again"], found["next update"])


def test_a_new_process_makes_the_same_next_update_from_the_checkpoint() -> None:
    expected = run(2, 2)["next update"]
    _same_update(run(2, 2, "resume")["next update"], expected)


def _same_update(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for name, parameter in expected[1].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=1e-7, msg=name)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-6), name
