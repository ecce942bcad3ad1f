"""Online DPO: which samples become a pair, and that the learner has the gradient of the plain DPO loss of the pairs.

The learner's own code on a tiny model, its engine replaced by plain backward passes, against autograd of the papers'
formulas written out here; DeepSpeed's part is in tests/test_gradient_invariance.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms_learner import PACKINGS, TOLERANCE, PlainLearner
from test_closed_form import CASES, optimum, vector
from test_gradient_invariance import MODEL, TEMPERATURE, largest_error, recorded_batch
from torch.nn.functional import logsigmoid

from actors.experience_batch import ExperienceBatch
from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.online_pairs import OnlinePairs
from launch.config import RunConfig
from launch.overrides import load_config
from launch.prepare import prepare
from trainers.algorithms import AlgorithmSettings
from trainers.correction import resolved
from trainers.errors import InputError
from trainers.experience import decode_group, decode_logprobs
from trainers.metrics import check
from trainers.online_pairs import best_and_worst, pair_gradients, sampled_pairs
from trainers.preference_training import PreferenceSettings
from trainers.protocols import LearnerGroup

BETA = 0.3
PAIRS = ((0, 0, 1), (1, 1, 0), (3, 2, 0))  # of the recorded batch: group, chosen, rejected; all of group 2 tie
RECIPE = "cpu-two-by-two"
TRL = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def algorithm(**keys: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": "online_dpo", "kl_coef": BETA, **keys})


# --- which samples become a pair ------------------------------------------------------------------


def test_the_highest_and_the_lowest_reward_make_the_pair_and_the_first_of_equal_ones() -> None:
    everyone = np.ones(5, dtype=bool)
    assert best_and_worst(np.array([0.5, 2.0, -1.0, 2.0, -1.0]), everyone) == (1, 2)
    assert best_and_worst(np.array([3.0, 1.0]), everyone[:2]) == (0, 1)


def test_a_sample_that_may_not_be_trained_on_is_in_no_pair() -> None:
    totals, kept = np.array([9.0, 1.0, np.nan, 0.0]), np.array([False, True, False, True])
    assert best_and_worst(totals, kept) == (1, 3)
    assert best_and_worst(totals, np.array([True, False, False, False])) is None


@given(st.floats(-1e6, 1e6), st.integers(2, 6))
def test_a_tie_prefers_nobody(reward: float, size: int) -> None:
    assert best_and_worst(np.full(size, reward), np.ones(size, dtype=bool)) is None


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=6))
def test_every_group_gives_a_pair_a_tie_or_nothing_and_pairs_count_samples_through_the_batch(
    rewards: list[list[int]],
) -> None:
    totals = [np.array(row, dtype=np.float64) for row in rewards]
    found = sampled_pairs(totals, [np.ones(len(row), dtype=bool) for row in rewards])
    assert found.chosen.size + found.num_ties + found.num_single == len(rewards)
    flat = np.concatenate(totals)
    starts = np.cumsum([0, *(len(row) for row in rewards)])
    for g, chosen, rejected, margin in zip(
        found.groups, found.chosen, found.rejected, found.scores_margins, strict=True
    ):
        assert starts[g] <= min(chosen, rejected) and max(chosen, rejected) < starts[g + 1]
        assert flat[chosen] == max(rewards[g]) and flat[rejected] == min(rewards[g])
        assert margin == flat[chosen] - flat[rejected] > 0
    assert found.num_single == sum(len(row) < 2 for row in rewards)


# --- the gradient of a sample ---------------------------------------------------------------------


def of_margins(margins: Sequence[float], loss: str) -> Any:
    policy = np.array(margins) - 7.0, np.full(len(margins), -7.0)
    reference = np.zeros(len(margins)), np.zeros(len(margins))
    lengths = np.ones(len(margins)), np.ones(len(margins))
    settings = PreferenceSettings.model_validate({"loss": loss, "beta": BETA})
    return pair_gradients(policy, reference, lengths, settings)


@given(st.lists(st.floats(-200, 200), min_size=1, max_size=5))
def test_the_coefficient_of_dpo_is_beta_times_how_wrong_the_policy_is(margins: list[float]) -> None:
    """-beta sigmoid(-beta margin) of the chosen sample, the opposite of the rejected one."""
    found = of_margins(margins, "sigmoid")
    expected = [-BETA / (1 + math.exp(BETA * m)) for m in margins]
    np.testing.assert_allclose(found.chosen, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(found.rejected, -found.chosen)


def test_ipo_asks_for_nothing_more_at_its_margin_and_pulls_back_beyond_it() -> None:
    found = of_margins([0.0, 1 / (2 * BETA), 5.0], "ipo")
    np.testing.assert_allclose(found.chosen, [-1 / BETA, 0.0, 2 * (5.0 - 1 / (2 * BETA))], atol=1e-12)


def test_a_policy_that_is_its_reference_has_the_loss_ln_2_and_metrics_by_the_names_of_trl() -> None:
    metrics = of_margins([0.0, 0.0], "sigmoid").metrics
    assert metrics["loss"] == pytest.approx(math.log(2)) and metrics["rewards/accuracies"] == 0.5
    assert set(TRL) < set(metrics)


def test_no_pair_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="without a pair"):
        of_margins([], "sigmoid")


# --- the learner ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_policy(resolve_model(MODEL), 16).train()
    torch.set_num_threads(before)


def plain_loss(model: Any, groups: Sequence[LearnerGroup], loss: str) -> torch.Tensor:
    """The mean over PAIRS, each sample alone through transformers' own model."""
    terms = []
    for g, *sides in PAIRS:
        decoded, references = decode_group(groups[g].payload), decode_logprobs(groups[g].reference_payload)
        prompt, ratios = torch.from_numpy(decoded.prompt.token_ids.astype(np.int64)), []
        for i in sides:
            ids = torch.cat([prompt, torch.from_numpy(decoded.trajectories[i].completion_ids.astype(np.int64))])
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logp = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            ratios.append(logp.sum() - float(references[i].sum(dtype=np.float64)))
        margin = ratios[0] - ratios[1]
        terms.append(-logsigmoid(BETA * margin) if loss == "sigmoid" else (margin - 1 / (2 * BETA)) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_learner_has_the_gradient_of_the_plain_loss_in_every_packing_and_on_any_number_of_ranks(
    model: torch.nn.Module, loss: str
) -> None:
    """Budgets of 30 and 40 tokens part the two samples of a pair (29 and 16); three ranks share the six samples."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float64)
    expected_loss = plain_loss(plain, recorded_batch(), loss)
    expected_loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert min(float(g.abs().max()) for g in expected.values()) > 1e-5, "the law says nothing"
    learner = PlainLearner(model, algorithm(loss=loss))
    for packing in PACKINGS:
        found, totals = learner.of(recorded_batch(), *packing, moved=0.0)
        named = {n.removeprefix("hf_model."): g for n, g in found.items()}
        assert largest_error({n: named[n] for n in expected}, expected) <= TOLERANCE, packing
        lengths = (5 + 9, 17 + 4, 13 + 8)  # of the pairs' samples; ranks are added up
        assert float(totals.sums[0]) == sum(lengths)


def test_a_step_tells_of_its_pairs_and_gives_other_samples_no_advantage(model: torch.nn.Module) -> None:
    from transformers import AutoModelForCausalLM

    learner, groups = PlainLearner(model, algorithm()), recorded_batch()
    fixed = learner._before_update(groups, None, None)
    pairs, batch = fixed.pairs, fixed.batch
    assert pairs is not None
    weights, advantages = pairs.step(batch.minibatches()[0], lambda s: learner._logprobs_of(batch, s))
    starts = (0, 5, 7, 11)
    members = {starts[g] + i for g, *sides in PAIRS for i in sides}
    assert set(np.flatnonzero(weights)) == set(np.flatnonzero(np.nan_to_num(advantages))) == members
    assert weights[list(members)] == pytest.approx(1 / 3)
    for g, chosen, rejected in PAIRS:
        assert advantages[starts[g] + chosen] == -advantages[starts[g] + rejected] > 0
    assert np.isnan(advantages[[2, 12, 14]]).all()  # masked, empty, aborted
    np.testing.assert_array_equal(pairs.advantages, advantages)
    found = pairs.metrics()
    plain = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float64)
    assert found["loss"] == pytest.approx(float(plain_loss(plain, groups, "sigmoid").detach()), rel=1e-4)
    assert (found["pairs/num"], found["pairs/num_ties"], found["pairs/num_single"]) == (3, 1, 0)
    assert found["objective/scores_margin"] == pytest.approx((1.0 + 1.0 + 0.7) / 3)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    for name in (*found, *TRL):
        assert name in found and check(name)


def test_every_optimizer_step_looks_at_the_weights_it_finds(model: torch.nn.Module) -> None:
    """With several updates a batch the coefficients of the later ones are not those of the first."""
    learner, groups = PlainLearner(model, algorithm(num_epochs=2)), recorded_batch()
    fixed = learner._before_update(groups, None, None)
    assert fixed.pairs is not None
    asked: list[list[int]] = []

    def scored(shift: float) -> Any:
        def rows(samples: Sequence[int]) -> list[np.ndarray]:
            asked.append(list(samples))
            return [np.full(3, -1.0 - (shift if k < len(samples) // 2 else 0.0)) for k in range(len(samples))]

        return rows

    members = fixed.batch.minibatches()[0]
    _, first = fixed.pairs.step(members, scored(0.0))
    _, later = fixed.pairs.step(members, scored(2.0))  # the chosen ones have become less likely
    assert len(asked) == 2 and (later[0] > first[0] > 0)
    np.testing.assert_array_equal(fixed.pairs.advantages, first)


def test_a_minibatch_divides_by_its_own_pairs_and_one_without_a_pair_scores_nothing(model: torch.nn.Module) -> None:
    learner = PlainLearner(model, algorithm(num_minibatches=4))
    fixed = learner._before_update(recorded_batch(), None, None)
    pairs = fixed.pairs
    assert pairs is not None
    for g, members in enumerate(fixed.batch.minibatches()):
        weights, advantages = pairs.step(members, lambda s: learner._logprobs_of(fixed.batch, s))
        if g == 2:  # whose samples tie
            assert not weights.any() and not np.nan_to_num(advantages).any()
        else:
            assert sorted(weights[weights > 0]) == [1.0, 1.0]
    assert pairs.metrics()["pairs/num"] == 3


def test_a_batch_of_ties_has_a_gradient_of_exactly_zero(model: torch.nn.Module) -> None:
    found, totals = PlainLearner(model, algorithm()).of(recorded_batch()[2:3], *PACKINGS[0], moved=0.0)
    assert all((g == 0).all() for g in found.values()) and totals.sums[0] == 0


def test_a_sample_without_its_reference_is_told() -> None:
    bare = [replace(group, reference_payload=None) for group in recorded_batch()]
    pairs = OnlinePairs(ExperienceBatch(bare, algorithm(), 32), algorithm(), 10.0)
    with pytest.raises(ValueError, match="3 of 3 samples came without reference log-probs"):
        pairs.step(range(15), lambda samples: [np.zeros(2)] * len(samples))


# --- where it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_with_labels_drawn_from_the_reward_online_dpo_stays_at_the_regularised_optimum(name: str) -> None:
    """Pairs sampled by the policy itself, preferred as Bradley-Terry says of the reward: pi* is a fixed point.

    Expectation over both samples and the label; a label that always follows the reward has no such point.
    """
    beta, best, rewards = 0.5, optimum(CASES[name]), vector(CASES[name][1])
    reference = vector(CASES[name][0]).log()
    logits = best.log().clone().requires_grad_()
    logp, expected = logits.log_softmax(0), torch.zeros((), dtype=torch.float64)
    sampled = logp.detach().exp()
    for i in range(len(best)):
        for j in range(len(best)):
            if i == j:
                continue
            settings = PreferenceSettings(loss="sigmoid", beta=beta)
            rows = [float(logp[k].detach()) for k in (i, j)], [float(reference[k]) for k in (i, j)]
            one = np.ones(1)
            found = pair_gradients((one * rows[0][0], one * rows[0][1]), (one * rows[1][0], one * rows[1][1]),
                                   (one, one), settings)  # fmt: skip
            prefers = torch.sigmoid(rewards[i] - rewards[j])
            expected = expected + sampled[i] * sampled[j] * prefers * (
                float(found.chosen[0]) * logp[i] + float(found.rejected[0]) * logp[j]
            )
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.abs().max() < 1e-9


# --- configuration --------------------------------------------------------------------------------


def config(*overrides: str) -> RunConfig:
    return load_config(RECIPE, ["algorithm.name=online_dpo", *overrides]).config  # type: ignore[no-any-return]


def test_a_run_has_a_reference_and_no_correction_at_any_staleness() -> None:
    chosen = config("run.max_staleness=2").algorithm
    assert chosen.needs_reference and chosen.needs_group and chosen.kl_coef == 0.1
    assert not resolved(chosen.correction, 2).is_on


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("run.samples_per_prompt=1", "run.samples_per_prompt", "a pair of samples needs at least 2"),
        ("algorithm.kl_coef=0", "algorithm.kl_coef", "is the beta of its loss"),
        ("algorithm.baseline=leave_one_out", "algorithm.baseline", "whose loss is that of pairs"),
        ("algorithm.scale=none", "algorithm.scale", "leave it out"),
        ("algorithm.clip_high=0.28", "algorithm.clip_high", "name=online_dpo"),
        ("algorithm.aggregation=token", "algorithm.aggregation", "name=online_dpo"),
        ("algorithm.kl_placement=reward", "algorithm.kl_placement", "name=online_dpo"),
        ("algorithm.entropy_coef=0.1", "algorithm.entropy_coef", "name=online_dpo"),
        ("algorithm.correction.kind=token_mask", "algorithm.correction.kind", "whoever sampled"),
        ("algorithm.ppo.gamma=0.9", "algorithm.ppo.gamma", "has no critic"),
        ("algorithm.loss=kto", "algorithm.loss", "one of sigmoid, ipo"),
    ],
)
def test_what_means_nothing_to_online_dpo_is_refused_in_one_line(override: str, field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        config(override)
    assert caught.value.field == field and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_loss_of_pairs_is_refused_where_there_are_none() -> None:
    with pytest.raises(InputError, match="set name=online_dpo"):
        load_config(RECIPE, ["algorithm.loss=ipo"])


def test_a_recipe_of_written_preferences_is_refused_with_what_it_needs() -> None:
    with pytest.raises(InputError) as caught:
        load_config("cpu-dpo", ["algorithm.name=online_dpo"])
    assert "give prompts and rewards" in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_of_written_preferences_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        prepare(config(f"prompts.train={{path: {tmp_path / 'pairs.jsonl'}}}"))
    assert caught.value.field == "prompts.train" and "algorithm.name=dpo" in caught.value.remedy
