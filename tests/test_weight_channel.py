"""Laws of the weight channel: what arrives is what was sent, or an error says which tensor or group is to blame."""

from __future__ import annotations

import functools
import multiprocessing
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.fingerprints import Verified, compare, fused_name
from cluster.errors import DamagedError, DeadlineError
from cluster.rendezvous import free_port
from cluster.transfer_group import SENDER, TransferGroup
from cluster.weight_channel import (
    MASK,
    TensorMeta,
    WeightFileWriter,
    WeightManifest,
    bit_sum,
    plan_buckets,
    read_weight_file,
    unpack_bucket,
)

DTYPES = ("float32", "bfloat16", "float16")
CPU = torch.device("cpu")


@functools.cache
def weights() -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (11, 4), "norm.weight": (4,), "a.mlp.weight": (3, 5), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def metas(dtype: str) -> tuple[TensorMeta, ...]:
    return tuple(TensorMeta(name, dtype, tuple(t.shape)) for name, t in weights().items())


def write_file(path: Path, dtype: str = "float32") -> WeightManifest:
    writer = WeightFileWriter(path, "0.7", metas(dtype))
    for name in reversed(weights()):  # in any order
        writer.write(name, weights()[name])
    return writer.commit()


# --- bit sums ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(width=32), max_size=40), st.integers(0, 40))
def test_a_bit_sum_is_additive_over_parts_and_blind_to_their_order(values: list[float], cut: int) -> None:
    for dtype in DTYPES:
        whole = torch.tensor(values, dtype=torch.float32).to(getattr(torch, dtype))
        assert (bit_sum(whole[:cut]) + bit_sum(whole[cut:])) & MASK == bit_sum(whole)
        assert bit_sum(torch.cat([whole[cut:], whole[:cut]])) == bit_sum(whole)


@given(st.data())
def test_any_single_flipped_bit_changes_the_bit_sum(data: st.DataObject) -> None:
    for dtype in DTYPES:
        tensor = torch.randn(9, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
        expected = bit_sum(tensor)
        raw = tensor.view(torch.uint8)
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert bit_sum(tensor) != expected


def test_a_bit_sum_tells_apart_what_compares_equal_and_ignores_layout() -> None:
    assert bit_sum(torch.tensor([0.0])) != bit_sum(torch.tensor([-0.0]))
    assert bit_sum(torch.tensor([float("nan")])) == bit_sum(torch.tensor([float("nan")]))
    matrix = torch.randn(6, 4)
    assert bit_sum(matrix.t()) == bit_sum(matrix)
    assert bit_sum(torch.empty(0)) == 0
    assert bit_sum(torch.zeros(1000)) == 0  # padding adds nothing


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_file_round_trips_cast_to_the_wire_dtype(tmp_path: Path, dtype: str) -> None:
    manifest = write_file(tmp_path / "w.safetensors", dtype)
    version, tensors = read_weight_file(tmp_path / "w.safetensors")
    found = dict(tensors)
    assert version == manifest.version == "0.7"
    assert list(found) == list(weights())
    for name, tensor in weights().items():
        cast = tensor.to(getattr(torch, dtype))
        assert found[name].dtype == cast.dtype and found[name].shape == cast.shape
        assert torch.equal(found[name], cast)
        assert manifest.fingerprints[name] == bit_sum(cast)
    assert WeightManifest.from_dict(manifest.to_dict()) == manifest


def test_a_weight_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_file(tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_an_unsealed_file_is_invisible_and_an_abandoned_one_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    writer = WeightFileWriter(path, "0.8", metas("float32"))
    for name, tensor in list(weights().items())[:-1]:
        writer.write(name, tensor)
    assert not path.exists()
    with pytest.raises(DamagedError, match="never written, the first is scale"):
        writer.commit()
    assert not path.exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_unsealed_file_leaves_the_version_before_it_readable(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_file(path)
    WeightFileWriter(path, "0.8", metas("float32")).write("norm.weight", torch.zeros(4))
    version, tensors = read_weight_file(path)
    assert version == "0.7" and torch.equal(dict(tensors)["norm.weight"], weights()["norm.weight"])


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    writer = WeightFileWriter(tmp_path / "w.safetensors", "0.8", metas("float32"))
    with pytest.raises(DamagedError, match=r"norm\.weight: shape \(5,\)"):
        writer.write("norm.weight", torch.zeros(5))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_flipped_bit_is_found_and_its_tensor_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "w.safetensors"
    manifest = write_file(path, data.draw(st.sampled_from(DTYPES)))
    raw = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    position = data.draw(st.integers(0, manifest.num_bytes - 1))
    raw[start + position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    name, end = "", 0
    for meta in manifest.tensors:
        end += meta.num_bytes
        if position < end:
            name = meta.name
            break
    with pytest.raises(DamagedError, match=f"{name} has fingerprint"):
        dict(read_weight_file(path)[1])


# --- buckets ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 120))
def test_buckets_keep_order_and_size(sizes: list[int], bucket_bytes: int) -> None:
    tensors = [TensorMeta(str(i), "float32", (n,)) for i, n in enumerate(sizes)]
    buckets = plan_buckets(tensors, bucket_bytes)
    assert [t for bucket in buckets for t in bucket] == tensors
    for bucket in buckets:
        assert sum(t.num_bytes for t in bucket) <= bucket_bytes or len(bucket) == 1


def test_a_bucket_unpacks_into_the_tensors_it_was_packed_from() -> None:
    (bucket,) = plan_buckets(metas("bfloat16"), 1 << 20)
    packed = torch.cat([t.bfloat16().reshape(-1).view(torch.uint8) for t in weights().values()])
    for name, tensor in unpack_bucket(packed, bucket):
        assert torch.equal(tensor, weights()[name].bfloat16())


# --- fingerprints -----------------------------------------------------------------------------

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "embed.weight": (10, 4), "l.attn.q_proj.weight": (8, 4), "l.attn.k_proj.weight": (4, 4),
        "l.attn.v_proj.weight": (4, 4), "norm.weight": (4,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def manifest_of(tensors: Mapping[str, torch.Tensor]) -> WeightManifest:
    return WeightManifest(
        "1.4",
        tuple(TensorMeta(n, "float32", tuple(t.shape)) for n, t in tensors.items()),
        {n: bit_sum(t) for n, t in tensors.items()},
    )


def worker(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (bit_sum(t), t.numel()) for name, t in tensors.items()}


def held_by_one_engine() -> dict[str, torch.Tensor]:
    """What a tensor-parallel size of 1 holds: q, k and v in one, and the vocabulary padded with zeros."""
    sent = checkpoint()
    return {
        "embed.weight": torch.cat([sent["embed.weight"], torch.zeros(6, 4)]),
        "l.attn.qkv_proj.weight": torch.cat([sent[f"l.attn.{p}_proj.weight"] for p in "qkv"]),
        "norm.weight": sent["norm.weight"],
    }


def held_by_two_workers() -> list[dict[str, torch.Tensor]]:
    sent = checkpoint()
    return [
        {
            "embed.weight": sent["embed.weight"].chunk(2)[i],
            "l.attn.qkv_proj.weight": torch.cat([sent[f"l.attn.{p}_proj.weight"].chunk(2)[i] for p in "qkv"]),
            "norm.weight": sent["norm.weight"],
        }
        for i in range(2)
    ]


def test_fused_names() -> None:
    assert fused_name("l.attn.k_proj.weight", FUSED) == "l.attn.qkv_proj.weight"
    assert fused_name("l.mlp.up_proj.bias", FUSED) == "l.mlp.gate_up_proj.bias"
    assert fused_name("l.mlp.down_proj.weight", FUSED) == "l.mlp.down_proj.weight"


def test_fused_tensors_and_vocabulary_padding_agree_with_the_checkpoint() -> None:
    assert compare(manifest_of(checkpoint()), [worker(held_by_one_engine())], FUSED, "g") == Verified(3, 0)


def test_sharded_and_replicated_parameters_agree_with_the_checkpoint() -> None:
    workers = [worker(held) for held in held_by_two_workers()]
    assert compare(manifest_of(checkpoint()), workers, FUSED, "g") == Verified(3, 0)


@pytest.mark.parametrize("name", ["embed.weight", "l.attn.qkv_proj.weight", "norm.weight"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_mismatch_on_any_worker_names_parameter_generator_and_version(culprit: int, name: str) -> None:
    held = held_by_two_workers()
    held[culprit][name] = held[culprit][name].clone()
    held[culprit][name].view(-1)[-1] += 1.0
    with pytest.raises(DamagedError) as caught:
        compare(manifest_of(checkpoint()), [worker(h) for h in held], FUSED, "generator-3")
    message = str(caught.value)
    assert message.startswith(f"generator-3: {name} has fingerprint") and "version 1.4" in message
    found, expected = message.split("fingerprint ")[1][:16], message.split("has ")[2][:16]
    assert found != expected  # it shows the fingerprint that is wrong, not a replica's that is right


def test_a_parameter_that_a_kernel_repacked_counts_as_verified_at_arrival() -> None:
    held = worker(held_by_one_engine())
    held["norm.weight"] = (0, 0)
    del held["embed.weight"]
    assert compare(manifest_of(checkpoint()), [held], FUSED, "g") == Verified(1, 2)


def test_partly_replicated_shards_are_not_mistaken_for_damage() -> None:
    """Two workers that hold all keys and values, and half of the queries each: some bits would count twice."""
    sent, held = checkpoint(), held_by_two_workers()
    for i in range(2):
        queries = sent["l.attn.q_proj.weight"].chunk(2)[i]
        held[i]["l.attn.qkv_proj.weight"] = torch.cat([queries, *(sent[f"l.attn.{p}_proj.weight"] for p in "kv")])
    assert compare(manifest_of(sent), [worker(h) for h in held], FUSED, "g") == Verified(2, 1)


def test_a_generator_of_which_nothing_can_be_compared_is_not_verified() -> None:
    with pytest.raises(DamagedError, match="no parameter"):
        compare(manifest_of(checkpoint()), [{}], FUSED, "g")


# --- transfer groups, between two processes ---------------------------------------------------

DEADLINE_S = 2.0
BUCKETS = 3
STALL_BYTES = 64 * 2**20  # more than sockets buffer: the sender feels that nobody reads


@pytest.fixture(autouse=True, scope="module")
def loopback() -> Iterator[None]:
    """gloo listens on the loopback, also where the host name resolves to nothing."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    yield
    if before is None:
        del os.environ["GLOO_SOCKET_IFNAME"]
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = before


def bucket(i: int) -> torch.Tensor:
    return torch.arange(1000 * i, 1000 * i + 500).to(torch.int16).view(torch.uint8)


def receive(port: int, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    group = TransferGroup("engine-0", "127.0.0.1", port, 1, 2, CPU, 30.0)
    buffers = [torch.zeros_like(bucket(i)) for i in range(BUCKETS)]
    for i, buffer in enumerate(buffers):
        group.broadcast(buffer, f"bucket {i}")
    results.put([buffer.tolist() for buffer in buffers])


def stall(port: int, results: Any, finished: Any) -> None:
    """Comes to the meeting and then reads nothing."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    group = TransferGroup("engine-0", "127.0.0.1", port, 1, 2, CPU, 30.0)
    results.put("here")
    finished.wait(60.0)
    group.abort()


def start(target: Callable[..., None], *args: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def test_every_bucket_arrives() -> None:
    port, results = free_port(), multiprocessing.get_context("spawn").Queue()
    process = start(receive, port, results)
    group = TransferGroup("engine-0", "127.0.0.1", port, SENDER, 2, CPU, 60.0)
    for i in range(BUCKETS):
        group.broadcast(bucket(i), f"bucket {i}")
    assert results.get(timeout=30.0) == [bucket(i).tolist() for i in range(BUCKETS)]
    process.join(30.0)
    assert process.exitcode == 0
    group.abort()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_member_that_never_comes_is_a_deadline_error_that_names_the_group(rank: int) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="waited 2 s for rendezvous from 1 other members of group engine-7"):
        TransferGroup("engine-7", "127.0.0.1", free_port(), rank, 2, CPU, DEADLINE_S)
    assert DEADLINE_S * 0.9 < time.monotonic() - started < DEADLINE_S + 20.0


def test_a_receiver_that_stalls_is_a_deadline_error_that_names_bucket_and_group() -> None:
    processes = multiprocessing.get_context("spawn")
    port, results, finished = free_port(), processes.Queue(), processes.Event()
    process = start(stall, port, results, finished)
    group = TransferGroup("engine-0", "127.0.0.1", port, SENDER, 2, CPU, 60.0)
    assert results.get(timeout=30.0) == "here"
    group.deadline_s = DEADLINE_S
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"waited 2 s for bucket 1 of 1 from group engine-0, rank 0 of 2"):
        group.broadcast(torch.zeros(STALL_BYTES, dtype=torch.uint8), "bucket 1 of 1")
    assert time.monotonic() - started < DEADLINE_S + 20.0
    finished.set()
    process.join(30.0)
    process.kill()
