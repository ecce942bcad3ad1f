"""Block-diagonal attention for packed samples, registered with transformers as ``burnish_packed``.

On CUDA: PyTorch's variable-length flash attention, forward and backward.  Elsewhere: scaled dot
product attention block by block, which can share a group's prompt.  A model asks for it by name
and the pack's layout arrives as the keyword ``pack_layout`` of the model's forward.
May import: torch, transformers, actors.packing.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F

from actors.packing import Block, PackLayout

NAME = "burnish_packed"

# Above this many tokens a block with several completions is attended to completion by completion:
# the dense mask would spend most of its work on pairs that may not look at each other.
DENSE_BLOCK_TOKENS = 384


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    pack_layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [1, heads, L, head_dim]; key and value: [1, kv_heads, L, head_dim].

    Returns:
        ([1, L, heads, head_dim], None)
    """
    if pack_layout is None:
        raise ValueError(f"attention {NAME!r} needs pack_layout; call the model through actors.modeling")
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("models with attention soft-capping are not supported by packed attention")
    if query.is_cuda and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return _variable_length(query, key, value, pack_layout, scaling, sliding_window), None
    out = torch.cat(
        [
            _block(query, key, value, pack_layout, i, block, scaling, sliding_window)
            for i, block in enumerate(pack_layout.blocks)
        ],
        dim=2,
    )
    return out.transpose(1, 2), None


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    bounds, longest = layout.cumulative(query.device)
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch before 2.12
        key, value = (_repeat_heads(t, query.shape[1]) for t in (key, value))
    if "window_size" not in known:  # torch 2.10
        if window is not None:
            raise NotImplementedError("sliding windows on CUDA need torch 2.11 or later")
        del options["window_size"]
        options["is_causal"] = True
    # Under autocast rotary embeddings leave queries and keys in float32 beside bfloat16 values, and the kernel takes
    # neither a mixture nor float32.
    low = value.dtype if value.dtype != torch.float32 else torch.bfloat16
    q, k, v = (t[0].transpose(0, 1).to(low) for t in (query, key, value))  # [L, heads, head_dim]
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return cast(torch.Tensor, out)[None].to(query.dtype)


def _block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    index: int,
    block: Block,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    stop = block.start + block.num_tokens
    q = query[:, :, block.start : stop]
    k, v = (_repeat_heads(t[:, :, block.start : stop], query.shape[1]) for t in (key, value))
    narrow = None if window is None or window >= block.num_tokens else window
    if narrow is None and len(block.completions) == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    if narrow is not None or block.num_tokens <= DENSE_BLOCK_TOKENS:
        mask = layout.mask(index, narrow, query.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return _by_completion(q, k, v, block, scaling)


def _by_completion(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scaling: float | None
) -> torch.Tensor:
    p = block.num_prompt
    prompt_k, prompt_v = k[:, :, :p], v[:, :, :p]
    parts = [F.scaled_dot_product_attention(q[:, :, :p], prompt_k, prompt_v, is_causal=True, scale=scaling)]
    start = p
    for num_tokens in block.completions:
        if num_tokens == 0:
            continue
        own = slice(start, start + num_tokens)
        mask = torch.ones(num_tokens, p + num_tokens, dtype=torch.bool, device=q.device).tril(diagonal=p)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, own],
                torch.cat([prompt_k, k[:, :, own]], dim=2),
                torch.cat([prompt_v, v[:, :, own]], dim=2),
                attn_mask=mask,
                scale=scaling,
            )
        )
        start += num_tokens
    return torch.cat(parts, dim=2)


def _repeat_heads(t: torch.Tensor, num_heads: int) -> torch.Tensor:
    repeats = num_heads // t.shape[1]
    return t if repeats == 1 else t.repeat_interleave(repeats, dim=1)


def register() -> None:
    """Make ``attn_implementation="burnish_packed"`` known to transformers.  Safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says who may look at whom; transformers need not build a mask."""
    return None
