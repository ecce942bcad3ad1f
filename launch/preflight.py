"""Checks before anything is allocated: is there a place for every role, does it fit, are all nodes alike?

``node_facts`` runs on every node; ``preflight_report`` judges what came back and is pure.  All problems
are collected, each one an InputError's line, so that one look at the report is enough.
May import: rich, the configuration, launch.demands, launch.estimate, launch.model_facts,
cluster.layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import ShortfallError
from cluster.layout import Layout, NodeSupply, plan_layout
from launch.config import RunConfig
from launch.demands import estimates, node_facts, num_gpus_asked, role_demands
from launch.estimate import MemoryEstimate, show_bytes
from launch.model_facts import ModelFacts, check_model_folder
from trainers.errors import InputError

__all__ = ["ModelFacts", "PreflightReport", "check_model_folder", "node_facts", "preflight_report", "role_demands"]

NEEDED_PACKAGES = ("torch", "transformers", "vllm", "ray", "deepspeed")
PROCESS_BYTES = 2**30  # host memory of a worker before its model: interpreter, torch, vLLM or DeepSpeed
FILE_VERSIONS = 2  # pushed files that exist at once: the new one, and the one still mapped


@dataclass(frozen=True, slots=True)
class Row:
    """One check: what, where, what is needed, what was found."""

    check: str
    where: str
    needed: str
    found: str
    passed: bool


@dataclass
class PreflightReport:
    """Every check that was made, and the problems among them."""

    rows: list[Row] = field(default_factory=list)
    problems: list[InputError] = field(default_factory=list)
    layout: Layout | None = None  # where every worker would be; None when there is no place

    @property
    def passed(self) -> bool:
        return not self.problems

    def add(self, check: str, where: str, needed: str, found: str, problem: InputError | None = None) -> None:
        self.rows.append(Row(check, where, needed, found, problem is None))
        if problem is not None:
            self.problems.append(problem)

    def table(self) -> Table:
        table = Table("", "check", "where", "needed", "found", title="preflight")
        for row in self.rows:
            mark = "[green]ok[/]" if row.passed else "[red]no[/]"
            table.add_row(mark, row.check, row.where, row.needed, row.found)
        return table

    def show(self, console: Console) -> None:
        console.print(self.table())
        for problem in self.problems:
            console.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)


def preflight_report(config: RunConfig, facts: ModelFacts, nodes: Sequence[Mapping[str, Any]]) -> PreflightReport:
    """Judge a run against the nodes it would get.  ``nodes``: one ``node_facts()`` each."""
    report = PreflightReport()
    device = config.cluster.device
    on_gpu = device == "cuda" or (device == "auto" and any(node["gpus"] for node in nodes))
    native = on_gpu or all(node.get("native_bfloat16", False) for node in nodes)
    dtype = config.model.dtype
    compute_bytes = 2 if dtype == "bfloat16" or (dtype == "auto" and native) else 4
    check_nodes(report, config, nodes)
    _check_model(report, config, facts)
    needs = estimates(config, facts, on_gpu, compute_bytes)
    supplies = [NodeSupply(node["hostname"], node["num_cpus"], len(node["gpus"]) * on_gpu) for node in nodes]
    demands = role_demands(config, on_gpu)
    num_workers = sum(demand.num_workers for demand in demands)
    needed = f"{num_gpus_asked(config):g} GPUs" if on_gpu else f"{num_workers} workers on CPU"
    there = f"{sum(s.num_gpus for s in supplies)} GPUs, {sum(s.num_cpus for s in supplies)} cores"
    try:
        layout = plan_layout(demands, supplies, config.cluster.colocate)
    except ShortfallError as error:
        problem = InputError(error.field, error.value, error.reason, error.remedy)
        report.add("placement", "cluster", needed, there, problem)
    else:
        report.layout = layout
        report.add("placement", "cluster", needed, there)
        _check_host_memory(report, config, layout, nodes, needs, on_gpu)
        if on_gpu:
            _check_gpu_memory(report, config, layout, nodes, needs)
    _check_push(report, config, facts, nodes, on_gpu, compute_bytes)
    return report


def check_nodes(report: PreflightReport, config: RunConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Add the line on whether as many nodes are there as ``cluster.num_nodes`` asks for."""
    wanted = config.cluster.num_nodes
    problem = None
    if wanted is not None and len(nodes) < wanted:
        reason = f"only {len(nodes)} nodes are there"
        problem = InputError("cluster.num_nodes", wanted, reason, "start the missing nodes or lower it")
    report.add("nodes", "cluster", str(wanted or "any"), str(len(nodes)), problem)
    packages = sorted({name for node in nodes for name in node["versions"]} | set(NEEDED_PACKAGES))
    for name in packages:
        versions = {str(node["hostname"]): node["versions"].get(name) for node in nodes}
        problem = None
        absent = [host for host, version in versions.items() if version is None]
        if absent and name in NEEDED_PACKAGES:
            problem = InputError(name, None, f"is not installed on {', '.join(absent)}", "install Burnish there")
        elif len(set(versions.values())) > 1:
            odd = ", ".join(f"{version} on {host}" for host, version in versions.items())
            problem = InputError(name, odd, "versions differ between nodes", "use one image or environment everywhere")
        found = ", ".join(sorted({str(version) for version in versions.values()}))
        report.add(f"version of {name}", "every node", "one", found, problem)
    for node in nodes:
        if "model_readable" in node:
            problem = None
            if not node["model_readable"]:
                reason = f"cannot be read on {node['hostname']}"
                problem = InputError("model.path", config.model.path, reason, "copy it there or use a shared disk")
            report.add("model folder", node["hostname"], "readable", "yes" if problem is None else "no", problem)
        if "rendezvous" in node:
            (address, port), problem = node["rendezvous"], None
            if port is None:
                reason = f"no port can be bound at {address}"
                problem = InputError("node", node["hostname"], reason, "mend its host name, firewall or network")
            report.add("a port to meet at", node["hostname"], "one", f"{address}:{port}", problem)


def _check_model(report: PreflightReport, config: RunConfig, facts: ModelFacts) -> None:
    longest, problem = config.model.max_length, None
    if longest is not None and longest > facts.max_length:
        reason = f"the model was made for {facts.max_length} positions"
        problem = InputError("model.max_length", longest, reason, f"use at most {facts.max_length}")
    report.add("longest sample", "model", f"{longest or 'any'} tokens", f"{facts.max_length} tokens", problem)
    width = config.generator.tensor_parallel_size
    if width > 1:
        problem = None
        if facts.heads % width:
            reason = f"the model's {facts.heads} attention heads cannot be split by it"
            problem = InputError("generator.tensor_parallel_size", width, reason, "use a divisor of the heads")
        report.add("tensor parallel size", "generator", str(width), f"{facts.heads} heads", problem)


def _check_host_memory(
    report: PreflightReport,
    config: RunConfig,
    layout: Layout,
    nodes: Sequence[Mapping[str, Any]],
    needs: Mapping[str, MemoryEstimate],
    on_gpu: bool,
) -> None:
    """Host memory: everything on a CPU; with GPUs processes, offloaded states, and models on their way to the GPUs or
    checkpoints in flight.
    """
    offloads = [w for s in (config.learner, config.critic) for w in (s.offload_optimizer, s.offload_param)]
    for index, node in enumerate(nodes):
        roles = Counter(slot.role for slot in layout.slots if slot.node == index)
        needed = sum(roles.values()) * PROCESS_BYTES
        for role, count in roles.items():
            if role in needs:
                need = needs[role]
                # States on nvme take little memory; with both kinds of offload the sum is an upper bound.
                needed += count * (need.offloaded_total if "cpu" in offloads else 0)
                ranks = [s.index for s in layout.slots if s.role == role and s.node == index]
                needed += need.host_bytes(ranks) if on_gpu else count * (need.host_copy + need.total)
        serving = min(config.generator.num_workers, config.learner.num_workers)  # the first ranks: actors/publisher.py
        here = sum(s.role == "learner" and s.node == index and s.index < serving for s in layout.slots)
        needed += here * needs["learner"].staged
        free = int(node["memory_free_bytes"])
        problem = None
        if needed > free:
            shown = ", ".join(f"{count} {role}" for role, count in roles.items())
            reason = f"{node['hostname']} has {show_bytes(free)} free, {shown} need about {show_bytes(needed)}"
            problem = InputError(
                "learner.token_budget", config.learner.token_budget, reason,
                "lower it or generator.kv_cache_gib, use fewer workers, a higher learner.zero_stage or a smaller model",
            )  # fmt: skip
        report.add("host memory", node["hostname"], show_bytes(needed), f"{show_bytes(free)} free", problem)


def _check_gpu_memory(
    report: PreflightReport,
    config: RunConfig,
    layout: Layout,
    nodes: Sequence[Mapping[str, Any]],
    needs: Mapping[str, MemoryEstimate],
) -> None:
    share = config.generator.gpu_memory_utilization
    for index, node in enumerate(nodes):
        roles = {slot.role for slot in layout.slots if slot.node == index and slot.gpus}
        if not roles:
            continue
        # The smallest GPU of a node decides: which worker gets which is up to the placement.
        total = min(int(gpu["memory_bytes"]) for gpu in node["gpus"])
        free = min(int(gpu.get("free_bytes", gpu["memory_bytes"])) for gpu in node["gpus"])
        bills = {role: needs[role].total for role in roles if role in needs}
        if "generator" in bills:
            claim, least, problem = int(share * total), show_bytes(bills["generator"]), None
            if bills["generator"] > claim:
                reason = f"that is {show_bytes(claim)} of a GPU; weights and one sample need {least}"
                remedy = "raise it or generator.tensor_parallel_size, or lower model.max_length"
                problem = InputError("generator.gpu_memory_utilization", share, reason, remedy)
            report.add("generator's share", node["hostname"], least, show_bytes(claim), problem)
            bills["generator"] = claim
        groups = [bills] if config.cluster.colocate else [{role: bill} for role, bill in bills.items()]
        for group in groups:
            needed, problem = sum(group.values()), None
            names = " + ".join(sorted(group))
            if needed > free:
                there = f"a GPU of {node['hostname']} has {show_bytes(free)} free"
                reason = f"{there}, {names} need about {show_bytes(needed)}"
                if "learner" in group:
                    problem = InputError(
                        "learner.token_budget", config.learner.token_budget, reason,
                        "lower it, set learner.gradient_checkpointing=true, learner.zero_stage=3 with more ranks, or "
                        "learner.offload_optimizer=cpu",
                    )  # fmt: skip
                elif "generator" in group:
                    problem = InputError("generator.gpu_memory_utilization", share, reason, "lower it or free the GPU")
                else:
                    role = min(group)
                    name, _, number = role.partition(".")
                    section = getattr(config, name)[int(number)] if number else getattr(config, name)
                    budget = section.token_budget
                    problem = InputError(f"{role}.token_budget", budget, reason, "lower it or free the GPU")
            there = f"{show_bytes(free)} free"
            report.add(f"GPU memory of {names}", node["hostname"], show_bytes(needed), there, problem)


def _check_push(
    report: PreflightReport,
    config: RunConfig,
    facts: ModelFacts,
    nodes: Sequence[Mapping[str, Any]],
    on_gpu: bool,
    compute_bytes: int,
) -> None:
    backend, colocate = config.push.backend, config.cluster.colocate
    if backend == "auto":
        backend = ("ipc" if colocate else "nccl") if on_gpu else "file"
    problem = None
    if backend == "ipc" and not on_gpu:  # nccl runs over gloo there
        problem = InputError("push.backend", backend, "shares GPU memory and there is no GPU", "use file or auto")
    elif backend == "ipc" and not colocate:
        problem = InputError("push.backend", "ipc", "joins roles that share a GPU", "use nccl or cluster.colocate=true")
    elif backend == "nccl" and colocate:
        problem = InputError("push.backend", "nccl", "cannot join two roles on one GPU", "use ipc")
    report.add("weight push", "cluster", backend, "GPUs" if on_gpu else "CPU only", problem)
    if backend == "file" and config.push.directory is None:
        needed = FILE_VERSIONS * facts.num_params * compute_bytes
        if facts.num_adapter_params and not config.pushes_merged:
            needed = FILE_VERSIONS * facts.num_adapter_params * 4  # float32
        for node in nodes:
            free = int(node["shm_free_bytes"])
            # Not a problem: launch/assemble.py then pushes by way of the run folder, which is slower.
            place = "" if needed <= free else ": pushes go through the run folder"
            report.add("shared memory", node["hostname"], show_bytes(needed), f"{show_bytes(free)} free{place}")
