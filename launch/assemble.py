"""Puts the parts together: layout, workers, fleets, publisher.  The only place that knows them all.

May import: everything.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.fleet import CriticGang, LearnerGang
from actors.generator import VLLMGenerator
from actors.generator_fleet import GeneratorFleet
from actors.membership import Event, Recruiting, no_event
from actors.mixed_scorer import MixedScorer
from actors.publisher import Publisher, Transport
from actors.reference import ReferenceModel
from actors.scorer_pools import ReferencePool, RewardModelPool, RewardPool
from actors.watched_parts import WatchedReference, WatchedScorer
from actors.watched_workers import WatchedWorkers
from cluster.layout import Layout, NodeSupply, WorkerSlot, plan_layout
from cluster.placement import Placement, RayHandle
from cluster.places import Places
from cluster.weight_channel import free_bytes
from cluster.worker_group import WorkerGroup
from launch.accountant import Accountant
from launch.adopting import node_watch
from launch.config import RunConfig
from launch.demands import num_gpus_asked, role_demands, transport
from launch.machines import choose_device, dtype_name, torch_device
from launch.prepare import Prepared
from launch.reward_pools import reward_pools
from launch.scale import ScaleDesk
from launch.scratch import make_scratch
from launch.trained_ranks import TrainedRanks, meeting_on
from trainers.bubbles import Setting
from trainers.errors import InputError
from trainers.experience import WeightVersion
from trainers.protocols import Reference, Scorer

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder in it


def choose_transport(config: RunConfig, device: str) -> Transport:
    """See :func:`launch.demands.transport`; InputError where it needs a GPU that is not there."""
    found = transport(config, device == "cuda")
    if found == "ipc" and device == "cpu":
        raise InputError("push.backend", "ipc", "it shares GPU memory and this run has no GPU", "use file or auto")
    return found


def push_directory(config: RunConfig, run_folder: Path, num_bytes: int, one_host: bool) -> Path:
    """Shared memory of the one host there is when a version fits twice, else the run folder (on a shared disk)."""
    if config.push.directory is not None:
        return Path(config.push.directory)
    if one_host and SHARED_MEMORY.is_dir() and free_bytes(SHARED_MEMORY) > 2 * num_bytes:
        return make_scratch(SHARED_MEMORY, config.run.name)
    return run_folder / "weights"


def meeting_point(
    layout: Layout, nodes: Sequence[NodeSupply], facts: Sequence[Mapping[str, Any]], role: str = "learner",
    taken: int = 0,
) -> tuple[str, int]:  # fmt: skip
    """Address and free port on the node of a role's rank 0, which may not be this one (a head without GPUs).

    ``taken``: a port of this node that was given to another role and is not listened on yet.
    """
    node = layout.nodes[layout.of(role)[0].node].node_id
    return meeting_on(node, nodes[0].node_id, facts, role, taken)


@dataclass
class Fleet:
    """A running system."""

    generators: WorkerGroup
    trained: dict[str, WorkerGroup]  # learner and, where there is one, critic
    ranks: TrainedRanks  # how those of ``trained`` start again
    rewards: tuple[WorkerGroup, ...]  # reward functions, then each reward model
    references: WorkerGroup | None
    generator: GeneratorFleet
    learner: LearnerGang
    critic: CriticGang | None
    scorer: Scorer
    reference: Reference | None
    publisher: Publisher
    accountant: Accountant
    layout: Layout
    device: str
    dtype: str
    _placement: Placement | None
    _ray: RayHandle | None
    _scratch: Path | None
    _pools: Sequence[RewardPool | RewardModelPool | ReferencePool]  # of ``rewards`` and ``references``
    _tasks: tuple[asyncio.Task[None], ...] = ()  # answer `burnish scale`, watch the nodes

    def take_ranks(self, trained: dict[str, WorkerGroup]) -> None:
        """Learner and critic are these from now on; the publisher has let the ones before go."""
        self.trained = trained
        self.learner, self.critic = self.ranks.gangs(trained, self.accountant.ledger)
        self.publisher.learner = trained["learner"]

    async def close(self) -> None:
        """End every worker, generators first: nobody then waits for a dead learner."""
        self.accountant.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.generator.close()
        for pool in self._pools:
            await pool.close()
        for group in (self.generators, *self.rewards, self.references, *reversed(self.trained.values())):
            if group is not None:
                await group.shutdown()
        if self._placement is not None:
            self._placement.remove()
        if self._ray is not None:
            self._ray.stop()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def recruiting(
    generators: WorkerGroup, places: Places, placement: Placement | None, publisher: Publisher,
    kwargs_of: Callable[[int], dict[str, Any]],
) -> Recruiting:  # fmt: skip
    """How a generator joins and leaves this run."""

    async def hire() -> int:
        slot = await places.take()
        return generators.add(kwargs_of(generators.next_index), slot)

    return Recruiting(
        hire, publisher.catch_up, publisher.between_pushes, lambda index: places.give_back(generators.slot(index)),
        None if placement is None else lambda index: placement.node_of(generators.slot(index)),
    )  # fmt: skip


def why_not(num_generators: int, layout: Layout, num_gpus: int, transport: Transport) -> str:
    """Why a run cannot have so many generators on this cluster whatever else happens; empty when it may try."""
    planned = layout.of("generator")
    if transport == "ipc" and num_generators > len(planned):
        return f"each generator shares the GPU of a learner rank (push.backend ipc), and there are {len(planned)}"
    gpus = planned[0].gpus * num_generators
    if gpus > num_gpus:
        return f"{num_generators} generators hold {gpus:g} GPUs, and the cluster has {num_gpus}"
    return ""


async def _settled(groups: Sequence[WorkerGroup], placement: Placement, handle: RayHandle | None) -> None:
    """Every worker of ``groups`` is ready; where one is not, what was started goes."""
    try:
        for group in groups:
            await group.ready()
    except BaseException:
        for group in groups:
            await group.shutdown()
        placement.remove()
        if handle is not None:
            handle.stop()
        raise


async def assemble(
    config: RunConfig, prepared: Prepared, run_folder: Path, version: WeightVersion,
    handle: RayHandle | None, nodes: list[NodeSupply], facts: Sequence[Mapping[str, Any]], event: Event = no_event,
) -> Fleet:  # fmt: skip
    """Place and construct every worker; returns when all are ready.

    ``facts``: launch.node_probe of each node.  ``event`` hears of workers that die, come back, join and leave.
    """
    device = choose_device(config.cluster, nodes, num_gpus_asked(config))
    chosen = choose_transport(config, device)
    layout = plan_layout(role_demands(config, device == "cuda"), nodes, config.cluster.colocate)
    dtype = dtype_name(config.model.dtype, device)
    accountant = Accountant(run_folder, Setting(config.run.max_staleness, config.cluster.colocate))
    ledger = accountant.ledger
    placement = None if handle is None else Placement.create(layout, config.cluster.placement_deadline_s)

    def launch(
        name: str, factory: type, kwargs: list[Mapping[str, Any]], concurrency: int, deadline: float,
        slots: Sequence[WorkerSlot] | None = None,
    ) -> WorkerGroup:  # fmt: skip
        group = WatchedWorkers.launch(
            name, factory, kwargs, placement=placement, slots=layout.of(name) if slots is None else slots,
            concurrency=concurrency, start_deadline_s=deadline,
        )  # fmt: skip
        group.watch(ledger)
        return group

    def generator_kwargs(index: int) -> dict[str, Any]:
        return {
            "name": f"generator-{index}", "model_path": prepared.model_path, "settings": config.generator,
            "dtype": dtype, "device": device, "max_length": prepared.max_length,
            "seed": config.run.seed, "version": tuple(version),
        }  # fmt: skip

    sampling = config.generator.sampling
    ranks = TrainedRanks(config, prepared, run_folder, torch_device(device), dtype, layout, placement, launch)
    meetings = {"learner": meeting_point(layout, nodes, facts)}
    if prepared.critic_path is not None:
        meetings["critic"] = meeting_point(layout, nodes, facts, "critic", meetings["learner"][1])
    trained = ranks.launch(meetings)
    learner, critic = ranks.gangs(trained, ledger)
    pools = reward_pools(config, prepared.model_path, dtype, torch_device(device), launch, event)
    references = None
    if config.has_reference_workers:
        references = launch(
            "reference", ReferenceModel,
            [
                {
                    "model_path": prepared.model_path, "settings": config.reference,
                    "temperature": sampling.temperature, "chunk": config.learner.logprob_chunk,
                    "dtype": dtype, "device": torch_device(device),
                }
            ] * config.reference.num_workers,
            concurrency=1, deadline=config.cluster.start_deadline_s,
        )  # fmt: skip
    if config.cluster.colocate and placement is not None:
        # vLLM takes all that its GPU loses of free memory while it starts for its own: nobody else may start meanwhile.
        others = (*trained.values(), *(pool.workers for pool in pools), references)
        await _settled([group for group in others if group is not None], placement, handle)
    generators = launch(
        "generator",
        VLLMGenerator,
        [generator_kwargs(i) for i in range(config.generator.num_workers)],
        concurrency=4096,  # an asyncio actor: calls are groups being sampled, and vLLM batches them
        deadline=config.generator.start_deadline_s,
    )  # fmt: skip
    size = 4 if dtype == "float32" else 2
    one_host = len(nodes) == 1 and config.health.adopt_up_to is None  # of whoever may have to read the file
    pushed = prepared.facts.num_params * size
    if config.model.lora is not None and not config.pushes_merged:
        pushed = prepared.facts.num_adapter_params * 4  # float32
    directory = push_directory(config, run_folder, pushed, one_host)
    reference = None if references is None else ReferencePool(
        references, config.reference.deadline_s, config.reference.token_budget, config.health, event
    )  # fmt: skip
    generator = GeneratorFleet(
        generators, config.generator.group_deadline_s, config.health, event, config.generator.max_num_seqs
    )
    fleet = Fleet(
        generators=generators,
        trained=trained,
        ranks=ranks,
        rewards=tuple(pool.workers for pool in pools),
        references=references,
        generator=generator,
        learner=learner,
        critic=critic,
        scorer=WatchedScorer(pools[0] if len(pools) == 1 else MixedScorer(pools), ledger),
        reference=None if reference is None else WatchedReference(reference, ledger),
        publisher=Publisher(
            trained["learner"], generators, generator.roster, chosen, directory, dtype, config.push.bucket_bytes,
            config.generator.tensor_parallel_size, config.push.deadline_s, staggered=config.run.max_staleness > 0,
        ),
        accountant=accountant,
        layout=layout,
        device=device,
        dtype=dtype,
        _placement=placement,
        _ray=handle,
        _scratch=directory if config.push.directory is None else None,
        _pools=pools if reference is None else [*pools, reference],
    )  # fmt: skip
    try:
        # Learners first: in the in-process twin constructors run one after the other.
        for group in (*trained.values(), generators, *fleet.rewards, references):
            if group is not None:
                await group.ready()
        places = Places(layout.of("generator"), placement, config.cluster.placement_deadline_s)
        generator.open(recruiting(generators, places, placement, fleet.publisher, generator_kwargs))
        watch = None if placement is None else node_watch(
            config, prepared.model_path, generator, placement, places, layout, facts, event
        )  # fmt: skip

        def refusal(wanted: int) -> str:
            present = nodes if watch is None else watch.nodes
            return why_not(wanted, layout, sum(node.num_gpus for node in present), chosen)

        desk = ScaleDesk(run_folder, watch or generator, refusal, event)
        watching = () if watch is None else (watch.run(),)
        fleet._tasks = tuple(asyncio.create_task(work) for work in (desk.run(), *watching))
    except BaseException:
        await fleet.close()
        raise
    return fleet
