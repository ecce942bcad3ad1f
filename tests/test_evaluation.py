"""Held-out evaluation."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from trainers.errors import VerificationError
from trainers.evaluation import evaluate, pass_at_k
from trainers.experience import GroupRewards, GroupSummary, Prompt, WeightVersion
from trainers.protocols import GeneratedGroup, GroupRequest

PROMPTS = [Prompt(f"p{i}", np.array([1], np.int32), f"q{i}") for i in range(4)]


class Fake:
    def __init__(self, version: WeightVersion) -> None:
        self.version = version
        self.requests: list[GroupRequest] = []

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.requests.append(request)
        n = request.num_samples
        return GeneratedGroup(
            GroupSummary(
                request.group_id, request.prompt.prompt_id, 1, (2,) * n, ("stop",) * n,
                self.version, self.version, "g", 0.0,
            ),
            None,
        )  # fmt: skip

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        right = {"p0": [1.0, 1.0], "p1": [1.0, 0.0], "p2": [0.01, 0.0], "p3": [np.nan, 0.0]}[group.summary.prompt_id]
        values = np.array(right[: group.summary.num_samples])
        return GroupRewards(group.summary.group_id, values, {"accuracy": values})


def run(fake: Fake, num_samples: int) -> dict[str, float]:
    return asyncio.run(
        evaluate(
            PROMPTS, fake, fake, version=WeightVersion(0, 3), step=3, num_samples=num_samples, temperature=1.0,
            max_tokens=4, reward="accuracy", seed=0,
        )
    ).metrics  # fmt: skip


def test_partial_credit_and_failures_are_not_correct_answers() -> None:
    metrics = run(Fake(WeightVersion(0, 3)), 2)
    assert metrics["eval/accuracy"] == pytest.approx((1.0 + 0.5 + 0 + 0) / 4)
    assert metrics["eval/pass_at_k"] == pytest.approx((1.0 + 1.0 + 0 + 0) / 4)


def test_one_sample_is_decoded_greedily() -> None:
    fake = Fake(WeightVersion(0, 3))
    run(fake, 1)
    assert all(r.greedy for r in fake.requests)


def test_an_evaluation_is_never_mixed_across_a_push() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        run(Fake(WeightVersion(0, 2)), 1)
    assert caught.group_contains(VerificationError)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 4, 2), (5, 2, 3), (3, 1, 3)])
def test_pass_at_k_is_the_chance_that_a_random_subset_holds_a_right_one(n: int, c: int, k: int) -> None:
    from itertools import combinations

    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert math.isclose(pass_at_k(n, c, k), sum(any(s) for s in subsets) / len(subsets))
