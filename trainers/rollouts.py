"""The generating half of the loop: from prompts to a batch of finished groups.

    pending --> [gate] --> in flight: generate --> score      \\
       ^                                     |--> reference --> finished --> take: the next batch
       |                                     \\--> values    /   `--> dropped, which makes room for another
       `--- lost, n times at most

The ledger says what became of every position, the gate how many may be under way, ``choose_batch`` which of the
finished ones are next; this file only runs the tasks between them.
May import: asyncio, trainers.*.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trainers.errors import GroupFailedError, NoGeneratorError
from trainers.experience import GroupRewards
from trainers.filtering import RefillLimit, useless
from trainers.greedy import greedy_request, greedy_reward, masked_without, together
from trainers.ledger import Ledger
from trainers.loop_parts import LoopParts, LoopSettings
from trainers.protocols import GeneratedGroup, GroupRequest, LearnerGroup, Payload
from trainers.sampling_seeds import sample_seed
from trainers.staleness import AdmissionGate, Choice, choose_batch


@dataclass
class Tally:
    """What the generating half did between two batches; times in s, of the loop's clock."""

    since: float
    num_sampled: int = 0  # groups
    num_tokens: int = 0  # of their completions, greedy ones included
    num_failed: int = 0  # groups given up
    dropped: list[GroupRewards] = field(default_factory=list)  # of groups that were filtered
    sampled_at: float = 0.0  # the last of them; 0: none
    taken_at: float = 0.0  # when the batch was complete
    wait_s: float = 0.0  # the learner had no batch
    bound_s: float = 0.0  # of that: only because a group at its bound was still running


class Rollouts:
    """Groups under way and finished.  ``finished``: what a resumed run brought along; the ledger knows them."""

    def __init__(
        self, settings: LoopSettings, parts: LoopParts, first_step: int, ledger: Ledger,
        finished: Sequence[LearnerGroup], stopping: asyncio.Event,
    ) -> None:  # fmt: skip
        self.settings, self.parts, self.ledger = settings, parts, ledger
        self._groups = {int(g.summary.group_id): g for g in finished}
        if set(self._groups) != set(ledger.finished):
            raise ValueError(f"finished groups {sorted(self._groups)}, the ledger has {sorted(ledger.finished)}")
        self._gate = AdmissionGate(
            settings.max_staleness, settings.groups_per_step, first_step, len(finished), settings.num_steps
        )
        self._stopping = stopping
        self._slots, self._arrived = asyncio.Event(), asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self.tally = Tally(self.parts.clock())

    @property
    def finished(self) -> list[LearnerGroup]:
        """Not trained on yet, in the order in which they finished."""
        return [self._groups[position] for position in self.ledger.finished]

    def wake(self) -> None:
        """Have every wait look at ``stopping`` again."""
        self._slots.set()
        self._arrived.set()

    # --- groups ---------------------------------------------------------------------------------

    async def feed(self, tasks: asyncio.TaskGroup) -> None:
        """Start a group for every free slot, until told to stop."""
        while not self._stopping.is_set():
            while self._gate.free_slots and not self._stopping.is_set():
                position = self.ledger.next_pending
                self.ledger.issue(position, "generators", self._gate.version, self.parts.clock())
                self._gate.admit()
                task = tasks.create_task(self._group(position))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            self._slots.clear()
            await self._slots.wait()

    def end(self) -> None:
        """Nobody waits for what is still running; in the ledger it stays in flight."""
        for task in set(self._running):
            task.cancel()

    async def _group(self, position: int) -> None:
        try:
            group = await self._rollout(position)
        except NoGeneratorError:
            raise  # the run ends with it: no group is lost, each is in flight until the run goes on
        except GroupFailedError as error:
            self._lost(position, error)
            return
        if (reason := self._reason_to_drop(group)) is not None:
            self.tally.dropped.append(group.rewards)
            self.ledger.drop(position, reason)
            self._make_room()
            return
        self._groups[position] = group
        self.ledger.finish(position)
        self._gate.accept()
        self.parts.recorder.phase("score", *self._of_a_step(len(self._groups)))
        self._arrived.set()

    async def _rollout(self, position: int) -> LearnerGroup:
        s, parts = self.settings, self.parts
        prompt, epoch = parts.prompts.at(position), parts.prompts.occurrence(position)
        request = GroupRequest(
            group_id=str(position),
            prompt=prompt,
            num_samples=s.samples_per_prompt,
            seeds=tuple(sample_seed(s.seed, prompt.prompt_id, i, epoch) for i in range(s.samples_per_prompt)),
            temperature=s.temperature,
            max_tokens=s.max_tokens,
        )
        generated, greedy = await self._generated(request)
        tally, now = self.tally, self.parts.clock()
        tally.num_sampled += 1
        sampled = [g.summary for g in (generated, greedy) if g is not None]
        tally.num_tokens += sum(sum(summary.num_completion_tokens) for summary in sampled)
        tally.sampled_at = now
        self.ledger.move(position, "scorers", now)
        parts.recorder.phase("generate", *self._of_a_step(tally.num_sampled))
        (rewards, baseline), reference, values = await asyncio.gather(
            self._scored(generated, greedy), self._reference(generated), self._early_values(generated)
        )
        return LearnerGroup(generated.summary, rewards, generated.payload, reference, values, baseline)

    async def _generated(self, request: GroupRequest) -> tuple[GeneratedGroup, GeneratedGroup | None]:
        """The group and, where that is the baseline, its prompt's greedy completion."""
        generate = self.parts.generator.generate
        if not self.settings.greedy_baseline:
            return await generate(request), None
        return await together(generate(request), generate(greedy_request(request)))

    async def _scored(
        self, generated: GeneratedGroup, greedy: GeneratedGroup | None
    ) -> tuple[GroupRewards, float | None]:
        """The group's rewards, and the reward of the greedy completion."""
        score = self.parts.scorer.score
        if greedy is None:
            return await score(generated), None
        rewards, of_greedy = await together(score(generated), score(greedy))
        baseline = greedy_reward(greedy, of_greedy)
        return masked_without(baseline, of_greedy, rewards), baseline

    async def _reference(self, generated: GeneratedGroup) -> Payload | None:
        return None if self.parts.reference is None else await self.parts.reference.logprobs(generated)

    async def _early_values(self, generated: GeneratedGroup) -> Payload | None:
        """The critic's values, now if no update of it comes before the group is trained on."""
        if self.parts.ppo is None or self.settings.max_staleness > 0:
            return None
        return await self.parts.ppo.critic.values(generated)

    def _reason_to_drop(self, group: LearnerGroup) -> str | None:
        filtering, num_dropped = self.settings.filtering, len(self.tally.dropped)
        if not filtering.zero_variance:
            return None
        reason = useless(group.summary, group.rewards, self.settings.mask_truncated, filtering.by)
        if reason is None or num_dropped < filtering.max_refills * self.settings.groups_per_step:
            return reason
        if filtering.at_limit == "fail":
            raise RefillLimit(filtering, num_dropped, self._gate.version + 1)
        return None

    def _lost(self, position: int, error: GroupFailedError) -> None:
        again = self.ledger.lose(position, str(error), max(1, len(error.reasons)))
        self.parts.recorder.event("group_lost", position=position, reason=str(error), again=again)
        if not again:
            self.tally.num_failed += 1
            if self.tally.num_failed > self.settings.groups_per_step:
                raise error  # no accident any more: more groups failed than a step holds
        self._make_room()

    def _make_room(self) -> None:
        """A group ended that nobody will train on; the learner may have waited for it, at its bound."""
        self._gate.give_back()
        self._slots.set()
        self._arrived.set()

    def _of_a_step(self, num_groups: int) -> tuple[int, int]:
        return min(num_groups, self.settings.groups_per_step), self.settings.groups_per_step

    # --- batches --------------------------------------------------------------------------------

    async def take(self) -> tuple[list[LearnerGroup], Tally] | None:
        """The next batch in stream order, and what was done for it; None when told to stop while waiting."""
        started, tally = self.parts.clock(), self.tally
        while not (choice := self._choose()).batch:
            self._arrived.clear()
            waits_from = self.parts.clock()
            await self._arrived.wait()
            if choice.at_bound:
                tally.bound_s += self.parts.clock() - waits_from
            if self._stopping.is_set():
                return None
        tally.taken_at = self.parts.clock()
        tally.wait_s = tally.taken_at - started
        self.tally = Tally(self.parts.clock())
        # In stream order: with staleness 0 the batch, and so the run, does not depend on who finished first.
        batch = [self._groups[position] for position in choice.batch]
        return await self._with_values(batch), tally

    def _choose(self) -> Choice:
        running = {position: entry.version for position, entry in self.ledger.in_flight.items()}
        finished = {position: entry.version for position, entry in self.ledger.finished.items()}
        s = self.settings
        return choose_batch(self._gate.version, s.max_staleness, s.groups_per_step, running, finished)

    async def _with_values(self, batch: list[LearnerGroup]) -> list[LearnerGroup]:
        """With a critic: its values before the coming update, for groups that came without."""
        ppo = self.parts.ppo
        if ppo is None:
            return batch

        async def valued(group: LearnerGroup) -> LearnerGroup:
            if group.values_payload is not None:
                return group
            values = await ppo.critic.values(GeneratedGroup(group.summary, group.payload))
            return replace(group, values_payload=values)

        return list(await asyncio.gather(*(valued(group) for group in batch)))

    def trained(self, batch: Sequence[LearnerGroup], step: int) -> None:
        """The batch is part of the weights of ``step`` now."""
        positions = [int(g.summary.group_id) for g in batch]
        self.ledger.train(positions, step)
        for position in positions:
            del self._groups[position]

    def advance(self) -> None:
        """Every generator serves the new version: its slots are free."""
        self._gate.advance()
        self._slots.set()
