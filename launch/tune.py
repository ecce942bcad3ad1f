"""``burnish train`` for SFT, reward models and preference learning: one run from its folder to the folder it exports.

What is learned is a task's (launch/tuning_task.py); this is what all tasks share: everything that can be refused is
refused before Ray starts, units are drawn from the mixture, steps, evaluations and checkpoints follow each other, a
signal stops with a checkpoint, and a resumed run trains every unit of the surviving lineage exactly once.
May import: everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.fleet import Gang
from actors.lora_settings import LoRAPlan
from cluster.checkpoints import Checkpoint, CheckpointStore
from cluster.layout import NodeSupply
from cluster.placement import RayHandle
from launch.alarm_watch import AlarmWatch
from launch.checkpointing import Checkpointer
from launch.demands import node_facts
from launch.journal import read_rows
from launch.machines import connect
from launch.node_probe import gather_facts, local_nodes
from launch.overrides import ResolvedConfig, dump_yaml
from launch.prepare import check_run_folder, run_folder
from launch.progress import Progress
from launch.resuming import earlier_attempts
from launch.rolling_back import WatchedRecorder
from launch.run_folder import entered
from launch.signals import stop_on_signals
from launch.telemetry import Telemetry
from launch.tuning_config import TuningConfig
from launch.tuning_place import ranks_of, refuse_shortfall, shared, tuning_report
from launch.tuning_prepare import PreparedTuning, made_with, newest_checkpoint, prepare_tuning
from launch.tuning_task import BaseModelFolder, Site, TuningFleet, TuningTask
from trainers.alarms import AlarmBoard
from trainers.errors import InputError
from trainers.metrics import METRICS
from trainers.mixture import MixtureStream

__all__ = ["BaseModelFolder", "PreparedTuning", "TuningFleet", "TuningTask", "prepare_tuning", "tune"]


def tune(resolved: ResolvedConfig, resume: bool, console: Console) -> Path:
    """Run to the end, or to a signal.  Returns the run folder."""
    config = resolved.config
    assert isinstance(config, TuningConfig)
    folder = run_folder(shared(config))
    check, ready = partial(check_run_folder, shared(config), resume), partial(_prepared, config, folder, resume)
    with entered(folder, resume, check, ready) as (checkpoint, prepared, facts):
        run = _Run(resolved, config, prepared, folder, checkpoint, console)
        model = prepared.base.facts
        about = f"{model.architecture}, {model.num_params / 1e6:.0f}M parameters; {prepared.task.summary}"
        console.print(f"{config.run.name}: {about}", markup=False, highlight=False, soft_wrap=True)
        return asyncio.run(run.go(facts))


def _prepared(
    config: TuningConfig, folder: Path, resume: bool
) -> tuple[Checkpoint | None, PreparedTuning, list[dict[str, Any]] | None]:
    """Where the run goes on from, its inputs, and what this node is if nobody else takes part."""
    checkpoint = newest_checkpoint(config, folder) if resume else None
    here = local_nodes(config.cluster)
    if here is not None:
        refuse_shortfall(config, here)
    prepared = prepare_tuning(config)
    facts = None
    if here is not None:
        facts = [node_facts(prepared.base.path)]
        _refuse_problems(config, prepared, facts)
    return checkpoint, prepared, facts


def _refuse_problems(config: TuningConfig, prepared: PreparedTuning, facts: Sequence[Mapping[str, Any]]) -> None:
    if problems := tuning_report(config, prepared.base.facts, facts).problems:
        raise problems[0]


class _Run:
    """What one run holds while it goes on."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        config: TuningConfig,
        prepared: PreparedTuning,
        folder: Path,
        checkpoint: Checkpoint | None,
        console: Console,
    ) -> None:
        self.resolved, self.config, self.task = resolved, config, prepared.task
        self.base, self.num_steps = prepared.base, prepared.num_steps
        self.folder, self.checkpoint, self.console = folder, checkpoint, console
        kept = config.checkpoint
        self.store = CheckpointStore(folder / "checkpoints", kept.keep, kept.keep_best, kept.best)
        self.stream = MixtureStream(self.task.sizes, config.data.weights, config.run.seed)
        self.step, self.num_tokens = 0, 0.0
        before, self.wandb_id = earlier_attempts(folder)
        self.is_resumed = checkpoint is not None or self.wandb_id is not None or before >= 0
        self.incarnation = before + 1
        if checkpoint is not None:
            state = checkpoint.metadata
            if state["data"] != self.task.digest:
                reason = "the rows, their order or their tokens are not those the checkpoint was made with"
                raise InputError("data.train", config.data.names, reason, "restore them, or start a new run")
            self.stream.load_state_dict(state["stream"])
            self.step, self.num_tokens = checkpoint.step, float(state["num_tokens"])
            self.wandb_id = state.get("wandb_id") or self.wandb_id
        self.board = AlarmBoard(config.alarms)
        if checkpoint is not None and "alarms" in checkpoint.metadata:
            self.board.load_state_dict(checkpoint.metadata["alarms"])
        self.stopping = False
        self.saver: Checkpointer
        self.fleet: TuningFleet

    async def go(self, facts: Sequence[Mapping[str, Any]] | None) -> Path:
        handle, nodes = connect(self.config.cluster, self.config.learner.num_workers)
        try:
            if facts is None:
                facts = await gather_facts(shared(self.config), self.base.path, nodes)
                _refuse_problems(self.config, PreparedTuning(self.base, self.task, self.num_steps), facts)
            await self._record_run(handle, nodes, facts)
        finally:
            if handle is not None:
                handle.stop()
        self.console.print(summary(self.folder, self.task.key_metrics))
        return self.folder

    async def _record_run(
        self, handle: RayHandle | None, nodes: list[NodeSupply], facts: Sequence[Mapping[str, Any]]
    ) -> None:
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump_yaml(self.resolved))
        live = self.console.is_terminal if config.telemetry.progress is None else config.telemetry.progress
        progress = Progress(self.num_steps, self.console, live)
        self.telemetry = Telemetry(
            self.folder, config.model_dump(mode="json"), config.telemetry, watcher=progress,
            wandb_id=self.wandb_id, resume_step=self.step if self.checkpoint else None,
        )  # fmt: skip
        watch = AlarmWatch(self.board, self.telemetry, self.folder)
        self.recorder = WatchedRecorder(self.telemetry, watch, self.store, self._stop)
        try:
            self.telemetry.event("data", step=self.step, **self.task.report)
            if self.is_resumed:
                source = str(self.checkpoint.path) if self.checkpoint else "none: from the beginning"
                self.telemetry.event("resumed", step=self.step, checkpoint=source)
            data = self.folder / "data"
            data.mkdir(exist_ok=True)
            self.task.write(data)
            await self.task.before_ranks(Site(handle, nodes, self.telemetry), data)
            started = time.perf_counter()
            kwargs = {"num_steps": self.num_steps, "lora": self._lora_plan(), **self.task.rank_kwargs(data)}
            async with ranks_of(config, self.base.path, self.task.rank_class, kwargs, handle, nodes, facts) as fleet:
                self.fleet = fleet
                if self.checkpoint is not None:
                    await fleet.call("load", str(self.checkpoint.path / "learner"))
                self.telemetry.event(
                    "ready", step=self.step, version=f"{self.incarnation}.{self.step}", device=fleet.device,
                    dtype=fleet.dtype, start_s=round(time.perf_counter() - started, 2), layout=fleet.layout.table(),
                )  # fmt: skip
                saved, wait_s = self.step if self.checkpoint is not None else -1, config.checkpoint.wait_s
                gang = Gang(fleet.ranks, fleet.deadline_s)
                self.saver = Checkpointer(self.store, {"learner": gang}, self.telemetry, wait_s, saved)
                try:
                    await self._train()
                finally:
                    await self.saver.close()
        except BaseException as error:
            self.telemetry.event("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            progress.close()
            self.telemetry.close()

    def _lora_plan(self) -> LoRAPlan | None:
        config = self.config
        if config.model.lora is None:
            return None
        return LoRAPlan(
            config.model.lora, config.model.quantization, self.base.adapter,
            merged_export=config.checkpoint.export_merged, reference=config.own_reference,
        )

    async def _train(self) -> None:
        every = self.config.checkpoint.every
        async with stop_on_signals(self._stop, self.telemetry, self.config.checkpoint.grace_s):
            if self.step == 0 and (metrics := await self._evaluate()):
                self.recorder.step(0, metrics)
            while self.step < self.num_steps and not self.stopping:
                await self._step()
                if every and self.step % every == 0:
                    await self._save()
            await self.saver.settle()
            if self.saver.saved_step != self.step:
                await self._save()
                await self.saver.settle()
            if self.config.checkpoint.export and self.step == self.num_steps:
                target = self.folder / "export" / f"step-{self.step:06d}"
                await self.fleet.call("export", str(target))
                found = await self.task.after_training(self.fleet, target)
                self.telemetry.event("export", path=str(target), **found)
        self.telemetry.event("finished" if self.step == self.num_steps else "stopped", step=self.step)

    async def _step(self) -> None:
        started = time.perf_counter()
        run = self.config.run
        drawn = self.stream.take(run.batch_size, self.step / self.num_steps)
        metrics = dict(await self.fleet.call("update", self.task.payload(drawn, self.step), self.step))
        self.step += 1
        self.num_tokens += metrics["num_tokens"]
        metrics |= {
            "num_tokens": self.num_tokens,
            "epoch": sum(self.stream.num_drawn) / sum(self.task.sizes),
            "time/step_s": time.perf_counter() - started,
        }
        metrics |= self.saver.metrics()
        every = self.config.evaluation.every
        if every and not self.stopping and (self.step % every == 0 or self.step == self.num_steps):
            metrics |= await self._evaluate()
        self.recorder.step(self.step, metrics)

    async def _evaluate(self) -> dict[str, float]:
        if not self.config.evaluation.every:
            return {}
        started = time.perf_counter()
        self.telemetry.phase("evaluate", 0, 1)
        found = dict(await self.task.evaluate(self.fleet, self.step))
        return found | {"time/evaluate_s": time.perf_counter() - started}

    async def _save(self) -> None:
        """Begin to save what there is now; it is written while the run goes on."""
        metadata = {
            "incarnation": self.incarnation, "stream": self.stream.state_dict(), "data": self.task.digest,
            "wandb_id": self.telemetry.wandb_id, "num_tokens": self.num_tokens,
            "made_with": made_with(self.config), "alarms": self.board.state_dict(),
        }  # fmt: skip
        score = self.telemetry.value(self.step, self.config.checkpoint.best_metric)
        await self.saver.save(self.step, metadata, score=score)

    def _stop(self) -> None:
        self.stopping = True


def summary(folder: Path, names: Sequence[str]) -> Table:
    """First and last value of the metrics that tell how a run went."""
    rows = list(read_rows(folder / "metrics.jsonl"))
    table = Table(title=f"{folder.name}: {rows[-1]['step'] if rows else 0} steps")
    for title in ("metric", "unit", "first", "last"):
        table.add_column(title, justify="left" if title in ("metric", "unit") else "right")
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            table.add_row(name, METRICS[name].unit, f"{values[0]:.4g}", f"{values[-1]:.4g}")
    return table
