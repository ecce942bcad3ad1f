"""Nodes of a cluster are looked at by an actor on each; a head without cores is no place for a worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.layout import Layout, NodeSupply, WorkerSlot, plan_layout
from cluster.placement import Placement, nodes_of_cluster
from cluster.places import Places
from launch.assemble import meeting_point
from launch.cli import main
from launch.demands import role_demands
from launch.node_probe import facts_of_joined, gather_facts, local_nodes
from launch.overrides import load_config
from launch.scratch import make_scratch, remove_abandoned

CONFIG = load_config("cpu-two-by-two").config
FACT = {"rendezvous": ("10.0.0.7", 7777)}


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[list[NodeSupply]]:
    """A head without cores, which is where this process is, and two nodes with two cores."""
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=0)
        ray.init(address=cluster.address, log_to_driver=False)
        yield nodes_of_cluster()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_every_node_with_cores_is_looked_at_by_itself(three_nodes: list[NodeSupply], tmp_path: Path) -> None:
    assert [node.num_cpus for node in three_nodes] == [0, 2, 2]
    assert local_nodes(CONFIG.cluster) is None, "this process is in a cluster"
    (tmp_path / "config.json").write_text("{}")
    facts = asyncio.run(gather_facts(CONFIG, str(tmp_path), three_nodes))
    assert [fact["node_id"] for fact in facts] == [node.node_id for node in three_nodes[1:]]
    for fact in facts:
        assert fact["model_readable"] and fact["num_cpus"] == 2 and fact["gpus"] == []
        address, port = fact["rendezvous"]
        assert socket.inet_aton(address) and port > 0
    states = {group["state"] for group in placement_group_table().values()}
    assert states == {"REMOVED"}, "a probe's place was not given back"


def test_a_node_that_joins_is_looked_at_and_its_places_are_on_it_alone(
    three_nodes: list[NodeSupply], tmp_path: Path
) -> None:
    async def law() -> None:
        slots = (WorkerSlot("worker", 0, 1, 0.0, 0.5, 1, ()),)
        placement = Placement.create(Layout(slots, tuple(three_nodes)), 60.0)
        joined = three_nodes[2]
        fact = await facts_of_joined(joined, placement, str(tmp_path), 0, 120.0)
        assert fact["node_id"] == joined.node_id and fact["model_readable"] is False
        places = Places(slots, placement, 60.0)
        places.adopt(joined.node_id, 1)
        slot, other = await places.take(), await places.take()
        assert placement.node_of(slot) == joined.node_id
        assert placement.node_of(other) in {node.node_id for node in three_nodes[1:]}
        assert placement.node_of(slots[0]) == three_nodes[1].node_id
        placement.remove()

    asyncio.run(law())


def test_validate_and_train_look_at_the_cluster_before_a_worker_is_placed(
    three_nodes: list[NodeSupply], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "cpu-two-by-two"]) == 0
    assert "nodes" in capsys.readouterr().out
    assert main(["train", "cpu-two-by-two", f"run.directory={tmp_path / 'runs'}", "push.backend=ipc"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("burnish: ")]
    assert "push.backend = 'ipc'" in line
    assert not (tmp_path / "runs").exists() and ray.is_initialized()


def layout_on(nodes: list[NodeSupply]) -> Layout:
    return plan_layout(role_demands(CONFIG, False), nodes, False)


def test_ranks_meet_on_the_node_of_rank_0() -> None:
    nodes = [NodeSupply("head", 0, 0), NodeSupply("worker", 4, 0)]
    assert meeting_point(layout_on(nodes), nodes, [FACT | {"node_id": "worker"}]) == ("10.0.0.7", 7777)


def test_on_the_drivers_own_node_the_port_is_chosen_at_the_last_moment() -> None:
    nodes = [NodeSupply("head", 4, 0), NodeSupply("worker", 4, 0)]
    _, port = meeting_point(layout_on(nodes), nodes, [FACT | {"node_id": "head"}])
    assert port != 7777


def test_scratch_of_a_run_that_is_gone_is_removed_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    mine = make_scratch(tmp_path, "run")
    (mine / "weights-0.1.safetensors").write_bytes(b"weights")
    abandoned = tmp_path / "burnish-run-killed"
    abandoned.mkdir()
    (abandoned / ".owner").touch()
    (tmp_path / "other").mkdir()
    assert remove_abandoned(tmp_path) == [abandoned]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, "other"])
