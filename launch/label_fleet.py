"""The workers of a labelling run: generators, and whoever labels.

May import: actors.*, cluster.*, launch.{judging, label_config, label_prepare, label_sources, machines}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.generator import VLLMGenerator
from actors.generator_fleet import GeneratorFleet
from actors.judge_worker import JudgeScorer
from actors.pair_worker import PairWorker
from actors.reward_ensemble import scorer_class
from actors.reward_worker import RewardWorker
from actors.scorer_pools import RewardModelPool, RewardPool
from actors.settings import GeneratorSettings, RewardModelSettings
from cluster.layout import Layout, RoleDemand, plan_layout
from cluster.placement import Placement, RayHandle
from cluster.worker_group import WorkerGroup
from launch.judging import make_respondent, pair_judge
from launch.label_config import LabelConfig
from launch.label_prepare import PAIR_FIELD, PreparedLabel
from launch.label_sources import JudgeLabeller, Labeller, PairLabeller, ScoreLabeller
from launch.machines import Device, choose_device, connect, dtype_name, torch_device
from trainers.asking import Respondent
from trainers.judge import RubricJudge
from trainers.prompt_format import PromptFormat

MANY = 4096  # calls at once of an asyncio actor whose engine batches them


@dataclass
class LabelFleet:
    """A running system."""

    generator: GeneratorFleet
    labeller: Labeller
    respondent: Respondent | None  # whom a judge asks
    _groups: list[WorkerGroup]
    _placement: Placement | None
    _ray: RayHandle | None

    async def close(self) -> None:
        if self.respondent is not None:
            await self.respondent.close()
        await _close(self._groups, self._placement, self._ray)


async def _close(groups: list[WorkerGroup], placement: Placement | None, handle: RayHandle | None) -> None:
    for group in groups:
        await group.shutdown()
    if placement is not None:
        placement.remove()
    if handle is not None:
        handle.stop()


def demands(config: LabelConfig, on_gpu: bool) -> list[RoleDemand]:
    """What each role asks for."""

    def engines(name: str, settings: GeneratorSettings) -> RoleDemand:
        gpus = settings.gpus(config.cluster.colocate) if on_gpu else 0.0
        return RoleDemand(name, settings.num_workers, gpus)

    roles = [engines("generator", config.generator)]
    judge, model = config.label.judge, config.label.reward_model
    if model is not None:
        asked = 1.0 if model.gpus_per_worker is None else model.gpus_per_worker
        roles.append(RoleDemand("reward_model", model.num_workers, asked if on_gpu else 0.0))
    elif judge is None:
        roles.append(RoleDemand("reward_workers", config.reward_workers.num_workers, 0.0))
    elif judge.path is not None:
        roles.append(engines("judge", judge.generator))
    return roles


async def start_fleet(config: LabelConfig, prepared: PreparedLabel) -> LabelFleet:
    """Join or start Ray, place and construct every worker; returns when all are ready."""
    handle, nodes = connect(config.cluster, sum(d.num_workers for d in demands(config, False)))
    placement: Placement | None = None
    groups: list[WorkerGroup] = []
    try:
        wanted = sum(d.num_workers * d.gpus_per_worker for d in demands(config, True))
        device = choose_device(config.cluster, nodes, wanted)
        layout = plan_layout(demands(config, device == "cuda"), nodes, config.cluster.colocate)
        if handle is not None:
            placement = Placement.create(layout, config.cluster.placement_deadline_s)
        start = _Starter(config, layout, placement, device, groups)
        settings = config.candidate_generator
        generators = start.engines("generator", prepared.model_path, settings, prepared.max_length)
        generator = GeneratorFleet(generators, settings.group_deadline_s)
        labeller = _labeller(config, prepared, start, generator)
        for group in groups:
            await group.ready()
    except BaseException:
        await _close(groups, placement, handle)
        raise
    return LabelFleet(generator, labeller, start.respondent, groups, placement, handle)


def _labeller(config: LabelConfig, prepared: PreparedLabel, start: _Starter, policy: GeneratorFleet) -> Labeller:
    label, workers = config.label, config.reward_workers
    # Every try of a function, and as long again for a queue of prompts before it.
    deadline_s = 2 * workers.timeout_s * (workers.num_retries + 1) + 60.0
    if label.judge is not None:
        judge, found = label.judge, prepared.judge
        assert found is not None
        judges = policy
        if judge.path is not None:
            own = judge.generator
            judges = GeneratorFleet(start.engines("judge", found.path, own, found.max_length), own.group_deadline_s)
        folder = Path(config.run.directory) / config.run.name
        start.respondent = respondent = make_respondent(judge, found, "label.judge", folder, judges)
        if judge.rubric is not None:
            marks = RubricJudge(respondent, judge.rubric, judge.max_tokens, judge.system)
            return ScoreLabeller(config, JudgeScorer(marks))
        return JudgeLabeller(config, pair_judge(judge, respondent, judge.pair_template), prepared.principles)
    if label.reward_model is not None:
        model = label.reward_model
        scorers = start.reward_model(model, prepared.model_path)
        return ScoreLabeller(config, RewardModelPool(scorers, model.deadline_s, model.token_budget))
    if label.pair is not None:
        kwargs = {"function": label.pair, "settings": workers, "field": PAIR_FIELD}
        return PairLabeller(config, start.functions(PairWorker, kwargs), deadline_s)
    rewards = start.functions(RewardWorker, {"rewards": label.rewards, "settings": workers})
    return ScoreLabeller(config, RewardPool(rewards, deadline_s))


@dataclass
class _Starter:
    """Launches groups into their slots and notes them down."""

    config: LabelConfig
    layout: Layout
    placement: Placement | None
    device: Device
    groups: list[WorkerGroup] = field(default_factory=list)
    respondent: Respondent | None = None

    def engines(self, role: str, path: str, settings: GeneratorSettings, max_length: int) -> WorkerGroup:
        shared = {
            "model_path": path, "settings": settings, "device": self.device, "max_length": max_length,
            "dtype": self.dtype, "seed": self.config.run.seed,
        }  # fmt: skip
        kwargs = [{"name": f"{role}-{i}", **shared} for i in range(settings.num_workers)]
        return self._launch(role, VLLMGenerator, kwargs, MANY, settings.start_deadline_s)

    def reward_model(self, settings: RewardModelSettings, policy_path: str) -> WorkerGroup:
        prompts = self.config.prompts
        kwargs = {
            "settings": settings, "policy_path": policy_path, "dtype": self.dtype,
            "device": torch_device(self.device),
            "form": PromptFormat(system=prompts.system, template=prompts.template, chat=prompts.chat),
        }  # fmt: skip
        deadline_s = self.config.cluster.start_deadline_s
        return self._launch("reward_model", scorer_class(settings), [kwargs] * settings.num_workers, 1, deadline_s)

    @property
    def dtype(self) -> str:
        return dtype_name(self.config.model.dtype, self.device)

    def functions(self, factory: type, kwargs: Mapping[str, Any]) -> WorkerGroup:
        count = self.config.reward_workers.num_workers
        return self._launch("reward_workers", factory, [kwargs] * count, 64, self.config.cluster.start_deadline_s)

    def _launch(self, role: str, factory: type, kwargs: list[Any], concurrency: int, deadline_s: float) -> WorkerGroup:
        group = WorkerGroup.launch(
            role, factory, kwargs, placement=self.placement, slots=self.layout.of(role), concurrency=concurrency,
            start_deadline_s=deadline_s,
        )  # fmt: skip
        self.groups.append(group)
        return group
