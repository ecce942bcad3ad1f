"""Memory of a role before anything is allocated: closed formulas, in bytes, of one worker.

Symbols: P parameters, R learner ranks, N tokens of a micro-batch, h hidden size, i intermediate size,
L layers, V vocabulary, q and k query and key/value heads, d size of a head, c compute bytes (2 or 4).
The estimates leave out allocator slack, CUDA contexts and kernels' workspaces: a few GiB on a GPU.
Pure: may import nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MASTER_BYTES = 4  # float32 parameters and gradients
ADAM_BYTES = 8  # two float32 moments
LOGIT_COPIES = 2  # float32 [chunk, V] alive at once in actors/logprobs.py


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker by part.  ``offloaded`` is host memory or disk, ``parts`` is the device."""

    parts: Mapping[str, int]
    offloaded: Mapping[str, int] = field(default_factory=dict)
    host_copy: int = 0  # of the state, for checkpoints to be written from
    staged: int = 0  # host memory of a rank that serves generators: the weights on their way (actors/publishing.py)
    loading: int = 0  # host memory of a rank that reads the weights' files for a GPU, until they are there
    num_loading: int | None = None  # ranks that read them, the first ones; None: all

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def offloaded_total(self) -> int:
        return sum(self.offloaded.values())

    def host_bytes(self, ranks: Sequence[int]) -> int:
        """Host memory beside GPUs of these ranks at its highest: at the start, or while checkpoints are written."""
        reading = [rank for rank in ranks if self.num_loading is None or rank < self.num_loading]
        return max(len(reading) * self.loading, len(ranks) * self.host_copy)


def with_staging(found: MemoryEstimate, num_bytes: int, on_host: bool) -> MemoryEstimate:
    """With the copy of the weights that is sent from, ``num_bytes``: on the host beside a GPU, else on the device."""
    if on_host:
        return replace(found, staged=num_bytes)
    return replace(found, parts={**found.parts, "staged weights": num_bytes})


def _share(num_bytes: int, ranks: int) -> int:
    return -(-num_bytes // ranks)


def activation_bytes(
    num_tokens: int, hidden: int, layers: int, intermediate: int, checkpointing: bool, compute_bytes: int = 2
) -> int:
    """Activations kept for the backward pass of one micro-batch.

    The residual stream is float32 (float32 embeddings, autocast of matrix products).  A layer keeps
    two normalisations with their casts, 2(4 + 4 + c)h; query, key, value, attention output, about
    4ch; gate, up, activation and product, 4ci; a token each.

        layer = N (2(8 + c) h + 4 c h + 4 c i)
        plain: L layer        checkpointing: L N 4 h + layer
    """
    layer = num_tokens * (2 * (8 + compute_bytes) * hidden + 4 * compute_bytes * (hidden + intermediate))
    return layers * num_tokens * 4 * hidden + layer if checkpointing else layers * layer


def estimate_learner(
    num_params: int,
    zero_stage: int,
    num_ranks: int,
    *,
    token_budget: int,
    hidden: int,
    layers: int,
    intermediate: int,
    vocab: int,
    logprob_chunk: int,
    checkpointing: bool = False,
    dtype_bytes: int = MASTER_BYTES,
    compute_bytes: int = 2,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    adapter_params: int = 0,
    quantized: tuple[int, int] | None = None,
) -> MemoryEstimate:
    """One learner rank.

    weights      P dtype_bytes, over R from stage 3 on, which adds one gathered layer (P / L)
    casts        P c, autocast's copies for one pass, when c < dtype_bytes; one layer's with ZeRO 3
    gradients    4 P, over R from stage 2 on
    partition    4 P / R, DeepSpeed's flat copy that the optimizer updates, stages 1 and 2
    optimizer    8 P, over R from stage 1 on
    activations  see activation_bytes
    logits       2 * 4 * chunk * V, and V h (4 + c) for the head's gradient and cast; nothing with V = 0, a head
                 of one number (a critic)

    ``host_copy`` is the 12 P / R that a checkpoint is written from, while training goes on; ``loading`` the P
    dtype_bytes that are read, with ZeRO 3 by rank 0 alone, which deals them out.

    With T = ``adapter_params`` the P others are frozen: they have no master copies, casts, gradients or states.

    base         P c; of ``quantized`` (parameters, bytes) those bytes, and the largest layer once in c, dequantised
    weights, casts, gradients, partition, optimizer, host copy: as above, of T in place of P
    activations  besides, N c rank for each adapted layer, which is little and left out
    logits       no gradient of the head: V h c in place of V h (4 + c)
    """
    ranks = max(1, num_ranks)
    if adapter_params:
        num_quantized, quantized_bytes = quantized or (0, 0)
        base = (num_params - num_quantized) * compute_bytes + quantized_bytes
        trained = estimate_learner(
            adapter_params, zero_stage, num_ranks, token_budget=token_budget, hidden=hidden, layers=layers,
            intermediate=intermediate, vocab=0, logprob_chunk=logprob_chunk, checkpointing=checkpointing,
            compute_bytes=compute_bytes, offload_optimizer=offload_optimizer,
        )  # fmt: skip
        parts = {"base": base, **trained.parts}
        if quantized is not None:
            parts["dequantised layer"] = hidden * intermediate * compute_bytes
        parts["logits"] = LOGIT_COPIES * 4 * logprob_chunk * vocab + vocab * hidden * compute_bytes
        read = 0 if quantized is not None else base  # what is quantised is made on the GPU
        return MemoryEstimate(parts, trained.offloaded, trained.host_copy, loading=read)
    layer_params = -(-num_params // max(1, layers))
    weights = num_params * dtype_bytes
    casts = num_params * compute_bytes if compute_bytes < dtype_bytes else 0
    gradients = num_params * MASTER_BYTES
    parts = dict[str, int]()
    offloaded: dict[str, int] = {}
    if zero_stage >= 3:
        (offloaded if offload_param else parts)["weights"] = _share(weights, ranks)
        parts["gathered layer"] = layer_params * dtype_bytes
        parts["casts"] = layer_params * compute_bytes if casts else 0
    else:
        parts["weights"], parts["casts"] = weights, casts
    parts["gradients"] = _share(gradients, ranks) if zero_stage >= 2 else gradients
    where = offloaded if offload_optimizer else parts
    if zero_stage in (1, 2) or (zero_stage == 3 and offload_optimizer):
        where["partition"] = _share(num_params * MASTER_BYTES, ranks)
    where["optimizer"] = _share(num_params * ADAM_BYTES, ranks if zero_stage >= 1 else 1)
    parts["activations"] = activation_bytes(token_budget, hidden, layers, intermediate, checkpointing, compute_bytes)
    parts["logits"] = LOGIT_COPIES * 4 * logprob_chunk * vocab + vocab * hidden * (4 + compute_bytes)
    return MemoryEstimate(
        parts, offloaded, _share(checkpoint_bytes(num_params), ranks), loading=weights,
        num_loading=1 if zero_stage >= 3 else None,
    )  # fmt: skip


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, compute_bytes: int = 2) -> int:
    """Keys and values of one token in all layers: 2 L k d c."""
    return 2 * layers * kv_heads * head_dim * compute_bytes


def estimate_generator(
    num_params: int,
    *,
    tensor_parallel_size: int,
    layers: int,
    kv_heads: int,
    head_dim: int,
    max_num_seqs: int,
    max_length: int,
    compute_bytes: int = 2,
    kv_cache_bytes: int | None = None,
) -> MemoryEstimate:
    """One GPU (or one CPU process) of a generator.

    weights   P c / TP
    kv cache  ``kv_cache_bytes`` where it is fixed (CPU), else what ``max_num_seqs`` samples of full
              length would fill: max_num_seqs * max_length * 2 L k d c / TP.  vLLM runs with less and
              samples fewer at once; one sample of full length must fit.  Key/value heads are copied,
              not split, beyond one a GPU.
    """
    split = min(tensor_parallel_size, kv_heads)
    cache = kv_cache_bytes
    if cache is None:
        cache = _share(max_num_seqs * max_length * kv_bytes_per_token(layers, kv_heads, head_dim, compute_bytes), split)
    return MemoryEstimate({"weights": _share(num_params * compute_bytes, tensor_parallel_size), "kv cache": cache})


def estimate_reference(
    num_params: int,
    *,
    token_budget: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    logprob_chunk: int,
    compute_bytes: int = 2,
) -> MemoryEstimate:
    """One reference worker: weights P c, activations of one layer N(2h + 2i)c (nothing is kept), logits as above."""
    return MemoryEstimate(
        {
            "weights": num_params * compute_bytes,
            "activations": 2 * token_budget * (hidden + intermediate) * compute_bytes,
            "logits": LOGIT_COPIES * 4 * logprob_chunk * vocab,
        }
    )


def checkpoint_bytes(num_params: int) -> int:
    """Disk of one checkpoint: float32 weights and Adam's two moments, 12 P."""
    return num_params * (MASTER_BYTES + ADAM_BYTES)


def show_bytes(num_bytes: int) -> str:
    """``1.5 GiB``: the largest binary unit that keeps the number at least 1."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
