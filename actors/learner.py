"""DeepSpeedLearner: one data-parallel rank of the policy's trainer.

Every method is called on all ranks at once.  One lap is ``update`` (with a critic: ``prepare``, then ``update`` with
its targets); the weights leave through ``publish_file`` or ``stage`` + ``send`` (actors/publishing.py).
May import: numpy, torch, actors.*, trainers.*, cluster.{rendezvous, transport, weight_channel}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from actors.adapter_reference import AdapterReference
from actors.batch_rank import BatchRank, Share
from actors.experience_batch import ExperienceBatch
from actors.lora_settings import LoRAPlan
from actors.modeling import load_policy, trained_dtype
from actors.objective import TokenTerms, pack_loss
from actors.online_pairs import OnlinePairs
from actors.packing import Pack
from actors.parameter_change import ParameterChange
from actors.pretraining import PretrainingTerm
from actors.scoring import score_samples
from actors.settings import LearnerSettings, SamplingSettings
from actors.update_plan import UpdatePlan, means
from actors.update_totals import UpdateTotals
from cluster.rendezvous import Rendezvous
from cluster.transport import fetch
from trainers.algorithms import AlgorithmSettings
from trainers.losses import kl_estimate
from trainers.ppo_targets import decode_targets, encode_targets, ppo_targets
from trainers.protocols import LearnerGroup, PreparedBatch, UpdateReport


class DeepSpeedLearner(BatchRank):
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective.

    Args:
        pretraining: file of the texts of PPO-ptx (actors/example_files.py), with ``algorithm.ppo.pretrain_coef`` only.
        lora: train an adapter; None: the whole model.
    """

    _reference: AdapterReference | None = None  # None: reference log-probs come with the groups, or nobody asks for any

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
        pretraining: str | None = None,
        lora: LoRAPlan | None = None,
    ) -> None:
        self.sampling = sampling
        self.pretraining = None if pretraining is None else PretrainingTerm(pretraining, algorithm, seed)

        def load(read_weights: bool) -> nn.Module:
            return load_policy(
                model_path, settings.logprob_chunk, trained_dtype(dtype, lora), settings.gradient_checkpointing, lora,
                device, read_weights,
            )  # fmt: skip

        super().__init__(
            rank, rendezvous, load, settings, algorithm, dtype, device, num_steps, seed, payload_deadline_s,
            tokenizer_path=model_path,
        )  # fmt: skip
        self._change: ParameterChange | None = ParameterChange(self.engine)  # None once it was measured
        if self.adapter is not None and self.adapter.plan.reference:
            self._reference = AdapterReference(self.adapter)

    # --- one lap ------------------------------------------------------------------------------

    def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> tuple[PreparedBatch | None, pa.Buffer | None]:
        """PPO's targets of one batch, from log-probs under the present weights.

        Args:
            scores: shaped rewards, float64 [G] a group.
            kl_coef: beta of this batch.

        Returns:
            On rank 0 the summary (its payload is left to the caller) and the targets as Arrow; else two None.
        """
        batch = ExperienceBatch(groups, self.algorithm, self.sampling.max_tokens)
        proximal, own = self._proximal(batch), self._own_references(batch)
        if self.rank != 0:
            return None, None
        tokens = [batch.tokens(i, self.payload_deadline_s) for i in range(batch.num_samples)]
        values = [t.values for t in tokens if t.values is not None]
        references = own or [t.reference_logprobs for t in tokens if t.reference_logprobs is not None]
        if len(values) < len(tokens):
            raise ValueError(f"{len(tokens) - len(values)} of {len(tokens)} samples came without the critic's values")
        targets, summary = ppo_targets(
            np.concatenate(scores), batch.trainable(), proximal, references or None, values, self.algorithm, kl_coef
        )
        prepared = PreparedBatch(
            payload=None,
            metrics=summary.metrics(),
            advantages=batch.by_group(means([t.advantages for t in targets])),
            kl_per_sequence=summary.kl,
            num_samples=summary.num_samples,
        )
        return prepared, encode_targets(targets)

    def update(
        self,
        groups: Sequence[LearnerGroup],
        step: int,
        targets: Sequence[Any] | None = None,
        kl_coef: float | None = None,
    ) -> UpdateReport:
        """All optimizer steps on one batch; the same report on every rank.

        Args:
            targets: the one payload of :meth:`prepare`, in a list so that Ray leaves it to this rank to fetch it;
                None: the advantages are those of the groups.
            kl_coef: beta of this batch; None: the algorithm's.
        """
        started = time.perf_counter()
        fixed = self._before_update(groups, targets, kl_coef)
        batch = fixed.batch
        lr = self.learning_rate(step)
        totals = UpdateTotals(self.device)
        norms: list[float] = []
        changed: list[float] = []
        for _ in range(self.algorithm.num_epochs):
            for members in batch.minibatches():
                self._accumulate(fixed, members, totals, step, len(norms))
                norms.append(self._step(lr, changed))
        metrics = totals.reduced()
        metrics["loss"] /= len(norms)
        correction = self.algorithm.correction
        for name, measured in (
            ("kl", self.algorithm.needs_reference),
            ("correction/truncated_fraction", correction.truncates),
            ("correction/masked_fraction", correction.masks),
        ):
            if not measured:
                metrics.pop(name, None)  # not measured is not 0
        advantages = fixed.advantages
        if fixed.pairs is not None:
            advantages = fixed.pairs.advantages
            metrics |= fixed.pairs.metrics()  # its loss too: that of the pack is only made to have its gradient
        if self.pretraining is not None:
            metrics["pretrain_loss"] = totals.pretrain_loss() / len(norms)
        scored = advantages[np.isfinite(advantages)]
        lengths = np.array([s.num_completion for s in batch.shapes])
        metrics |= {
            "learning_rate": lr,
            "advantages/mean": float(scored.mean()) if scored.size else 0.0,
            "advantages/std": float(scored.std()) if scored.size else 0.0,
            "learner/peak_memory_bytes": float(self.peak_memory_bytes()),
        }
        if totals.num_trained or self.pretraining is not None:
            metrics["grad_norm"] = float(np.mean(norms))
        if self._reference is not None:
            metrics["learner/reference_s"] = self._reference.took_s()
        if changed:
            metrics["learner/parameters_changed_fraction"] = changed[0]
        return UpdateReport(
            metrics=metrics,
            advantages=batch.by_group(advantages),
            learn_s=time.perf_counter() - started,
            num_tokens=int(lengths[fixed.trainable].sum()),
        )

    def _step(self, lr: float, changed: list[float]) -> float:
        """One optimizer step, its gradient's norm; of the first that has a gradient, the share that it changed."""
        change = self._change if lr > 0 else None
        if change is not None:
            change.look()
        norm = self.engine.step(lr)
        if change is not None and norm > 0:
            changed.append(change.fraction())
            self._change = None
        return norm

    def gradients(
        self, groups: Sequence[LearnerGroup], targets: Sequence[Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """The gradient of one update's first minibatch, whole, without a step.  For checks."""
        fixed = self._before_update(groups, targets, None)
        self._accumulate(fixed, fixed.batch.minibatches()[0], UpdateTotals(self.device), 0, 0)
        found = dict(self.engine.gradients())
        self.engine.discard_gradients()
        return found if self.rank == 0 else {}

    def _before_update(
        self, groups: Sequence[LearnerGroup], targets: Sequence[Any] | None, kl_coef: float | None
    ) -> UpdatePlan:
        algorithm = self.algorithm if kl_coef is None else self.algorithm.model_copy(update={"kl_coef": kl_coef})
        batch = ExperienceBatch(groups, algorithm, self.sampling.max_tokens)
        own = self._own_references(batch)
        if algorithm.learns_from_pairs:
            pairs = OnlinePairs(batch, algorithm, self.payload_deadline_s, own)
            plain = algorithm.model_copy(update={"kl_coef": 0.0})  # the reference is in the loss of the pairs
            return UpdatePlan(batch, plain, pairs.is_paired, pairs.advantages, None, None, own, pairs)
        trainable = batch.trainable()
        if targets is not None:
            rows = decode_targets(fetch(targets[0], self.payload_deadline_s))
            per_token = [r.advantages for r in rows]
            before = [r.proximal_logprobs for r in rows]
            return UpdatePlan(batch, algorithm, trainable, means(per_token), per_token, before, own)
        in_reward = algorithm.kl_coef > 0 and algorithm.kl_placement == "reward"
        proximal = self._proximal(batch) if algorithm.num_updates > 1 or in_reward else None
        penalties = self._kl_penalties(batch, proximal, own) if in_reward and proximal is not None else None
        if algorithm.has_token_advantages:
            per_token = batch.token_advantages(penalties)
            return UpdatePlan(batch, algorithm, trainable, means(per_token), per_token, proximal, own)
        totals = None if penalties is None else np.array([row.sum() for row in penalties])
        return UpdatePlan(batch, algorithm, trainable, batch.advantages(totals), None, proximal, own)

    def _accumulate(
        self, fixed: UpdatePlan, members: Sequence[int], totals: UpdateTotals, step: int, index: int
    ) -> None:
        """Backward of everything that goes into the ``index``-th optimizer step on the batch of ``step``."""
        if fixed.pairs is not None:
            fixed = self._paired(fixed, fixed.pairs, members)
        weights = fixed.weights(members)
        weight_of = dict(zip(members, weights, strict=True))
        for share in self.shares(fixed.batch, members, fixed.chosen(members, weights)):
            terms = self._terms(fixed, share, weight_of)
            self.engine.set_boundary(share.is_last and self.pretraining is None)
            logprobs, entropy = self.engine.forward(share.pack, self.sampling.temperature)
            outcome = pack_loss(logprobs, entropy, terms, fixed.algorithm)
            self.engine.backward(outcome.loss if not share.is_filler else (logprobs.sum() + entropy.sum()) * 0.0)
            totals.num_microbatches += 1
            if not share.is_filler:
                totals.add(outcome, share.pack, first=index == 0)
        if self.pretraining is not None:
            totals.pretrain += self.pretraining.accumulate(self.engine, self.settings.token_budget, step, index)

    def _terms(self, fixed: UpdatePlan, share: Share, weight_of: dict[int, float]) -> TokenTerms:
        samples, pack = share.samples, share.pack
        tokens = [fixed.batch.tokens(i, self.payload_deadline_s) for i in samples]
        references = [t.reference_logprobs for t in tokens if t.reference_logprobs is not None]
        if fixed.references is not None:
            references = [fixed.references[i] for i in samples]
        advantages, proximal = fixed.token_advantages, fixed.proximal
        return TokenTerms(
            weights=self.per_token([0.0 if share.is_filler else weight_of[i] for i in samples], pack),
            advantages=self.per_token([fixed.advantages[i] for i in samples], pack)
            if advantages is None
            else self.laid_out([advantages[i] for i in samples]),
            behavior_logprobs=self.laid_out([t.behavior_logprobs for t in tokens]),
            proximal_logprobs=None if proximal is None else self.laid_out([proximal[i] for i in samples]),
            reference_logprobs=None if len(references) < len(tokens) else self.laid_out(references),
            lengths=pack.lengths,
        )

    # --- log-probs before the update ------------------------------------------------------------

    def _paired(self, fixed: UpdatePlan, pairs: OnlinePairs, members: Sequence[int]) -> UpdatePlan:
        """What the pairs among ``members`` ask of their samples under the present weights; a collective."""
        weights, advantages = pairs.step(members, lambda samples: self._logprobs_of(fixed.batch, samples))
        return replace(fixed, sample_weights=weights, advantages=advantages)

    def _proximal(self, batch: ExperienceBatch) -> list[np.ndarray]:
        """Log-probs of every sample under the weights before this batch's first step."""
        return self._logprobs_of(batch, range(batch.num_samples))

    def _logprobs_of(self, batch: ExperienceBatch, samples: Sequence[int]) -> list[np.ndarray]:
        """float32 [T] of each of ``samples`` under the present weights, on every rank; a collective."""
        tokens = [batch.tokens(i, self.payload_deadline_s) for i in samples]
        prompts, completions = [t.prompt_ids for t in tokens], [t.completion_ids for t in tokens]
        return self.score_everything(self._score, prompts, completions, [batch.shapes[i].group for i in samples])

    def _score(self, pack: Pack) -> torch.Tensor:
        logprobs: torch.Tensor = self.engine.forward(pack, self.sampling.temperature, with_entropy=False)[0]
        return logprobs

    def _own_references(self, batch: ExperienceBatch) -> list[np.ndarray] | None:
        """Log-probs of every sample under this model as it started, where that is the reference."""
        return None if self._reference is None else self._reference.logprobs(batch, self._proximal)

    def _kl_penalties(
        self, batch: ExperienceBatch, proximal: Sequence[np.ndarray], own: Sequence[np.ndarray] | None
    ) -> list[np.ndarray]:
        """beta * the KL estimate of each token, float64 [T] a sample."""
        penalties = []
        for i in range(batch.num_samples):
            reference = batch.tokens(i, self.payload_deadline_s).reference_logprobs if own is None else own[i]
            if reference is None:
                raise ValueError("a KL penalty in the reward needs reference log-probs")
            per_token = kl_estimate(
                torch.from_numpy(proximal[i].copy()), torch.from_numpy(reference.copy()), self.algorithm.kl_estimator
            )
            penalties.append(self.algorithm.kl_coef * per_token.double().numpy())
        return penalties

    def score(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given completions under the present weights, on every rank.  For the start-up probe."""
        with self.evaluating():
            rows = score_samples(
                self._score, prompts, completions, list(range(len(prompts))),
                self.settings.token_budget, False, self.device,
            )  # fmt: skip
        return [rows[i] for i in range(len(prompts))]
