"""What PPO fixes before it updates anything: per-token advantages and returns, and the record that carries them.

    scores --(last token)--> token rewards - beta * KL --> GAE with the critic's values --> whitened
                                                              \\--> returns (of the values as they are)

Samples that may not be trained on (no reward, aborted, masked) are given NaN rows: nothing of them enters a sum,
and what is used in spite of that shows.
Axes: S samples of the global batch, T completion tokens of one.
May import: numpy, pyarrow, torch, trainers.{algorithms, gae, losses}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch

from trainers.algorithms import AlgorithmSettings
from trainers.gae import gae, token_rewards, whiten
from trainers.losses import kl_estimate


@dataclass(frozen=True, slots=True)
class SampleTargets:
    """The fixed terms of one sample, float32 [T] each."""

    proximal_logprobs: np.ndarray  # the policy before the update
    values: np.ndarray  # the critic before the update
    advantages: np.ndarray  # NaN throughout where the sample is masked
    returns: np.ndarray  # NaN throughout where the sample is masked


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """Means over the trainable samples; NaN when there is none, or no reference."""

    score: float  # shaped reward
    kl: float  # nats a sequence: sum over its tokens of log pi - log pi_ref, which has the mean KL(pi || ref)
    penalty: float  # what the KL cost a sequence in the reward; 0 when it is in the loss
    num_samples: int

    def metrics(self) -> dict[str, float]:
        """By TRL's names; ``objective/kl`` only where it was measured."""
        found = {
            "objective/scores": self.score,
            "objective/non_score_reward": -self.penalty,
            "objective/rlhf_reward": self.score - self.penalty,
        }
        return found if np.isnan(self.kl) else found | {"objective/kl": self.kl}


def ppo_targets(
    scores: np.ndarray,
    trainable: np.ndarray,
    proximal: Sequence[np.ndarray],
    references: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray],
    algorithm: AlgorithmSettings,
    kl_coef: float,
) -> tuple[list[SampleTargets], TargetSummary]:
    """Targets of every sample of the global batch.

    ``r_t = -beta kl_t + [t = T] score`` (Ouyang et al. 2022, arXiv:2203.02155, eq. 2, token by token), the KL only
    where ``algorithm.kl_placement`` is "reward"; advantages and returns by :func:`trainers.gae.gae`.

    Args:
        scores: float64 [S], shaped rewards; looked at where trainable.
        trainable: bool [S].
        proximal, references, values: float32 [T] for each sample; ``references`` None when there is no reference.
        kl_coef: beta of this batch (a controller may have moved it away from ``algorithm.kl_coef``).

    Raises:
        ValueError: a KL penalty without a reference, or a trainable sample whose terms are not finite.
    """
    in_reward = kl_coef > 0 and algorithm.kl_placement == "reward"
    if in_reward and references is None:
        raise ValueError("a KL penalty in the reward needs reference log-probs")
    advantages = [np.full(row.shape, np.nan) for row in values]
    returns = [np.full(row.shape, np.nan) for row in values]
    kls, penalties = [], []
    for i in np.flatnonzero(trainable):
        per_token = None
        if references is not None:
            kls.append(float((proximal[i].astype(np.float64) - references[i]).sum()))
        if in_reward and references is not None:
            per_token = kl_coef * _kl(proximal[i], references[i], algorithm)
            penalties.append(float(per_token.sum()))
        paid = token_rewards(float(scores[i]), per_token, values[i].size)
        advantages[i], returns[i] = gae(paid, values[i], algorithm.ppo.gamma, algorithm.ppo.gae_lambda)
        if not (np.isfinite(advantages[i]).all() and np.isfinite(proximal[i]).all()):
            raise ValueError(f"sample {i} is trained on, but its reward, value or a log-prob is not finite")
    if algorithm.ppo.whiten_advantages:
        advantages = whiten(advantages, [bool(t) for t in trainable])
    targets = [
        SampleTargets(*(row.astype(np.float32) for row in rows))
        for rows in zip(proximal, values, advantages, returns, strict=True)
    ]
    summary = TargetSummary(
        score=_mean(scores[trainable]),
        kl=_mean(np.array(kls)),
        penalty=_mean(np.array(penalties)) if penalties else 0.0,
        num_samples=int(trainable.sum()),
    )
    return targets, summary


def _kl(policy: np.ndarray, reference: np.ndarray, algorithm: AlgorithmSettings) -> np.ndarray:
    ours, theirs = (torch.from_numpy(row.astype(np.float64)) for row in (policy, reference))
    per_token: np.ndarray = kl_estimate(ours, theirs, algorithm.kl_estimator).numpy()
    return per_token


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


# --- Arrow ------------------------------------------------------------------------------------

_NAMES = [field.name for field in fields(SampleTargets)]
TARGETS_SCHEMA = pa.schema([(name, pa.list_(pa.float32())) for name in _NAMES])


def encode_targets(targets: Sequence[SampleTargets]) -> pa.Buffer:
    """One Arrow IPC stream, a row a sample of the batch."""
    columns = [pa.array([getattr(t, name) for t in targets], type=pa.list_(pa.float32())) for name in _NAMES]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TARGETS_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=TARGETS_SCHEMA))
    return sink.getvalue()


def decode_targets(buffer: pa.Buffer | bytes) -> list[SampleTargets]:
    """Inverse of :func:`encode_targets`; arrays are views of the buffer and read-only."""
    table = pa.ipc.open_stream(buffer).read_all().combine_chunks()
    columns = [[row.values.to_numpy() for row in table[name]] for name in _NAMES]
    return [SampleTargets(*rows) for rows in zip(*columns, strict=True)]
