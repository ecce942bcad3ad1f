"""DeepSpeedLearner: one data-parallel rank of the policy's trainer.

Every method is called on all ranks at once.  One lap is ``update``; the weights leave through
``publish_file`` or ``stage`` + ``send`` (actors/publishing.py).
May import: numpy, torch, actors.*, trainers.*, cluster.{rendezvous, transport, weight_channel}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.experience_batch import ExperienceBatch, contributing
from actors.modeling import load_policy
from actors.objective import MAXIMA, SUMS, TokenTerms, pack_loss
from actors.packing import Pack, build_pack
from actors.rank import EngineRank
from actors.scoring import filler_microbatch, score_samples
from actors.settings import LearnerSettings, SamplingSettings
from cluster.rendezvous import Rendezvous
from trainers.algorithms import AlgorithmSettings
from trainers.batching import plan_microbatches
from trainers.losses import kl_estimate
from trainers.protocols import LearnerGroup, UpdateReport
from trainers.schedules import learning_rate


class DeepSpeedLearner(EngineRank):
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective."""

    def __init__(
        self,
        rank: int,
        rendezvous: Rendezvous,
        model_path: str,
        settings: LearnerSettings,
        algorithm: AlgorithmSettings,
        sampling: SamplingSettings,
        dtype: str,
        device: str,
        num_steps: int,
        seed: int,
        payload_deadline_s: float = 300.0,
    ) -> None:
        self.algorithm, self.sampling = algorithm, sampling
        self.num_steps, self.payload_deadline_s = num_steps, payload_deadline_s

        def load() -> nn.Module:
            return load_policy(model_path, settings.logprob_chunk, checkpointing=settings.gradient_checkpointing)

        super().__init__(rank, rendezvous, load, settings, dtype, device, seed, tokenizer_path=model_path)
        self.share_prompts = self.device.type != "cuda" if settings.share_prompts is None else settings.share_prompts

    # --- one lap ------------------------------------------------------------------------------

    def update(self, groups: Sequence[LearnerGroup], step: int) -> UpdateReport:
        """All optimizer steps on one batch; the same report on every rank."""
        started = time.perf_counter()
        batch, proximal, advantages = self._before_update(groups)
        trainable = batch.trainable()
        lr = learning_rate(
            step, self.num_steps, self.settings.optimizer.lr,
            self.settings.optimizer.warmup_steps, self.settings.optimizer.schedule,
        )  # fmt: skip
        totals = _Totals(self.device)
        norms: list[float] = []
        for epoch in range(self.algorithm.num_epochs):
            for index, members in enumerate(batch.minibatches()):
                first = epoch == 0 and index == 0
                self._accumulate(batch, members, trainable, advantages, proximal, totals, first)
                norms.append(self.engine.step(lr))
        metrics = totals.reduced()
        if not self.algorithm.needs_reference:
            del metrics["kl"]  # not measured is not 0
        scored = advantages[np.isfinite(advantages)]
        lengths = np.array([s.num_completion for s in batch.shapes])
        metrics |= {
            "grad_norm": float(np.mean(norms)),
            "learning_rate": lr,
            "advantages/mean": float(scored.mean()) if scored.size else 0.0,
            "advantages/std": float(scored.std()) if scored.size else 0.0,
            "learner/peak_memory_bytes": float(self.peak_memory_bytes()),
        }
        return UpdateReport(
            metrics=metrics,
            advantages=batch.by_group(advantages),
            learn_s=time.perf_counter() - started,
            num_tokens=int(lengths[trainable].sum()),
        )

    def gradients(self, groups: Sequence[LearnerGroup]) -> dict[str, torch.Tensor]:
        """The gradient of one update's first minibatch, whole, without a step.  For checks."""
        batch, proximal, advantages = self._before_update(groups)
        totals = _Totals(self.device)
        self._accumulate(batch, batch.minibatches()[0], batch.trainable(), advantages, proximal, totals, True)
        found = dict(self.engine.gradients())
        self.engine.discard_gradients()
        return found if self.rank == 0 else {}

    def _before_update(
        self, groups: Sequence[LearnerGroup]
    ) -> tuple[ExperienceBatch, dict[int, np.ndarray] | None, np.ndarray]:
        """(batch, proximal log-probs where they are needed, advantages [samples]): fixed for all its updates."""
        batch = ExperienceBatch(groups, self.algorithm, self.sampling.max_tokens)
        in_reward = self.algorithm.kl_coef > 0 and self.algorithm.kl_placement == "reward"
        proximal: dict[int, np.ndarray] | None = None
        if self.algorithm.num_updates > 1 or in_reward:
            proximal = self._proximal(batch)
        penalties = self._kl_penalties(batch, proximal) if in_reward and proximal is not None else None
        return batch, proximal, batch.advantages(penalties)

    def _accumulate(
        self,
        batch: ExperienceBatch,
        members: Sequence[int],
        trainable: np.ndarray,
        advantages: np.ndarray,
        proximal: dict[int, np.ndarray] | None,
        totals: _Totals,
        first: bool,
    ) -> None:
        weights = batch.weights(members, trainable)
        weight_of = dict(zip(members, weights, strict=True))
        chosen = contributing(members, weights, advantages, self.algorithm) or []
        # Nobody contributes: every rank still runs one zero-weight pass, so that the step is the same
        # step (Adam's momentum moves on) that a pass over all the zeros would have made.
        shapes = [batch.shapes[i] for i in (chosen or [i for i in members if batch.shapes[i].num_completion > 0])]
        if not shapes:
            raise ValueError(f"no completion in this minibatch of {len(members)} samples has any token")
        index_of = chosen or [i for i in members if batch.shapes[i].num_completion > 0]
        plan = plan_microbatches(shapes, self.engine.world_size, self.settings.token_budget, self.share_prompts)[
            self.rank
        ]
        if not chosen:
            plan = [()]
        for i, microbatch in enumerate(plan):
            filler = not microbatch
            pack = self._pack(batch, microbatch or filler_microbatch(shapes), index_of)
            terms = self._terms(batch, pack, index_of, weight_of, advantages, proximal, filler)
            self.engine.set_boundary(i == len(plan) - 1)
            logprobs, entropy = self.engine.forward(pack, self.sampling.temperature)
            outcome = pack_loss(logprobs, entropy, terms, self.algorithm)
            loss = outcome.loss if not filler else (logprobs.sum() + entropy.sum()) * 0.0
            self.engine.backward(loss)
            if not filler:
                totals.add(outcome.sums, outcome.maxima, pack, first)
        totals.num_microbatches += len(plan)

    def _pack(self, batch: ExperienceBatch, microbatch: Any, index_of: Sequence[int]) -> Pack:
        wanted = sorted({m for piece in microbatch for m in piece.members})
        opened = {m: batch.tokens(index_of[m], self.payload_deadline_s) for m in wanted}
        prompts = {m: t.prompt_ids for m, t in opened.items()}
        completions = {m: t.completion_ids for m, t in opened.items()}
        return build_pack(microbatch, prompts, completions, self.device)

    def _terms(
        self,
        batch: ExperienceBatch,
        pack: Pack,
        index_of: Sequence[int],
        weight_of: dict[int, float],
        advantages: np.ndarray,
        proximal: dict[int, np.ndarray] | None,
        filler: bool,
    ) -> TokenTerms:
        samples = [index_of[m] for m in pack.members]
        tokens = [batch.tokens(i, self.payload_deadline_s) for i in samples]
        per_token = lambda values: self.tensor(np.repeat(values, pack.lengths))  # noqa: E731
        references = [t.reference_logprobs for t in tokens]
        return TokenTerms(
            weights=per_token([0.0 if filler else weight_of[i] for i in samples]),
            advantages=per_token([advantages[i] for i in samples]),
            behavior_logprobs=self.tensor(np.concatenate([t.behavior_logprobs for t in tokens])),
            proximal_logprobs=None if proximal is None else self.tensor(np.concatenate([proximal[i] for i in samples])),
            reference_logprobs=None
            if any(r is None for r in references)
            else self.tensor(np.concatenate([r for r in references if r is not None])),
        )

    # --- log-probs before the update ------------------------------------------------------------

    def _proximal(self, batch: ExperienceBatch) -> dict[int, np.ndarray]:
        """Log-probs of every sample under the weights before this batch's first step.

        Computed where a sample will be trained *or* elsewhere, then shared: packing differs between
        minibatches, so any rank may need any of them.
        """
        tokens = [batch.tokens(i, self.payload_deadline_s) for i in range(batch.num_samples)]
        mine = score_samples(
            self._score,
            [t.prompt_ids for t in tokens],
            [t.completion_ids for t in tokens],
            [s.group for s in batch.shapes],
            self.settings.token_budget,
            self.share_prompts,
            self.device,
            self.engine.world_size,
            self.rank,
        )
        return self.everyone(mine)

    def _score(self, pack: Pack) -> torch.Tensor:
        logprobs: torch.Tensor = self.engine.forward(pack, self.sampling.temperature, with_entropy=False)[0]
        return logprobs

    def _kl_penalties(self, batch: ExperienceBatch, proximal: dict[int, np.ndarray]) -> np.ndarray:
        """beta * sum over tokens of the KL estimate, float64 [samples]."""
        penalties = np.zeros(batch.num_samples)
        for i in range(batch.num_samples):
            reference = batch.tokens(i, self.payload_deadline_s).reference_logprobs
            if reference is None:
                raise ValueError("a KL penalty in the reward needs reference log-probs")
            per_token = kl_estimate(
                torch.from_numpy(proximal[i].copy()), torch.from_numpy(reference.copy()), self.algorithm.kl_estimator
            )
            penalties[i] = self.algorithm.kl_coef * float(per_token.double().sum())
        return penalties

    def score(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given completions under the present weights, on every rank.  For the start-up probe."""
        rows = score_samples(
            self._score, prompts, completions, list(range(len(prompts))),
            self.settings.token_budget, False, self.device,
        )  # fmt: skip
        return [rows[i] for i in range(len(prompts))]


class _Totals:
    """Metric sums over packs, then over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
        self.first_deviation = torch.zeros((), dtype=torch.float64, device=device)
        self.inputs = torch.zeros(2, dtype=torch.float64, device=device)  # computed, and what samples alone would need
        self.num_microbatches = 0

    def add(self, sums: torch.Tensor, maxima: torch.Tensor, pack: Pack, first: bool) -> None:
        self.sums += sums
        self.maxima = torch.maximum(self.maxima, maxima)
        if first:
            self.first_deviation = torch.maximum(self.first_deviation, maxima[MAXIMA.index("ratio_deviation")])
        alone = sum(len(b.completions) * b.num_prompt + sum(b.completions) for b in pack.layout.blocks)
        self.inputs += torch.tensor([pack.num_inputs, alone], dtype=torch.float64, device=self.inputs.device)

    def reduced(self) -> dict[str, float]:
        sums = torch.cat([self.sums, self.inputs])
        maxima = torch.cat([self.maxima, self.first_deviation[None]])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        total = dict(zip(SUMS, sums.tolist(), strict=False))
        peak = dict(zip(MAXIMA, maxima.tolist(), strict=False))
        computed, alone = sums[-2:].tolist()
        n = max(total["tokens"], 1.0)
        return {
            "loss": total["loss"],
            "entropy": total["entropy"] / n,
            "kl": total["kl"] / n,
            "ratio/mean": total["ratio"] / n,
            "ratio/max": peak["ratio"],
            "ratio/first_minibatch_max_deviation": maxima[-1].item(),
            "clip_ratio/low_mean": total["clip_low"] / n,
            "clip_ratio/high_mean": total["clip_high"] / n,
            "clip_ratio/region_mean": (total["clip_low"] + total["clip_high"]) / n,
            "sampling/sampling_logp_difference/mean": total["mismatch"] / n,
            "sampling/sampling_logp_difference/max": peak["mismatch"],
            "learner/num_microbatches": float(self.num_microbatches),
            "learner/shared_prompt_fraction": 1.0 - computed / alone if alone else 0.0,
        }
