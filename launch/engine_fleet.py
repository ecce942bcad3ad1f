"""Engines by role, placed and started: what a command needs that samples, and trains nothing.

May import: actors.{generator, generator_fleet, settings}, cluster.*, launch.machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from actors.generator import VLLMGenerator
from actors.generator_fleet import GeneratorFleet
from actors.settings import GeneratorSettings
from cluster.layout import RoleDemand, plan_layout
from cluster.placement import Placement, RayHandle
from cluster.settings import ClusterSettings
from cluster.worker_group import WorkerGroup
from launch.machines import choose_device, connect, dtype_name

MANY = 4096  # calls at once of an asyncio actor whose engine batches them


@dataclass(frozen=True, slots=True)
class EngineRole:
    """One model in engines of its own."""

    path: str
    max_length: int
    settings: GeneratorSettings


@dataclass
class EngineFleet:
    """Generators by role; empty where none is needed, and then Ray is not started either."""

    generators: dict[str, GeneratorFleet] = field(default_factory=dict)
    _groups: list[WorkerGroup] = field(default_factory=list)
    _placement: Placement | None = None
    _ray: RayHandle | None = None

    async def close(self) -> None:
        for group in self._groups:
            await group.shutdown()
        if self._placement is not None:
            self._placement.remove()
        if self._ray is not None:
            self._ray.stop()


async def start_engines(
    roles: Mapping[str, EngineRole], cluster: ClusterSettings, dtype: Literal["auto", "float32", "bfloat16"], seed: int
) -> EngineFleet:
    """Join or start Ray, place and construct the engines of ``roles``; returns when all are ready.

    Args:
        dtype: as ``model.dtype`` has it.
    """
    fleet = EngineFleet()
    if not roles:
        return fleet
    fleet._ray, nodes = connect(cluster, sum(role.settings.num_workers for role in roles.values()))
    try:
        engines = {name: role.settings for name, role in roles.items()}
        wanted = sum(demand.num_workers * demand.gpus_per_worker for demand in engine_demands(engines, cluster, True))
        device = choose_device(cluster, nodes, wanted)
        layout = plan_layout(engine_demands(engines, cluster, device == "cuda"), nodes, cluster.colocate)
        if fleet._ray is not None:
            fleet._placement = Placement.create(layout, cluster.placement_deadline_s)
        for name, role in roles.items():
            shared = {
                "model_path": role.path, "settings": role.settings, "device": device, "max_length": role.max_length,
                "dtype": dtype_name(dtype, device), "seed": seed,
            }  # fmt: skip
            group = WorkerGroup.launch(
                name, VLLMGenerator, [{"name": f"{name}-{i}", **shared} for i in range(role.settings.num_workers)],
                placement=fleet._placement, slots=layout.of(name), concurrency=MANY,
                start_deadline_s=role.settings.start_deadline_s,
            )  # fmt: skip
            fleet._groups.append(group)
            fleet.generators[name] = GeneratorFleet(group, role.settings.group_deadline_s)
        for group in fleet._groups:
            await group.ready()
    except BaseException:
        await fleet.close()
        raise
    return fleet


def engine_demands(
    engines: Mapping[str, GeneratorSettings], cluster: ClusterSettings, on_gpu: bool
) -> list[RoleDemand]:
    """What engines of these settings ask for, by role."""
    return [
        RoleDemand(name, settings.num_workers, settings.gpus(cluster.colocate) if on_gpu else 0.0)
        for name, settings in engines.items()
    ]
