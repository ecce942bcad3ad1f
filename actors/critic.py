"""CriticLearner: one data-parallel rank of the value function's trainer.

Every method is called on all ranks at once.  ``values`` is asked for each group before the update, ``update`` gets
the targets that the policy's learner made of them.  The value of a token is read at the state in which the token
was chosen: the prompt and what stands before it.
May import: numpy, torch, actors.*, trainers.*, cluster.{rendezvous, transport}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.batch_rank import BatchRank, Share
from actors.experience_batch import ExperienceBatch
from actors.group_batch import GroupBatch
from actors.lora_settings import LoRAPlan
from actors.modeling import trained_dtype
from actors.packing import Pack
from actors.scalar_model import load_scalar
from actors.settings import CriticSettings
from cluster.rendezvous import Rendezvous
from cluster.transport import fetch
from trainers.algorithms import AlgorithmSettings
from trainers.experience import decode_group, encode_logprobs
from trainers.gae import explained_variance
from trainers.losses import token_weights
from trainers.ppo_targets import SampleTargets, decode_targets
from trainers.protocols import CriticReport, LearnerGroup
from trainers.value_loss import clipped_value_loss

SUMS = ("tokens", "loss", "clipped")


class CriticLearner(BatchRank):
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective.

    Args:
        model_path: folder of a reward model, whose head is kept, or of a causal language model, which gets a head
            of zeros.  Its tokenizer is the policy's.
    """

    def __init__(
        self,
        rank: int,
        rendezvous: Rendezvous,
        model_path: str,
        settings: CriticSettings,
        algorithm: AlgorithmSettings,
        dtype: str,
        device: str,
        num_steps: int,
        seed: int,
        payload_deadline_s: float = 300.0,
    ) -> None:
        lora = None if settings.lora is None else LoRAPlan(settings.lora, settings.quantization)

        def load(read_weights: bool) -> nn.Module:
            return load_scalar(
                model_path, "critic.path", trained_dtype(dtype, lora), settings.gradient_checkpointing, lora, device,
                read_weights,
            )  # fmt: skip

        super().__init__(
            rank, rendezvous, load, settings, algorithm, dtype, device, num_steps, seed, payload_deadline_s,
            tokenizer_path=model_path,
        )  # fmt: skip

    def values(self, payloads: list[Any], deadline_s: float) -> tuple[Any, ...]:
        """({"score_s"}, values before each completion token of each group in ``payloads``, an Arrow buffer a group).

        The samples are divided among the ranks; rank 0 has the result, the others have None for each group.
        """
        started = time.perf_counter()
        batch = GroupBatch([decode_group(fetch(payload, deadline_s)) for payload in payloads])
        rows = batch.by_group(self.score_everything(self._score, batch.prompts, batch.completions, batch.groups))
        buffers = [encode_logprobs(part) if self.rank == 0 else None for part in rows]
        return {"score_s": time.perf_counter() - started}, *buffers

    def _score(self, pack: Pack) -> torch.Tensor:
        values: torch.Tensor = self.engine.forward(pack)
        return values

    # --- the update -----------------------------------------------------------------------------

    def update(self, groups: Sequence[LearnerGroup], step: int, targets: Sequence[Any]) -> CriticReport:
        """All optimizer steps on one batch; the same report on every rank.

        ``targets``: the one payload of the policy learner's ``prepare``, in a list.
        """
        started = time.perf_counter()
        batch, rows, trainable = self._before_update(groups, targets)
        lr = self.learning_rate(step)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        norms: list[float] = []
        for _ in range(self.algorithm.num_epochs):
            for members in batch.minibatches():
                sums += self._accumulate(batch, members, rows, trainable)
                norms.append(self.engine.step(lr))
        dist.all_reduce(sums)
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        kept = [row for row, keep in zip(rows, trainable, strict=True) if keep]
        returns = np.concatenate([np.empty(0), *(row.returns for row in kept)])
        values = np.concatenate([np.empty(0), *(row.values for row in kept)])
        metrics = {
            "critic/loss": total["loss"] / len(norms),
            "critic/clip_ratio": total["clipped"] / max(total["tokens"], 1.0),
            "critic/value_mean": float(values.mean()) if values.size else float("nan"),
            "critic/return_mean": float(returns.mean()) if returns.size else float("nan"),
            "critic/explained_variance": explained_variance(returns, values),
            "critic/grad_norm": float(np.mean(norms)),
            "critic/learning_rate": lr,
            "critic/peak_memory_bytes": float(self.peak_memory_bytes()),
        }
        return CriticReport(metrics, time.perf_counter() - started)

    def gradients(self, groups: Sequence[LearnerGroup], targets: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The gradient of one update's first minibatch, whole, without a step.  For checks."""
        batch, rows, trainable = self._before_update(groups, targets)
        self._accumulate(batch, batch.minibatches()[0], rows, trainable)
        found = dict(self.engine.gradients())
        self.engine.discard_gradients()
        return found if self.rank == 0 else {}

    def _before_update(
        self, groups: Sequence[LearnerGroup], targets: Sequence[Any]
    ) -> tuple[ExperienceBatch, list[SampleTargets], np.ndarray]:
        batch = ExperienceBatch(groups, self.algorithm, max_tokens=1)  # which only a "constant" aggregation reads
        return batch, decode_targets(fetch(targets[0], self.payload_deadline_s)), batch.trainable()

    def _accumulate(
        self, batch: ExperienceBatch, members: Sequence[int], rows: Sequence[SampleTargets], trainable: np.ndarray
    ) -> torch.Tensor:
        """Backward of one minibatch: the mean over its tokens.  Returns this rank's sums, float64 [len(SUMS)]."""
        lengths, included = [batch.shapes[i].num_completion for i in members], [bool(trainable[i]) for i in members]
        weights = token_weights(lengths, included, "token", 1)
        weight_of = dict(zip(members, weights, strict=True))
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        for share in self.shares(batch, members, [i for i in members if weight_of[i] > 0]):
            self.engine.set_boundary(share.is_last)
            values = self.engine.forward(share.pack)
            if share.is_filler:
                self.engine.backward(values.sum() * 0.0)
                continue
            loss, counted = self._loss(values, share, rows, weight_of)
            self.engine.backward(loss)
            sums += counted
        return sums

    def _loss(
        self, values: torch.Tensor, share: Share, rows: Sequence[SampleTargets], weight_of: dict[int, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = clipped_value_loss(
            values,
            self.laid_out([rows[i].values for i in share.samples]),
            self.laid_out([rows[i].returns for i in share.samples]),
            self.algorithm.ppo.value_clip,
        )
        loss = (found.loss * self.per_token([weight_of[i] for i in share.samples], share.pack)).sum()
        with torch.no_grad():
            sums = (torch.ones_like(values).sum(), loss, found.clipped.sum())
            return loss, torch.stack([s.double() for s in sums])
