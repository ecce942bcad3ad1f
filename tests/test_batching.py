"""Laws of the micro-batch plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.batching import SampleShape, plan_microbatches

GROUP = st.tuples(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=1, max_size=9))
BATCH = st.lists(GROUP, min_size=1, max_size=7)
RANKS = st.integers(1, 9)
EXTRA = st.integers(0, 400)  # budget above the longest sample


def shapes_of(groups: list[tuple[int, list[int]]]) -> list[SampleShape]:
    return [SampleShape(g, s, p, t) for g, (p, lengths) in enumerate(groups) for s, t in enumerate(lengths)]


@settings(deadline=None)
@given(groups=BATCH, ranks=RANKS, extra=EXTRA, share=st.booleans())
def test_every_sample_is_in_exactly_one_microbatch(
    groups: list[tuple[int, list[int]]], ranks: int, extra: int, share: bool
) -> None:
    shapes = shapes_of(groups)
    plan = plan_microbatches(shapes, ranks, max(s.cost for s in shapes) + extra, share)
    dealt = [m for rank in plan for microbatch in rank for piece in microbatch for m in piece.members]
    assert sorted(dealt) == list(range(len(shapes)))


@settings(deadline=None)
@given(groups=BATCH, ranks=RANKS, extra=EXTRA, share=st.booleans())
def test_no_microbatch_exceeds_the_budget_and_pieces_are_honest(
    groups: list[tuple[int, list[int]]], ranks: int, extra: int, share: bool
) -> None:
    shapes = shapes_of(groups)
    budget = max(s.cost for s in shapes) + extra
    for rank in plan_microbatches(shapes, ranks, budget, share):
        for microbatch in rank:
            assert sum(piece.num_tokens for piece in microbatch) <= budget
            for piece in microbatch:
                members = [shapes[m] for m in piece.members]
                assert len({m.group for m in members}) == 1  # they share one prompt
                assert share or len(members) == 1
                assert piece.num_tokens == members[0].num_prompt + sum(m.num_completion for m in members)


@settings(deadline=None)
@given(groups=BATCH, ranks=RANKS, extra=EXTRA, share=st.booleans())
def test_all_ranks_run_the_same_number_of_microbatches(
    groups: list[tuple[int, list[int]]], ranks: int, extra: int, share: bool
) -> None:
    shapes = shapes_of(groups)
    plan = plan_microbatches(shapes, ranks, max(s.cost for s in shapes) + extra, share)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert any(plan[rank][-1] for rank in range(ranks))  # no round in which nobody computes


@settings(deadline=None)
@given(groups=BATCH, ranks=RANKS, extra=EXTRA, share=st.booleans())
def test_the_plan_is_a_function_of_the_lengths(
    groups: list[tuple[int, list[int]]], ranks: int, extra: int, share: bool
) -> None:
    budget = max(s.cost for s in shapes_of(groups)) + extra
    first = plan_microbatches(shapes_of(groups), ranks, budget, share)
    assert plan_microbatches(shapes_of(groups), ranks, budget, share) == first


def test_more_ranks_than_samples_leaves_ranks_with_empty_microbatches() -> None:
    plan = plan_microbatches(shapes_of([(3, [4, 2])]), 5, 100, share_prompts=False)
    assert sorted(len(microbatch) for rank in plan for microbatch in rank) == [0, 0, 0, 1, 1]


def test_a_sample_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens exceeds the token budget of 10"):
        plan_microbatches(shapes_of([(3, [4, 8])]), 1, 10, share_prompts=True)


def test_a_group_that_fits_shares_its_prompt_once() -> None:
    plan = plan_microbatches(shapes_of([(30, [5, 5, 5, 5])] * 2), 1, 1000, share_prompts=True)
    pieces = [piece for microbatch in plan[0] for piece in microbatch]
    assert len(pieces) < 8  # fewer prompts than samples
    assert sum(piece.num_tokens for piece in pieces) < 8 * 35


def test_ranks_get_similar_loads() -> None:
    shapes = shapes_of([(10, [7, 31, 50, 12, 44, 3, 60, 28])] * 8)
    plan = plan_microbatches(shapes, 4, 256, share_prompts=True)
    loads = [sum(piece.num_tokens for microbatch in rank for piece in microbatch) for rank in plan]
    assert max(loads) <= 1.25 * min(loads)
