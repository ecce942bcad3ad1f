"""Samples laid end to end: the token layout of one micro-batch, without any padding.

A pack is a row of *blocks*.  A block is one prompt followed by the completions that share it::

    [ prompt | completion 0 | completion 1 | ... ]      positions restart after the prompt

Each completion sees the prompt and itself, never its neighbours.  The last token of a completion
predicts nothing and is left out; the last prompt token predicts the first token of every
completion, so its hidden state is read once for each.

Axes: L input tokens of the pack, N scored tokens (all completion tokens).
May import: numpy, torch, trainers.batching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainers.batching import MicroBatch

Rows = Sequence[np.ndarray] | Mapping[int, np.ndarray]  # looked up by sample index only


@dataclass(frozen=True, slots=True)
class Block:
    """Where a prompt and its completions lie in the pack."""

    start: int
    num_prompt: int
    completions: tuple[int, ...]  # input tokens of each completion, its last token left out

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + sum(self.completions)


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch, ready for a forward pass.  Members are in the order of ``lengths``."""

    input_ids: torch.Tensor  # int64 [1, L]
    position_ids: torch.Tensor  # int64 [1, L]
    predict_index: torch.Tensor  # int64 [N]: whose hidden state predicts target n
    targets: torch.Tensor  # int64 [N]
    members: tuple[int, ...]  # index of each sample in the batch
    lengths: tuple[int, ...]  # scored tokens of each member, sums to N
    layout: PackLayout

    @property
    def num_inputs(self) -> int:
        return int(self.input_ids.shape[1])


class PackLayout:
    """The blocks of a pack, with the attention masks that its layers share."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._cumulative: tuple[torch.Tensor, int] | None = None

    def mask(self, index: int, window: int | None, device: torch.device) -> torch.Tensor:
        """bool [l, l] for one block: true where a row's token may look at a column's."""
        key = (index, window)
        if key not in self._masks:
            block = self.blocks[index]
            segment = np.repeat(np.arange(len(block.completions) + 1), (block.num_prompt, *block.completions))
            position = np.concatenate(
                [np.arange(block.num_prompt), *(block.num_prompt + np.arange(t) for t in block.completions)]
            )
            allowed = (segment[None, :] == segment[:, None]) | (segment[None, :] == 0)
            distance = position[:, None] - position[None, :]
            allowed &= distance >= 0
            if window is not None:
                allowed &= distance < window
            self._masks[key] = torch.from_numpy(allowed).to(device)
        return self._masks[key]

    def cumulative(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """(int32 [blocks + 1] boundaries, longest block) for variable-length kernels; no shared prompts."""
        if self._cumulative is None:
            if any(len(b.completions) > 1 for b in self.blocks):
                raise ValueError("a variable-length kernel cannot share prompts; plan with share_prompts=False")
            sizes = [b.num_tokens for b in self.blocks]
            bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            self._cumulative = (torch.from_numpy(bounds).to(device), max(sizes))
        return self._cumulative


def build_pack(
    microbatch: MicroBatch,
    prompts: Rows,
    completions: Rows,
    device: torch.device | str = "cpu",
) -> Pack:
    """Lay a planned micro-batch out.

    Args:
        microbatch: pieces whose members index ``prompts`` and ``completions``.
        prompts: int32 [P] of each sample (equal arrays for samples of one group).
        completions: int32 [T] of each sample, T >= 1.
    """
    blocks: list[Block] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict: list[np.ndarray] = []
    members: list[int] = []
    cursor = 0
    for piece in microbatch:
        prompt = prompts[piece.members[0]]
        size = int(prompt.shape[0])
        start, lengths = cursor, []
        ids.append(prompt)
        positions.append(np.arange(size))
        cursor += size
        for member in piece.members:
            tokens = completions[member]
            inputs = int(tokens.shape[0]) - 1
            ids.append(tokens[:-1])
            positions.append(size + np.arange(inputs))
            predict.append(np.concatenate([[start + size - 1], cursor + np.arange(inputs)]))
            lengths.append(inputs)
            members.append(member)
            cursor += inputs
        blocks.append(Block(start, size, tuple(lengths)))
    as_row = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)  # noqa: E731
    return Pack(
        input_ids=as_row(ids)[None],
        position_ids=as_row(positions)[None],
        predict_index=as_row(predict),
        targets=as_row([completions[m] for m in members]),
        members=tuple(members),
        lengths=tuple(int(completions[m].shape[0]) for m in members),
        layout=PackLayout(blocks),
    )
