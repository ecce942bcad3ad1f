"""Training with the real losses reaches the optimum that can be written down.

A softmax bandit: one token, a vector of logits as its parameters, exact expectations instead of samples.
The regularised optimum is ``pi* = pi_ref exp(R / beta) / Z``.  KL in the reward by k1 and KL in the loss
by k2 reach it; k3 in the loss, the usual GRPO form, has the fixed point ``beta pi_ref / (lambda - R)`` with
``lambda = beta + E[R]``, which is another policy.

PPO is trained the same way, token by token: its answers may be spelt in several tokens, its rewards are those
of ``token_rewards``, its baseline the exact value of each prefix, its advantages those of ``gae``.  Over several
tokens k1 in the reward still reaches pi*: a token is charged for the KL that it leads to.  k2 in the loss does
not, since no term of the loss sees that an early token chooses the prefix in which a later one pays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from trainers.advantages import group_relative
from trainers.gae import gae, token_rewards
from trainers.losses import clipped_surrogate, kl_estimate

BETA = 0.5
NUM_STEPS = 130
LR = 0.25  # of natural gradient descent: every logit's gradient is divided by its probability
Placement = Literal["reward", "loss"]
Estimator = Literal["k1", "k2", "k3"]

CASES = {
    "two answers": ((0.6, 0.4), (1.0, 0.0), (0.917243, 0.082757)),
    "three answers": ((0.5, 0.3, 0.2), (1.0, 0.5, -1.0), (0.814296, 0.179738, 0.005966)),
}
Case = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def vector(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def train(case: Case, placement: Placement, estimator: Estimator) -> torch.Tensor:
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
            logits -= LR * gradient / probabilities
    return logits.detach().softmax(0)


def tilted(reference: torch.Tensor, rewards: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """pi_ref exp(R / beta) / Z."""
    return torch.softmax(reference.log() + rewards / beta, 0)


def optimum(case: Case) -> torch.Tensor:
    return tilted(vector(case[0]), vector(case[1]))


def fixed_point_of_k3(case: Case, beta: float = BETA) -> torch.Tensor:
    """beta pi_ref / (lambda - R): lambda by bisection, so that it sums to 1."""
    reference, rewards = vector(case[0]), vector(case[1])
    total: Callable[[float], float] = lambda value: float((beta * reference / (value - rewards)).sum())  # noqa: E731
    low, high = float(rewards.max()) + 1e-9, float(rewards.max()) + beta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > 1 else (low, middle)
    return beta * reference / (low - rewards)


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


# --- PPO, token by token ----------------------------------------------------------------------

Spelling = list[list[tuple[int, int]]]  # of each answer: which prefix each token is chosen in, and which choice it is
ONE_TOKEN: dict[str, Spelling] = {name: [[(0, i)] for i in range(len(case[0]))] for name, case in CASES.items()}
TWO_TOKENS: Spelling = [[(0, 0)], [(0, 1), (1, 0)], [(0, 1), (1, 1)]]  # the last two answers share their first token
THREE = CASES["three answers"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of all answers, end to end.  Axes: N tokens, A answers, S prefixes, C choices."""

    answer: torch.Tensor  # int64 [N]
    prefix: torch.Tensor  # int64 [N]
    choice: torch.Tensor  # int64 [N]

    @classmethod
    def of(cls, spelling: Spelling) -> Tokens:
        rows = [(i, prefix, choice) for i, tokens in enumerate(spelling) for prefix, choice in tokens]
        return cls(*(torch.tensor(c) for c in zip(*rows, strict=True)))

    def masses(self, probabilities_a: torch.Tensor) -> torch.Tensor:
        """How often each choice is made, [S, C]."""
        shape = (int(self.prefix.max()) + 1, int(self.choice.max()) + 1)
        return torch.zeros(shape, dtype=torch.float64).index_put(
            (self.prefix, self.choice), probabilities_a[self.answer], accumulate=True
        )

    def answers(self, logp_n: torch.Tensor) -> torch.Tensor:
        """The probability of each answer, [A]: the product over its tokens."""
        sums = torch.zeros(int(self.answer.max()) + 1, dtype=torch.float64)
        return sums.index_add(0, self.answer, logp_n).exp()


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over choices; torch's own wakes its threads for two rows, which takes ten times as long."""
    return logits - logits.exp().sum(1, keepdim=True).log()


def ppo_advantages(
    tokens: Tokens, probabilities: torch.Tensor, totals: torch.Tensor, penalties: torch.Tensor, lam: float
) -> torch.Tensor:
    """[N], of the exact critic: the value of a prefix is the mean return-to-go of the answers through it."""
    rows = [torch.nonzero(tokens.answer == i).squeeze(1) for i in range(len(totals))]
    paid = [token_rewards(float(t), penalties[row].numpy(), len(row)) for t, row in zip(totals, rows, strict=True)]
    to_go = torch.from_numpy(np.concatenate([np.cumsum(r[::-1])[::-1] for r in paid]))
    weights = probabilities[tokens.answer]
    sums = torch.zeros(2, int(tokens.prefix.max()) + 1, dtype=torch.float64)
    sums = sums.index_add(1, tokens.prefix, torch.stack([weights * to_go, weights]))
    values = (sums[0] / sums[1])[tokens.prefix]
    found = [gae(r, values[row].numpy(), 1.0, lam)[0] for r, row in zip(paid, rows, strict=True)]
    return torch.from_numpy(np.concatenate(found))


def train_ppo(
    case: Case, spelling: Spelling, placement: Placement, estimator: Estimator, beta: float = BETA, lam: float = 1.0
) -> torch.Tensor:
    """The policy over answers, after exact-expectation descent from a policy that is *not* the reference."""
    tokens, totals = Tokens.of(spelling), vector(case[1])
    masses = tokens.masses(vector(case[0]))
    reference = (masses / masses.sum(1, keepdim=True)).log()[tokens.prefix, tokens.choice]
    logits = torch.linspace(0.0, 1.0, masses.numel(), dtype=torch.float64).reshape(masses.shape).requires_grad_()
    for _ in range(NUM_STEPS):
        logp = log_softmax(logits)[tokens.prefix, tokens.choice]
        sampled = logp.detach()
        probabilities = tokens.answers(sampled)
        penalties = torch.zeros_like(sampled)
        if placement == "reward":
            penalties = beta * kl_estimate(sampled, reference, estimator)
        advantages = ppo_advantages(tokens, probabilities, totals, penalties, lam)
        per_token = clipped_surrogate(logp, sampled, advantages, 0.2, 0.2).loss
        if placement == "loss":
            per_token = per_token + beta * kl_estimate(logp, reference, estimator)
        (gradient,) = torch.autograd.grad((probabilities[tokens.answer] * per_token).sum(), logits)
        with torch.no_grad():
            logits -= LR / max(beta, 1.0) * gradient / tokens.masses(probabilities)
    return tokens.answers(log_softmax(logits.detach())[tokens.prefix, tokens.choice])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_ppo_reaches_the_regularised_optimum(name: str, placement: Placement, estimator: Estimator) -> None:
    found = train_ppo(CASES[name], ONE_TOKEN[name], placement, estimator)
    torch.testing.assert_close(found, vector(CASES[name][2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_ppo_with_k1_in_the_reward_reaches_it_over_several_tokens(lam: float) -> None:
    """With an exact critic and gamma 1 every lambda has the same expected gradient."""
    found = train_ppo(THREE, TWO_TOKENS, "reward", "k1", lam=lam)
    torch.testing.assert_close(found, vector(THREE[2]), rtol=0, atol=1e-6)


def test_ppo_with_k2_in_the_loss_forgets_over_several_tokens_what_a_token_leads_to() -> None:
    """The last token is chosen as it should be; the first for the reward alone that the last one will earn."""
    reference, rewards = vector(THREE[0]), vector(THREE[1])
    last = tilted(reference[1:] / reference[1:].sum(), rewards[1:])
    first = tilted(
        torch.stack([reference[0], reference[1:].sum()]), torch.stack([rewards[0], (last * rewards[1:]).sum()])
    )
    expected = torch.cat([first[:1], first[1] * last])
    torch.testing.assert_close(train_ppo(THREE, TWO_TOKENS, "loss", "k2"), expected, rtol=0, atol=1e-6)
    assert float((expected - optimum(THREE)).abs().max()) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_ppo_with_k3_in_the_loss_reaches_its_own_fixed_point(name: str) -> None:
    found = train_ppo(CASES[name], ONE_TOKEN[name], "loss", "k3")
    torch.testing.assert_close(found, fixed_point_of_k3(CASES[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_ppo_without_a_penalty_takes_the_best_answer_and_with_a_large_one_stays_at_the_reference(
    name: str, placement: Placement, estimator: Estimator
) -> None:
    case, best = CASES[name], int(np.argmax(CASES[name][1]))
    assert float(train_ppo(case, ONE_TOKEN[name], placement, estimator, beta=1e-3)[best]) > 0.998
    kept = train_ppo(case, ONE_TOKEN[name], placement, estimator, beta=1e3)
    torch.testing.assert_close(kept, vector(case[0]), rtol=0, atol=1e-3)
