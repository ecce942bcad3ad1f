"""Laws of the arithmetic that gives every worker its place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ShortfallError
from cluster.layout import Layout, NodeSupply, RoleDemand, plan_layout

GIVEN_NODES = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=4
).map(lambda sizes: [NodeSupply(f"node-{n}", cpus, gpus) for n, (cpus, gpus) in enumerate(sizes)])
GIVEN_SIZES = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0])), min_size=1, max_size=4
)


def _demands(sizes: list[tuple[int, float]]) -> list[RoleDemand]:
    return [RoleDemand(f"role{n}", workers, gpus) for n, (workers, gpus) in enumerate(sizes)]


def _assert_laws(layout: Layout, demands: list[RoleDemand], nodes: list[NodeSupply]) -> None:
    for demand in demands:
        assert [slot.index for slot in layout.of(demand.name)] == list(range(demand.num_workers))
    for n, node in enumerate(nodes):
        here = [slot for slot in layout.slots if slot.node == n]
        whole = sum(slot.gpus for slot in here if slot.shared_gpu is None)
        parts: dict[int, float] = {}
        for slot in here:
            if slot.shared_gpu is not None:
                parts[slot.shared_gpu] = parts.get(slot.shared_gpu, 0) + slot.gpus
        assert whole + len(parts) <= node.num_gpus, "a GPU is handed out twice"
        assert all(part <= 1 + 1e-9 and number < node.num_gpus for number, part in parts.items())
        assert sum(slot.cpus for slot in here) <= node.num_cpus - 0.05
        assert all(slot.cpus >= 0.01 and round(slot.cpus, 2) == slot.cpus for slot in here)
        for demand in demands:
            cores = [core for slot in here if slot.role == demand.name for core in slot.cpu_ids]
            assert len(cores) == len(set(cores)) and all(0 <= core < node.num_cpus for core in cores)
        assert all(slot.threads >= 1 for slot in here)


@settings(max_examples=200, deadline=None)
@given(nodes=GIVEN_NODES, sizes=GIVEN_SIZES, colocate=st.booleans())
def test_whatever_is_granted_keeps_the_laws_and_whatever_is_refused_names_a_role(
    nodes: list[NodeSupply], sizes: list[tuple[int, float]], colocate: bool
) -> None:
    demands = _demands(sizes)
    try:
        layout = plan_layout(demands, nodes, colocate)
    except ShortfallError as error:
        assert error.field.split(".")[0] in {demand.name for demand in demands}
        assert "\n" not in str(error)
        return
    _assert_laws(layout, demands, nodes)


def test_two_ranks_on_two_cores_get_one_disjoint_core_each() -> None:
    demands = [RoleDemand("generator", 1, 0), RoleDemand("learner", 2, 0)]
    layout = plan_layout(demands, [NodeSupply("here", 2, 0)], colocate=False)
    assert [slot.cpu_ids for slot in layout.of("learner")] == [(0,), (1,)]
    assert [slot.threads for slot in layout.of("learner")] == [1, 1]
    (generator,) = layout.of("generator")
    assert (generator.cpu_ids, generator.threads) == ((0, 1), 2)
    assert sum(slot.cpus for slot in layout.slots) < 2


def test_roles_with_cores_of_their_own_divide_them_among_all_of_theirs_and_the_others_share() -> None:
    demands = [RoleDemand("generator", 2, 0, own_cores=True), RoleDemand("learner", 1, 0, own_cores=True),
               RoleDemand("reward_workers", 1, 0)]  # fmt: skip
    layout = plan_layout(demands, [NodeSupply("here", 8, 0)], colocate=False)
    assert [slot.cpu_ids for slot in layout.slots] == [(0, 1), (2, 3), (4, 5), tuple(range(8))]
    assert [slot.threads for slot in layout.slots] == [2, 2, 2, 8]
    nodes = [NodeSupply("a", 2, 0), NodeSupply("b", 2, 0)]
    spread = plan_layout(demands[:2], nodes, colocate=False)
    assert [(slot.node, slot.cpu_ids) for slot in spread.slots] == [(0, (0,)), (1, (0, 1)), (0, (1,))]


def test_too_few_cores_for_one_each_are_shared_unpinned() -> None:
    demands = [RoleDemand("generator", 2, 0, own_cores=True), RoleDemand("learner", 1, 0, own_cores=True)]
    layout = plan_layout(demands, [NodeSupply("here", 2, 0)], colocate=False)
    assert {(slot.cpu_ids, slot.threads) for slot in layout.slots} == {((), 1)}


def test_more_workers_than_cores_share_them_unpinned() -> None:
    layout = plan_layout([RoleDemand("scorer", 3, 0)], [NodeSupply("here", 2, 0)], colocate=False)
    assert {(slot.cpu_ids, slot.threads) for slot in layout.slots} == {((), 1)}


def test_workers_without_gpus_go_round_the_nodes_and_skip_one_without_cores() -> None:
    nodes = [NodeSupply("head", 0, 0), NodeSupply("a", 4, 0), NodeSupply("b", 4, 0)]
    layout = plan_layout([RoleDemand("learner", 4, 0)], nodes, colocate=False)
    assert [slot.node for slot in layout.of("learner")] == [1, 2, 1, 2]
    assert [slot.cpu_ids for slot in layout.of("learner")] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_a_workers_gpus_never_span_nodes() -> None:
    nodes = [NodeSupply("a", 16, 3), NodeSupply("b", 16, 3)]
    layout = plan_layout([RoleDemand("generator", 2, 2)], nodes, colocate=False)
    assert [slot.node for slot in layout.slots] == [0, 1]
    with pytest.raises(ShortfallError, match=r"generator\.num_workers = 3: 2 of them fit"):
        plan_layout([RoleDemand("generator", 3, 2)], nodes, colocate=False)


def test_wide_workers_choose_before_narrow_ones_whatever_the_order_asked() -> None:
    nodes = [NodeSupply("a", 16, 4), NodeSupply("b", 16, 4)]
    demands = [RoleDemand("scorer", 4, 1), RoleDemand("generator", 1, 4)]
    layout = plan_layout(demands, nodes, colocate=False)
    assert {slot.node for slot in layout.of("generator")} == {0}
    assert {slot.node for slot in layout.of("scorer")} == {1}


def test_a_refusal_states_the_shortfall() -> None:
    demands = [RoleDemand("generator", 2, 1), RoleDemand("learner", 4, 1)]
    with pytest.raises(ShortfallError) as caught:
        plan_layout(demands, [NodeSupply("a", 16, 4)], colocate=False)
    assert caught.value.field == "learner.num_workers" and caught.value.value == 4
    assert "the cluster has 4 GPUs on 1 nodes, all roles together ask for 6" in str(caught.value)
    assert "ask for 2 fewer or add 2 GPUs" in caught.value.remedy


def test_a_demand_for_gpus_is_refused_where_there_are_none() -> None:
    with pytest.raises(ShortfallError, match="the cluster has 0 GPUs"):
        plan_layout([RoleDemand("learner", 1, 1)], [NodeSupply("a", 16, 0)], colocate=False)


def test_colocated_workers_of_one_index_share_one_gpu_and_ranks_of_one_role_never_do() -> None:
    demands = [RoleDemand("generator", 4, 1), RoleDemand("learner", 4, 1), RoleDemand("reference", 2, 1)]
    nodes = [NodeSupply("a", 16, 2), NodeSupply("b", 16, 2)]
    layout = plan_layout(demands, nodes, colocate=True)
    _assert_laws(layout, demands, nodes)
    places = [[(slot.node, slot.shared_gpu) for slot in layout.of(demand.name)] for demand in demands]
    assert places[0] == places[1] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places[2] == places[0][:2]
    assert all(slot.gpus == 0.3333 for slot in layout.slots)


def test_cores_follow_the_gpus() -> None:
    demands = [RoleDemand("generator", 1, 2), RoleDemand("learner", 2, 1), RoleDemand("scorer", 1, 0)]
    layout = plan_layout(demands, [NodeSupply("a", 64, 4)], colocate=False)
    generator, first, second, scorer = layout.slots
    assert generator.cpus > first.cpus == second.cpus > scorer.cpus == 1


def test_the_table_has_a_row_for_every_slot() -> None:
    layout = plan_layout([RoleDemand("learner", 2, 0)], [NodeSupply("here", 2, 0)], colocate=False)
    assert layout.table()[1] == {
        "role": "learner", "index": 1, "node": "here", "gpus": 0.0, "cpus": 0.95, "threads": 1, "cpu_ids": "1",
    }


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ShortfallError, match=r"cluster\.num_nodes"):
        plan_layout([RoleDemand("learner", 1, 0)], [], colocate=False)
