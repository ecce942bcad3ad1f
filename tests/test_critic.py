"""The laws of the critic, and of the policy's update with its targets: one value a token, one gradient a batch.

Real DeepSpeed ranks in processes of their own, on the batch of tests/test_gradient_invariance.py: 1 rank and ZeRO 0
against transformers in float64, then 2 ranks with ZeRO 2 and ZeRO 3 against that one rank.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import model_of_rank, run_ranks
from test_gradient_invariance import (
    DEADLINE_S,
    MAX_TOKENS,
    MODEL,
    TEMPERATURE,
    TOLERANCE,
    largest_error,
    recorded_batch,
)

from actors.model_folders import resolve_model
from actors.settings import CriticSettings, LearnerSettings, OptimizerSettings, SamplingSettings
from cluster.rendezvous import Rendezvous, free_port
from trainers.algorithms import AlgorithmSettings
from trainers.experience import decode_group, decode_logprobs, encode_logprobs, may_train
from trainers.losses import token_weights
from trainers.ppo_targets import SampleTargets, decode_targets, encode_targets, ppo_targets
from trainers.protocols import LearnerGroup

PPO = AlgorithmSettings.model_validate(
    {"name": "ppo", "aggregation": "token", "kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k1"}
)
SEVERAL_UPDATES = PPO.model_copy(update={"num_epochs": 2, "num_minibatches": 2})
PACKINGS = ((4096, True), (4096, False), (64, True), (30, False))  # token budget, share prompts
WHERE = ((1, 0), (2, 2), (2, 3))  # ranks, ZeRO stage
SHARDED = WHERE[1:]


def valued_batch() -> list[LearnerGroup]:
    """The recorded batch, with values of a critic that is far from right; the same on every rank."""
    draw = np.random.default_rng(3)
    found = []
    for group in recorded_batch():
        values = [draw.normal(0.0, 0.5, t).astype(np.float32) for t in group.summary.num_completion_tokens]
        found.append(replace(group, values_payload=encode_logprobs(values)))
    return found


def trainable(groups: Sequence[LearnerGroup]) -> np.ndarray:
    return np.concatenate([may_train(g.summary, g.rewards, False) for g in groups])


def made_targets(groups: Sequence[LearnerGroup]) -> list[SampleTargets]:
    """Targets without a policy: its log-probs are drawn, the rest is computed."""
    draw = np.random.default_rng(5)
    values = [row for g in groups for row in decode_logprobs(g.values_payload)]
    proximal, references = ([draw.normal(-5.8, 0.3, row.size).astype(np.float32) for row in values] for _ in range(2))
    totals = np.concatenate([g.rewards.totals for g in groups])
    return ppo_targets(totals, trainable(groups), proximal, references, values, PPO, PPO.kl_coef)[0]


@functools.cache
def critic_folder() -> tempfile.TemporaryDirectory[str]:
    """A reward model of the tiny backbone with a head that says something."""
    from actors.scalar_model import load_scalar

    folder = tempfile.TemporaryDirectory(prefix="burnish-critic-")
    model = load_scalar(resolve_model(MODEL), "critic.path").hf_model
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    model.save_pretrained(folder.name)  # type: ignore[operator]
    return folder


# --- in the ranks' processes ------------------------------------------------------------------


def settings(kind: type[LearnerSettings], ranks: int, stage: int, budget: int = 4096) -> Any:
    optimizer = OptimizerSettings(lr=1e-3, eps=1e-2, max_grad_norm=0.1)
    return kind(num_workers=ranks, zero_stage=stage, token_budget=budget, logprob_chunk=16, optimizer=optimizer,
                start_deadline_s=DEADLINE_S)  # type: ignore[arg-type]  # fmt: skip


def one_rank(rank: int, ranks: int, stage: int, port: int, critic_path: str, folder: str) -> None:
    torch.set_num_threads(1)
    from actors.critic import CriticLearner
    from actors.learner import DeepSpeedLearner

    common = {"dtype": "float32", "device": "cpu", "num_steps": 10, "seed": 5, "algorithm": PPO}
    meeting = Rendezvous("127.0.0.1", port, ranks)
    critic_path = model_of_rank(rank, stage, critic_path, folder)
    critic = CriticLearner(rank, meeting, critic_path, settings(CriticSettings, ranks, stage), **common)
    learner = DeepSpeedLearner(
        rank, meeting, model_of_rank(rank, stage, resolve_model(MODEL), folder),
        settings(LearnerSettings, ranks, stage),
        sampling=SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS), **common,
    )  # fmt: skip
    found = critic_laws(critic) | policy_laws(learner)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    learner.close()


def pack_as(rank: Any, budget: int, share: bool, algorithm: AlgorithmSettings = PPO) -> None:
    kind = type(rank.settings)
    rank.settings, rank.share_prompts = settings(kind, rank.engine.world_size, rank.engine.zero_stage, budget), share
    rank.algorithm = algorithm


def critic_laws(critic: Any) -> dict[str, Any]:
    groups = valued_batch()
    targets = [encode_targets(made_targets(groups))]
    found: dict[str, Any] = {}
    for budget, share in PACKINGS:
        pack_as(critic, budget, share)
        _, *rows = critic.values([g.payload for g in groups], DEADLINE_S)
        found[f"values/{budget}/{share}"] = None if rows[0] is None else [r for b in rows for r in decode_logprobs(b)]
        found[f"critic/{budget}/{share}"] = critic.gradients(groups, targets)
    pack_as(critic, 30, True, SEVERAL_UPDATES)
    found["critic update"] = critic.update(groups, 0, targets).metrics, critic.weights.whole_state(torch.float32)
    return found


def policy_laws(learner: Any) -> dict[str, Any]:
    groups = valued_batch()
    scores = [g.rewards.totals for g in groups]
    found: dict[str, Any] = {}
    for budget, share in PACKINGS:
        pack_as(learner, budget, share)
        prepared, buffer = learner.prepare(groups, scores, PPO.kl_coef)
        # To everyone, as the controller does it.
        mine = {} if buffer is None else {0: buffer.to_pybytes()}
        targets = [learner.everyone(mine)[0]]
        found[f"prepared/{budget}/{share}"] = prepared and dict(prepared.metrics), targets[0]
        found[f"policy/{budget}/{share}"] = learner.gradients(groups, targets)
    found["policy update"] = learner.update(groups, 0, targets, PPO.kl_coef).metrics
    pack_as(learner, 30, True, SEVERAL_UPDATES)
    found["policy updates"] = learner.update(groups, 1, targets, PPO.kl_coef).metrics
    return found


# --- in the test's process --------------------------------------------------------------------


def run(ranks: int, stage: int) -> dict[str, Any]:
    found = _run(ranks, stage)
    if isinstance(found, str):
        pytest.fail(found)
    return found


@functools.cache
def _run(ranks: int, stage: int) -> dict[str, Any] | str:
    """What rank 0 found, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, stage, free_port(), critic_folder().name, folder)
        wrong = run_ranks(one_rank, ranks, *arguments, deadline_s=DEADLINE_S)
        if wrong is not None:
            return f"{ranks} ranks, ZeRO {stage}: {wrong}"
        return torch.load(Path(folder) / "found.pt", weights_only=False)


@functools.cache
def naive() -> tuple[list[np.ndarray], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(values, critic's gradient, policy's gradient): sample by sample, float64, transformers' own models."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    critic = AutoModelForSequenceClassification.from_pretrained(critic_folder().name, dtype=torch.float64)
    policy = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float64)
    groups = valued_batch()
    targets, kept = made_targets(groups), trainable(groups)
    prepared = decode_targets(run(1, 0)["prepared/4096/True"][1])
    lengths = [t for g in groups for t in g.summary.num_completion_tokens]
    weights = token_weights(lengths, list(kept), "token", MAX_TOKENS)
    values = []
    samples = [(decode_group(g.payload).prompt, t) for g in groups for t in decode_group(g.payload).trajectories]
    for i, (prompt, trajectory) in enumerate(samples):
        ids = torch.tensor([*prompt.token_ids.tolist(), *trajectory.completion_ids.tolist()])
        before = slice(len(prompt.token_ids) - 1, len(ids) - 1)  # the states in which the tokens were chosen
        hidden = critic.base_model(input_ids=ids[None]).last_hidden_state[0, before]
        row = critic.score(hidden)[:, 0]
        values.append(row.detach().numpy())
        if not kept[i]:
            continue
        old, goal = (torch.from_numpy(r.astype(np.float64)) for r in (targets[i].values, targets[i].returns))
        bounded = old + (row - old).clamp(-PPO.ppo.value_clip, PPO.ppo.value_clip)
        loss = 0.5 * torch.maximum((row - goal) ** 2, (bounded - goal) ** 2)
        (weights[i] * loss.sum()).backward()
        logits = policy(ids[None]).logits[0, before] / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(1, ids[len(prompt.token_ids) :, None])[:, 0]
        advantages = torch.from_numpy(prepared[i].advantages.astype(np.float64))
        (-weights[i] * (advantages * logprobs).sum()).backward()  # ratio 1: the surrogate is the policy gradient
    return values, *({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (critic, policy))


@pytest.mark.parametrize("where", WHERE)
def test_a_value_depends_on_its_own_text_only_not_on_padding_neighbours_ranks_or_packing(where: Any) -> None:
    expected = naive()[0]
    assert max(np.abs(row).max() for row in expected if row.size) > 0.05  # else the law says nothing
    for budget, share in PACKINGS:
        for row, reference in zip(run(*where)[f"values/{budget}/{share}"], expected, strict=True):
            np.testing.assert_allclose(row, reference, atol=2e-5)


def test_one_rank_has_the_critics_gradient_of_the_naive_clipped_loss() -> None:
    expected, found = naive()[1], run(1, 0)
    for budget, share in PACKINGS:
        assert largest_error(found[f"critic/{budget}/{share}"], expected) <= TOLERANCE, (budget, share)


def test_one_rank_has_the_policy_gradient_of_the_critics_advantages() -> None:
    expected, found = naive()[2], run(1, 0)
    for budget, share in PACKINGS:
        # Proximal log-probs come from another pack: the ratio is 1 up to rounding, and so is the gradient.
        assert largest_error(found[f"policy/{budget}/{share}"], expected) <= 5 * TOLERANCE, (budget, share)


@pytest.mark.parametrize("where", SHARDED)
@pytest.mark.parametrize("who", ["critic", "policy"])
def test_two_ranks_have_the_gradient_of_one_rank(who: str, where: Any) -> None:
    expected, found = run(1, 0)[f"{who}/4096/True"], run(*where)
    for budget, share in PACKINGS:
        assert largest_error(found[f"{who}/{budget}/{share}"], expected) <= 5 * TOLERANCE, (budget, share)


@pytest.mark.parametrize("where", SHARDED)
def test_ranks_and_packing_change_no_target(where: Any) -> None:
    metrics, expected = run(1, 0)["prepared/4096/True"]
    for budget, share in PACKINGS:
        seen, buffer = run(*where)[f"prepared/{budget}/{share}"]
        assert seen == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for a, b in zip(decode_targets(buffer), decode_targets(expected), strict=True):
            np.testing.assert_allclose(a.advantages, b.advantages, atol=1e-4)
            np.testing.assert_allclose(a.proximal_logprobs, b.proximal_logprobs, atol=1e-4)


@pytest.mark.parametrize("where", SHARDED)
def test_after_several_updates_the_critics_parameters_and_metrics_agree(where: Any) -> None:
    (metrics, parameters), (expected_metrics, expected) = run(*where)["critic update"], run(1, 0)["critic update"]
    assert max(float((parameters[n] - expected[n]).abs().max()) for n in expected) <= 1e-6
    skipped = {"critic/peak_memory_bytes"}
    for name in expected_metrics.keys() - skipped:
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name
    assert expected_metrics["critic/loss"] > 0 and expected_metrics["critic/grad_norm"] > 0
    assert expected_metrics["critic/explained_variance"] < 1


@pytest.mark.parametrize("where", WHERE)
def test_on_the_first_minibatch_the_ratio_is_1_and_nothing_is_clipped(where: Any) -> None:
    first, several = run(*where)["policy update"], run(*where)["policy updates"]
    assert first["ratio/first_minibatch_max_deviation"] <= 1e-5
    assert first["clip_ratio/region_mean"] == 0.0
    assert several["ratio/max"] > 1.0 + 1e-4  # measured against the log-probs of before all updates
    assert first["advantages/mean"] == pytest.approx(several["advantages/mean"])
