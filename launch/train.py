"""``burnish train``: one run from its folder to its last checkpoint.

Order matters: everything that can be refused is refused before Ray starts, the rest before a worker is
placed; workers are proved to hold the learner's weights before the first prompt is sampled.
May import: everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.settings import LearnerSettings
from cluster.checkpoints import Checkpoint, CheckpointStore
from cluster.layout import NodeSupply
from cluster.placement import RayHandle
from cluster.transport import fetch
from launch.assemble import Fleet, assemble, connect
from launch.demands import node_facts
from launch.node_probe import gather_facts, local_nodes
from launch.overrides import ResolvedConfig, dump_yaml
from launch.plots import before_after, before_after_table, reward_plot
from launch.prepare import Prepared, check_run_folder, prepare
from launch.progress import Progress
from launch.prompts import PromptStream
from launch.resuming import earlier_attempts, newest_checkpoint
from launch.telemetry import Telemetry
from launch.validate import refuse_problems, refuse_shortfall
from trainers.evaluation import EvaluationReport, evaluate
from trainers.experience import WeightVersion, decode_group
from trainers.loop import LoopParts, LoopSettings, TrainingLoop
from trainers.ppo_lap import PPOLap, PPOState
from trainers.protocols import LearnerGroup, UpdateReport

logger = logging.getLogger("burnish.launch")

PROBE_PROMPTS, PROBE_TOKENS = 4, 8
PAYLOAD_DEADLINE_S = 120.0


def train(resolved: ResolvedConfig, resume: bool, console: Console) -> Path:
    """Run to the end, or to a signal.  Returns the run folder."""
    config = resolved.config
    folder = check_run_folder(config, resume)
    checkpoint = newest_checkpoint(config, folder) if resume else None
    here = local_nodes(config)
    if here is not None:
        refuse_shortfall(config, here)
    prepared = prepare(config)
    run = _Run(resolved, prepared, folder, checkpoint, console)
    if here is not None:
        run.facts = [node_facts(prepared.model_path)]
        refuse_problems(config, prepared, run.facts)
    report = prepared.report
    console.print(
        f"{config.run.name}: {prepared.facts.architecture}, {prepared.facts.num_params / 1e6:.0f}M parameters; "
        f"{report.num_train_distinct} distinct training questions, {report.num_eval_distinct} held out"
    )
    return asyncio.run(run.go())


class _Run:
    """What one run holds while it goes on."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        prepared: Prepared,
        folder: Path,
        checkpoint: Checkpoint | None,
        console: Console,
    ) -> None:
        self.resolved, self.config, self.prepared = resolved, resolved.config, prepared
        self.folder, self.checkpoint, self.console = folder, checkpoint, console
        self.store = CheckpointStore(folder / "checkpoints", self.config.checkpoint.keep)
        self.stream = PromptStream(prepared.train, self.config.run.seed, self.config.prompts.shuffle)
        self.facts: list[dict[str, Any]] | None = None  # of the nodes; None until they were looked at
        self.first_step, self.num_tokens = 0, 0
        incarnation, self.wandb_id = earlier_attempts(folder)
        self.is_resumed = self.wandb_id is not None or checkpoint is not None or incarnation >= 0
        if checkpoint is not None:
            state = checkpoint.metadata
            self.first_step = checkpoint.step
            incarnation = max(incarnation, int(state["incarnation"]))
            self.wandb_id = state.get("wandb_id") or self.wandb_id
            self.stream.load_state_dict(state["prompts"])
            self.num_tokens = int(state["num_tokens"])
        self.version = WeightVersion(incarnation + 1, self.first_step)
        self.first_position = self.stream.position
        self.checkpoint_s: float | None = None  # of the last step's checkpoint, for the next step's row
        self.saved_step = self.first_step if checkpoint is not None else -1
        self.fleet: Fleet
        self.ppo: PPOLap | None = None

    async def go(self) -> Path:
        handle, nodes = connect(self.config)
        try:
            if self.facts is None:
                self.facts = await gather_facts(self.config, self.prepared.model_path, nodes)
                refuse_problems(self.config, self.prepared, self.facts)
            await self._run(handle, nodes, self.facts)
        finally:
            if handle is not None:
                handle.stop()
        self._show()
        return self.folder

    async def _run(
        self, handle: RayHandle | None, nodes: list[NodeSupply], facts: Sequence[Mapping[str, Any]]
    ) -> None:
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump_yaml(self.resolved))
        live = self.console.is_terminal if config.telemetry.progress is None else config.telemetry.progress
        progress = Progress(config.run.num_steps, self.console, live)
        self.telemetry = Telemetry(
            self.folder, config.model_dump(mode="json"), config.telemetry, watcher=progress,
            wandb_id=self.wandb_id, resume_step=self.first_step if self.checkpoint else None,
        )  # fmt: skip
        if self.is_resumed:
            source = str(self.checkpoint.path) if self.checkpoint else "none: from the beginning"
            self.telemetry.event("resumed", step=self.first_step, checkpoint=source, version=str(self.version))
        try:
            started = time.perf_counter()
            self.fleet = await assemble(config, self.prepared, self.folder, self.version, handle, nodes, facts)
            try:
                await self._prove(time.perf_counter() - started)
                await self._loop()
            finally:
                await self.fleet.close()
        except BaseException as error:
            self.telemetry.event("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            progress.close()
            self.telemetry.close()

    async def _prove(self, start_s: float) -> None:
        """Restore, push, and compare both engines' log-probs before anything is sampled for training."""
        fleet, config = self.fleet, self.config
        if self.checkpoint is not None:
            await fleet.learner.load(str(self.checkpoint.path / "learner"))
            if fleet.critic is not None:
                await fleet.critic.load(str(self.checkpoint.path / "critic"))
        pushed = await fleet.publisher.push(self.version)
        probe = await fleet.publisher.probe(
            [p.token_ids for p in self.prepared.train[:PROBE_PROMPTS]],
            min(PROBE_TOKENS, config.generator.sampling.max_tokens), config.run.seed, config.push.probe_tolerance,
        )  # fmt: skip
        self.telemetry.event(
            "ready", step=self.first_step, version=str(self.version), start_s=round(start_s, 2),
            device=fleet.device, dtype=fleet.dtype, push_s=round(pushed.push_s, 3),
            num_verified=pushed.num_verified, num_arrival_verified=pushed.num_arrival_verified,
            probe_mean_difference=probe["mean_difference"], layout=fleet.layout.table(),
        )  # fmt: skip

    async def _loop(self) -> None:
        run, sampling = self.config.run, self.config.generator.sampling
        settings = LoopSettings(
            num_steps=run.num_steps, groups_per_step=run.groups_per_step, samples_per_prompt=run.samples_per_prompt,
            max_staleness=run.max_staleness, temperature=sampling.temperature, max_tokens=sampling.max_tokens,
            seed=run.seed,
        )  # fmt: skip
        fleet = self.fleet
        self.ppo = self._ppo_lap()
        parts = LoopParts(
            prompts=self.stream, generator=fleet.generator, scorer=fleet.scorer, reference=fleet.reference,
            learner=fleet.learner, publisher=fleet.publisher, recorder=self.telemetry,
            between_steps=self._between_steps, on_update=self._record,
            after_record=self._after_record, ppo=self.ppo,
        )  # fmt: skip
        self.loop = TrainingLoop(settings, parts, self.first_step, self.version, self.num_tokens)
        with _stop_on_signals(self.loop, self.telemetry):
            await self.loop.run()
        if self.saved_step != self.loop.step:
            await self._save(self.loop.step, self.loop.version)
        if self.config.checkpoint.export and not self.loop.stopping:
            target = self.folder / "export" / f"step-{self.loop.step:06d}"
            await fleet.learner.export(str(target))
            self.telemetry.event("export", path=str(target))
        self.telemetry.event("stopped" if self.loop.stopping else "finished", step=self.loop.step)

    def _ppo_lap(self) -> PPOLap | None:
        """With a critic: the lap that updates both, with the state of the checkpoint if there is one."""
        fleet, algorithm = self.fleet, self.config.algorithm
        if fleet.critic is None:
            return None
        state = PPOState.initial(algorithm)
        if self.checkpoint is not None:
            state = PPOState.restored(algorithm, self.checkpoint.metadata["ppo"])
        overlap = self.config.critic.overlap
        if overlap is None:
            overlap = fleet.device == "cuda" and not self.config.cluster.colocate
        return PPOLap(fleet.learner, fleet.critic, algorithm, state, overlap)

    # --- between steps --------------------------------------------------------------------------

    async def _between_steps(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        evaluation = self.config.evaluation
        metrics: dict[str, float] = {}
        fresh = step == 0
        resumed_here = step == self.first_step and not fresh
        if evaluation.every and not resumed_here and (last or step % evaluation.every == 0):
            report = await self._evaluate(step, version)
            metrics |= report.metrics
            if fresh:
                self._write_samples("samples-before.jsonl", report)
            if last:
                self._write_samples("samples-after.jsonl", report)
        if fresh:
            if metrics:
                self.telemetry.step(0, metrics)
            return {}
        if self.checkpoint_s is not None:
            metrics["time/checkpoint_s"], self.checkpoint_s = self.checkpoint_s, None
        return metrics

    async def _after_record(self, step: int, version: WeightVersion, last: bool) -> None:
        every = self.config.checkpoint.every
        if last or (every and step % every == 0):
            self.checkpoint_s = await self._save(step, version)

    async def _evaluate(self, step: int, version: WeightVersion) -> EvaluationReport:
        settings, fleet = self.config.evaluation, self.fleet
        return await evaluate(
            self.prepared.held_out, fleet.generator, fleet.scorer, version=version, step=step,
            num_samples=settings.num_samples, temperature=settings.temperature,
            max_tokens=self.config.generator.sampling.max_tokens,
            reward=settings.reward or self.config.reward_names[0], seed=self.config.run.seed,
            progress=lambda done, total: self.telemetry.phase("evaluate", done, total),
        )  # fmt: skip

    async def _save(self, step: int, version: WeightVersion) -> float:
        started = time.perf_counter()
        directory = self.store.begin(step)
        try:
            await self.fleet.learner.save(str(directory / "learner"))
            # The consumption frontier, not the read cursor: prompts taken but not trained on come again.
            trained = (step - self.first_step) * self.config.run.groups_per_step
            prompts = self.stream.state_dict() | {"position": self.first_position + trained}
            shards = {"learner": _shards(self.config.learner)}
            if self.fleet.critic is not None and self.ppo is not None:
                await self.fleet.critic.save(str(directory / "critic"))
                shards |= {"critic": _shards(self.config.critic), "ppo": self.ppo.state.state_dict()}
            metadata = {
                "incarnation": version.incarnation, "prompts": prompts, "wandb_id": self.telemetry.wandb_id,
                "num_tokens": self.loop.num_tokens, "seed": self.config.run.seed,
                **shards,
            }  # fmt: skip
            # In this thread: the run must not go on while its frontier is being written down.
            self.store.commit(step, metadata)
        except OSError as error:
            # A full disk costs this checkpoint, not the run: the last one is still there.
            shutil.rmtree(directory, ignore_errors=True)
            self.telemetry.event("checkpoint_failed", step=step, error=str(error))
            return time.perf_counter() - started
        self.saved_step = step
        took = time.perf_counter() - started
        self.telemetry.event("checkpoint", step=step, seconds=round(took, 3))
        return took

    # --- records --------------------------------------------------------------------------------

    def _record(self, step: int, batch: list[LearnerGroup], report: UpdateReport) -> None:
        groups = [decode_group(fetch(g.payload, PAYLOAD_DEADLINE_S)) for g in batch]
        self.telemetry.trajectories(step, groups, [g.rewards for g in batch], report.advantages)

    def _write_samples(self, name: str, report: EvaluationReport) -> None:
        rows: list[dict[str, Any]] = []
        for generated, rewards in zip(report.groups, report.rewards, strict=True):
            group = decode_group(fetch(generated.payload, PAYLOAD_DEADLINE_S))
            source = group.prompt.source
            rows += [
                {
                    "prompt": source if isinstance(source, str) else source[-1]["content"],
                    "completion": t.text,
                    "reward": _number(rewards.totals[t.sample_index]),
                    "answer": group.prompt.columns.get("answer"),
                }
                for t in group.trajectories
            ]
        (self.folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    def _show(self) -> None:
        self.console.print(self.telemetry.summary())
        if (self.folder / "samples-after.jsonl").exists():
            self.console.print(before_after_table(before_after(self.folder)))
        if (self.folder / "metrics.jsonl").exists():
            reward_plot([self.folder], self.folder / "reward.png")
            self.console.print(f"plot: {self.folder / 'reward.png'}")


def _shards(settings: LearnerSettings) -> dict[str, int]:
    """What a resumed run must have in common with the one that saved."""
    return {"num_workers": settings.num_workers, "zero_stage": settings.zero_stage}


def _number(value: float) -> float | None:
    return float(value) if value == value else None


@contextlib.contextmanager
def _stop_on_signals(loop: TrainingLoop, telemetry: Telemetry) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to stop with a checkpoint; the second ends it at once."""
    running = asyncio.get_running_loop()
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    def on_signal(number: signal.Signals) -> None:
        telemetry.event("stopping", signal=number.name)
        loop.stop()
        for s in signals:
            running.remove_signal_handler(s)

    for s in signals:
        running.add_signal_handler(s, on_signal, s)
    try:
        yield
    finally:
        for s in signals:
            running.remove_signal_handler(s)
