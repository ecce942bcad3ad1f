"""``burnish validate``: everything a command would refuse, without a worker or a run folder; of training as one report.

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
from launch.compare_config import CompareConfig
from launch.compare_prepare import prepare_compare
from launch.config import RunConfig
from launch.demands import node_facts, num_gpus_asked, num_workers, role_demands
from launch.eval_config import EvalConfig
from launch.eval_prepare import prepare_eval
from launch.label_config import LabelConfig
from launch.label_prepare import prepare_label
from launch.machines import check_num_nodes, choose_device, connect
from launch.node_probe import gather_facts, local_nodes
from launch.preflight import PreflightReport, preflight_report
from launch.prepare import Prepared, prepare
from launch.revise_config import ReviseConfig
from launch.revise_prepare import prepare_revise
from launch.select import SFT
from launch.select_config import SelectConfig
from launch.stage_demands import AnyConfig, plan_stages, stage_demands
from launch.stage_demands import num_workers as most_workers
from launch.tuning_config import TuningConfig
from launch.tuning_place import shared
from launch.tuning_prepare import prepare_tuning

REFUSED = 2
Joined = tuple[RayHandle | None, list[NodeSupply]]


def validate(config: AnyConfig, console: Console, name: str) -> int:
    """Print where every worker of recipe ``name`` would be and what was checked.

    0 when all is well, else 2 with a line a problem.  Joins the cluster that the command would join; where it would
    start Ray on this machine alone, nothing is started.

    Raises:
        InputError: the model folder, the data, a reward or another input cannot be used.
        ShortfallError: a worker of a command that does not train has no place.
    """
    if isinstance(config, RunConfig | TuningConfig):
        return _validate_training(config, console)
    _prepare(config)
    _validate_places(config, console)
    print(f"{name}: configuration, models, data and places are valid")
    return 0


def _prepare(config: SelectConfig | LabelConfig | ReviseConfig | EvalConfig | CompareConfig) -> None:
    """Look at what the command would look at before its first worker."""
    match config:
        case LabelConfig():
            prepare_label(config)
        case SelectConfig():
            prepare_label(config.labelling(SFT))
        case ReviseConfig():
            prepare_revise(config)
        case EvalConfig():
            prepare_eval(config)
        case CompareConfig():
            prepare_compare(config)


def _validate_training(config: RunConfig | TuningConfig, console: Console) -> int:
    """One report on all that training would refuse."""
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


def _validate_places(config: AnyConfig, console: Console) -> None:
    """Print where every worker would be, stage by stage."""
    handle, nodes = None, local_nodes(config.cluster)
    if nodes is None:
        handle, nodes = connect(config.cluster, most_workers(stage_demands(config, False)))
    try:
        layouts = plan_stages(config, nodes)
    finally:
        if handle is not None:
            handle.stop()
    if isinstance(config, CompareConfig):  # dozens
        console.print(f"{len(layouts)} stages, and a place for every worker of each", markup=False, highlight=False)
        return
    for name, layout in layouts.items():
        console.print(layout_table(layout, name))


def _facts(config: RunConfig, model_path: str, join: Callable[[], Joined]) -> list[dict[str, Any]]:
    """What this machine is like, or every node of the cluster that a run would ``join``."""
    if local_nodes(config.cluster) is not None:
        return [node_facts(model_path)]
    handle, nodes = join()
    try:
        return asyncio.run(gather_facts(config, model_path, nodes))
    finally:
        if handle is not None:
            handle.stop()


def layout_table(layout: Layout, title: str = "layout") -> Table:
    """One row a worker: its node, GPUs, cores."""
    rows = layout.table()
    table = Table(title=title)
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
