"""CUDA IPC handles as plain values: vLLM's engine is another process, whose messages carry no classes and no dtypes.

A staged bucket is one row of bytes, so what a handle says besides the place in the GPU's memory is known on both sides.
May import: torch.
"""

from __future__ import annotations

from typing import Any

import torch

# Of the arguments of torch.multiprocessing.reductions.rebuild_cuda_tensor, those that are of one bucket alone.
OFFSET, HANDLE, REF_COUNTER, EVENT = 3, slice(7, 10), slice(11, 13), slice(13, 15)


def ipc_handle(bucket: torch.Tensor) -> list[Any]:
    """Numbers and bytes by which a process on the same GPU finds ``bucket`` (uint8 [N], on CUDA, contiguous)."""
    from torch.multiprocessing.reductions import reduce_tensor

    return plain_handle(reduce_tensor(bucket)[1], bucket.numel())


def plain_handle(arguments: tuple[Any, ...], num_bytes: int) -> list[Any]:
    """What :func:`rebuild_arguments` needs of ``arguments``, which are those of ``rebuild_cuda_tensor``."""
    return [num_bytes, arguments[OFFSET], *arguments[HANDLE], *arguments[REF_COUNTER], *arguments[EVENT]]


def rebuild_arguments(handle: list[Any], device_index: int) -> tuple[Any, ...]:
    """Arguments of ``rebuild_cuda_tensor``; ``device_index``: the GPU's number here, which may be another there."""
    num_bytes, offset, *rest = handle
    storage, counter, event = rest[:3], rest[3:5], rest[5:7]
    return (
        torch.Tensor, torch.Size((num_bytes,)), (1,), offset, torch.UntypedStorage, torch.uint8, device_index, *storage,
        False, *counter, *event,
    )  # fmt: skip


def shared_bucket(handle: list[Any], device_index: int) -> torch.Tensor:
    """The sender's memory, uint8 [N]; valid as long as the sender keeps it."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    found: torch.Tensor = rebuild_cuda_tensor(*rebuild_arguments(handle, device_index))
    return found
