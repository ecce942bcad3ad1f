"""Handles of staged buckets: what crosses to vLLM's engine process is what its messages carry, and nothing is lost."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from actors.ipc_handles import plain_handle, rebuild_arguments

# As reduce_tensor gives them for uint8 [4096] on a GPU that its sender calls 3.
GIVEN: dict[str, Any] = {
    "tensor_cls": torch.Tensor, "tensor_size": torch.Size((4096,)), "tensor_stride": (1,), "tensor_offset": 512,
    "storage_cls": torch.UntypedStorage, "dtype": torch.uint8, "storage_device": 3, "storage_handle": b"handle",
    "storage_size_bytes": 8192, "storage_offset_bytes": 1024, "requires_grad": False, "ref_counter_handle": b"counter",
    "ref_counter_offset": 7, "event_handle": b"event", "event_sync_required": True,
}  # fmt: skip


def test_the_names_are_those_of_torch() -> None:
    assert list(GIVEN) == list(signature(rebuild_cuda_tensor).parameters), "the places in a handle are torch's"


def test_a_handle_crosses_vllms_messages_and_names_the_same_memory_on_the_receivers_own_device() -> None:
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    handle = plain_handle(tuple(GIVEN.values()), 4096)
    came = MsgpackDecoder().decode(MsgpackEncoder().encode([handle]))[0]
    assert dict(zip(GIVEN, rebuild_arguments(came, 0), strict=True)) == GIVEN | {"storage_device": 0}
