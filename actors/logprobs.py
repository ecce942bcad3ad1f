"""Log-probabilities and entropies of chosen tokens, without the [N, vocabulary] matrix.

Logits exist for one chunk of positions at a time, in the forward pass and again in the backward
pass, which recomputes them.  Peak extra memory is two chunks of [chunk, V] float32.
May import: torch.
"""

from __future__ import annotations

from typing import Any

import torch


class ChunkedLogprobs(torch.autograd.Function):
    """See :func:`chunked_logprobs`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cast = weight.to(hidden.dtype)
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        normaliser = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            logits = _logits(hidden[rows], cast, temperature)
            normaliser[rows] = torch.logsumexp(logits, dim=-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normaliser[rows]
            if with_entropy:
                # H = -E[log p], from the same rounded log Z as in the backward pass: the rounding cancels in
                # log p + H there.  (log Z - E[z] is the difference of two large numbers.)
                logits -= normaliser[rows, None]
                entropy[rows] = -torch.einsum("nv,nv->n", logits.exp(), logits)
        # The parameter itself is saved, not its cast: under ZeRO 3 it is released after the forward
        # pass and gathered again, in place, before the backward pass.
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature, ctx.chunk, ctx.with_entropy = temperature, chunk, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_logprobs, grad_entropy = grads
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        entropy_matters = ctx.with_entropy and bool((grad_entropy != 0).any())
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = _logits(hidden[rows], cast, ctx.temperature)
            logits -= normaliser[rows, None]  # log p
            if entropy_matters:  # dH/dz = -p (log p + H)
                probabilities = logits.exp()
                logits += entropy[rows, None]
                logits *= -grad_entropy[rows, None]
                logits -= grad_logprobs[rows, None]
                logits *= probabilities
            else:  # d logprob / dz = onehot - p
                logits.exp_()
                logits *= -grad_logprobs[rows, None]
            logits[torch.arange(logits.shape[0], device=logits.device), targets[rows]] += grad_logprobs[rows]
            logits /= ctx.temperature
            low = logits.to(hidden.dtype)
            grad_hidden[rows] = low @ cast
            if grad_weight is not None:
                if low.dtype == torch.float32:
                    grad_weight.addmm_(low.t(), hidden[rows])
                else:
                    grad_weight += low.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    chunk: int,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of its distribution ``softmax(hidden W^T / temperature)``.

    Args:
        hidden: [N, hidden] in the compute dtype.
        weight: [V, hidden] of the output embedding (float32 master or compute dtype).
        targets: int64 [N].
        temperature: that of the sampler: behavior log-probs are taken after it is applied.
        chunk: positions whose logits exist at once.

    Returns:
        (logprobs, entropy), float32 [N], in nats; both differentiable in hidden and weight.
        Without ``with_entropy`` the second is zeros.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        scored: tuple[torch.Tensor, torch.Tensor] = ChunkedLogprobs.apply(
            hidden, weight, targets, temperature, chunk, with_entropy
        )
    return scored
