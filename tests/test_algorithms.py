"""Each algorithm against its paper, and the identities between them.

The papers' formulas are written out here in plain numpy and torch, sample by sample in float64, and share no code
with the package.  Where we chose otherwise, or a paper leaves something open, the line is marked "ours".  Numbers of
other implementations: tests/test_golden.py, tests/test_golden_differences.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_closed_form import CASES, THREE, TWO_TOKENS, Spelling, Tokens, log_softmax, optimum, vector

from actors.experience_batch import ExperienceBatch
from actors.objective import SUMS, PackOutcome, TokenTerms, pack_loss
from trainers.advantages import group_relative
from trainers.algorithms import AlgorithmSettings
from trainers.batch_advantages import reward_to_go, scaled_over_batch
from trainers.experience import GroupRewards, GroupSummary, WeightVersion
from trainers.losses import kl_estimate
from trainers.presets import PRESETS
from trainers.protocols import LearnerGroup
from trainers.sequence_ratio import policy_log_ratio

MAX_TOKENS = 16
GREEDY = (0.25, 1.0, 0.5)  # reward of each prompt's greedy completion
REWARDS = ((1.0, 0.0, 0.5, 0.0), (0.0, 1.0), (0.7, 0.7, 0.7))  # of three prompts; the last has no spread
LENGTHS = ((3, 1, 5, 2), (4, 2), (2, 6, 1))
WITHOUT_CRITIC = [name for name in PRESETS if name not in ("ppo", "online_dpo")]  # online DPO: test_online_dpo.py
BETA = 0.2


def algorithm(name: str, **keys: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": name, **keys})


@dataclass(frozen=True)
class Batch:
    """Log-probs of every sample's tokens, float64 [T] each, in the order of groups and samples."""

    policy: list[torch.Tensor]  # leaves
    proximal: list[torch.Tensor]
    behavior: list[torch.Tensor]
    reference: list[torch.Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.policy]


def batch(seed: int = 0, spread: float = 0.3) -> Batch:
    """``spread``: how far the policies are apart, in nats a token; 0: they are one."""
    draw = np.random.default_rng(seed)
    rows: list[list[torch.Tensor]] = [[], [], [], []]
    for length in (t for group in LENGTHS for t in group):
        start = draw.normal(-2.0, 0.5, length)
        for found in rows:
            found.append(torch.from_numpy(start + draw.normal(0.0, spread, length)))
    return Batch([row.requires_grad_() for row in rows[0]], *rows[1:])


# --- the papers ---------------------------------------------------------------------------------


def paper_advantages(name: str, rows: Batch, beta: float) -> list[np.ndarray]:
    """float64 [T] of each sample; of the paper but for what is marked ours."""
    penalties = [beta * (p.detach() - r).numpy() for p, r in zip(rows.proximal, rows.reference, strict=True)]
    found, at = [], 0
    for g, rewards in enumerate(REWARDS):
        n, r = len(rewards), list(rewards)
        if name == "rloo":  # the KL of the whole answer is part of the reward
            r = [reward - float(penalties[at + i].sum()) for i, reward in enumerate(rewards)]
        for i in range(n):
            others = [x for j, x in enumerate(r) if j != i]
            mean, length = statistics.fmean(r), LENGTHS[g][i]
            if name == "rloo":
                per_token = np.full(length, r[i] - statistics.fmean(others))
            elif name in ("dr_grpo", "reinforce_plus_plus_baseline"):
                per_token = np.full(length, r[i] - mean)
            elif name in ("reinforce_plus_plus", "remax"):
                start = r[i] - (GREEDY[g] if name == "remax" else 0.0)
                per_token = np.array([start - sum(penalties[at + i][t:]) for t in range(length)])
            else:
                spread = statistics.stdev(r)
                per_token = np.full(length, (r[i] - mean) / (spread + 1e-4) if spread else 0.0)  # ours: the 1e-4
            found.append(per_token)
        at += n
    tokens = np.concatenate(found)
    if name == "reinforce_plus_plus":
        found = [(row - tokens.mean()) / math.sqrt(tokens.var() + 1e-8) for row in found]
    if name == "reinforce_plus_plus_baseline":  # ours: the paper subtracts tokens.mean() here too
        found = [row / math.sqrt(tokens.var() + 1e-8) for row in found]
    return found


def paper_loss(name: str, rows: Batch, beta: float) -> torch.Tensor:
    """The scalar that the paper minimises, over the whole batch, but for what is marked ours."""
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(name, (0.2, 0.2))
    per_sample = []
    for i, advantage in enumerate(map(torch.from_numpy, paper_advantages(name, rows, beta))):
        policy, ratio = rows.policy[i], torch.exp(rows.policy[i] - rows.proximal[i])
        if name == "gspo":
            ratio = torch.prod(ratio) ** (1 / len(ratio)) * torch.ones_like(ratio)
        # Ours for RLOO and ReMax: their papers have -advantage * policy, which is the same only where the ratio is 1.
        terms = -torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
        weight = torch.ones(())
        if name == "cispo":
            weight = torch.clamp(torch.exp(policy - rows.behavior[i]), max=5.0).detach()
            terms = -advantage * policy  # no KL in the paper: ours is added below and has the weight as well
        d = policy - rows.reference[i]
        # Ours for all but GRPO: their papers have no KL term; with a beta they get GRPO's.
        if name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo"):
            terms = terms + beta * (torch.exp(-d) - 1 + d)
        elif name == "reinforce_plus_plus_baseline":
            terms = terms + beta * d**2 / 2
        per_sample.append(weight * terms)
    n = len(per_sample)
    if name in ("grpo", "gspo"):
        return sum(terms.mean() for terms in per_sample) / n  # type: ignore[return-value]
    if name in ("dr_grpo", "rloo", "remax"):  # ours for RLOO and ReMax: the constant, as in Dr. GRPO
        return sum(terms.sum() for terms in per_sample) / (n * MAX_TOKENS)  # type: ignore[return-value]
    return torch.cat(per_sample).mean()


# --- ours ---------------------------------------------------------------------------------------


def learner_groups(rewards: Sequence[Sequence[float]] = REWARDS) -> list[LearnerGroup]:
    version = WeightVersion(0, 0)
    found = []
    for g, (row, lengths) in enumerate(zip(rewards, LENGTHS, strict=True)):
        summary = GroupSummary(str(g), f"p{g}", 3, lengths, ("stop",) * len(row), version, version, "g", 0.0)
        totals = np.array(row)
        found.append(LearnerGroup(summary, GroupRewards(str(g), totals, {}), None, None, greedy_reward=GREEDY[g]))
    return found


def our_advantages(chosen: AlgorithmSettings, rows: Batch) -> list[np.ndarray]:
    """As the learner makes them: float [T] of each sample."""
    found, penalties = ExperienceBatch(learner_groups(), chosen, MAX_TOKENS), None
    if chosen.kl_coef and chosen.kl_placement == "reward":
        penalties = [
            chosen.kl_coef * kl_estimate(p, r, chosen.kl_estimator).numpy()
            for p, r in zip(rows.proximal, rows.reference, strict=True)
        ]
    if chosen.has_token_advantages:
        return found.token_advantages(penalties)
    per_sample = found.advantages(None if penalties is None else np.array([p.sum() for p in penalties]))
    return [np.full(t, a) for t, a in zip(rows.lengths, per_sample, strict=True)]


def our_packs(chosen: AlgorithmSettings, rows: Batch, packs: Sequence[Sequence[int]]) -> list[PackOutcome]:
    """Every pack's share of the loss; ``packs`` divide the samples."""
    members = list(range(len(rows.policy)))
    whole = ExperienceBatch(learner_groups(), chosen, MAX_TOKENS)
    weights, advantages = whole.weights(members, whole.trainable()), our_advantages(chosen, rows)
    found = []
    for pack in packs:
        lay = lambda column: torch.cat([torch.as_tensor(column[i]) for i in pack])  # noqa: B023, E731
        terms = TokenTerms(
            weights=torch.cat([torch.full((rows.lengths[i],), weights[i]) for i in pack]),
            advantages=lay(advantages).double(),
            behavior_logprobs=lay(rows.behavior),
            proximal_logprobs=lay(rows.proximal),
            reference_logprobs=lay(rows.reference) if chosen.kl_coef else None,
            lengths=tuple(rows.lengths[i] for i in pack),
        )
        logprobs = torch.cat([rows.policy[i] for i in pack])
        found.append(pack_loss(logprobs, torch.zeros_like(logprobs), terms, chosen))
    return found


EVERYTHING = [list(range(9))]


def gradients(loss: torch.Tensor, rows: Batch) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(loss, rows.policy))


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_algorithm_has_the_loss_of_its_paper_but_for_what_is_marked_ours(name: str, beta: float) -> None:
    """Marked "ours" above: no batch mean in the REINFORCE++ baseline; a constant divisor and PPO's clipped token ratio
    in RLOO and ReMax, whose papers have REINFORCE's sum over tokens (the same gradient in the first update, but for the
    divisor); a KL term where a paper has none, which in CISPO has the token's weight.

    PPO's loss is tested with its critic (tests/test_critic.py, tests/test_ppo_targets.py).
    """
    rows = batch()
    (found,) = our_packs(algorithm(name, kl_coef=beta), rows, EVERYTHING)
    expected = paper_loss(name, rows, beta)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-8)  # token advantages travel as float32
    theirs = gradients(expected, rows)
    torch.testing.assert_close(gradients(found.loss, rows), theirs, rtol=1e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-3, "the law says nothing"


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_loss_and_gradient_do_not_depend_on_which_samples_share_a_pack(name: str) -> None:
    rows, chosen = batch(1), algorithm(name, kl_coef=BETA)
    (whole,) = our_packs(chosen, rows, EVERYTHING)
    expected = gradients(whole.loss, rows)
    for packs in ([[i] for i in range(9)], [[8, 0, 4], [3, 7], [1, 2, 5, 6]]):
        parts = our_packs(chosen, rows, packs)
        loss = torch.stack([part.loss for part in parts]).sum()
        torch.testing.assert_close(loss, whole.loss)
        torch.testing.assert_close(gradients(loss, rows), expected)
        torch.testing.assert_close(sum(part.sums for part in parts), whole.sums)


@pytest.mark.parametrize("name", PRESETS)
def test_on_the_first_minibatch_every_ratio_is_1_and_nothing_is_clipped(name: str) -> None:
    logprobs = torch.tensor([-1.0, -7.25, -0.3, -2.0, -0.1])
    terms = TokenTerms(
        torch.full((5,), 0.2), torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0]), logprobs - 0.1, None, None, (2, 3)
    )
    found = pack_loss(logprobs, torch.zeros(5), terms, algorithm(name))
    sums = dict(zip(SUMS, found.sums.tolist(), strict=True))
    assert sums["ratio"] == 5 and sums["clip_low"] == sums["clip_high"] == 0


# --- identities -----------------------------------------------------------------------------------

REWARD = st.integers(-1000, 1000).map(lambda n: n / 100)


@given(st.lists(REWARD, min_size=2, max_size=12))
def test_the_leave_one_out_advantage_is_n_over_n_minus_1_times_the_mean_centred_one(rewards: list[float]) -> None:
    everyone, n = np.ones(len(rewards), dtype=bool), len(rewards)
    left_out = group_relative(np.array(rewards), everyone, "leave_one_out", "none")
    centred = group_relative(np.array(rewards), everyone, "group_mean", "none")
    np.testing.assert_allclose(left_out, n / (n - 1) * centred, rtol=1e-12, atol=1e-12)


@given(REWARD, REWARD)
def test_in_a_group_of_two_rloo_is_the_difference_dr_grpo_half_of_it_and_grpo_its_sign(a: float, b: float) -> None:
    both, pair = np.ones(2, dtype=bool), np.array([a, b])
    np.testing.assert_allclose(group_relative(pair, both, "leave_one_out", "none"), [a - b, b - a], atol=1e-12)
    np.testing.assert_allclose(group_relative(pair, both, "group_mean", "none"), [(a - b) / 2, (b - a) / 2], atol=1e-12)
    grpo = group_relative(pair, both, "group_mean", "std")
    if a != b:  # sqrt(1/2), a little less for the 1e-4 beside the deviation
        np.testing.assert_allclose(grpo, np.sign([a - b, b - a]) / math.sqrt(2), rtol=2e-2)


TOKEN = st.tuples(st.floats(-6, 0), st.floats(-6, 0))  # policy, proximal
SAMPLES = st.lists(st.lists(TOKEN, min_size=1, max_size=6), min_size=1, max_size=4)


@given(SAMPLES)
def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens_ratios(
    rows: list[list[tuple[float, float]]],
) -> None:
    policy, proximal = (torch.tensor([pair[k] for row in rows for pair in row], dtype=torch.float64) for k in (0, 1))
    samples = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    for kind in ("sequence", "sequence_token"):
        found = policy_log_ratio(policy, proximal, samples, len(rows), kind).exp()  # type: ignore[arg-type]
        for i, row in enumerate(rows):
            expected = statistics.geometric_mean([math.exp(p - q) for p, q in row])
            np.testing.assert_allclose(found[samples == i], expected, rtol=1e-9)


@given(st.floats(-2, 2), st.integers(1, 9))
def test_the_ratio_of_a_sequence_stays_when_tokens_of_that_ratio_are_repeated(log_ratio: float, times: int) -> None:
    policy = torch.full((times,), log_ratio, dtype=torch.float64)
    found = policy_log_ratio(policy, torch.zeros_like(policy), torch.zeros(times, dtype=torch.int64), 1, "sequence")
    np.testing.assert_allclose(found, log_ratio, rtol=1e-12)


def test_a_sample_without_tokens_disturbs_no_sequence_ratio() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64).requires_grad_()
    found = policy_log_ratio(policy, torch.full((3,), -2.0).double(), torch.tensor([0, 0, 2]), 4, "sequence")
    np.testing.assert_allclose(found.detach(), [0.5, 0.5, -1.0])
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    np.testing.assert_allclose(gradient, [1.0, 1.0, 1.0])


def test_gspo_by_tokens_is_gspo_unless_advantages_differ_inside_a_sample() -> None:
    """arXiv:2507.18071, section 4.3: the values are equal, and with equal advantages the gradients are."""
    rows = batch(2, spread=1e-4)  # inside the narrow clip, or everything would be 0
    found = [our_packs(algorithm("gspo", ratio=kind), rows, EVERYTHING)[0] for kind in ("sequence", "sequence_token")]
    torch.testing.assert_close(found[0].loss, found[1].loss)
    whole, by_token = (gradients(outcome.loss, rows) for outcome in found)
    torch.testing.assert_close(whole, by_token, rtol=1e-3, atol=1e-7)  # up to s r_t / sg(r_t): at s the same
    policy = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    terms = TokenTerms(torch.full((2,), 0.5), torch.tensor([1.0, 0.0]).double(), policy, policy, None, (2,))
    for kind, expected in (("sequence", [-0.25, -0.25]), ("sequence_token", [-0.5, 0.0])):
        leaf = policy.clone().requires_grad_()
        outcome = pack_loss(leaf, torch.zeros(2), terms, algorithm("gspo", ratio=kind))
        np.testing.assert_allclose(torch.autograd.grad(outcome.loss, leaf)[0], expected)


def gradient_at(name: str, ratio: float, advantage: float) -> float:
    """Of the loss of one token in its log-prob."""
    leaf = torch.tensor([math.log(ratio)], dtype=torch.float64).requires_grad_()
    nothing = torch.zeros(1, dtype=torch.float64)
    terms = TokenTerms(torch.ones(1), nothing + advantage, nothing, nothing, None, (1,))
    return float(torch.autograd.grad(pack_loss(leaf, nothing, terms, algorithm(name)).loss, leaf)[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "grpo", "dapo"),
    [(1.25, 1.0, False, True), (1.29, 1.0, False, False), (1.29, -1.0, True, True),
     (0.79, -1.0, False, False), (0.79, 1.0, True, True), (0.81, -1.0, True, True)],
)  # fmt: skip
def test_clip_higher_keeps_the_gradient_of_tokens_that_become_up_to_28_percent_likelier(
    ratio: float, advantage: float, grpo: bool, dapo: bool
) -> None:
    for name, kept in (("grpo", grpo), ("dapo", dapo)):
        assert gradient_at(name, ratio, advantage) == pytest.approx(-ratio * advantage if kept else 0.0)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.1, -1.0), (4.0, -2.0), (9.0, 1.0)])
def test_cispo_drops_no_token_and_weighs_none_by_more_than_its_cap(ratio: float, advantage: float) -> None:
    assert gradient_at("cispo", ratio, advantage) == pytest.approx(-min(ratio, 5.0) * advantage)


# --- over the batch -------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), min_size=2, max_size=8)


@given(ROWS)
def test_advantages_over_the_batch_have_mean_0_and_deviation_1_over_its_tokens(rows: list[list[float]]) -> None:
    tokens = np.concatenate([np.array(row) for row in rows])
    if tokens.std() < 1e-2:
        return
    found = scaled_over_batch([np.array(row) for row in rows], [True] * len(rows), has_baseline=False)
    values = np.concatenate(found)
    assert abs(values.mean()) < 1e-9 and values.std() == pytest.approx(1.0, rel=1e-3)
    kept = np.concatenate(scaled_over_batch([np.array(r) for r in rows], [True] * len(rows), has_baseline=True))
    assert kept.std() == pytest.approx(1.0, rel=1e-3)
    np.testing.assert_allclose(kept, tokens / math.sqrt(tokens.var() + 1e-8), rtol=1e-9)


def test_beside_a_group_mean_the_samples_mean_is_0_and_a_group_without_a_spread_stays_at_0() -> None:
    rows = our_advantages(algorithm("reinforce_plus_plus_baseline"), batch())
    assert all((row == 0).all() for row in rows[6:])  # the third prompt
    assert sum(row[0] for row in rows) == pytest.approx(0.0, abs=1e-6)
    assert np.concatenate(rows).std() == pytest.approx(1.0, rel=1e-6)


def test_against_the_batch_a_group_without_a_spread_has_an_advantage() -> None:
    rows = our_advantages(algorithm("reinforce_plus_plus"), batch())
    assert abs(float(np.concatenate(rows).mean())) < 1e-6
    assert all((row != 0).all() for row in rows[6:])


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"])
def test_a_masked_sample_changes_nothing_but_what_it_was_compared_with(name: str) -> None:
    """Its own row is NaN; what stands in its place does not matter."""
    chosen, nan = algorithm(name), float("nan")
    found = []
    for rubbish in (nan, nan, float("inf")):
        rewards = [list(row) for row in REWARDS]
        rewards[1][0] = rubbish
        found.append(ExperienceBatch(learner_groups(rewards), chosen, MAX_TOKENS).token_advantages())
    assert np.isnan(found[0][4]).all() and np.isfinite(np.concatenate(found[0][:4] + found[0][5:])).all()
    for a, b in zip(found[0], found[2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_token_is_charged_for_its_own_kl_and_what_follows() -> None:
    np.testing.assert_allclose(reward_to_go(2.0, np.array([0.5, 0.25, 1.0]), 3), [0.25, 0.75, 1.0])
    np.testing.assert_allclose(reward_to_go(2.0, None, 2), [2.0, 2.0])
    assert reward_to_go(2.0, None, 0).size == 0
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        reward_to_go(1.0, np.zeros(3), 2)


# --- the greedy baseline on policies that can be enumerated -----------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_greedy_baseline_leaves_the_expected_gradient_exact(name: str) -> None:
    """ReMax, arXiv:2310.10505: whatever the greedy answer is worth, the expectation is the policy gradient."""
    probabilities, rewards = vector(CASES[name][0]), vector(CASES[name][1])
    exact = probabilities * (rewards - (probabilities * rewards).sum())
    greedy = float(rewards[int(probabilities.argmax())])
    found = torch.zeros_like(exact)
    for i, p in enumerate(probabilities):
        advantage = reward_to_go(float(rewards[i]) - greedy, None, 1)[0]
        score = -probabilities.clone()  # gradient of log pi(i) in the logits
        score[i] += 1
        found += p * advantage * score
    torch.testing.assert_close(found, exact)


def train(case: Any, spelling: Spelling, greedy: bool) -> torch.Tensor:
    """The policy over answers after exact-expectation descent, k1 in the reward, tokens charged to the end."""
    tokens, totals, beta = Tokens.of(spelling), vector(case[1]), 0.5
    masses = tokens.masses(vector(case[0]))
    reference = (masses / masses.sum(1, keepdim=True)).log()[tokens.prefix, tokens.choice]
    logits = torch.zeros_like(masses).requires_grad_()
    for _ in range(400):
        logp = log_softmax(logits)[tokens.prefix, tokens.choice]
        sampled = logp.detach()
        probabilities = tokens.answers(sampled)
        baseline = float(totals[int(probabilities.argmax())]) if greedy else 0.0
        penalties = beta * kl_estimate(sampled, reference, "k1")
        advantages = torch.from_numpy(np.concatenate([
            reward_to_go(float(total) - baseline, penalties[tokens.answer == i].numpy(), len(spelling[i]))
            for i, total in enumerate(totals)
        ]))  # fmt: skip
        loss = -(probabilities[tokens.answer] * advantages * logp).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.25 * gradient / tokens.masses(probabilities)
    return tokens.answers(log_softmax(logits.detach())[tokens.prefix, tokens.choice])


@pytest.mark.parametrize("greedy", [True, False])
def test_with_k1_in_the_reward_a_greedy_or_no_baseline_reaches_the_regularised_optimum(greedy: bool) -> None:
    torch.testing.assert_close(train(THREE, TWO_TOKENS, greedy), optimum(THREE), rtol=0, atol=1e-6)
