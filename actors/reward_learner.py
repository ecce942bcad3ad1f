"""RewardModelLearner: one data-parallel rank of reward-model training.

Every method is called on all ranks at once.  A step sends the indices of its comparisons; their tokens lie in
files that every rank can read.
May import: numpy, torch, actors.*, trainers.*, cluster.rendezvous.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.end_scores import end_scores
from actors.lora_settings import LoRAPlan
from actors.modeling import load_tokenizer, trained_dtype
from actors.packing import Pack
from actors.rank import EngineRank
from actors.scalar_model import load_scalar, scalar_pad_token_id
from actors.sequence_packing import end_pack, laid_side_by_side, pair_indices
from actors.settings import LearnerSettings
from cluster.rendezvous import Rendezvous
from trainers.batching import plan_whole
from trainers.bradley_terry import PreferenceLoss, pair_weights, preference_loss
from trainers.comparisons import Comparison, ComparisonTable
from trainers.reward_training import RewardTrainingSettings
from trainers.schedules import learning_rate

SUMS = ("loss", "accuracy", "margin", "center_rewards_loss", "score", "num_scores", "num_tokens", "computed")


class RewardModelLearner(EngineRank):
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective.

    Args:
        data_folder: holds ``train.arrow`` and what else is to be scored (trainers/comparisons.py).
    """

    def __init__(
        self,
        rank: int,
        rendezvous: Rendezvous,
        model_path: str,
        settings: LearnerSettings,
        dtype: str,
        device: str,
        num_steps: int,
        seed: int,
        *,
        algorithm: RewardTrainingSettings,
        data_folder: str,
        lora: LoRAPlan | None = None,
    ) -> None:
        self.algorithm, self.num_steps, self.data_folder = algorithm, num_steps, Path(data_folder)
        self.train = ComparisonTable(self.data_folder / "train.arrow")

        def load(read_weights: bool) -> nn.Module:
            return load_scalar(
                model_path, "model.path", trained_dtype(dtype, lora), settings.gradient_checkpointing, lora, device,
                read_weights,
            )  # fmt: skip

        super().__init__(rank, rendezvous, load, settings, dtype, device, seed, tokenizer_path=model_path)
        self.share_prompts = self.device.type != "cuda" if settings.share_prompts is None else settings.share_prompts

    # --- training -----------------------------------------------------------------------------

    def update(self, indices: Sequence[int], step: int) -> dict[str, float]:
        """One optimizer step on the comparisons ``indices`` of the training data; the same metrics on every rank."""
        started = time.perf_counter()
        batch = [self.train[i] for i in indices]
        optimizer = self.settings.optimizer
        lr = learning_rate(step, self.num_steps, optimizer.lr, optimizer.warmup_steps, optimizer.schedule)
        metrics = self._accumulate(batch)
        norm = self.engine.step(lr)
        learn_s = time.perf_counter() - started
        return metrics | {
            "grad_norm": norm,
            "learning_rate": lr,
            "time/learn_s": learn_s,
            "throughput/learn_tokens_per_s": metrics["num_tokens"] / learn_s,
            "learner/peak_memory_bytes": float(self.peak_memory_bytes()),
        }

    def gradients(self, indices: Sequence[int]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """(metrics, the whole gradient of one update at rank 0), without a step.  For checks."""
        metrics = self._accumulate([self.train[i] for i in indices])
        found = dict(self.engine.gradients())
        self.engine.discard_gradients()
        return metrics, found if self.rank == 0 else {}

    def _accumulate(self, batch: Sequence[Comparison]) -> dict[str, float]:
        # Fixed for the whole batch before any backward: how it is cut up then cannot change the loss.
        weights = pair_weights([len(c.pairs) for c in batch])
        costs = [c.cost(self.share_prompts) for c in batch]
        plan = plan_whole(costs, self.engine.world_size, self.settings.token_budget)[self.rank]
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=self.device)  # -min, max
        for i, unit in enumerate(plan):
            self.engine.set_boundary(i == len(plan) - 1)
            if not unit:  # the others are still at work: run in step with them, for nothing
                filler = self._pack([batch[int(np.argmin(costs))]])
                self.engine.backward(self.engine.forward(filler).sum() * 0.0)
                continue
            members = [batch[m] for m in unit]
            pack = self._pack(members)
            scores = self.engine.forward(pack)  # in the order of the pack's members, which is that of the answers
            outcome, pairs, per_pair = self._loss(scores, members, weights[list(unit)])
            self.engine.backward(outcome.loss)
            found = scores.detach().double()
            won = (outcome.margin > 0).float() + 0.5 * (outcome.margin == 0).float()
            centre = found[pairs].sum(dim=1).square()
            totals += torch.stack(
                [
                    outcome.loss.detach().double(), (per_pair * won).sum().double(),
                    (per_pair * outcome.margin).sum().double(), (per_pair * centre).sum().double(), found.sum(),
                    *self._counts(len(found), sum(c.num_tokens for c in members), pack.num_inputs),
                ]
            )  # fmt: skip
            extremes = torch.maximum(extremes, torch.stack([-found.min(), found.max()]))
        dist.all_reduce(totals)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        total = dict(zip(SUMS, totals.tolist(), strict=True))
        return {
            "loss": total["loss"],
            "accuracy": total["accuracy"],
            "margin": total["margin"],
            "center_rewards_loss": total["center_rewards_loss"],
            "mean_reward": total["score"] / total["num_scores"],
            "min_reward": -extremes[0].item(),
            "max_reward": extremes[1].item(),
            "num_tokens": total["num_tokens"],
            "learner/num_microbatches": float(len(plan)),
            "learner/shared_prompt_fraction": 1.0 - total["computed"] / total["num_tokens"],
        }

    def _counts(self, *counts: int) -> torch.Tensor:
        return torch.tensor(counts, dtype=torch.float64, device=self.device)

    def _pack(self, members: Sequence[Comparison]) -> Pack:
        """All answers of ``members``, numbered in order."""
        return end_pack(*laid_side_by_side(members, self.share_prompts), self.device)

    def _loss(
        self, scores: torch.Tensor, members: Sequence[Comparison], weights: np.ndarray
    ) -> tuple[PreferenceLoss, torch.Tensor, torch.Tensor]:
        """(loss, int64 [N, 2] pairs as indices of ``scores``, float32 [N] weights)."""
        index = torch.from_numpy(pair_indices(members)).to(self.device)
        per_pair = self.tensor(np.repeat(weights, [len(c.pairs) for c in members]))
        margin = None
        if any(c.margins is not None for c in members):
            rows = [c.margins if c.margins is not None else (0.0,) * len(c.pairs) for c in members]
            margin = self.tensor(np.concatenate(rows))
        better, worse = scores[index[:, 0]], scores[index[:, 1]]
        smoothing, centring = self.algorithm.label_smoothing, self.algorithm.centering_coef
        return preference_loss(better, worse, per_pair, margin, smoothing, centring), index, per_pair

    # --- scoring and export -------------------------------------------------------------------

    def score(self, name: str) -> list[np.ndarray]:
        """Scores, float32 [K], of every comparison in ``name``.arrow, under the present weights; on every rank."""
        table = ComparisonTable(self.data_folder / f"{name}.arrow")
        comparisons = [table[i] for i in range(len(table))]
        owner = [i for i, c in enumerate(comparisons) for _ in c.completion_ids]
        with self.evaluating():
            mine = end_scores(
                self.engine.forward, [comparisons[i].prompt_ids for i in owner],
                [answer for c in comparisons for answer in c.completion_ids], owner,
                self.settings.token_budget, self.share_prompts, self.device, self.engine.world_size, self.rank,
            )  # fmt: skip
        scores = self.everyone(mine)
        flat = np.array([scores[i] for i in range(len(owner))], dtype=np.float32)
        return np.split(flat, np.cumsum([len(c.completion_ids) for c in comparisons])[:-1])

    def export(self, directory: str) -> None:
        """A standard sequence-classification folder whose padding is not EOS, so that padded batches score alike."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        pad = scalar_pad_token_id(tokenizer, "model.path", self.tokenizer_path)
        cast(Any, self.engine.engine.module).hf_model.config.pad_token_id = pad
        super().export(directory)
        if self.rank == 0:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            tokenizer.padding_side = "right"
            tokenizer.save_pretrained(directory)
        dist.barrier()
