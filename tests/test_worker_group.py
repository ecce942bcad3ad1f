"""Laws of worker groups: the same for Ray actors and for objects in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster import placement as placement_module
from cluster.errors import ClusterError, DeadlineError, ShortfallError, WorkerDiedError, WorkerError
from cluster.host import host_facts, pin_to, worker_environment
from cluster.layout import Layout, NodeSupply, RoleDemand, WorkerSlot, plan_layout
from cluster.placement import Placement, nodes_of_cluster, start_or_join
from cluster.places import Places
from cluster.rendezvous import Rendezvous, free_port, join, node_address
from cluster.settings import ClusterSettings
from cluster.transport import fetch, fetch_all, put
from cluster.worker_group import WorkerGroup


class RefusedError(Exception):
    """An error with fields of its own, as the users' errors have."""

    def __init__(self, field: str, value: object) -> None:
        self.field, self.value = field, value
        super().__init__(field, value)


class Worker:
    """A plain class with every kind of method."""

    def __init__(self, rank: int, refuse: bool = False, stall_s: float = 0.0) -> None:
        threading.Event().wait(stall_s)
        if refuse:
            raise RefusedError("model.path", "/nowhere")
        self.rank = rank
        self.closed_at: str | None = None

    def add(self, one: int, other: int = 0) -> int:
        return self.rank + one + other

    def refuse(self) -> None:
        raise RefusedError("rewards.function", self.rank)

    def own_timeout(self) -> None:
        raise TimeoutError("the worker's own")

    def refuse_or_hang(self, hang_s: float) -> None:
        if self.rank == 1:
            self.refuse()
        threading.Event().wait(hang_s)

    def pair(self, size: int) -> tuple[int, bytes]:
        return size, b"x" * size

    def several(self, sizes: list[int]) -> tuple[int, *tuple[bytes, ...]]:
        return len(sizes), *(b"x" * size for size in sizes)

    def late_pair(self, stall_s: float) -> tuple[int, bytes]:
        threading.Event().wait(stall_s)
        return 1, b"x"

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def maps(self) -> str:
        return Path("/proc/self/maps").read_text()

    def cores(self) -> list[int]:
        return sorted(os.sched_getaffinity(0))

    def title(self) -> str:
        return type(self).__name__

    def die(self) -> None:
        os._exit(1)

    def closed_path(self) -> str | None:
        return self.closed_at

    def pid(self) -> int:
        return os.getpid()

    def touch_on_close(self, path: str) -> None:
        self.closed_at = path

    def close(self) -> None:
        if self.closed_at:
            Path(self.closed_at).touch()

    def join_and_sum(self, rendezvous: Rendezvous) -> float:
        import torch
        import torch.distributed as dist

        join(rendezvous, self.rank, "gloo", 30.0)
        total = torch.tensor([float(self.rank + 1)])
        dist.all_reduce(total)
        dist.destroy_process_group()
        return float(total)

    def join_alone(self, rendezvous: Rendezvous, deadline_s: float) -> None:
        join(rendezvous, self.rank, "gloo", deadline_s)


class AsyncWorker:
    """Two calls that need each other: they finish only when both run at a time."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def wait(self) -> str:
        await self.event.wait()
        return "woken"

    async def wake(self) -> None:
        self.event.set()

    def plain(self) -> str:
        return "plain"


@pytest.fixture(scope="module")
def ray_placement() -> Iterator[tuple[Placement, Layout]]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    handle = start_or_join(ClusterSettings(object_store_bytes=80 * 2**20), num_slots=2)
    assert handle.started_here
    layout = plan_layout([RoleDemand("worker", 2, 0)], nodes_of_cluster(), colocate=False)
    placement = Placement.create(layout, deadline_s=60)
    yield placement, layout
    placement.remove()
    handle.stop()
    assert not ray.is_initialized()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


LOCAL_SLOTS = plan_layout([RoleDemand("worker", 2, 0)], [NodeSupply("here", 2, 0)], colocate=False).slots


class Launcher:
    """Starts groups in one of the two forms and ends them with the test."""

    def __init__(self, placement: Placement | None, slots: tuple[WorkerSlot, ...]) -> None:
        self.placement, self.slots, self.groups = placement, slots, list[WorkerGroup]()

    def __call__(
        self, *kwargs: dict[str, Any], factory: type = Worker, concurrency: int = 1, start_deadline_s: float = 60
    ) -> WorkerGroup:
        group = WorkerGroup.launch(
            "worker",
            factory,
            kwargs,
            placement=self.placement,
            slots=self.slots[: len(kwargs)],
            concurrency=concurrency,
            start_deadline_s=start_deadline_s,
        )
        self.groups.append(group)
        return group


@pytest.fixture(params=["ray", "in_process"])
def launch(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    if request.param == "ray":
        placement, layout = request.getfixturevalue("ray_placement")
        launcher = Launcher(placement, layout.slots)
    else:
        launcher = Launcher(None, LOCAL_SLOTS)
    yield launcher
    for group in launcher.groups:
        asyncio.run(group.shutdown(deadline_s=0.5))


@pytest.fixture
def launch_ray(ray_placement: tuple[Placement, Layout]) -> Iterator[Launcher]:
    launcher = Launcher(ray_placement[0], ray_placement[1].slots)
    yield launcher
    for group in launcher.groups:
        asyncio.run(group.shutdown(deadline_s=0.5))


def test_an_address_where_no_ray_answers_is_refused_at_once() -> None:
    if ray.is_initialized():
        pytest.skip("a process has one Ray: this one is running already")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ShortfallError, match=rf"cluster\.address = '{address}': no Ray answers there"):
        start_or_join(ClusterSettings(address=address), num_slots=1)


def test_results_come_in_index_order_with_each_workers_own_arguments(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        assert len(group) == 2
        assert await group.call(1, "add", 10, other=100, deadline_s=20) == 111
        assert await group.call_all("add", 5, deadline_s=20) == [5, 6]
        assert await group.call_all("add", 5, deadline_s=20, per_worker=[(10,), (20,)]) == [15, 26]

    asyncio.run(check())


def test_an_exception_keeps_its_type_and_fields_and_names_its_worker(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        with pytest.raises(RefusedError) as caught:
            await group.call(1, "refuse", deadline_s=20)
        assert type(caught.value) is RefusedError
        assert (caught.value.field, caught.value.value) == ("rewards.function", 1)
        assert caught.value.__notes__ == ["raised by worker[1].refuse"]

    asyncio.run(check())


def test_an_exception_of_a_constructor_keeps_its_type(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1, "refuse": True})
        with pytest.raises(RefusedError) as caught:
            await group.ready()
        assert type(caught.value) is RefusedError and caught.value.field == "model.path"
        await group.shutdown(deadline_s=5)  # must not trip over the worker that never came to be

    asyncio.run(check())


def test_a_wait_past_its_deadline_names_method_worker_and_seconds(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0})
        await group.ready()
        with pytest.raises(DeadlineError) as caught:
            await group.call(0, "refuse_or_hang", 2.0, deadline_s=0.3)
        assert str(caught.value) == "waited 0.3 s for refuse_or_hang from worker[0]; it did not come"

    asyncio.run(check())


def test_a_timeout_of_the_workers_own_is_not_taken_for_a_passed_deadline(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0})
        await group.ready()
        with pytest.raises(TimeoutError, match="the worker's own") as caught:
            await group.call(0, "own_timeout", deadline_s=20)
        assert not isinstance(caught.value, ClusterError)

    asyncio.run(check())


def test_one_failing_worker_fails_the_group_while_the_others_hang(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        started = time.monotonic()
        with pytest.raises(RefusedError):
            await group.call_all("refuse_or_hang", 8.0, deadline_s=30)
        assert time.monotonic() - started < 6

    asyncio.run(check())


def test_a_split_call_brings_the_summary_and_leaves_the_payload_where_it_is(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0})
        await group.ready()
        summary, payload = await group.call_split(0, "pair", 200_000, deadline_s=20)
        assert summary == 200_000
        assert isinstance(payload, ray.ObjectRef) == (launch.placement is not None)
        await group.shutdown()
        assert len(fetch(payload, deadline_s=20)) == 200_000  # the payload outlives its worker

    asyncio.run(check())


def test_a_split_call_brings_as_many_payloads_as_were_asked_for(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0})
        await group.ready()
        num, *payloads = await group.call_split(0, "several", [3, 200_000, 1], deadline_s=20, num_payloads=3)
        assert num == 3 and [len(fetch(payload, deadline_s=20)) for payload in payloads] == [3, 200_000, 1]

    asyncio.run(check())


def test_calls_of_an_async_worker_run_side_by_side_up_to_its_concurrency(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({}, factory=AsyncWorker, concurrency=2)
        await group.ready()
        waiting = asyncio.create_task(group.call(0, "wait", deadline_s=20))
        await group.call(0, "wake", deadline_s=20)
        assert await waiting == "woken"
        assert await group.call(0, "plain", deadline_s=20) == "plain"

    asyncio.run(check())


def test_shutdown_closes_every_worker(launch: Launcher, tmp_path: Path) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        paths = [tmp_path / "0", tmp_path / "1"]
        await group.call_all("touch_on_close", deadline_s=20, per_worker=[(str(path),) for path in paths])
        await group.shutdown()
        assert all(path.exists() for path in paths)
        with pytest.raises(WorkerError):
            await group.call(0, "add", 1, deadline_s=20)
        with pytest.raises(WorkerError, match="was shut down"):
            await group.restart(0, group.slot(0))
        with pytest.raises(WorkerError, match="was shut down"):
            group.add({"rank": 2}, group.slot(0))

    asyncio.run(check())


def test_a_worker_that_is_added_has_a_new_index_and_one_that_ended_is_missed_by_nobody(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        slot = group.slot(0)
        group.end(0)
        with pytest.raises(WorkerDiedError, match=r"worker\[0\] has ended"):
            await group.call(0, "add", 1, deadline_s=20)
        index = group.add({"rank": 7}, slot)
        await group.ready_at(index)
        assert index == 2 and group.indices == (1, 2) and len(group) == 2
        assert await group.call_all("add", 1, deadline_s=20) == [2, 8]
        assert await group.call_all("add", deadline_s=20, per_worker=[(10,), (20,)]) == [11, 27]
        await group.ping(index, deadline_s=20)

    asyncio.run(check())


def test_a_restarted_worker_has_its_index_and_arguments_and_nothing_of_its_past(launch: Launcher) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        await group.call(1, "touch_on_close", "nowhere", deadline_s=20)
        await group.restart(1, group.slot(1))
        assert await group.call(1, "add", 1, deadline_s=20) == 2 and group.indices == (0, 1)
        assert await group.call(1, "closed_path", deadline_s=20) is None

    asyncio.run(check())


def test_a_retired_worker_is_closed_and_the_others_stay(launch: Launcher, tmp_path: Path) -> None:
    async def check() -> None:
        group = launch({"rank": 0}, {"rank": 1})
        await group.ready()
        await group.call(1, "touch_on_close", str(tmp_path / "closed"), deadline_s=20)
        await group.retire(1)
        assert (tmp_path / "closed").exists() and group.indices == (0,)
        assert await group.call(0, "add", 1, deadline_s=20) == 1

    asyncio.run(check())


def test_a_dead_and_a_silent_worker_are_lost_and_one_that_refuses_is_not(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0}, {"rank": 1})
        await group.ready()
        found: list[bool] = []
        for method, arguments, deadline_s in (
            ("refuse", (), 20.0), ("own_timeout", (), 20.0), ("refuse_or_hang", (30.0,), 0.3), ("die", (), 20.0),
        ):  # fmt: skip
            index = 1 if method == "die" else 0
            with pytest.raises(Exception) as caught:  # of four kinds
                await group.call(index, method, *arguments, deadline_s=deadline_s)
            found.append(group.is_lost(index, caught.value))
        assert found == [False, False, True, True]
        with pytest.raises(WorkerDiedError):
            await group.ping(1, deadline_s=20)

    asyncio.run(check())


def test_a_frozen_worker_is_ended_and_its_place_can_be_filled(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0}, {"rank": 1})
        await group.ready()
        pid = await group.call(1, "pid", deadline_s=20)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DeadlineError):
            await group.ping(1, deadline_s=0.5)
        group.end(1)
        index = group.add({"rank": 5}, group.slot(1))
        await group.ready_at(index)
        assert await group.call(index, "add", 1, deadline_s=20) == 6
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
        assert not psutil.pid_exists(pid), "a frozen process holds its memory for ever"

    asyncio.run(check())


def test_a_placement_grows_by_a_place_and_gives_it_back(ray_placement: tuple[Placement, Layout]) -> None:
    async def check() -> None:
        placement, layout = ray_placement
        places = Places(layout.slots, placement, deadline_s=30)
        slot = await places.take()
        assert slot.index == 2 and slot.cpu_ids == ()
        group = WorkerGroup.launch(
            "worker", Worker, [{"rank": 9}], placement=placement, slots=[slot], start_deadline_s=60
        )
        await group.ready()
        assert await group.call(0, "add", 1, deadline_s=20) == 10
        await group.shutdown()
        places.give_back(slot)
        places.give_back(layout.slots[1])
        assert await places.take() == layout.slots[1], "a place of the layout is used again"
        assert (await places.take()).index == 3
        with pytest.raises(DeadlineError, match="1000 GPUs and .* on one node for one more worker"):
            await placement.grow(replace(slot, index=8, gpus=1000.0), deadline_s=0.5)

    asyncio.run(check())


def test_two_ranks_meet_and_add_up(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0}, {"rank": 1})
        await group.ready()
        rendezvous = Rendezvous(node_address(), free_port(), world_size=2)
        assert await group.call_all("join_and_sum", rendezvous, deadline_s=90) == [3.0, 3.0]

    asyncio.run(check())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_does_not_come_names_itself_and_the_address(launch_ray: Launcher, rank: int) -> None:
    async def check() -> None:
        group = launch_ray({"rank": rank})
        await group.ready()
        rendezvous = Rendezvous("127.0.0.1", free_port(), world_size=2)
        with pytest.raises(DeadlineError) as caught:
            await group.call(0, "join_alone", rendezvous, 1.0, deadline_s=90)
        assert f"as rank {rank} from 127.0.0.1:{rendezvous.port}" in str(caught.value)

    asyncio.run(check())


def test_a_taken_port_is_named_as_such() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(WorkerError, match=f"rank 0 cannot listen on 127.0.0.1:{port}"):
            join(Rendezvous("127.0.0.1", port, world_size=2), 0, "gloo", 5.0)


def test_a_killed_worker_is_reported_at_once_by_group_index_and_method(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0}, {"rank": 1})
        await group.ready()
        hanging = asyncio.create_task(group.call_all("refuse_or_hang", 0.0, deadline_s=60))
        with pytest.raises(RefusedError):
            await hanging
        started = time.monotonic()
        with pytest.raises(WorkerError, match=r"worker\[1\] died in or before die"):
            await group.call(1, "die", deadline_s=60)
        with pytest.raises(WorkerError, match=r"worker\[1\] died in or before add"):
            await group.call_all("add", 1, deadline_s=60)
        assert time.monotonic() - started < 20
        assert await group.call(0, "add", 1, deadline_s=20) == 1  # the other one lives on

    asyncio.run(check())


def test_a_constructor_that_does_not_return_is_a_passed_deadline(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0, "stall_s": 30.0}, start_deadline_s=1.0)
        with pytest.raises(DeadlineError, match=r"__init__ from worker\[0\]"):
            await group.ready()

    asyncio.run(check())


def test_a_ray_worker_has_its_environment_its_cores_and_its_name(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0}, {"rank": 1})
        await group.ready()
        slot = launch_ray.slots[1]
        wanted = worker_environment(slot.threads, slot.cpu_ids)
        found = await group.call(1, "environment", deadline_s=20)
        assert {name: found.get(name) for name in wanted} == wanted
        loaded = await group.call(1, "maps", deadline_s=20)
        for library in wanted.get("LD_PRELOAD", "").split(":"):
            assert Path(library).name.split(".so")[0] in loaded
        if slot.cpu_ids:
            allowed = sorted(os.sched_getaffinity(0))
            cores = await group.call_all("cores", deadline_s=20)
            assert cores == [[allowed[core] for core in slot.cpu_ids] for slot in launch_ray.slots]
        assert await group.call_all("title", deadline_s=20) == ["burnish-worker-0", "burnish-worker-1"]

    asyncio.run(check())


def test_a_payload_that_does_not_come_is_a_passed_deadline(launch_ray: Launcher) -> None:
    async def check() -> None:
        group = launch_ray({"rank": 0})
        await group.ready()
        with pytest.raises(DeadlineError):
            await group.call_split(0, "late_pair", 30.0, deadline_s=0.2)

    asyncio.run(check())
    values = [put(1), 2, put(3)]
    assert fetch_all(values, deadline_s=20) == [1, 2, 3]
    never = ray.remote(num_cpus=1000)(lambda: 1).remote()
    with pytest.raises(DeadlineError, match="1 of 2 payloads from the object store"):
        fetch_all([never, values[0]], deadline_s=0.2)
    ray.cancel(never)


def test_a_placement_that_is_not_granted_says_what_was_asked_and_what_is_free(
    ray_placement: tuple[Placement, Layout],
) -> None:
    (node, *_) = nodes_of_cluster()
    slot = WorkerSlot("greedy", 0, 0, 0.0, 1000.0, 1, ())
    with pytest.raises(DeadlineError, match=r"1 worker slots: 1000 CPUs \(.* free\) from the Ray cluster"):
        Placement.create(Layout((slot,), (node,)), deadline_s=1.0)


def test_a_ray_that_was_running_is_joined_and_not_stopped(ray_placement: tuple[Placement, Layout]) -> None:
    handle = start_or_join(ClusterSettings(), num_slots=1)
    assert not handle.started_here
    handle.stop()
    assert ray.is_initialized()


def test_workers_import_this_checkout_ahead_of_what_the_user_set() -> None:
    root = str(Path(placement_module.__file__).resolve().parent.parent)
    assert placement_module._import_path({"PYTHONPATH": "/mine"})["PYTHONPATH"].split(os.pathsep) == [root, "/mine"]


def test_what_the_user_preloads_comes_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/mine.so /opt/libiomp5.so")
    libraries = worker_environment(2, None)["LD_PRELOAD"].split(":")
    assert libraries[:2] == ["/opt/mine.so", "/opt/libiomp5.so"]
    assert sum("libiomp5" in library for library in libraries) == 1
    assert worker_environment(2, None, preload=False)["LD_PRELOAD"] == "/opt/mine.so:/opt/libiomp5.so"


def test_a_pool_is_never_larger_than_its_cores() -> None:
    assert worker_environment(8, (0, 1))["OMP_NUM_THREADS"] == "2"
    assert worker_environment(8, None)["OMP_NUM_THREADS"] == "8"


def test_cores_that_do_not_exist_are_not_pinned_to() -> None:
    before = os.sched_getaffinity(0)
    assert pin_to([len(before)]) == ()
    assert os.sched_getaffinity(0) == before


def test_host_facts_are_within_reason() -> None:
    facts = host_facts()
    assert 1 <= facts["num_cpus"] <= (os.cpu_count() or 1)
    assert 0 < facts["memory_free_bytes"] <= facts["memory_bytes"]
    assert facts["versions"]["ray"] == ray.__version__
