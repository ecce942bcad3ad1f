"""Packs of whole texts: for SFT (targets inside a text) and for scoring (the state at its end).

Axes: L tokens of one text.  May import: numpy, torch, actors.packing, trainers.{batching, comparisons}.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from actors.packing import Block, Pack, PackLayout, Rows, build_pack
from trainers.batching import MicroBatch, Piece
from trainers.comparisons import Comparison


def text_pack(members: Sequence[int], texts: Rows, masks: Rows, device: torch.device | str = "cpu") -> Pack:
    """Texts laid end to end; the pack's targets are the tokens that ``masks`` marks.

    Args:
        members: which texts, in order.
        texts: int32 [L] each, L >= 2.
        masks: bool [L] each: token t is a target, predicted from the state of token t - 1.  The first token of a
            text cannot be one.
    """
    blocks, ids, positions, predict, targets, lengths = [], [], [], [], [], []
    cursor = 0
    for member in members:
        tokens, mask = texts[member], masks[member]
        if mask[0]:
            raise ValueError(f"text {member}: nothing predicts its first token, so it is no target")
        size = int(tokens.shape[0]) - 1  # the last token predicts nothing
        wanted = np.flatnonzero(mask)
        blocks.append(Block(cursor, size, ()))
        ids.append(tokens[:-1])
        positions.append(np.arange(size))
        predict.append(cursor + wanted - 1)
        targets.append(tokens[wanted])
        lengths.append(int(wanted.size))
        cursor += size
    as_row = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)  # noqa: E731
    return Pack(
        input_ids=as_row(ids)[None],
        position_ids=as_row(positions)[None],
        predict_index=as_row(predict),
        targets=as_row(targets),
        members=tuple(members),
        lengths=tuple(lengths),
        layout=PackLayout(blocks),
    )


def end_pack(microbatch: MicroBatch, prompts: Rows, completions: Rows, device: torch.device | str = "cpu") -> Pack:
    """Prompts with their completions, read once for each sample: at its last token.  N = number of samples.

    Args:
        microbatch: pieces whose members index ``prompts`` and ``completions``.
        prompts: int32 [P] of each sample.
        completions: int32 [T] of each sample, T >= 1.
    """
    members = [m for piece in microbatch for m in piece.members]
    # build_pack drops a completion's last token, which predicts nothing.  Here it is the one that is read, so one
    # more token, never looked at, takes its place.
    longer = {m: np.append(completions[m], completions[m][-1]) for m in members}
    pack = build_pack(microbatch, prompts, longer, device)
    ends = torch.from_numpy(np.cumsum(pack.lengths) - 1).to(device)
    return Pack(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        predict_index=pack.predict_index[ends],
        targets=pack.targets[ends],
        members=pack.members,
        lengths=(1,) * len(pack.members),
        layout=pack.layout,
    )


def laid_side_by_side(
    members: Sequence[Comparison], share_prompts: bool
) -> tuple[MicroBatch, list[np.ndarray], list[np.ndarray]]:
    """(pieces, prompt of each answer, answers): all answers of ``members``, numbered in order.

    Each comparison is one piece where prompts are shared.
    """
    prompts: list[np.ndarray] = []
    completions: list[np.ndarray] = []
    microbatch: list[Piece] = []
    for comparison in members:
        first = len(completions)
        completions += comparison.completion_ids
        prompts += [comparison.prompt_ids] * len(comparison.completion_ids)
        mine = range(first, len(completions))
        groups = [tuple(mine)] if share_prompts else [(i,) for i in mine]
        microbatch += [Piece(group, 0) for group in groups]
    return tuple(microbatch), prompts, completions


def pair_indices(members: Sequence[Comparison]) -> np.ndarray:
    """int64 [N, 2]: every (better, worse) pair of ``members``, as indices of their answers laid side by side."""
    first = np.cumsum([0, *(len(c.completion_ids) for c in members)])
    pairs = [start + np.array(c.pairs, dtype=np.int64) for start, c in zip(first, members, strict=False)]
    return np.concatenate(pairs)
