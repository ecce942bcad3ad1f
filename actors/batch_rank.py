"""BatchRank: a rank that trains on batches of sampled groups, the policy's or the critic's.

What the two share: which samples this rank computes in which pack, how ranks stay in step, and how a whole batch
is scored before the first update.
May import: numpy, torch, actors.*, trainers.*, cluster.rendezvous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from actors.experience_batch import ExperienceBatch
from actors.packing import Pack, build_pack
from actors.rank import EngineRank
from actors.scoring import Score, filler_microbatch, score_samples
from actors.settings import LearnerSettings
from cluster.rendezvous import Rendezvous
from trainers.algorithms import AlgorithmSettings
from trainers.batching import plan_microbatches
from trainers.schedules import learning_rate


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch of this rank."""

    pack: Pack
    samples: tuple[int, ...]  # index in the batch, in the pack's order
    is_filler: bool  # computed with weight 0, so that all ranks make equally many passes
    is_last: bool  # of the minibatch


class BatchRank(EngineRank):
    """A rank, see :class:`actors.rank.EngineRank`; ``num_steps`` is the length of the learning-rate schedule."""

    def __init__(
        self,
        rank: int,
        rendezvous: Rendezvous,
        load: Callable[[bool], nn.Module],
        settings: LearnerSettings,
        algorithm: AlgorithmSettings,
        dtype: str,
        device: str,
        num_steps: int,
        seed: int,
        payload_deadline_s: float,
        tokenizer_path: str,
    ) -> None:
        self.algorithm, self.num_steps, self.payload_deadline_s = algorithm, num_steps, payload_deadline_s
        super().__init__(rank, rendezvous, load, settings, dtype, device, seed, tokenizer_path)
        self.share_prompts = self.device.type != "cuda" if settings.share_prompts is None else settings.share_prompts

    def learning_rate(self, step: int) -> float:
        optimizer = self.settings.optimizer
        return learning_rate(step, self.num_steps, optimizer.lr, optimizer.warmup_steps, optimizer.schedule)

    def shares(self, batch: ExperienceBatch, members: Sequence[int], chosen: Sequence[int]) -> Iterator[Share]:
        """This rank's packs of one minibatch; equally many on every rank.

        Args:
            members: all samples of the minibatch.
            chosen: those that have a gradient.  When there is none, every rank still makes one zero-weight pass, so
                that the step is the same step (Adam's momentum moves on) that a pass over all the zeros would make.
        """
        index_of = list(chosen) or [i for i in members if batch.shapes[i].num_completion > 0]
        shapes = [batch.shapes[i] for i in index_of]
        if not shapes:
            raise ValueError(f"no completion in this minibatch of {len(members)} samples has any token")
        budget = self.settings.token_budget
        plan = plan_microbatches(shapes, self.engine.world_size, budget, self.share_prompts)[self.rank]
        if not chosen:
            plan = [()]
        for i, microbatch in enumerate(plan):
            pieces = microbatch or filler_microbatch(shapes)
            opened = {m: batch.tokens(index_of[m], self.payload_deadline_s) for p in pieces for m in p.members}
            prompts = {m: t.prompt_ids for m, t in opened.items()}
            completions = {m: t.completion_ids for m, t in opened.items()}
            pack = build_pack(pieces, prompts, completions, self.device)
            samples = tuple(index_of[m] for m in pack.members)
            yield Share(pack, samples, is_filler=not microbatch, is_last=i == len(plan) - 1)

    def score_everything(
        self,
        score: Score,
        prompts: Sequence[np.ndarray],
        completions: Sequence[np.ndarray],
        groups: Sequence[int],
    ) -> list[np.ndarray]:
        """float32 [T] of every sample, on every rank; each was computed by one of them.  A collective.

        Shared, because packing differs between minibatches: any rank may need any sample later.
        """
        # Without dropout: these are compared with what generators and references say, and they have none.  That the
        # ratio of the first minibatch is 1 takes more, training passes without it: lora.dropout is refused in runs
        # that sample (actors/adapted_model.py).
        with self.evaluating():
            mine = score_samples(
                score, prompts, completions, groups, self.settings.token_budget, self.share_prompts, self.device,
                self.engine.world_size, self.rank,
            )  # fmt: skip
        rows = self.everyone(mine)
        return [rows[i] for i in range(len(completions))]

    def per_token(self, values: Sequence[float], pack: Pack) -> torch.Tensor:
        """float32 [N]: each sample's value at each of its tokens."""
        return self.tensor(np.repeat(values, pack.lengths))

    def laid_out(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [N]: the samples' rows end to end."""
        return self.tensor(np.concatenate(rows))
