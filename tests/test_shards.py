"""Laws of saved pieces: they are what was there at the moment of the copy, and any range can be read back."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors import shards, state_saving
from actors.engine_state import EngineState
from actors.shards import Piece, ShardFolder, Snapshot, copy_to_host, cut, shard_name, write_shard
from actors.state_saving import SaveOutcome, StateWriter
from cluster.errors import DamagedError
from cluster.manifest import FileEntry, digest_of

SHAPES = {"a.weight": (5, 3), "a.bias": (1,), "b": (7,)}
DEADLINE_S = 30.0


def values() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in SHAPES.items()}


def snapshot(rank: int, num_ranks: int, whole: dict[str, torch.Tensor], rng: int = 0) -> Snapshot:
    pieces = []
    for name, tensor in whole.items():
        start, count = cut(tensor.numel(), rank, num_ranks)
        for field, factor in (("weight", 1.0), ("exp_avg", 10.0)):
            if count:
                pieces.append(Piece(name, field, start, (tensor * factor).view(-1)[start : start + count]))
    shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
    metadata = {"rank": rank, "num_ranks": num_ranks, "adam_step": 4.0, "shapes": shapes}
    return copy_to_host(pieces, torch.full((3,), rng + rank, dtype=torch.uint8), metadata)


def write_all(folder: Path, num_ranks: int) -> dict[str, torch.Tensor]:
    for rank in range(num_ranks):
        write_shard(folder / shard_name(rank), snapshot(rank, num_ranks, values()))
    return values()


@pytest.mark.parametrize("buffer_elements", [1, 4, 2**20])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_any_range_can_be_read_however_many_ranks_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, buffer_elements: int
) -> None:
    monkeypatch.setattr(shards, "BUFFER_ELEMENTS", buffer_elements)
    whole = write_all(tmp_path, num_ranks)
    saved = ShardFolder(tmp_path)
    saved.expect(SHAPES)
    assert saved.adam_step == 4.0
    for name, tensor in whole.items():
        assert torch.equal(saved.read(name, "weight").view(tensor.shape), tensor)
        for start in range(tensor.numel()):
            for count in range(1, tensor.numel() - start + 1):
                expected = (tensor * 10.0).view(-1)[start : start + count]
                assert torch.equal(saved.read(name, "exp_avg", start, count), expected)
    assert [int(saved.rng(rank)[0]) for rank in range(num_ranks + 1)] == [*range(num_ranks), 0]


def test_a_shard_is_a_safetensors_file_whose_bytes_are_those_that_were_reported(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    found = snapshot(0, 1, values())
    assert write_shard(path, found) == FileEntry(path.stat().st_size, digest_of(path))
    assert torch.equal(load_file(path)["b@0|weight"], values()["b"])
    assert found.num_bytes == sum(2 * 4 * t.numel() for t in values().values()) + 3


def test_what_is_missing_or_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training state"):
        ShardFolder(tmp_path)
    write_all(tmp_path, 3)
    saved = ShardFolder(tmp_path)
    with pytest.raises(DamagedError, match=r"b has shape \(7,\), the model's has \(8,\)"):
        saved.expect(SHAPES | {"b": (8,)})
    with pytest.raises(DamagedError, match=r"c has shape none, the model's has \(1,\)"):
        saved.expect(SHAPES | {"c": (1,)})
    with pytest.raises(DamagedError, match=r"7 of 7 elements of b \(exp_avg_sq\) are missing"):
        saved.read("b", "exp_avg_sq")
    (tmp_path / shard_name(1)).unlink()
    with pytest.raises(DamagedError, match=r"shards of ranks \[0, 2\] of 3"):
        ShardFolder(tmp_path)


def test_what_training_does_after_the_copy_is_not_in_the_file(tmp_path: Path) -> None:
    live = torch.zeros(6)
    rng = torch.zeros(3, dtype=torch.uint8)
    taken = copy_to_host([Piece("w", "weight", 0, live)], rng, {})
    live += 1.0
    write_shard(tmp_path / "x", taken)
    assert torch.equal(load_file(tmp_path / "x")["w@0|weight"], torch.zeros(6))


def test_a_second_copy_takes_the_memory_of_the_first_where_it_fits() -> None:
    rng = torch.zeros(3, dtype=torch.uint8)
    first = copy_to_host([Piece("w", "weight", 0, torch.zeros(6))], rng, {})
    place = first.buffers[0].data_ptr()
    second = copy_to_host([Piece("w", "weight", 0, torch.ones(6))], rng, {}, first.buffers)
    assert second.buffers[0].data_ptr() == place and torch.equal(second.buffers[0], torch.ones(6))
    larger = copy_to_host([Piece("w", "weight", 0, torch.full((7,), 2.0))], rng, {}, second.buffers)
    assert torch.equal(larger.buffers[0], torch.full((7,), 2.0)) and torch.equal(second.buffers[0], torch.ones(6))


def test_a_write_goes_on_beside_its_rank_and_its_outcome_is_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(path: Path, found: Snapshot) -> FileEntry:
        assert gate.wait(DEADLINE_S)
        return write_shard(path, found)

    monkeypatch.setattr(state_saving, "write_shard", slow)
    writer, path = StateWriter(), tmp_path / "learner" / shard_name(0)
    with pytest.raises(RuntimeError, match="no save was begun"):
        writer.outcome()
    assert writer.begin(path, lambda: snapshot(0, 1, values())).num_bytes > 0
    assert writer.outcome() is None and not path.exists()
    with pytest.raises(RuntimeError, match="the save before it is not over"):
        writer.begin(path, lambda: pytest.fail("the snapshot that is being written would be overwritten"))
    gate.set()
    outcome = writer.outcome(DEADLINE_S)
    assert outcome is not None and outcome.error is None
    assert outcome.files == {shard_name(0): FileEntry(path.stat().st_size, digest_of(path))}
    with pytest.raises(RuntimeError, match="no save was begun"):
        writer.outcome()
    writer.close()


def test_a_full_disk_is_an_outcome_and_the_next_write_succeeds(tmp_path: Path) -> None:
    full, writer = tmp_path / "full", StateWriter()
    full.symlink_to("/dev/full")
    writer.begin(full, lambda: snapshot(0, 1, values()))
    refused = writer.outcome(DEADLINE_S)
    assert isinstance(refused, SaveOutcome) and refused.files == {}
    assert refused.error is not None and "No space left on device" in refused.error
    writer.begin(tmp_path / shard_name(0), lambda: snapshot(0, 1, values()))
    written = writer.outcome(DEADLINE_S)
    assert written is not None and written.error is None
    writer.close()


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_where_nothing_is_partitioned_the_next_step_is_the_same_bit_for_bit(
    tmp_path: Path, num_ranks: int, num_steps: int, with_head: bool
) -> None:
    def made(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.4}]
        return model, torch.optim.AdamW(groups if with_head else model.parameters(), lr=0.1, fused=True)

    def step(model: torch.nn.Module, adam: torch.optim.Optimizer, number: int) -> None:
        model(torch.full((2, 5), float(number))).square().sum().backward()
        adam.step()
        adam.zero_grad()

    def state_of(model: torch.nn.Module, adam: torch.optim.Optimizer, rank: int) -> EngineState:
        return EngineState(model, None, adam, 0, rank, num_ranks, lambda _: nullcontext())

    model, adam = made(1)
    spare: tuple[torch.Tensor, ...] = ()
    for number in range(num_steps):
        step(model, adam, number)
    for rank in (*range(num_ranks), *range(num_ranks)):  # the second time into the memory of the first
        state = state_of(model, adam, rank)
        taken = copy_to_host(state.pieces(), torch.get_rng_state(), state.metadata(), spare)
        spare = taken.buffers
        write_shard(tmp_path / shard_name(rank), taken)
    other, other_adam = made(2)
    step(other, other_adam, 9)
    state_of(other, other_adam, 0).load(ShardFolder(tmp_path))
    for each, optimizer in ((model, adam), (other, other_adam)):
        step(each, optimizer, 5)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Partitioned:
    """One of two ranks under ZeRO 2, as DeepSpeed 0.19 lays it out: each optimizer group is one flat tensor, padded
    and cut in two, and a parameter knows where its part lies."""

    def __init__(self, rank: int, whole: dict[str, torch.Tensor], groups: tuple[tuple[str, ...], ...]) -> None:
        self.module = torch.nn.Module()
        flats = []
        for index, names in enumerate(groups):
            numel = sum(whole[name].numel() for name in names)
            size, at = -(-numel // 2), 0  # of a partition
            flats.append(torch.zeros(size))
            for name in names:
                parameter: Any = torch.nn.Parameter(torch.zeros(whole[name].shape))
                self.module.register_parameter(name.replace(".", "_"), parameter)
                begin, end = max(at, rank * size), min(at + parameter.numel(), (rank + 1) * size)
                parameter._hp_mapping = None if begin >= end else SimpleNamespace(
                    param_group_index=index,
                    lp_fragment_address=SimpleNamespace(start=begin - at, numel=end - begin),
                    hp_fragment_address=SimpleNamespace(start=begin - rank * size, numel=end - begin),
                )
                at += parameter.numel()
        self.adam = torch.optim.AdamW([{"params": [flat]} for flat in flats])
        zero = SimpleNamespace(single_partition_of_fp32_groups=flats)
        self.state = EngineState(self.module, zero, self.adam, 2, rank, 2, lambda _: nullcontext())


def test_with_an_optimizer_group_of_the_head_every_piece_goes_to_its_own_flat_partition(tmp_path: Path) -> None:
    whole = {name.replace(".", "_"): tensor for name, tensor in values().items()}
    fields = {"weight": 1.0, "exp_avg": 10.0, "exp_avg_sq": 100.0}
    pieces = [Piece(n, f, 0, (t * factor).view(-1)) for n, t in whole.items() for f, factor in fields.items()]
    shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
    metadata = {"rank": 0, "num_ranks": 1, "adam_step": 4.0, "shapes": shapes}
    saved, again = tmp_path / "saved", tmp_path / "again"
    write_shard(saved / shard_name(0), copy_to_host(pieces, torch.zeros(1, dtype=torch.uint8), metadata))
    for rank in range(2):
        one = Partitioned(rank, whole, (("a_weight", "a_bias"), ("b",)))
        one.state.load(ShardFolder(saved))
        assert one.state.adam_step() == 4.0 and len(one.adam.state) == 2
        taken = copy_to_host(one.state.pieces(), torch.zeros(1, dtype=torch.uint8), one.state.metadata())
        write_shard(again / shard_name(rank), taken)
    for name, tensor in whole.items():
        for field, factor in fields.items():
            assert torch.equal(ShardFolder(again).read(name, field).view(tensor.shape), tensor * factor)
