"""The baseline: GRPO as one writes it by hand with transformers and torch, without packing.

All samples are right-padded to the longest one and go through the model in micro-batches of 8 rows;
logits exist for every position.  Written apart from actors and trainers, so that it can also tell
whether their packing is right (tests/test_benchmarks.py).
Axes: B samples, L tokens of the longest sample, V vocabulary.
May import: numpy, torch, transformers, benchmarks.job, trainers.*.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainers.experience import decode_group, decode_logprobs
from trainers.protocols import LearnerGroup

ROWS = 8  # samples of one micro-batch


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded samples; column t of a [B, L-1] tensor belongs to the prediction of token t + 1."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L]
    completion_mask: torch.Tensor  # float32 [B, L-1]
    advantages: torch.Tensor  # float32 [B]
    reference_logprobs: torch.Tensor  # float32 [B, L-1]
    lengths: torch.Tensor  # float32 [B], completion tokens

    def rows(self, start: int, stop: int) -> PaddedBatch:
        return PaddedBatch(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


def pad_groups(groups: Sequence[LearnerGroup], pad_id: int, device: str | torch.device = "cpu") -> PaddedBatch:
    """Pad every sample of every group; advantages are standardised within each group, as GRPO does."""
    samples = []
    for group in groups:
        decoded = decode_group(group.payload)
        references = decode_logprobs(group.reference_payload)
        rewards = group.rewards.totals
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        samples += [
            (decoded.prompt.token_ids, t.completion_ids, references[i], advantages[i])
            for i, t in enumerate(decoded.trajectories)
        ]
    size = len(samples)
    width = max(p.size + c.size for p, c, _, _ in samples)
    ids = np.full((size, width), pad_id, dtype=np.int64)
    attention = np.zeros((size, width), dtype=np.int64)
    mask, reference = np.zeros((size, width - 1), np.float32), np.zeros((size, width - 1), np.float32)
    for i, (prompt, completion, reference_logprobs, _) in enumerate(samples):
        end = prompt.size + completion.size
        ids[i, :end] = np.concatenate([prompt, completion])
        attention[i, :end] = 1
        mask[i, prompt.size - 1 : end - 1] = 1
        reference[i, prompt.size - 1 : end - 1] = reference_logprobs
    advantages = np.array([s[3] for s in samples], dtype=np.float32)
    lengths = np.array([s[1].size for s in samples], dtype=np.float32)
    columns = (ids, attention, mask, advantages, reference, lengths)
    return PaddedBatch(*(torch.from_numpy(column).to(device) for column in columns))


def token_logprobs(model: Any, batch: PaddedBatch, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """float32 [B, L-1]: log-probs of every next token, by way of all logits [B, L, V]."""
    device = batch.input_ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    return logprobs.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)


def grpo_loss(logprobs: torch.Tensor, batch: PaddedBatch, num_samples: int, beta: float) -> torch.Tensor:
    """Mean over samples of the token means of clipped surrogate + beta * k3; ``num_samples`` of the whole batch."""
    ratio = torch.exp(logprobs - logprobs.detach())
    advantages = batch.advantages[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    difference = batch.reference_logprobs - logprobs
    k3 = torch.exp(difference * batch.completion_mask) - 1 - difference * batch.completion_mask
    per_token = (beta * k3 - surrogate) * batch.completion_mask
    return (per_token.sum(1) / batch.lengths).sum() / num_samples


class PlainTrainer:
    """Model, fused AdamW, and an update in padded micro-batches."""

    architecture = "AutoModelForCausalLM"

    def __init__(
        self, model_path: str, dtype: str, device: str, lr: float, beta: float, checkpointing: bool = False
    ) -> None:
        import transformers

        self.dtype, self.beta = getattr(torch, dtype), beta
        model_class = getattr(transformers, self.architecture)
        self.model = model_class.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).to(device)
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.device = device

    def backward(self, batch: PaddedBatch, rows: int = ROWS) -> None:
        """Accumulate the gradient of the whole batch."""
        num_samples = batch.input_ids.shape[0]
        for part in _parts(batch, rows):
            logprobs = token_logprobs(self.model, part, 1.0, self.dtype)
            grpo_loss(logprobs, part, num_samples, self.beta).backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self, batch: PaddedBatch, rows: int = ROWS) -> tuple[float, float]:
        """(seconds of forward and backward, seconds of clipping and the optimizer)."""
        started = time.perf_counter()
        self.backward(batch, rows)
        synchronize(self.device)
        learned = time.perf_counter()
        self.step()
        synchronize(self.device)
        return learned - started, time.perf_counter() - learned

    @torch.no_grad()
    def score(self, batch: PaddedBatch, rows: int = ROWS) -> list[torch.Tensor]:
        """Log-probs without gradients: what a reference model computes."""
        return [token_logprobs(self.model, part, 1.0, self.dtype) for part in _parts(batch, rows)]


class PlainCritic(PlainTrainer):
    """The same with a value head: the mean over tokens of PPO's clipped square, whose targets are the advantages."""

    architecture = "AutoModelForSequenceClassification"

    @property
    def pad_id(self) -> int:
        return int(self.model.config.pad_token_id)

    def values(self, batch: PaddedBatch) -> torch.Tensor:
        """float32 [B, L-1]: the head at the state before every token."""
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return self.model.score(hidden[:, :-1]).squeeze(2).float()

    def backward(self, batch: PaddedBatch, rows: int = ROWS) -> None:
        """Accumulate the gradient of the whole batch."""
        num_tokens = batch.completion_mask.sum()
        for part in _parts(batch, rows):
            values, goal = self.values(part), part.advantages[:, None]
            squares = torch.maximum((values - goal) ** 2, (values.clamp(-0.2, 0.2) - goal) ** 2)
            (0.5 * (squares * part.completion_mask).sum() / num_tokens).backward()


def _parts(batch: PaddedBatch, rows: int) -> Iterator[PaddedBatch]:
    for start in range(0, batch.input_ids.shape[0], rows):
        yield batch.rows(start, start + rows)


def load_into_vllm(llm: Any, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
    """``model.load_weights`` in the one worker of an in-process ``vllm.LLM``.

    Between vLLM's own begin and end of a reload: CPU kernels repack weights after load, and without
    these two calls float32 weights have no place to go ("into parameter (torch.Size([0]))").
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config = llm.llm_engine.model_config

    def load(model: Any) -> None:
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights))
        finalize_layerwise_reload(model, config)

    llm.apply_model(load)


def synchronize(device: str) -> None:
    """Wait for the device, where there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
