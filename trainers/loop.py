"""The loop: one asynchronous lap after another, from prompts to pushed weights, at any staleness.

    prompts --> [gate] --> generate, score --> finished --> _one_step: update        trainers/rollouts.py | here
                  ^                                                     |
                  |                                                version + 1
                  |                                                     |
                  |-- slots (max_staleness > 0) <----------------------push   a part of the fleet after the other
                  |                                                     |
                  `-- slots (max_staleness 0) <-- checkpoint <-- evaluate

What wakes each task:
    feed       a free slot: the gate advanced, or a group gave its slot back
    a group    its generator, then its scorer, its reference and its critic (these at the same time)
    _one_step  a finished group, when with it a batch is complete, or the wish to stop

Synchronous training is ``max_staleness`` 0: the gate opens for one step's groups and stays shut until their update
has been pushed, evaluated and saved.  Above 0 it opens with the push, and groups go on being sampled while the
learner updates, pushes, evaluates and saves.  The loop speaks to protocols (trainers/protocols.py); payloads pass
through it unopened.
May import: asyncio, trainers.*.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from trainers.ensembles import disagreement_metrics, mask_disagreement
from trainers.errors import VerificationError
from trainers.experience import WeightVersion
from trainers.ledger import Ledger
from trainers.loop_parts import LoopParts, LoopSettings, Prompts
from trainers.protocols import LearnerGroup, PushReport
from trainers.rollouts import Rollouts, Tally
from trainers.step_metrics import group_metrics, throughput

__all__ = ["LoopParts", "LoopSettings", "Prompts", "TrainingLoop"]


class TrainingLoop:
    """Runs laps ``first_step`` .. ``num_steps``.  ``step`` is the number of finished laps.

    Args:
        ledger: of the run that goes on; by default one that has trained ``first_step`` whole batches and gives every
            group one try.
        finished: groups that ledger has as finished, in that order.
    """

    def __init__(
        self,
        settings: LoopSettings,
        parts: LoopParts,
        first_step: int,
        version: WeightVersion,
        num_tokens: int = 0,
        ledger: Ledger | None = None,
        finished: Sequence[LearnerGroup] = (),
    ) -> None:
        self.settings, self.parts = settings, parts
        self.step, self.version = first_step, version
        self.num_tokens = num_tokens  # prompt and completion tokens of trained samples, over the whole run
        self._stopping = asyncio.Event()
        if ledger is None:
            ledger = Ledger(1, frontier=first_step * settings.groups_per_step)
        self.rollouts = Rollouts(settings, parts, first_step, ledger, finished, self._stopping)

    def stop(self) -> None:
        """Finish the update that is being made, if any, and return; safe to call from a signal handler."""
        self._stopping.set()
        self.rollouts.wake()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def snapshot(self) -> tuple[dict[str, Any], list[LearnerGroup]]:
        """Of this very moment: the ledger's state, and the finished groups that are worth saving with it.

        A synchronous lap saves none: resumed it is sampled again as a whole, which repeats the run that was not
        interrupted.
        """
        return self.rollouts.ledger.state_dict(), self.rollouts.finished if self.settings.max_staleness else []

    async def run(self) -> None:
        """Until ``num_steps`` or :meth:`stop`.  The first failure of any part ends the run with its error.

        Being cancelled is never a way to stop: an update may have been cut off, which nobody must save as a step.
        """
        await self.parts.between_steps(self.step, self.version, False)
        try:
            async with asyncio.TaskGroup() as tasks:
                feeding = tasks.create_task(self.rollouts.feed(tasks))
                while self.step < self.settings.num_steps and not self.stopping:
                    await self._one_step()
                feeding.cancel()
                self.rollouts.end()
        except ExceptionGroup as group:  # no except*: in early Pythons 3.11 what it raises is put into a group again
            raise _first(group) from None

    async def _one_step(self) -> None:
        s, parts = self.settings, self.parts
        started = parts.clock()
        taken = await self.rollouts.take()
        if taken is None:
            return
        batch, tally = taken
        self._check_lag(batch)
        metrics = group_metrics(batch, self.version, tally.dropped if s.filtering.zero_variance else None)
        trained, num_masked = mask_disagreement(batch, s.ensembles)
        metrics |= disagreement_metrics([g.rewards for g in batch], num_masked)
        learn_from = parts.clock()
        parts.recorder.phase("learn", 0, 1)
        report = await (parts.learner if parts.ppo is None else parts.ppo).update(trained, self.step)
        parts.recorder.phase("learn", 1, 1)
        learned = parts.clock()
        self.step += 1
        self.version = self.version._replace(step=self.version.step + 1)
        parts.recorder.phase("push", 0, 1)
        parts.recorder.event("pushing", step=self.step, version=str(self.version))
        push = await parts.publisher.push(self.version)
        parts.recorder.phase("push", 1, 1)
        self.rollouts.trained(batch, self.step)
        if s.max_staleness > 0:
            self.rollouts.advance()
        num_generated = sum(t for g in batch for t in g.summary.num_completion_tokens)
        self.num_tokens += num_generated + sum(g.summary.num_prompt_tokens * g.summary.num_samples for g in batch)
        times = self._times(started, learn_from, learned, push, tally)
        parts.on_update(self.step, batch, report)
        last = self.step >= s.num_steps
        metrics |= dict(report.metrics) | times
        sampling_s = times.get("time/generate_s", tally.taken_at - tally.since)
        metrics |= throughput(times, sampling_s, tally.num_tokens, report.num_tokens, len(batch) * s.samples_per_prompt)
        metrics |= {
            "groups/num_generated": float(tally.num_sampled),
            "groups/num_dropped": float(len(tally.dropped)),
            "groups/num_failed": float(tally.num_failed),
            "groups/num_trained": float(len(batch)),
        }
        metrics |= {"num_tokens": float(self.num_tokens), "push/num_bytes": float(push.num_bytes)}
        metrics |= await parts.between_steps(self.step, self.version, last)
        parts.recorder.step(self.step, metrics)
        if parts.after_record is not None:
            await parts.after_record(self.step, self.version, last)
        if s.max_staleness == 0:
            self.rollouts.advance()

    def _times(
        self, started: float, learn_from: float, learned: float, push: PushReport, tally: Tally
    ) -> dict[str, float]:
        times = {
            "time/wait_groups_s": tally.wait_s,
            "time/wait_bound_s": tally.bound_s,
            "time/learn_s": learned - learn_from,
            "time/push_s": push.push_s,
            "time/push_pause_s": push.pause_s,
            "time/step_s": self.parts.clock() - started,
        }
        if self.settings.max_staleness == 0:  # above 0 there is no such phase: generators do not stop
            times["time/generate_s"] = tally.sampled_at - started
            times["time/score_s"] = tally.taken_at - tally.sampled_at
        return times

    def _check_lag(self, batch: Sequence[LearnerGroup]) -> None:
        for group in batch:
            oldest = group.summary.oldest_version
            if self.version.step - oldest.step > self.settings.max_staleness:
                raise VerificationError(
                    f"run.max_staleness = {self.settings.max_staleness}: {group.summary.generator} sampled group "
                    f"{group.summary.group_id} under {oldest}, and the learner is at {self.version}; it missed a push"
                )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that the others followed from."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
