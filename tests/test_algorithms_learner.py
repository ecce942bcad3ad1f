"""What the learner makes of an algorithm: one gradient a batch, however it is packed and over however many ranks.

The learner's own code on a tiny model, with the engine replaced by plain backward passes: DeepSpeed's part is in
tests/test_gradient_invariance.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_gradient_invariance import MAX_TOKENS, MODEL, TEMPERATURE, largest_error, recorded_batch

from actors.learner import DeepSpeedLearner
from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.scoring import score_samples
from actors.settings import LearnerSettings, SamplingSettings
from actors.update_totals import UpdateTotals
from trainers.algorithms import AlgorithmSettings
from trainers.presets import PRESETS
from trainers.protocols import LearnerGroup

TOLERANCE = 1e-4  # relative to a parameter's largest gradient element, float32
# (ranks, token budget, share prompts); the longest sample has 29 tokens.
PACKINGS = ((1, 4096, True), (1, 30, False), (2, 64, True), (3, 40, False))
WITHOUT_CRITIC = [name for name in PRESETS if name != "ppo"]


class PlainEngine:
    """One model, and gradients that add up."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.world_size = model, 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def set_boundary(self, is_last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class PlainLearner(DeepSpeedLearner):
    """All ranks of a learner, one after the other in this process."""

    def __init__(self, model: torch.nn.Module, algorithm: AlgorithmSettings) -> None:
        self.engine = PlainEngine(model)  # type: ignore[assignment]
        self.algorithm, self.rank, self.device, self.pretraining = algorithm, 0, torch.device("cpu"), None
        self.sampling = SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
        self.settings, self.share_prompts, self.payload_deadline_s = LearnerSettings(), True, 10.0

    def score_everything(self, score: Any, prompts: Any, completions: Any, groups: Any) -> list[np.ndarray]:
        rows = score_samples(score, prompts, completions, groups, 4096, True, self.device)
        return [rows[i] for i in range(len(completions))]

    def of(
        self, groups: Sequence[LearnerGroup], num_ranks: int, token_budget: int, share_prompts: bool, moved: float
    ) -> tuple[dict[str, torch.Tensor], UpdateTotals]:
        """The gradient after the parameters ``moved`` since the log-probs before the update; rank 0's totals."""
        fixed = self._before_update(groups, None, None)
        start = [p.detach().clone() for p in self.engine.model.parameters()]  # type: ignore[attr-defined]
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.engine.model.parameters():  # type: ignore[attr-defined]
                p += moved * p.abs().mean() * torch.randn(p.shape, generator=draw)
        self.settings = LearnerSettings(token_budget=token_budget)
        self.share_prompts, self.engine.world_size = share_prompts, num_ranks
        totals = UpdateTotals(self.device)
        for self.rank in range(num_ranks):
            self._accumulate(fixed, fixed.batch.minibatches()[0], totals, 0, 0)
        found = {}
        with torch.no_grad():
            for (name, p), before in zip(self.engine.model.named_parameters(), start, strict=True):  # type: ignore[attr-defined]
                found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                p.grad = None
                p.copy_(before)
        self.rank, self.engine.world_size = 0, 1
        return found, totals


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_policy(resolve_model(MODEL), 16).train()
    torch.set_num_threads(before)


def groups() -> list[LearnerGroup]:
    return [replace(g, greedy_reward=worth) for g, worth in zip(recorded_batch(), (0.5, 1.0, 0.0, 0.2), strict=True)]


def chosen(name: str, **keys: Any) -> AlgorithmSettings:
    beta = {"kl_coef": 0.1}
    return AlgorithmSettings.model_validate({"name": name, "num_epochs": 2, **beta, **keys})


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_the_gradient_is_the_same_in_every_packing_and_on_any_number_of_ranks(
    model: torch.nn.Module, name: str
) -> None:
    learner = PlainLearner(model, chosen(name))
    expected, totals = learner.of(groups(), *PACKINGS[0], moved=0.02)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-5, "the law says nothing"
    for packing in PACKINGS[1:]:
        found, others = learner.of(groups(), *packing, moved=0.02)
        assert largest_error(found, expected) <= TOLERANCE, packing
        torch.testing.assert_close(others.sums, totals.sums, rtol=1e-4, atol=1e-5)


def test_after_the_policy_has_moved_gspo_has_another_gradient_than_grpo_and_before_it_the_same(
    model: torch.nn.Module,
) -> None:
    wide = {"clip_low": 0.9, "clip_high": 9.0, "kl_coef": 0.0}
    token, sequence = (PlainLearner(model, chosen("gspo", ratio=ratio, **wide)) for ratio in ("token", "sequence"))
    for moved, differ in ((0.0, False), (0.3, True)):
        ours, theirs = (learner.of(groups(), *PACKINGS[2], moved=moved)[0] for learner in (sequence, token))
        assert (largest_error(ours, theirs) > 1e-2) == differ


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_on_the_first_minibatch_nothing_is_clipped(model: torch.nn.Module, name: str) -> None:
    """GSPO's bounds are 3e-4 wide: rounding between packings must stay below them."""
    _, totals = PlainLearner(model, chosen(name)).of(groups(), *PACKINGS[1], moved=0.0)
    assert float(totals.first_deviation) < 1e-5
    names = ("clip_low", "clip_high")
    from actors.objective import SUMS

    assert all(float(totals.sums[SUMS.index(n)]) == 0.0 for n in names)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"])
def test_samples_that_may_not_be_trained_on_are_not_trained_on(model: torch.nn.Module, name: str) -> None:
    """The batch has a masked, an aborted and an empty sample; what they were given does not matter."""
    learner, odd = PlainLearner(model, chosen(name)), groups()
    expected, _ = learner.of(odd, *PACKINGS[0], moved=0.0)
    odd[3].rewards.totals[3] = -1e6  # of the aborted one
    found, _ = learner.of(odd, *PACKINGS[0], moved=0.0)
    assert largest_error(found, expected) == 0.0


def test_remax_skips_samples_that_are_worth_what_the_greedy_answer_is(model: torch.nn.Module) -> None:
    equal = [replace(g, greedy_reward=1.0) for g in groups()[2:3]]  # four samples of reward 1
    learner = PlainLearner(model, chosen("remax", kl_coef=0.0))
    found, totals = learner.of(equal, *PACKINGS[0], moved=0.0)
    assert all((g == 0).all() for g in found.values()) and totals.sums[0] == 0
