"""The law of saved state: whoever loads it, on however many ranks, makes the update that would have come next."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from test_gradient_invariance import ALGORITHMS, DEADLINE_S, MODEL, TEMPERATURE, recorded_batch, save, settings

from actors.model_folders import resolve_model
from actors.settings import SamplingSettings
from cluster.rendezvous import Rendezvous, free_port

TOLERANCE = 1e-6
Where = tuple[int, int]  # ranks, ZeRO stage
SHORT: tuple[Where, ...] = ((1, 0), (2, 2), (2, 3))  # writers and readers of `make test`
WRITERS: tuple[Where, ...] = (*SHORT, (2, 0))
READERS: tuple[Where, ...] = (*SHORT, (1, 2), (1, 3), (2, 0))
PAIRS = [
    pytest.param(reader, writer, id=f"{writer[0]}x{writer[1]} to {reader[0]}x{reader[1]}",
                 marks=() if {reader, writer} <= set(SHORT) else pytest.mark.slow)
    for reader in READERS for writer in WRITERS
]  # fmt: skip


def rank_main(rank: int, where: Where, port: int, read: tuple[str, ...], folder: str) -> None:
    """Without ``read``: train, save, go on.  Else: load each folder in turn and make the next update."""
    torch.set_num_threads(1)
    from actors.learner import DeepSpeedLearner

    ranks, zero_stage = where
    learner = DeepSpeedLearner(
        rank, Rendezvous("127.0.0.1", port, ranks), resolve_model(MODEL), settings(ranks, zero_stage),
        ALGORITHMS["kl-entropy"], SamplingSettings(temperature=TEMPERATURE, max_tokens=32),
        "float32", "cpu", num_steps=10, seed=99 if read else 5,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if not read:
        for step in range(2):
            learner.update(recorded_batch(), step)
            save(learner, f"{folder}/earlier")  # the next one is copied into its memory
        torch.manual_seed(1000 + rank)
        save(learner, f"{folder}/state")
        found["next"] = next_update(learner)
    for number, source in enumerate(read):
        if number == 0:  # into an engine whose Adam has made no step yet; then into one that has
            assert not learner.engine._state().adam_step()
        learner.load(f"{source}/state")
        found[source] = next_update(learner)
    torch.save(found, f"{folder}/found-{rank}.pt")
    learner.close()


def next_update(learner: Any) -> dict[str, Any]:
    drawn = torch.rand(3)
    gradients = learner.gradients(recorded_batch())
    learner.update(recorded_batch(), 2)
    return {"gradients": gradients, "weights": learner.weights.whole_state(torch.float32), "drawn": drawn}


@functools.cache
def folder_of(where: Where) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"burnish-reshard-{where[0]}x{where[1]}-")


@functools.cache
def run(where: Where, read: tuple[str, ...]) -> list[dict[str, Any]] | str:
    """What each rank found, or what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if read else folder_of(where).name
        wrong = run_ranks(rank_main, where[0], where, free_port(), read, folder, deadline_s=DEADLINE_S)
        if wrong is not None:
            return f"{where}, reading {len(read)}: {wrong}"
        return [torch.load(Path(folder) / f"found-{rank}.pt", weights_only=False) for rank in range(where[0])]


def written(where: Where) -> list[dict[str, Any]]:
    found = run(where, ())
    assert not isinstance(found, str), found
    return [rank["next"] for rank in found]


def read_back(reader: Where, writer: Where) -> list[dict[str, Any]]:
    writers = SHORT if {reader, writer} <= set(SHORT) else WRITERS
    for where in writers:
        written(where)
    found = run(reader, tuple(folder_of(where).name for where in writers))
    assert not isinstance(found, str), found
    return [rank[folder_of(writer).name] for rank in found]


@pytest.mark.parametrize(("reader", "writer"), PAIRS)
def test_the_next_update_is_that_of_the_uninterrupted_run(reader: Where, writer: Where) -> None:
    expected, found = written(writer), read_back(reader, writer)
    for what in ("gradients", "weights"):
        assert list(found[0][what]) == list(expected[0][what]) != []
        for name, tensor in expected[0][what].items():
            torch.testing.assert_close(found[0][what][name], tensor, rtol=0, atol=TOLERANCE, msg=f"{what} {name}")
    if reader == writer:
        for name, tensor in expected[0]["weights"].items():
            assert torch.equal(found[0]["weights"][name], tensor), f"{name} is not the same bit for bit"
    for rank, mine in enumerate(found):
        assert torch.equal(mine["drawn"], expected[rank % writer[0]]["drawn"]), "each rank draws its own numbers"


def test_the_ranks_share_the_writing_evenly() -> None:
    for where in SHORT:
        written(where)
        sizes = [path.stat().st_size for path in sorted(Path(folder_of(where).name, "state").iterdir())]
        assert len(sizes) == where[0] and max(sizes) <= 1.2 * min(sizes)
