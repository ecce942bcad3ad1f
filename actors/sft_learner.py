"""SFTLearner: one data-parallel rank of supervised fine-tuning.

Every method is called on all ranks at once.  A step names its examples; each rank computes the same plan of packs
from their lengths and reads its own from a mapped file (actors/example_files.py).
May import: numpy, torch, actors.*, trainers.{batching, examples, schedules, sft}, cluster.rendezvous.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.engine import TrainingEngine
from actors.example_files import ExampleFile
from actors.lora_settings import LoRAPlan
from actors.modeling import load_policy, trained_dtype
from actors.packing import Pack
from actors.rank import EngineRank
from actors.sequence_packing import text_pack
from actors.settings import LearnerSettings
from cluster.rendezvous import Rendezvous
from trainers.batching import plan_whole
from trainers.examples import Example
from trainers.schedules import learning_rate
from trainers.sft import cross_entropy_sum

TEMPERATURE = 1.0  # texts were written, not sampled


def sft_pack_loss(logprobs: torch.Tensor, num_targets: int, is_filler: bool = False) -> torch.Tensor:
    """A pack's share of the batch's loss; a filler's is 0 and has a gradient, which is 0 too.

    Args:
        logprobs: float32 [N] of the pack's targets at temperature 1.
        num_targets: targets of the whole batch, over all ranks.
    """
    return logprobs.sum() * 0.0 if is_filler else cross_entropy_sum(logprobs, num_targets)


def example_packs(
    examples: Sequence[Example], rank: int, num_ranks: int, token_budget: int, device: torch.device
) -> Iterator[tuple[Pack, bool]]:
    """(pack, is_filler) of one rank; equally many on every rank, so that collectives inside a pass stay in step."""
    costs = [int(e.input_ids.shape[0]) - 1 for e in examples]  # the last token predicts nothing
    smallest = int(np.argmin(costs))
    texts, masks = [e.input_ids for e in examples], [e.mask for e in examples]
    for members in plan_whole(costs, num_ranks, token_budget)[rank]:
        yield text_pack(members or (smallest,), texts, masks, device), not members


def accumulate_examples(
    engine: TrainingEngine, examples: Sequence[Example], token_budget: int, coef: float = 1.0
) -> tuple[torch.Tensor, int]:
    """Backward of ``coef`` times the mean cross-entropy of ``examples``' targets; its last pass ends the accumulation.

    Returns:
        (this rank's share of the mean itself, float64 [], packs of one rank).
    """
    num_targets = sum(int(e.mask.sum()) for e in examples)  # of all ranks, before the first backward pass
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    packs = list(example_packs(examples, engine.rank, engine.world_size, token_budget, engine.device))
    for i, (pack, is_filler) in enumerate(packs):
        engine.set_boundary(i == len(packs) - 1)
        logprobs, _ = engine.forward(pack, TEMPERATURE, with_entropy=False)
        loss = sft_pack_loss(logprobs, num_targets, is_filler)
        engine.backward(coef * loss)
        total += loss.detach().double()
    return total, len(packs)


class SFTLearner(EngineRank):
    """A rank.  ``train`` and ``held_out`` are files of examples, in the order of the datasets."""

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
        train: Mapping[str, str],
        held_out: str | None,
        lora: LoRAPlan | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.names = tuple(train)
        self.train = [ExampleFile(path) for path in train.values()]
        self.held_out = None if held_out is None else ExampleFile(held_out)

        def load(read_weights: bool) -> nn.Module:
            return load_policy(
                model_path, settings.logprob_chunk, trained_dtype(dtype, lora), settings.gradient_checkpointing, lora,
                device, read_weights,
            )  # fmt: skip

        super().__init__(rank, rendezvous, load, settings, dtype, device, seed, tokenizer_path=model_path)

    def update(self, drawn: Sequence[tuple[int, int]], step: int) -> dict[str, float]:
        """One optimizer step on the examples ``drawn`` ([(dataset, index)]); ``step`` counts from 0."""
        started = time.perf_counter()
        examples = [self.train[dataset][index] for dataset, index in drawn]
        optimizer = self.settings.optimizer
        lr = learning_rate(step, self.num_steps, optimizer.lr, optimizer.warmup_steps, optimizer.schedule)
        loss, num_packs = self._accumulate(examples)
        norm = self.engine.step(lr)
        num_tokens = sum(int(e.input_ids.shape[0]) for e in examples)
        num_targets = sum(int(e.mask.sum()) for e in examples)
        learn_s = time.perf_counter() - started
        shares = np.bincount([dataset for dataset, _ in drawn], minlength=len(self.train)) / len(drawn)
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": lr,
            "num_tokens": float(num_tokens),
            "num_target_tokens": float(num_targets),
            "time/learn_s": learn_s,
            "throughput/learn_tokens_per_s": num_tokens / learn_s,
            "learner/num_microbatches": float(num_packs),
            "learner/peak_memory_bytes": float(self.peak_memory_bytes()),
            **({f"mixture/{n}": float(s) for n, s in zip(self.names, shares, strict=True)} if len(shares) > 1 else {}),
        }

    def evaluate(self) -> dict[str, float]:
        """Mean cross-entropy of the held-out targets, in nats, and how many there are."""
        if self.held_out is None:
            raise ValueError("there are no held-out examples")
        examples = [self.held_out[i] for i in range(len(self.held_out))]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for pack, is_filler in self._packs(examples):
            with torch.no_grad(), self.evaluating():
                logprobs, _ = self.engine.forward(pack, TEMPERATURE, with_entropy=False)
            if not is_filler:
                total[0] -= logprobs.double().sum()
                total[1] += logprobs.numel()
        dist.all_reduce(total)
        summed, count = total.tolist()
        return {"loss": summed / count, "num_target_tokens": count}

    def gradients(self, drawn: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The whole gradient of one step, without the step.  For checks."""
        self._accumulate([self.train[dataset][index] for dataset, index in drawn])
        found = dict(self.engine.gradients())
        self.engine.discard_gradients()
        return found if self.rank == 0 else {}

    def _packs(self, examples: Sequence[Example]) -> Iterator[tuple[Pack, bool]]:
        return example_packs(examples, self.rank, self.engine.world_size, self.settings.token_budget, self.device)

    def _accumulate(self, examples: Sequence[Example]) -> tuple[float, int]:
        """Gradients of the batch; (its loss, packs of one rank)."""
        total, num_packs = accumulate_examples(self.engine, examples, self.settings.token_budget)
        dist.all_reduce(total)
        return float(total), num_packs
