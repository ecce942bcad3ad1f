"""``burnish validate``: everything ``burnish train`` would refuse, as one report, without a worker or a run folder.

May import: rich, cluster.*, launch.*.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.layout import Layout, NodeSupply, plan_layout
from cluster.placement import RayHandle
from launch import tuning_place
from launch.config import RunConfig
from launch.demands import node_facts, num_gpus_asked, num_workers, role_demands
from launch.machines import check_num_nodes, choose_device, connect
from launch.node_probe import gather_facts, local_nodes
from launch.preflight import PreflightReport, preflight_report
from launch.prepare import Prepared, prepare
from launch.tuning_config import TuningConfig
from launch.tuning_place import shared
from launch.tuning_prepare import prepare_tuning

REFUSED = 2
Joined = tuple[RayHandle | None, list[NodeSupply]]


def validate(config: RunConfig | TuningConfig, console: Console) -> int:
    """Print where every worker would be and what was checked; 0 when all is well, else 2 with a line a problem.

    Joins the cluster a run would join; where a run would start Ray on this machine alone, nothing is started.

    Raises:
        InputError: the model folder, the data or a reward cannot be used.
    """
    if isinstance(config, TuningConfig):
        tuning = prepare_tuning(config)
        console.print(tuning.task.summary, markup=False, highlight=False, soft_wrap=True)
        facts = _facts(shared(config), tuning.base.path, lambda: connect(config.cluster, config.learner.num_workers))
        report = tuning_place.tuning_report(config, tuning.base.facts, facts)
    else:
        prepared = prepare(config)
        facts = _facts(config, prepared.model_path, lambda: connect(config.cluster, num_workers(config)))
        report = preflight_report(config, prepared.facts, facts)
    if report.layout is not None:
        console.print(layout_table(report.layout))
    console.print(report.table())
    for problem in report.problems:
        print(f"burnish: {problem}", file=sys.stderr)
    return 0 if report.passed else REFUSED


def _facts(config: RunConfig, model_path: str, join: Callable[[], Joined]) -> list[dict[str, Any]]:
    """What this machine is like, or every node of the cluster that a run would ``join``."""
    if local_nodes(config) is not None:
        return [node_facts(model_path)]
    handle, nodes = join()
    try:
        return asyncio.run(gather_facts(config, model_path, nodes))
    finally:
        if handle is not None:
            handle.stop()


def layout_table(layout: Layout) -> Table:
    """One row a worker: its node, GPUs, cores."""
    rows = layout.table()
    table = Table(title="layout")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("role", "node") else "right")
    for row in rows:
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table


def refuse_shortfall(config: RunConfig, nodes: list[NodeSupply]) -> None:
    """InputError or ShortfallError when there is no place for every worker.  Needs the configuration only."""
    device = choose_device(config.cluster, nodes, num_gpus_asked(config))
    check_num_nodes(config.cluster, nodes)
    plan_layout(role_demands(config, device == "cuda"), nodes, config.cluster.colocate)


def refuse_problems(config: RunConfig, prepared: Prepared, facts: Sequence[Mapping[str, Any]]) -> PreflightReport:
    """The report on these nodes; the first problem in it is raised."""
    report = preflight_report(config, prepared.facts, facts)
    if report.problems:
        raise report.problems[0]
    return report
