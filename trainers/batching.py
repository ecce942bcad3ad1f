"""Token-budget packing: which samples share a micro-batch, and which rank computes it.

The plan is a pure function of the samples' lengths, so every rank computes the same one and no
plan is ever sent.  Ranks always get the same number of micro-batches (ZeRO 2 and 3 communicate
inside backward and would hang otherwise); where samples run out a micro-batch is empty and its rank
runs a zero-weight pass.

A *piece* is one prompt with some of its completions.  Where attention can share a prompt, the
completions of a group stay together so that the prompt is computed once.
May import: the standard library.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampleShape:
    """Where a sample stands and how long it is, in tokens."""

    group: int  # index of its group in the batch
    sample: int  # index in the group
    num_prompt: int
    num_completion: int

    @property
    def cost(self) -> int:
        return self.num_prompt + self.num_completion


@dataclass(frozen=True, slots=True)
class Piece:
    """One prompt and some of its completions: ``members`` index the list of shapes."""

    members: tuple[int, ...]
    num_tokens: int


MicroBatch = tuple[Piece, ...]


def plan_microbatches(
    shapes: Sequence[SampleShape], num_ranks: int, token_budget: int, share_prompts: bool
) -> list[list[MicroBatch]]:
    """``plan[rank][i]``: the same number of micro-batches for every rank, each within the budget.

    Balanced greedily, longest piece first, over ``num_ranks * k`` bins for the smallest k that
    fits; when the budget cannot be met because one sample alone exceeds it, that is an error
    (configuration checks it beforehand).

    Raises:
        ValueError: a sample is longer than ``token_budget``.
    """
    too_long = [s.cost for s in shapes if s.cost > token_budget]
    if too_long:
        raise ValueError(f"a sample of {max(too_long)} tokens exceeds the token budget of {token_budget}")
    total = sum(p.num_tokens for p in _pieces(shapes, token_budget, share_prompts))
    rounds = max(1, -(-total // (token_budget * num_ranks)))
    while True:
        bins = num_ranks * rounds
        # Half a bin's fair share: small enough to balance, large enough to keep prompts shared.
        limit = min(token_budget, max(total // bins // 2, 1))
        filled = _fill(_pieces(shapes, limit, share_prompts), bins)
        if all(sum(p.num_tokens for p in b) <= token_budget for b in filled):
            break
        rounds += 1
    filled.sort(key=lambda b: -sum(p.num_tokens for p in b))  # a round holds bins of similar size
    return [[tuple(filled[r * num_ranks + rank]) for r in range(rounds)] for rank in range(num_ranks)]


def _pieces(shapes: Sequence[SampleShape], limit: int, share_prompts: bool) -> list[Piece]:
    if not share_prompts:
        return [Piece((i,), s.cost) for i, s in enumerate(shapes)]
    groups: dict[int, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape.group, []).append(i)
    pieces = []
    for members in groups.values():
        members = sorted(members, key=lambda i: (-shapes[i].num_completion, i))
        num_prompt = shapes[members[0]].num_prompt
        current: list[int] = []
        tokens = num_prompt
        for i in members:
            if current and tokens + shapes[i].num_completion > limit:
                pieces.append(Piece(tuple(current), tokens))
                current, tokens = [], num_prompt
            current.append(i)
            tokens += shapes[i].num_completion
        pieces.append(Piece(tuple(current), tokens))
    return pieces


def _fill(pieces: Sequence[Piece], num_bins: int) -> list[list[Piece]]:
    bins: list[list[Piece]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for piece in sorted(pieces, key=lambda p: (-p.num_tokens, p.members)):
        load, b = heapq.heappop(heap)
        bins[b].append(piece)
        heapq.heappush(heap, (load + piece.num_tokens, b))
    return bins


def plan_whole(costs: Sequence[int], num_ranks: int, token_budget: int) -> list[list[tuple[int, ...]]]:
    """``plan[rank][i]``: indices of units that must not be split (texts, or all answers to one prompt).

    Like :func:`plan_microbatches`, for units of ``costs`` tokens: equally many micro-batches on every rank, each
    within the budget; one may be empty.

    Raises:
        ValueError: a unit costs more than ``token_budget``.
    """
    shapes = [SampleShape(i, 0, 0, cost) for i, cost in enumerate(costs)]
    plan = plan_microbatches(shapes, num_ranks, token_budget, share_prompts=False)
    return [[tuple(m for piece in microbatch for m in piece.members) for microbatch in rank] for rank in plan]
