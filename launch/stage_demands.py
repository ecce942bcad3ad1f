"""What any command asks of the machines: workers and GPUs by role, stage by stage.  Stages come one after the other.

May import: cluster.*, launch.*.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from cluster.layout import Layout, NodeSupply, RoleDemand, plan_layout
from cluster.settings import ClusterSettings
from launch import label_fleet, tuning_place
from launch.compare_config import CompareConfig
from launch.config import RunConfig
from launch.demands import role_demands
from launch.engine_fleet import engine_demands
from launch.eval_config import EvalConfig
from launch.judge_workers import judge_demand
from launch.label_config import LabelConfig
from launch.machines import check_num_nodes, choose_device
from launch.revise_config import ReviseConfig
from launch.select import ANSWERS
from launch.select_config import SelectConfig
from launch.tuning_config import TuningConfig

Stages = dict[str, list[RoleDemand]]
OneCommand = RunConfig | TuningConfig | SelectConfig | LabelConfig | ReviseConfig | EvalConfig
AnyConfig = OneCommand | CompareConfig


def stage_demands(config: AnyConfig, on_gpu: bool) -> Stages:
    """By stage; a comparison has those of all its runs, which are planned for that."""
    if isinstance(config, CompareConfig):
        found = Stages()
        for name, own in _runs(config).items():
            found |= {f"{name}: {stage}": asked for stage, asked in stage_demands(own, on_gpu).items()}
        return found
    if isinstance(config, EvalConfig):
        return _of_eval(config, on_gpu)
    if isinstance(config, TuningConfig):
        reference = tuning_place.reference_demands(config, on_gpu)
        return ({"reference": reference} if reference else {}) | {"training": tuning_place.demands(config, on_gpu)}
    if isinstance(config, RunConfig):
        return {"training": role_demands(config, on_gpu)}
    if isinstance(config, ReviseConfig):
        asked = engine_demands(config.engines, config.cluster, on_gpu)
        return {"revising": asked} if asked else {}
    labelling = config if isinstance(config, LabelConfig) else config.labelling(ANSWERS)
    return {"sampling and scoring": label_fleet.demands(labelling, on_gpu)}


def _of_eval(config: EvalConfig, on_gpu: bool) -> Stages:
    """As launch/evaluate.py goes through them."""
    cluster, base, judge = config.cluster, config.base, config.eval.judge
    stages: Stages = {"sampling": engine_demands({"generator": config.generator}, cluster, on_gpu)}

    def model(name: str, num_workers: int, gpus: float | None) -> RoleDemand:
        return RoleDemand(name, num_workers, (1.0 if gpus is None else gpus) if on_gpu else 0.0)

    scoring = [RoleDemand("reward_workers", config.reward_workers.num_workers, 0.0)] if config.rewards else []
    for index, scorer in enumerate(config.reward_models):
        scoring.append(model(f"reward_models.{index}", scorer.num_workers, scorer.gpus_per_worker))
    scoring += [judge_demand(j, i, on_gpu, False, cluster.colocate) for i, j in enumerate(config.judges)]
    if scoring:
        stages["scoring"] = scoring
    if judge is not None and judge.endpoint is None:
        stages["judging"] = engine_demands({"eval.judge.generator": judge.generator}, cluster, on_gpu)
    return stages | {"log-probs": [model("base", base.num_workers, base.gpus_per_worker)]}


def _runs(config: CompareConfig) -> dict[str, OneCommand]:
    """One run of each recipe of a comparison: they differ by seed, name and folder alone."""
    from launch.compare_plan import make_plan
    from launch.compare_prepare import folder_of
    from launch.overrides import resolve

    plan, found = make_plan(config, folder_of(config)), dict[str, OneCommand]()
    for stage in plan.stages:
        if stage.recipe not in found:
            raw = copy.deepcopy(plan.recipes[stage.recipe])
            found[stage.recipe] = resolve(raw, stage.overrides, stage.recipe).config
    return found


def num_workers(stages: Stages) -> int:
    """At once."""
    return max((sum(demand.num_workers for demand in asked) for asked in stages.values()), default=0)


def num_gpus(stages: Stages, colocate: bool) -> float:
    """At once; roles that share GPUs need those of the widest one."""
    together = max if colocate else sum
    return max((together(d.num_workers * d.gpus_per_worker for d in asked) for asked in stages.values()), default=0.0)


def plan_stages(config: AnyConfig, nodes: Sequence[NodeSupply]) -> dict[str, Layout]:
    """A place for every worker of every stage.

    Raises:
        InputError: GPUs are asked for and there is none, or nodes are missing.
        ShortfallError: a stage has no place for a worker.
    """
    cluster: ClusterSettings = config.cluster
    device = choose_device(cluster, nodes, num_gpus(stage_demands(config, True), cluster.colocate))
    check_num_nodes(cluster, nodes)
    stages = stage_demands(config, device == "cuda")
    return {name: plan_layout(asked, nodes, cluster.colocate) for name, asked in stages.items()}
