"""PreferenceLearner: one data-parallel rank of offline preference learning, DPO and its relatives.

Every method is called on all ranks at once.  A step sends the indices of its comparisons; their tokens, and what the
reference thinks of them, lie in files that every rank can read.
May import: numpy, torch, actors.*, trainers.*, cluster.rendezvous.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from actors.lora_settings import LoRAPlan
from actors.modeling import load_policy, trained_dtype
from actors.preference_objective import PreferenceBatch, Share
from actors.rank import EngineRank
from actors.reference_pass import ReferencePass
from actors.settings import LearnerSettings
from cluster.rendezvous import Rendezvous
from trainers.comparisons import ComparisonTable
from trainers.preference_training import PreferenceSettings
from trainers.reference_logps import TEMPERATURE, reference_rows
from trainers.schedules import learning_rate

TRAIN, HELD_OUT = "train", "held_out"
COUNTS = frozenset({"num_tokens", "learner/num_microbatches", "learner/shared_prompt_fraction"})  # of the work itself


class PreferenceLearner(EngineRank):
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective.

    Args:
        data_folder: holds ``train.arrow`` and, to evaluate, ``held_out.arrow`` (trainers/comparisons.py).
        reference: file of each of the two, where the loss has a reference of its own (trainers/reference_logps.py).
        lora: train an adapter, and where it says so be the reference, with the adapter as it started.
    """

    _own: ReferencePass | None = None

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
        algorithm: PreferenceSettings,
        data_folder: str,
        reference: Mapping[str, str],
        lora: LoRAPlan | None = None,
    ) -> None:
        self.algorithm, self.num_steps = algorithm, num_steps
        files = {name: Path(data_folder) / f"{name}.arrow" for name in (TRAIN, HELD_OUT)}
        self._tables = {name: ComparisonTable(file) for name, file in files.items() if file.exists()}
        self._reference = {name: reference_rows(Path(file)) for name, file in reference.items()}

        def load(read_weights: bool) -> nn.Module:
            return load_policy(
                model_path, settings.logprob_chunk, trained_dtype(dtype, lora), settings.gradient_checkpointing, lora,
                device, read_weights,
            )  # fmt: skip

        super().__init__(rank, rendezvous, load, settings, dtype, device, seed, tokenizer_path=model_path)
        self.share_prompts = self.device.type != "cuda" if settings.share_prompts is None else settings.share_prompts
        self._own = ReferencePass(self) if lora is not None and lora.reference else None

    def update(self, indices: Sequence[int], step: int) -> dict[str, float]:
        """One optimizer step on the comparisons ``indices`` of the training data; the same metrics on every rank."""
        started = time.perf_counter()
        optimizer = self.settings.optimizer
        lr = learning_rate(step, self.num_steps, optimizer.lr, optimizer.warmup_steps, optimizer.schedule)
        metrics = self._pass(TRAIN, indices, learn=True)
        norm = self.engine.step(lr)
        learn_s = time.perf_counter() - started
        return metrics | {
            "grad_norm": norm,
            "learning_rate": lr,
            "time/learn_s": learn_s,
            "throughput/learn_tokens_per_s": metrics["num_tokens"] / learn_s,
            "learner/peak_memory_bytes": float(self.peak_memory_bytes()),
            **({} if self._own is None else {"learner/reference_s": self._own.took_s()}),
        }

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics of all held-out comparisons under the present weights, as one batch."""
        with self.evaluating():
            metrics = self._pass(HELD_OUT, range(len(self._tables[HELD_OUT])), learn=False)
        return {name: value for name, value in metrics.items() if name not in COUNTS}

    def _pass(self, name: str, indices: Sequence[int], learn: bool) -> dict[str, float]:
        """Metrics of one batch; with ``learn`` its gradient is accumulated, and the last pack ends the accumulation."""
        table, rows = self._tables[name], self._reference.get(name)
        comparisons = [table[i] for i in indices]
        reference = None if rows is None else [rows[i] for i in indices]
        if self._own is not None:
            reference = self._own.rows(name, indices, comparisons)
        batch = PreferenceBatch(comparisons, reference, self.algorithm, self.share_prompts, self.device)
        num_kl = self._settle_kl(batch)
        nothing = batch.nothing().metrics
        totals = torch.zeros(len(nothing), dtype=torch.float64, device=self.device)
        inputs = torch.zeros(2, dtype=torch.float64, device=self.device)  # computed, and what answers alone would need
        plan = self._plan(batch)
        for i, members in enumerate(plan):
            share = batch.share(members)
            with nullcontext() if learn else torch.no_grad():
                if learn:
                    self.engine.set_boundary(i == len(plan) - 1)
                outcome = batch.outcome(self._logprobs(share), share)
                if learn:
                    self.engine.backward(outcome.loss.float())
            totals += torch.stack([outcome.metrics[metric] for metric in nothing])
            if not share.is_filler:
                blocks = share.pack.layout.blocks
                alone = sum(len(b.completions) * b.num_prompt + sum(b.completions) for b in blocks)
                inputs += torch.tensor([share.pack.num_inputs, alone], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        dist.all_reduce(inputs)
        computed, alone_everywhere = inputs.tolist()
        return {
            **dict(zip(nothing, totals.tolist(), strict=True)),
            **({"kl": batch.kl} if batch.needs_kl else {}),
            "num_tokens": float(batch.num_judged_tokens),
            "learner/num_microbatches": float(len(plan) + num_kl),
            "learner/shared_prompt_fraction": 1.0 - computed / alone_everywhere,
        }

    def _settle_kl(self, batch: PreferenceBatch) -> int:
        """KTO: the KL of the whole batch, before anything is learned from it.  How many packs that took.

        Measured without dropout, as its reference is: z is of the policy, and dropout would add its own noise to it.
        """
        if not batch.needs_kl:
            return 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        plan = self._plan(batch, mismatched=True)
        for members in plan:
            share = batch.share(members, mismatched=True)
            with torch.no_grad(), self.evaluating():
                total += batch.mismatched_ratios(self._logprobs(share), share)
        dist.all_reduce(total)
        batch.settle_kl(float(total))
        return len(plan)

    def _plan(self, batch: PreferenceBatch, mismatched: bool = False) -> list[tuple[int, ...]]:
        return batch.plan(self.rank, self.engine.world_size, self.settings.token_budget, mismatched)

    def _logprobs(self, share: Share) -> torch.Tensor:
        logprobs: torch.Tensor = self.engine.forward(share.pack, TEMPERATURE, with_entropy=False)[0]
        return logprobs
