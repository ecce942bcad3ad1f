"""Training on stale samples, in small: with a correction it reaches what the synchronous run reaches.

A policy of two binary tokens, four answers, a KL penalty in the reward (k1), the real loss of a pack, and exact
expectations under the policy of ``lag`` updates ago in place of samples.  The learning rate is one that synchronous
training bears; stale samples keep on pushing long after the policy has moved, and without a correction that throws
it onto a single answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from actors.objective import TokenTerms, pack_loss
from trainers.algorithms import AlgorithmSettings
from trainers.correction import CorrectionSettings, resolved

pytestmark = pytest.mark.usefixtures("one_thread")

STATE, CHOICE = torch.tensor([0, 1, 0, 1, 0, 2, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])
REWARDS = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([[0.0, 0.5], [0.3, 0.0], [0.0, -0.2]], dtype=torch.float64)  # logits; training starts there
BETA, LR = 0.2, 22.0
KINDS = ("token_truncate", "sequence_truncate", "token_mask", "sequence_mask", "decoupled", "cispo")

Behavior = Callable[[int, list[torch.Tensor]], torch.Tensor]  # update, all logits so far -> logits of the sampler


def tokens(logits: torch.Tensor) -> torch.Tensor:
    """Log-probs of the eight tokens of the four answers, [8]."""
    return logits.log_softmax(1)[STATE, CHOICE]


def of_answers(per_token: torch.Tensor) -> torch.Tensor:
    return per_token.reshape(4, 2).sum(1)


def lagging(lag: int) -> Behavior:
    return lambda update, history: history[max(0, update - lag)]


def train(
    correction: CorrectionSettings,
    behavior_of: Behavior,
    num_updates: int,
    lr: float = LR,
    beta: float = BETA,
    tied: bool = False,
) -> list[torch.Tensor]:
    """The policy over answers before each update and at the end.  ``tied``: the second token cannot see the first."""
    algorithm = AlgorithmSettings(correction=correction)
    history = [REFERENCE]
    for update in range(num_updates):
        behavior = tokens(behavior_of(update, history))
        probabilities = of_answers(behavior).exp()
        logits = history[-1].clone().requires_grad_()
        logprobs = tokens(logits)
        values = REWARDS - beta * of_answers(logprobs.detach() - tokens(REFERENCE))
        advantages = values - (probabilities * values).sum()  # the mean of an infinitely large group
        terms = TokenTerms(
            probabilities.repeat_interleave(2), advantages.repeat_interleave(2), behavior, None, None, (2,) * 4
        )
        loss = pack_loss(logprobs, torch.zeros(8, dtype=torch.float64), terms, algorithm).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        if tied:
            gradient[1:] = gradient[1:].sum(0)
        history.append(history[-1] - lr * gradient)
    return [of_answers(tokens(logits)).exp() for logits in history]


def objective(policy: torch.Tensor) -> float:
    """E[R] - beta KL(policy || reference)."""
    return float((policy * (REWARDS - BETA * (policy.log() - of_answers(tokens(REFERENCE))))).sum())


OPTIMUM = torch.softmax(of_answers(tokens(REFERENCE)) + REWARDS / BETA, 0)
LAG = 32


@cache
def run(kind: str, lag: int) -> list[torch.Tensor]:
    return train(CorrectionSettings.model_validate({"kind": kind}), lagging(lag), 60)


def distance(policy: torch.Tensor) -> float:
    return float((policy - OPTIMUM).abs().max())


def test_the_synchronous_run_reaches_the_optimum() -> None:
    policies = run("none", 0)
    assert distance(policies[0]) > 0.5
    assert distance(policies[40]) < 0.002 and distance(policies[60]) < 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_run_with_a_correction_reaches_what_the_synchronous_one_reaches(kind: str) -> None:
    policies = run(kind, LAG)
    assert distance(policies[LAG + 10]) < 0.005 and distance(policies[60]) < 0.002
    assert objective(policies[60]) == pytest.approx(objective(run("none", 0)[60]), abs=1e-4)


def test_without_a_correction_the_stale_run_collapses_on_the_way() -> None:
    """Onto one answer: most of what it had gained is gone before it finds back."""
    policies = run("none", LAG)
    assert max(distance(p) for p in policies[10:]) > 0.9
    assert distance(policies[LAG + 8]) > 0.5
    assert objective(policies[LAG + 8]) < objective(run("none", 0)[LAG + 8]) - 0.3
    assert distance(policies[60]) > 10 * distance(run("token_truncate", LAG)[60])


def test_at_a_tenth_of_the_learning_rate_the_same_lag_harms_nobody() -> None:
    """Staleness narrows the learning rates that hold; it is not bad in itself."""
    synchronous = objective(train(CorrectionSettings(kind="none"), lagging(0), 100, lr=LR / 10)[-1])
    for kind in ("none", "token_truncate"):
        policies = train(CorrectionSettings.model_validate({"kind": kind}), lagging(LAG), 100, lr=LR / 10)
        assert min(objective(p) for p in policies) == objective(policies[0])
        assert objective(policies[-1]) == pytest.approx(synchronous, abs=0.02)


def test_what_auto_means_in_a_stale_run_is_a_correction_that_holds() -> None:
    policies = train(resolved(CorrectionSettings(), LAG), lagging(LAG), 60)
    assert distance(policies[60]) < 0.002


def test_with_weights_of_whole_answers_the_stale_run_is_the_synchronous_one_step_for_step() -> None:
    unbounded = CorrectionSettings(kind="sequence_truncate", cap=1e30)
    for found, expected in zip(train(unbounded, lagging(LAG), 60), run("none", 0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "sequence_truncate", "token_truncate"])
def test_a_generator_that_never_samples_the_policy_leads_astray_what_cannot_represent_the_optimum(kind: str) -> None:
    """Not stale but another engine: it samples at half the logits, for ever.

    The second token cannot see the first, so the best policy is a compromise, and who samples weighs it.  Weights
    of whole answers restore it; token weights correct the choice but not how often each state is seen.
    """
    flattened: Behavior = lambda update, history: 0.5 * history[-1]  # noqa: E731
    bounds = {} if kind == "none" else {"cap": 1e9}
    correction = CorrectionSettings.model_validate({"kind": kind, **bounds})
    found = train(correction, flattened, 100, lr=4.0, beta=0.5, tied=True)[-1]
    expected = train(CorrectionSettings(kind="none"), lagging(0), 100, lr=4.0, beta=0.5, tied=True)[-1]
    astray = float((found - expected).abs().max())
    assert astray < 1e-6 if kind == "sequence_truncate" else astray > 0.05
