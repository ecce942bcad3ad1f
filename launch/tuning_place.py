"""Where the ranks of a run that learns from files run: their demand, whether they fit, and the ranks themselves.

A reference, where a loss has one, works before the ranks start and in their place.
May import: actors.{reference, scorer_pools}, cluster.*, trainers.*, launch.{assemble, estimate, machines,
model_facts, preflight, tuning_config, tuning_task}.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from actors.reference import ReferenceModel
from actors.scorer_pools import ReferencePool
from cluster.errors import ShortfallError
from cluster.layout import NodeSupply, RoleDemand, plan_layout
from cluster.placement import Placement, RayHandle
from cluster.rendezvous import Rendezvous
from cluster.worker_group import WorkerGroup
from launch.assemble import meeting_point
from launch.config import RunConfig
from launch.estimate import estimate_learner, show_bytes
from launch.machines import Device, check_num_nodes, choose_device, dtype_name, torch_device
from launch.model_facts import ModelFacts
from launch.preflight import PROCESS_BYTES, PreflightReport, check_nodes
from launch.tuning_config import TuningConfig
from launch.tuning_task import Site, TuningFleet
from trainers.errors import InputError
from trainers.reference_logps import TEMPERATURE

ROLE = "learner"
REFERENCE = "reference"


def shared(config: TuningConfig) -> RunConfig:
    """For functions written for runs that sample, and that look only at sections which both kinds have."""
    return cast(RunConfig, config)


def demands(config: TuningConfig, on_gpu: bool) -> list[RoleDemand]:
    """The ranks are all there is."""
    setting = config.learner.gpus_per_worker
    gpus = (1.0 if setting is None else setting) if on_gpu else 0.0
    return [RoleDemand(ROLE, config.learner.num_workers, gpus)]


def reference_demands(config: TuningConfig, on_gpu: bool) -> list[RoleDemand]:
    """The reference's workers, which are there while no rank is; none for most kinds of runs."""
    if not config.has_reference_workers:
        return []
    settings = config.reference_settings
    setting = settings.gpus_per_worker
    gpus = (1.0 if setting is None else setting) if on_gpu else 0.0
    return [RoleDemand(REFERENCE, settings.num_workers, gpus)]


def dtype_of(config: TuningConfig, nodes: Sequence[NodeSupply]) -> str:
    """The compute dtype's name on these nodes."""
    return dtype_name(config.model.dtype, _device(config, nodes))


def _device(config: TuningConfig, nodes: Sequence[NodeSupply]) -> Device:
    wanted = sum(d.num_workers * d.gpus_per_worker for d in demands(config, True))
    return choose_device(config.cluster, nodes, wanted)


def refuse_shortfall(config: TuningConfig, nodes: list[NodeSupply]) -> None:
    """InputError or ShortfallError when there is no place for every rank.  Needs the configuration only."""
    device = _device(config, nodes)
    check_num_nodes(config.cluster, nodes)
    for asked in (demands(config, device == "cuda"), reference_demands(config, device == "cuda")):
        if asked:
            plan_layout(asked, nodes, config.cluster.colocate)


@asynccontextmanager
async def references_of(config: TuningConfig, model_path: str, site: Site) -> AsyncIterator[ReferencePool]:
    """Reference workers that are ready, for as long as the context lasts."""
    device, settings = _device(config, site.nodes), config.reference_settings
    layout = plan_layout(reference_demands(config, device == "cuda"), site.nodes, config.cluster.colocate)
    kwargs = {
        "model_path": model_path, "settings": settings, "temperature": TEMPERATURE,
        "chunk": config.learner.logprob_chunk, "dtype": dtype_name(config.model.dtype, device),
        "device": torch_device(device),
    }  # fmt: skip
    placement = None if site.handle is None else Placement.create(layout, config.cluster.placement_deadline_s)
    workers = WorkerGroup.launch(
        REFERENCE, ReferenceModel, [kwargs] * settings.num_workers, placement=placement, slots=layout.of(REFERENCE),
        start_deadline_s=config.cluster.start_deadline_s,
    )  # fmt: skip
    pool = ReferencePool(workers, settings.deadline_s, settings.token_budget, event=site.telemetry.event)
    try:
        await workers.ready()
        yield pool
    finally:
        await pool.close()
        await workers.shutdown()
        if placement is not None:
            placement.remove()


@asynccontextmanager
async def ranks_of(
    config: TuningConfig,
    model_path: str,
    rank_class: type,
    kwargs: Mapping[str, Any],
    handle: RayHandle | None,
    nodes: list[NodeSupply],
    facts: Sequence[Mapping[str, Any]],
) -> AsyncIterator[TuningFleet]:
    """Ranks that are ready, for as long as the context lasts.

    ``kwargs``: of ``rank_class``, besides what every rank gets.  ``facts``: launch.demands.node_facts of each node.
    """
    learner = config.learner
    device = _device(config, nodes)
    layout = plan_layout(demands(config, device == "cuda"), nodes, config.cluster.colocate)
    dtype = dtype_name(config.model.dtype, device)
    common: dict[str, Any] = {
        "rendezvous": Rendezvous(*meeting_point(layout, nodes, facts), learner.num_workers),
        "model_path": model_path,
        "settings": learner,
        "dtype": dtype,
        "device": torch_device(device),
        "seed": config.run.seed,
        **kwargs,
    }
    placement = None if handle is None else Placement.create(layout, config.cluster.placement_deadline_s)
    ranks = WorkerGroup.launch(
        ROLE, rank_class, [{"rank": rank, **common} for rank in range(learner.num_workers)],
        placement=placement, slots=layout.of(ROLE), start_deadline_s=learner.start_deadline_s,
    )  # fmt: skip
    try:
        await ranks.ready()
        yield TuningFleet(ranks, learner.update_deadline_s, layout, device, dtype)
    finally:
        await ranks.shutdown()
        if placement is not None:
            placement.remove()


def tuning_report(config: TuningConfig, facts: ModelFacts, nodes: Sequence[Mapping[str, Any]]) -> PreflightReport:
    """Judge a run against the nodes it would get.  ``nodes``: one ``launch.demands.node_facts()`` each."""
    report = PreflightReport()
    device, learner = config.cluster.device, config.learner
    on_gpu = device == "cuda" or (device == "auto" and any(node["gpus"] for node in nodes))
    native = on_gpu or all(node.get("native_bfloat16", False) for node in nodes)
    dtype = config.model.dtype
    need = estimate_learner(
        facts.num_params,
        learner.zero_stage,
        learner.num_workers,
        token_budget=learner.token_budget,
        hidden=facts.hidden,
        layers=facts.layers,
        intermediate=facts.intermediate,
        vocab=facts.vocab,
        logprob_chunk=learner.logprob_chunk,
        checkpointing=learner.gradient_checkpointing,
        compute_bytes=2 if dtype == "bfloat16" or (dtype == "auto" and native) else 4,
        offload_optimizer=learner.offload_optimizer != "none",
        offload_param=learner.offload_param != "none",
        adapter_params=facts.num_adapter_params,
        quantized=facts.quantized,
    )
    check_nodes(report, shared(config), nodes)
    supplies = [NodeSupply(node["hostname"], node["num_cpus"], len(node["gpus"]) * on_gpu) for node in nodes]
    asked = demands(config, on_gpu)
    needed = f"{learner.num_workers} ranks on {'GPUs' if on_gpu else 'CPU'}"
    there = f"{sum(s.num_gpus for s in supplies)} GPUs, {sum(s.num_cpus for s in supplies)} cores"
    try:
        report.layout = plan_layout(asked, supplies, config.cluster.colocate)
    except ShortfallError as error:
        problem = InputError(error.field, error.value, error.reason, error.remedy)
        report.add("placement", "cluster", needed, there, problem)
        return report
    if asked := reference_demands(config, on_gpu):
        try:
            plan_layout(asked, supplies, config.cluster.colocate)
        except ShortfallError as error:
            short = InputError(error.field, error.value, error.reason, error.remedy)
            report.add("placement of the reference", "cluster", f"{asked[0].num_workers} workers", there, short)
            return report
    report.add("placement", "cluster", needed, there)
    offloaded = need.offloaded_total if "cpu" in (learner.offload_optimizer, learner.offload_param) else 0
    for index, node in enumerate(nodes):
        ranks = [slot.index for slot in report.layout.slots if slot.node == index]
        if not ranks:
            continue
        bill = len(ranks) * (PROCESS_BYTES + offloaded)
        bill += need.host_bytes(ranks) if on_gpu else len(ranks) * (need.host_copy + need.total)
        _memory(report, config, node["hostname"], "host memory", bill, int(node["memory_free_bytes"]))
        if on_gpu:
            free = min(int(gpu.get("free_bytes", gpu["memory_bytes"])) for gpu in node["gpus"])
            _memory(report, config, node["hostname"], "GPU memory of a rank", need.total, free)
    return report


def _memory(report: PreflightReport, config: TuningConfig, host: str, what: str, needed: int, free: int) -> None:
    problem = None
    if needed > free:
        problem = InputError(
            "learner.token_budget", config.learner.token_budget,
            f"{host} has {show_bytes(free)} of {what} free, about {show_bytes(needed)} are needed",
            "lower it, set learner.gradient_checkpointing=true, a higher learner.zero_stage with more ranks, "
            "learner.offload_optimizer=cpu, or use a smaller model",
        )  # fmt: skip
    report.add(what, host, show_bytes(needed), f"{show_bytes(free)} free", problem)
