"""Where an evaluation runs: one stage of workers after the other, so that no two big models share memory.

May import: actors.{generator, judge_worker, model_folders, reference, reward_ensemble, reward_worker, settings},
cluster.*, launch.{eval_config, judge_workers, machines}.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.generator import VLLMGenerator
from actors.judge_worker import JudgeWorker
from actors.model_folders import resolve_model
from actors.reference import ReferenceModel
from actors.reward_ensemble import scorer_class
from actors.reward_worker import RewardWorker
from actors.settings import GeneratorSettings
from cluster.layout import Layout, RoleDemand, plan_layout
from cluster.placement import Placement
from cluster.worker_group import WorkerGroup
from launch.eval_config import EvalConfig
from launch.judge_workers import judge_demand, judge_kwargs
from launch.machines import choose_device, connect, dtype_name, torch_device
from trainers.prompt_format import PromptFormat

MANY = 4096  # calls at once of an asyncio actor whose engine batches them
GENERATOR, FUNCTIONS, LOGPROBS = "generator", "reward_workers", "logprobs"


@dataclass(frozen=True)
class Role:
    """Workers of one kind: what they are made of, and the GPUs of each where there are GPUs."""

    name: str
    factory: type
    kwargs: tuple[Mapping[str, Any], ...]
    gpus: float
    concurrency: int
    deadline_s: float


class EvalCluster:
    """The machines of one evaluation; makes roles, and runs stages of them."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        fleets = [config.generator] + ([] if config.eval.judge is None else [config.eval.judge.generator])
        engines = max(fleet.num_workers for fleet in fleets)
        scorers = config.reward_workers.num_workers + sum(m.num_workers for m in config.reward_models)
        scorers += sum(judge_demand(j, i, False, False, False).num_workers for i, j in enumerate(config.judges))
        self._ray, self._nodes = connect(config.cluster, max(engines, scorers, config.base.num_workers))
        try:
            # Stages come one after the other, so the engines say how many GPUs there have to be at least.
            wanted = max(fleet.num_workers * fleet.tensor_parallel_size for fleet in fleets)
            self.device = choose_device(config.cluster, self._nodes, wanted)
        except BaseException:
            self.close()
            raise
        self.dtype = dtype_name(config.model.dtype, self.device)

    def close(self) -> None:
        if self._ray is not None:
            self._ray.stop()

    # --- roles --------------------------------------------------------------------------------

    def engines(self, who: str, path: str, max_length: int, settings: GeneratorSettings | None = None) -> Role:
        """Engines as ``settings`` says; by default as those of the models that are compared."""
        settings = settings or self._config.generator
        shared = {
            "model_path": path, "settings": settings, "dtype": self.dtype, "device": self.device,
            "max_length": max_length, "seed": self._config.run.seed,
        }  # fmt: skip
        kwargs = tuple({"name": f"{who}-{i}", **shared} for i in range(settings.num_workers))
        gpus = settings.gpus(self._config.cluster.colocate)
        return Role(GENERATOR, VLLMGenerator, kwargs, gpus, MANY, settings.start_deadline_s)

    def logprobs(self, path: str) -> Role:
        """A frozen model that scores completions at the sampling temperature."""
        base = self._config.base
        kwargs = {
            "model_path": path, "settings": base.model_copy(update={"path": None}), "chunk": base.logprob_chunk,
            "temperature": self._config.generator.sampling.temperature,
            "dtype": self.dtype, "device": torch_device(self.device),
        }  # fmt: skip
        return self._scorer(LOGPROBS, ReferenceModel, kwargs, base.num_workers, base.gpus_per_worker)

    def scorers(self, policy_path: str) -> list[Role]:
        """The reward functions, if there are any, then each reward model under its number."""
        config, roles = self._config, []
        if config.rewards:
            kwargs = {"rewards": config.rewards, "settings": config.reward_workers}
            count = config.reward_workers.num_workers
            deadline_s = config.cluster.start_deadline_s
            roles.append(Role(FUNCTIONS, RewardWorker, (kwargs,) * count, 0.0, 64, deadline_s))
        return roles + self._reward_models(policy_path, judged=False) + self._judges()

    def _judges(self) -> list[Role]:
        config, roles = self._config, []
        folder = Path(config.run.directory) / config.run.name
        for index, judge in enumerate(config.judges):
            kwargs = judge_kwargs(judge, index, folder, self.dtype, self.device, config.run.seed)
            gpus = judge_demand(judge, index, True, False, config.cluster.colocate).gpus_per_worker
            deadline_s = judge.generator.start_deadline_s
            roles.append(Role(f"judges.{index}", JudgeWorker, tuple(kwargs), gpus, MANY, deadline_s))
        return roles

    def judged_models(self, policy_path: str) -> list[Role]:
        """The reward models as they score pairs: bare scores, of tokens that are already their own."""
        return self._reward_models(policy_path, judged=True)

    def _reward_models(self, policy_path: str, judged: bool) -> list[Role]:
        prompts, roles = self._config.prompts, []
        form = PromptFormat(system=prompts.system, template=prompts.template, chat=prompts.chat)
        for index, model in enumerate(self._config.reward_models):
            own = resolve_model(model.paths[0]) if judged and model.retokenize else policy_path
            # Bare scores; but those of an ensemble's members are no reward before they are on one scale.
            scaled = model.ensemble is not None and model.normalize
            bare = {"normalize": scaled, "clip": None, "retokenize": False} if judged else {}
            kwargs = {
                "settings": model.model_copy(update=bare), "policy_path": own, "form": form,
                "dtype": self.dtype, "device": torch_device(self.device),
            }  # fmt: skip
            role = f"reward_models.{index}"
            roles.append(self._scorer(role, scorer_class(model), kwargs, model.num_workers, model.gpus_per_worker))
        return roles

    def _scorer(self, name: str, factory: type, kwargs: Mapping[str, Any], count: int, gpus: float | None) -> Role:
        deadline_s = self._config.cluster.start_deadline_s
        return Role(name, factory, (kwargs,) * count, 1.0 if gpus is None else gpus, 1, deadline_s)

    # --- stages -------------------------------------------------------------------------------

    def layout(self, roles: Sequence[Role]) -> Layout:
        """A place for every worker.  ShortfallError where there is none."""
        on_gpu = self.device == "cuda"
        demands = [RoleDemand(r.name, len(r.kwargs), r.gpus if on_gpu else 0.0) for r in roles]
        return plan_layout(demands, self._nodes, self._config.cluster.colocate)

    @asynccontextmanager
    async def stage(self, roles: Sequence[Role]) -> AsyncIterator[dict[str, WorkerGroup]]:
        """The workers of ``roles`` by name, ready; gone, with their memory, when the block ends."""
        layout = self.layout(roles)
        placement = None
        if self._ray is not None:
            placement = Placement.create(layout, self._config.cluster.placement_deadline_s)
        groups: dict[str, WorkerGroup] = {}
        try:
            for role in roles:
                groups[role.name] = WorkerGroup.launch(
                    role.name, role.factory, role.kwargs, placement=placement, slots=layout.of(role.name),
                    concurrency=role.concurrency, start_deadline_s=role.deadline_s,
                )  # fmt: skip
            for group in groups.values():
                await group.ready()
            yield groups
        finally:
            for group in groups.values():
                await group.shutdown()
            if placement is not None:
                placement.remove()
            gc.collect()  # in process: an engine that was closed is a cycle of references, and the next one is as big
