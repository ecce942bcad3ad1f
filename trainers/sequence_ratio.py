"""How far the policy has moved since the update began, token by token or by whole completions.

With ``r_t = pi_t / pi_proximal_t`` of one token and ``s = (prod_t r_t)^(1/T)`` of its completion (GSPO,
arXiv:2507.18071, eq. 7):

    token            r_t
    sequence         s at every token; the gradient flows through all tokens' log-probs
    sequence_token   s at every token, but the gradient through the token's own: sg(s) r_t / sg(r_t), eq. 14

``s`` needs its completion whole: a pack holds whole samples, and a sample's tokens have a weight above 0 together
or not at all.
Axes: N tokens of S samples, laid end to end, each sample whole.
May import: torch, trainers.{off_policy, presets}.
"""

from __future__ import annotations

import torch

from trainers.off_policy import sample_log_ratios
from trainers.presets import RatioKind


def policy_log_ratio(
    policy_logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    samples: torch.Tensor,
    num_samples: int,
    kind: RatioKind,
) -> torch.Tensor:
    """The logarithm of each token's ratio, of the dtype and device of ``policy_logprobs`` and differentiable in it.

    Args:
        policy_logprobs, proximal_logprobs: [N].
        samples: int64 [N], whose token each one is.
        num_samples: S; a sample may have no token.
    """
    per_token = policy_logprobs - proximal_logprobs
    if kind == "token":
        return per_token
    num_tokens = torch.bincount(samples, minlength=num_samples).clamp(min=1)
    mean = (sample_log_ratios(per_token, samples, num_samples) / num_tokens)[samples].to(per_token.dtype)
    if kind == "sequence":
        return mean
    return mean.detach() + (policy_logprobs - policy_logprobs.detach())
