"""Training with the real losses reaches the optimum that can be written down.

A softmax bandit: one token, a vector of logits as its parameters, exact expectations instead of samples.
The regularised optimum is ``pi* = pi_ref exp(R / beta) / Z``.  KL in the reward by k1 and KL in the loss
by k2 reach it; k3 in the loss, the usual GRPO form, has the fixed point ``beta pi_ref / (lambda - R)`` with
``lambda = beta + E[R]``, which is another policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

from trainers.advantages import group_relative
from trainers.losses import clipped_surrogate, kl_estimate

BETA = 0.5
NUM_STEPS = 1500
LR = 4.0  # plain gradient descent on the logits

CASES = {
    "two answers": ((0.6, 0.4), (1.0, 0.0), (0.917243, 0.082757)),
    "three answers": ((0.5, 0.3, 0.2), (1.0, 0.5, -1.0), (0.814296, 0.179738, 0.005966)),
}
Case = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def vector(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def train(case: Case, placement: Literal["reward", "loss"], estimator: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """The policy after exact-expectation gradient descent from the reference."""
    reference, rewards = vector(case[0]), vector(case[1])
    logits = reference.log().clone().requires_grad_()
    for _ in range(NUM_STEPS):
        logp = logits.log_softmax(0)
        probabilities = logp.detach().exp()  # what sampling would weigh each answer with
        values = rewards
        if placement == "reward":
            values = values - BETA * kl_estimate(logp.detach(), reference.log(), estimator)
        advantages = values - (probabilities * values).sum()
        per_token = clipped_surrogate(logp, logp.detach(), advantages, 0.2, 0.2).loss
        if placement == "loss":
            per_token = per_token + BETA * kl_estimate(logp, reference.log(), estimator)
        (gradient,) = torch.autograd.grad((probabilities * per_token).sum(), logits)
        with torch.no_grad():
            logits -= LR * gradient
    return logits.detach().softmax(0)


def optimum(case: Case) -> torch.Tensor:
    """pi_ref exp(R / beta) / Z."""
    tilted = vector(case[0]) * torch.exp(vector(case[1]) / BETA)
    return tilted / tilted.sum()


def fixed_point_of_k3(case: Case) -> torch.Tensor:
    """beta pi_ref / (lambda - R): lambda by bisection, so that it sums to 1."""
    reference, rewards = vector(case[0]), vector(case[1])
    total: Callable[[float], float] = lambda value: float((BETA * reference / (value - rewards)).sum())  # noqa: E731
    low, high = float(rewards.max()) + 1e-9, float(rewards.max()) + BETA
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > 1 else (low, middle)
    return BETA * reference / (low - rewards)


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_has_the_published_numbers(name: str) -> None:
    torch.testing.assert_close(optimum(CASES[name]), vector(CASES[name][2]), rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", CASES)
def test_k1_in_the_reward_reaches_the_regularised_optimum(name: str) -> None:
    torch.testing.assert_close(train(CASES[name], "reward", "k1"), vector(CASES[name][2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_k2_in_the_loss_reaches_the_regularised_optimum(name: str) -> None:
    torch.testing.assert_close(train(CASES[name], "loss", "k2"), vector(CASES[name][2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_k3_in_the_loss_reaches_its_own_fixed_point(name: str) -> None:
    case = CASES[name]
    found, expected = train(case, "loss", "k3"), fixed_point_of_k3(case)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    multiplier = BETA + float((found * vector(case[1])).sum())
    torch.testing.assert_close(found, BETA * vector(case[0]) / (multiplier - vector(case[1])), rtol=0, atol=1e-6)
    assert float((found - optimum(case)).abs().max()) > 0.01  # it is not the regularised optimum


@pytest.mark.parametrize("name", CASES)
def test_k1_in_the_loss_is_no_penalty_at_all(name: str) -> None:
    """Its expected gradient is zero: the policy runs to the best answer (so configuration refuses it)."""
    best = int(np.argmax(CASES[name][1]))
    assert float(train(CASES[name], "loss", "k1")[best]) > 0.99


@pytest.mark.parametrize("name", CASES)
def test_the_leave_one_out_baseline_has_the_exact_gradient_in_expectation(name: str) -> None:
    """All pairs of samples, weighted by their probability: no bias, which is why it reaches the optimum.

    The group mean shrinks the gradient of two samples by one half, and nothing else.
    """
    reference, rewards = vector(CASES[name][0]), vector(CASES[name][1])
    probabilities = vector(CASES[name][2])
    values = rewards - BETA * (probabilities.log() - reference.log()) + torch.arange(len(rewards))  # off the optimum
    exact = probabilities * (values - (probabilities * values).sum())
    for baseline, shrink in (("leave_one_out", 1.0), ("group_mean", 0.5)):
        expected = torch.zeros_like(exact)
        for i, p in enumerate(probabilities):
            for j, q in enumerate(probabilities):
                pair = np.array([float(values[i]), float(values[j])])
                advantages = group_relative(pair, np.ones(2, dtype=bool), baseline, "none")  # type: ignore[arg-type]
                for k, advantage in zip((i, j), advantages, strict=True):
                    score = -probabilities.clone()  # gradient of log pi(k) in the logits
                    score[k] += 1
                    expected += p * q * advantage * score / 2
        torch.testing.assert_close(expected, shrink * exact)
