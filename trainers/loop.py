"""The loop: one asynchronous lap after another, from prompts to pushed weights.

    prompts --> [gate] --> _group: generate --> score      \\
                  ^                        |--> reference --> finished --> _step: update
                  |                        \\--> values    /                   |
                  |                                                        version + 1
                  |                                                           |
                  `------------- slots <-- evaluate, checkpoint <-- push <----'

What wakes each task:
    _feed    a free slot: the gate advanced, or a group gave its slot back
    _group   its generator, then its scorer, its reference and its critic (these at the same time)
    _step    ``groups_per_step`` finished groups, or the wish to stop

Synchronous training is ``max_staleness`` 0: the gate then opens for one step's groups and stays shut
until their update has been pushed.  The loop speaks to protocols (trainers/protocols.py); payloads
pass through it unopened.
May import: asyncio, trainers.*.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from trainers.experience import Prompt, WeightVersion
from trainers.ppo_lap import PPOLap
from trainers.protocols import (
    GeneratedGroup,
    Generator,
    GroupRequest,
    Learner,
    LearnerGroup,
    Payload,
    Recorder,
    Reference,
    Scorer,
    UpdateReport,
    WeightPublisher,
)
from trainers.sampling_seeds import sample_seed
from trainers.staleness import AdmissionGate
from trainers.step_metrics import group_metrics, throughput


class Prompts(Protocol):
    """A resumable stream."""

    def take(self, n: int) -> list[tuple[int, Prompt]]: ...

    def occurrence(self, position: int) -> int: ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The loop's part of the run configuration."""

    num_steps: int
    groups_per_step: int
    samples_per_prompt: int
    max_staleness: int
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class LoopParts:
    """Everything the loop drives."""

    prompts: Prompts
    generator: Generator
    scorer: Scorer
    reference: Reference | None
    learner: Learner
    publisher: WeightPublisher
    recorder: Recorder
    # After a push, while no group is running: evaluation, as asked for; its metrics join the row of this step.
    between_steps: Callable[[int, WeightVersion, bool], Awaitable[dict[str, float]]]
    on_update: Callable[[int, list[LearnerGroup], UpdateReport], None]
    # After the row of this step: its checkpoint.  In this order a kill in between loses no row of the lineage.
    after_record: Callable[[int, WeightVersion, bool], Awaitable[None]] | None = None
    ppo: PPOLap | None = None  # with a critic: its values of each group, and its update in place of the learner's


class TrainingLoop:
    """Runs laps ``first_step`` .. ``num_steps``.  ``step`` is the number of finished laps."""

    def __init__(
        self,
        settings: LoopSettings,
        parts: LoopParts,
        first_step: int,
        version: WeightVersion,
        num_tokens: int = 0,
    ) -> None:
        self.settings, self.parts = settings, parts
        self.step, self.version = first_step, version
        self._gate = AdmissionGate(settings.max_staleness, settings.groups_per_step, first_step)
        self._finished: list[LearnerGroup] = []
        self._slots = asyncio.Event()
        self._arrived = asyncio.Event()
        self._stopping = asyncio.Event()
        self.num_tokens = num_tokens  # prompt and completion tokens of trained samples, over the whole run
        self._running: set[asyncio.Task[None]] = set()
        self._generated = 0  # groups of this step that were sampled
        self._generate_ended = 0.0

    def stop(self) -> None:
        """Finish the update that is being made, if any, and return; safe to call from a signal handler."""
        self._stopping.set()
        self._arrived.set()
        self._slots.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    async def run(self) -> None:
        """Until ``num_steps`` or :meth:`stop`.  The first failure of any part ends the run with its error."""
        await self.parts.between_steps(self.step, self.version, False)
        try:
            async with asyncio.TaskGroup() as tasks:
                feeding = tasks.create_task(self._feed(tasks))
                while self.step < self.settings.num_steps and not self.stopping:
                    await self._one_step()
                feeding.cancel()
                self._end_groups()
        except* asyncio.CancelledError:
            if not self.stopping:
                raise
        except* Exception as group:  # noqa: BLE001 - unwrapped and raised again
            raise _first(group) from None

    # --- from prompts to finished groups ------------------------------------------------------

    async def _feed(self, tasks: asyncio.TaskGroup) -> None:
        while not self.stopping:
            while self._gate.free_slots and not self.stopping:
                ((position, prompt),) = self.parts.prompts.take(1)
                self._gate.admit()
                task = tasks.create_task(self._group(position, prompt))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            self._slots.clear()
            await self._slots.wait()

    def _end_groups(self) -> None:
        for task in set(self._running):
            task.cancel()

    async def _group(self, position: int, prompt: Prompt) -> None:
        s, parts = self.settings, self.parts
        epoch = parts.prompts.occurrence(position)
        request = GroupRequest(
            group_id=str(position),
            prompt=prompt,
            num_samples=s.samples_per_prompt,
            seeds=tuple(sample_seed(s.seed, prompt.prompt_id, i, epoch) for i in range(s.samples_per_prompt)),
            temperature=s.temperature,
            max_tokens=s.max_tokens,
        )
        generated = await parts.generator.generate(request)
        self._generated += 1
        self._generate_ended = time.perf_counter()
        parts.recorder.phase("generate", self._generated, s.groups_per_step)
        rewards, reference, values = await asyncio.gather(
            parts.scorer.score(generated), self._reference(generated), self._values(generated)
        )
        self._finished.append(LearnerGroup(generated.summary, rewards, generated.payload, reference, values))
        self._gate.accept()
        parts.recorder.phase("score", len(self._finished), s.groups_per_step)
        self._arrived.set()

    async def _reference(self, generated: GeneratedGroup) -> Payload | None:
        return None if self.parts.reference is None else await self.parts.reference.logprobs(generated)

    async def _values(self, generated: GeneratedGroup) -> Payload | None:
        return None if self.parts.ppo is None else await self.parts.ppo.critic.values(generated)

    # --- from finished groups to new weights --------------------------------------------------

    async def _one_step(self) -> None:
        s, parts = self.settings, self.parts
        started = time.perf_counter()
        self._generated, self._generate_ended = 0, started
        self._slots.set()
        while len(self._finished) < s.groups_per_step:
            self._arrived.clear()
            await self._arrived.wait()
            if self.stopping:
                return
        # Position order: the batch, and so the run, does not depend on who finished first.
        ready = sorted(self._finished, key=lambda g: int(g.summary.group_id))
        batch, self._finished = ready[: s.groups_per_step], ready[s.groups_per_step :]
        gathered = time.perf_counter()
        metrics = group_metrics(batch, self.version)
        parts.recorder.phase("learn", 0, 1)
        report = await (parts.learner if parts.ppo is None else parts.ppo).update(batch, self.step)
        parts.recorder.phase("learn", 1, 1)
        learned = time.perf_counter()
        self.step += 1
        self.version = self.version._replace(step=self.version.step + 1)
        parts.recorder.phase("push", 0, 1)
        push = await parts.publisher.push(self.version)
        parts.recorder.phase("push", 1, 1)
        num_generated = sum(t for g in batch for t in g.summary.num_completion_tokens)
        self.num_tokens += num_generated + sum(g.summary.num_prompt_tokens * g.summary.num_samples for g in batch)
        times = {
            "time/generate_s": self._generate_ended - started,
            "time/score_s": gathered - self._generate_ended,
            "time/learn_s": learned - gathered,
            "time/push_s": push.push_s,
            "time/push_pause_s": push.pause_s,
        }
        times["time/step_s"] = time.perf_counter() - started
        parts.on_update(self.step, batch, report)
        last = self.step >= s.num_steps
        metrics |= dict(report.metrics) | times
        metrics |= throughput(times, num_generated, report.num_tokens, len(batch) * s.samples_per_prompt)
        metrics |= {"num_tokens": float(self.num_tokens), "push/num_bytes": float(push.num_bytes)}
        metrics |= await parts.between_steps(self.step, self.version, last)
        parts.recorder.step(self.step, metrics)
        if parts.after_record is not None:
            await parts.after_record(self.step, self.version, last)
        self._gate.advance()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that the others followed from."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
