"""``burnish train``: one run from its folder to its last checkpoint.

Order matters: everything that can be refused is refused before Ray starts, the rest before a worker is
placed; workers are proved to hold the learner's weights before the first prompt is sampled.
May import: everything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.start_probe import probe
from cluster.checkpoints import Checkpoint, CheckpointStore
from cluster.layout import NodeSupply
from cluster.placement import RayHandle
from cluster.transport import fetch
from launch.adapters import adapter_identity
from launch.alarm_watch import AlarmWatch
from launch.assemble import Fleet, assemble
from launch.checkpointing import Checkpointer, SavingRanks
from launch.config import RunConfig
from launch.demands import node_facts, num_workers
from launch.ending import show_end
from launch.held_out import HeldOut
from launch.loop_settings import loop_settings, ppo_lap
from launch.machines import connect
from launch.node_probe import gather_facts, local_nodes
from launch.overrides import ResolvedConfig, dump_yaml
from launch.prepare import Prepared, check_run_folder, prepare, run_folder
from launch.progress import Progress
from launch.prompts import PromptStream
from launch.restart import train_on
from launch.resuming import earlier_attempts, made_with, newest_checkpoint, restored_ledger
from launch.rolling_back import WatchedRecorder
from launch.run_folder import entered
from launch.signals import stop_on_signals
from launch.spool import UNTRAINED, encode_spool
from launch.telemetry import Telemetry
from launch.validate import refuse_problems, refuse_shortfall
from trainers.alarms import AlarmBoard
from trainers.experience import WeightVersion, decode_group
from trainers.loop import LoopParts, TrainingLoop
from trainers.ppo_lap import PPOLap
from trainers.protocols import LearnerGroup, PushReport, UpdateReport

logger = logging.getLogger("burnish.launch")

PROBE_PROMPTS, PROBE_TOKENS = 4, 8
PAYLOAD_DEADLINE_S = 120.0
SHARDS = {"num_workers", "zero_stage"}  # how a trained state was held when it was saved; a resumed run may differ


def train(resolved: ResolvedConfig, resume: bool, console: Console) -> Path:
    """Run to the end, or to a signal.  Returns the run folder."""
    config, folder = resolved.config, run_folder(resolved.config)
    check, ready = partial(check_run_folder, config, resume), partial(_prepared, config, folder, resume)
    with entered(folder, resume, check, ready) as (checkpoint, prepared, facts):
        _train(resolved, prepared, folder, checkpoint, console, facts)
    return folder


def _prepared(
    config: RunConfig, folder: Path, resume: bool
) -> tuple[Checkpoint | None, Prepared, list[dict[str, Any]] | None]:
    """Where the run goes on from, its inputs, and what this node is if nobody else takes part."""
    checkpoint = newest_checkpoint(config, folder) if resume else None
    here = local_nodes(config.cluster)
    if here is not None:
        refuse_shortfall(config, here)
    prepared = prepare(config)
    facts = None
    if here is not None:
        facts = [node_facts(prepared.model_path)]
        refuse_problems(config, prepared, facts)
    return checkpoint, prepared, facts


def _train(
    resolved: ResolvedConfig, prepared: Prepared, folder: Path, checkpoint: Checkpoint | None, console: Console,
    facts: list[dict[str, Any]] | None,
) -> None:  # fmt: skip
    config, report = resolved.config, prepared.report
    console.print(
        f"{config.run.name}: {prepared.facts.architecture}, {prepared.facts.num_params / 1e6:.0f}M parameters; "
        f"{report.num_train_distinct} distinct training questions, {report.num_eval_distinct} held out"
    )
    run = _Run(resolved, prepared, folder, checkpoint, console, facts)
    while asyncio.run(run.go()):
        checkpoint = newest_checkpoint(config, folder)
        console.print(f"{config.run.name}: an alarm takes the run back to step {checkpoint.step if checkpoint else 0}")
        run = _Run(resolved, prepared, folder, checkpoint, console, run.facts)
    show_end(console, folder, run.telemetry)


class _Run:
    """What one run holds while it goes on, from its start or a checkpoint to its end or an alarm that takes it back.

    ``facts``: launch.node_probe of each node; None until they were looked at.
    """

    def __init__(
        self,
        resolved: ResolvedConfig,
        prepared: Prepared,
        folder: Path,
        checkpoint: Checkpoint | None,
        console: Console,
        facts: list[dict[str, Any]] | None = None,
    ) -> None:
        self.resolved, self.config, self.prepared = resolved, resolved.config, prepared
        self.folder, self.console = folder, console
        kept = self.config.checkpoint
        self.store = CheckpointStore(folder / "checkpoints", kept.keep, kept.keep_best, kept.best)
        self.stream = PromptStream(prepared.train, self.config.run.seed, self.config.prompts.shuffle)
        self.facts = facts
        incarnation, self.wandb_id = earlier_attempts(folder)
        self.is_resumed = self.wandb_id is not None or checkpoint is not None or incarnation >= 0
        if checkpoint is not None:
            self.wandb_id = checkpoint.metadata.get("wandb_id") or self.wandb_id
        self.go_on_from(checkpoint, incarnation)
        self.saver: Checkpointer | None = None
        self.fleet: Fleet
        self.telemetry: Telemetry
        self.loop: TrainingLoop
        self.ppo: PPOLap | None = None
        self.goes_back = False

    def go_on_from(self, checkpoint: Checkpoint | None, incarnation: int) -> None:
        """:meth:`train` begins at ``checkpoint``, None: at the beginning; ``incarnation``: the last that was served."""
        self.checkpoint = checkpoint
        self.first_step, self.num_tokens = 0, 0
        if checkpoint is not None:
            state = checkpoint.metadata
            self.first_step = checkpoint.step
            incarnation = max(incarnation, int(state["incarnation"]))
            self.stream.check(state["prompts"])
            self.num_tokens = int(state["num_tokens"])
        self.version = WeightVersion(incarnation + 1, self.first_step)

    async def go(self) -> bool:
        """Whether an alarm ended the run to have it go on from an earlier checkpoint."""
        handle, nodes = connect(self.config.cluster, num_workers(self.config))
        try:
            if self.facts is None:
                self.facts = await gather_facts(self.config, self.prepared.model_path, nodes)
                refuse_problems(self.config, self.prepared, self.facts)
            await self._run(handle, nodes, self.facts)
        finally:
            if handle is not None:
                handle.stop()
        return self.goes_back

    async def _run(self, handle: RayHandle | None, nodes: list[NodeSupply], facts: Sequence[Mapping[str, Any]]) -> None:
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
            self.fleet = await assemble(
                config, self.prepared, self.folder, self.version, handle, nodes, facts, self.telemetry.event
            )
            try:
                await self._prove(time.perf_counter() - started)
                await train_on(self)
            finally:
                if self.saver is not None:
                    await self.saver.close()
                await self.fleet.close()
        except BaseException as error:
            self.telemetry.event("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            progress.close()
            self.telemetry.close()

    async def restore(self) -> PushReport:
        """The checkpoint's state into every rank, where there is one, and its weights into every generator."""
        fleet = self.fleet
        if self.checkpoint is not None:
            await fleet.learner.load(str(self.checkpoint.path / "learner"))
            if fleet.critic is not None:
                await fleet.critic.load(str(self.checkpoint.path / "critic"))
        return await fleet.publisher.push(self.version)

    async def _prove(self, start_s: float) -> None:
        """Restore, push, and compare both engines' log-probs before anything is sampled for training."""
        fleet, config = self.fleet, self.config
        pushed = await self.restore()
        found = await probe(
            fleet.publisher, [p.token_ids for p in self.prepared.train[:PROBE_PROMPTS]],
            min(PROBE_TOKENS, config.generator.sampling.max_tokens), config.run.seed, config.push.probe_tolerance,
            max(config.generator.start_deadline_s, config.learner.start_deadline_s),
        )  # fmt: skip
        self.telemetry.event(
            "ready", step=self.first_step, version=str(self.version), start_s=round(start_s, 2),
            device=fleet.device, dtype=fleet.dtype, push_s=round(pushed.push_s, 3),
            num_verified=pushed.num_verified, num_arrival_verified=pushed.num_arrival_verified,
            probe_mean_difference=found["mean_difference"], layout=fleet.layout.table(),
        )  # fmt: skip

    async def train(self) -> None:
        """From the checkpoint, or the beginning, to the end of the run or a stop."""
        config, fleet = self.config, self.fleet
        saved = {} if self.checkpoint is None else self.checkpoint.metadata
        self.ppo = ppo_lap(config, fleet, saved or None)
        self.board = AlarmBoard(config.watched, config.algorithm.ppo.value_warmup_steps if self.ppo else 0)
        if "alarms" in saved:
            self.board.load_state_dict(saved["alarms"])
        watch = AlarmWatch(self.board, self.telemetry, self.folder)
        saver = self.saver = self._checkpointer()
        self.recorder = WatchedRecorder(self.telemetry, watch, self.store, self._stop_for_alarm)
        self.held_out = HeldOut(
            config, self.prepared.held_out, fleet, self.telemetry, self.folder, saved.get("first_evaluation")
        )
        parts = LoopParts(
            prompts=self.stream, generator=fleet.generator, scorer=fleet.scorer, reference=fleet.reference,
            learner=fleet.learner, publisher=fleet.publisher, recorder=self.recorder,
            between_steps=self._between_steps, on_update=self._record,
            after_record=self._after_record, ppo=self.ppo,
        )  # fmt: skip
        ledger, untrained = restored_ledger(config, self.checkpoint)
        if self.checkpoint is not None:
            self.telemetry.event(
                "ledger", frontier=ledger.frontier, num_untrained=len(untrained), num_reissued=len(ledger.to_reissue)
            )
        self.loop = TrainingLoop(
            loop_settings(config), parts, self.first_step, self.version, self.num_tokens, ledger, untrained
        )
        async with stop_on_signals(self.loop.stop, self.telemetry, config.checkpoint.grace_s) as stopping:
            await self.loop.run()
            stopping.check()
            await saver.settle()
            if self.recorder.target is None and saver.saved_step != self.loop.step:
                await self._save(self.loop.step, self.loop.version)
                await saver.settle()
        if self.recorder.target is not None:
            self.goes_back = not stopping.received  # who stopped the run resumes it, and from there
            if stopping.received:
                self.telemetry.event("stopped", step=self.loop.step)
            return
        if config.checkpoint.export and not self.loop.stopping:
            target = self.folder / "export" / f"step-{self.loop.step:06d}"
            await fleet.learner.export(str(target))
            self.telemetry.event("export", path=str(target))
        self.telemetry.event("stopped" if self.loop.stopping else "finished", step=self.loop.step)

    # --- between steps --------------------------------------------------------------------------

    async def _between_steps(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        evaluation = self.config.evaluation
        spent = self.fleet.accountant.settle()  # the first time it is the start's, and no row's
        metrics: dict[str, float] = {}
        fresh = step == 0 and self.checkpoint is None
        resumed_here = step == self.first_step and not fresh
        due = evaluation.every and not resumed_here and not self.loop.stopping  # after SIGTERM time is short
        if due and (last or step % evaluation.every == 0):
            metrics |= await self.held_out.evaluate(step, version, last)
        if fresh:
            if metrics:
                self.recorder.step(0, metrics)
            return {}
        return metrics | spent | (self.saver.metrics() if self.saver is not None else {})

    async def _after_record(self, step: int, version: WeightVersion, last: bool) -> None:
        every = self.config.checkpoint.every
        if self.recorder.target is not None:
            return  # the checkpoint to go back to stays the newest good one
        if last or (every and step % every == 0):
            await self._save(step, version)

    def _checkpointer(self) -> Checkpointer:
        roles: dict[str, SavingRanks] = {"learner": self.fleet.learner}
        if self.fleet.critic is not None:
            roles["critic"] = self.fleet.critic
        saved = self.first_step if self.checkpoint is not None else -1
        return Checkpointer(self.store, roles, self.telemetry, self.config.checkpoint.wait_s, saved)

    def _stop_for_alarm(self) -> None:
        self.loop.stop()
        if self.recorder.target is not None and self.saver is not None:
            self.saver.abandon()

    async def _save(self, step: int, version: WeightVersion) -> None:
        """Begin to save what there is now; it is written while the run goes on."""
        ledger, untrained = self.loop.snapshot()  # before the first wait: it belongs to these weights
        prompts = self.stream.identity() | {"position": ledger["frontier"]}
        metadata = {
            "incarnation": version.incarnation, "prompts": prompts, "ledger": ledger,
            "made_with": made_with(self.config), "wandb_id": self.telemetry.wandb_id,
            "num_tokens": self.loop.num_tokens, "seed": self.config.run.seed,
            "alarms": self.board.state_dict(), "first_evaluation": self.held_out.state_dict(),
            "learner": self.config.learner.model_dump(include=SHARDS),
            "adapter": adapter_identity(self.config.model),
        }  # fmt: skip
        if self.ppo is not None:
            critic = self.config.critic.model_dump(include={*SHARDS, "quantization"})
            metadata |= {"critic": critic, "ppo": self.ppo.state.state_dict()}
        assert self.saver is not None
        score = self.telemetry.value(step, self.config.checkpoint.best_metric)
        files = {}
        if untrained:
            files[UNTRAINED] = await asyncio.to_thread(encode_spool, untrained, PAYLOAD_DEADLINE_S)
        await self.saver.save(step, metadata, files=files, score=score)

    # --- records --------------------------------------------------------------------------------

    def _record(self, step: int, batch: list[LearnerGroup], report: UpdateReport) -> None:
        groups = [decode_group(fetch(g.payload, PAYLOAD_DEADLINE_S)) for g in batch]
        self.telemetry.trajectories(step, groups, [g.rewards for g in batch], report.advantages)
