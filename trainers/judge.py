"""A language model as judge: of two answers in both orders, or of one answer by a rubric.

Whom it asks it does not know (trainers/asking.py).  Axes: G samples of one prompt.
May import: numpy, trainers.{asking, experience, rubric, verdicts}.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from trainers.asking import Question, Reply, Respondent, Silence, fill_template
from trainers.experience import GroupRewards, Prompt, RewardFailure, Trajectory, TrajectoryGroup
from trainers.rubric import RubricSettings, weighted_mean
from trainers.verdicts import Judgement


class PairJudge:
    """Asks ``respondent`` which of two answers is better, in both orders.

    Args:
        template: {prompt}, {a} and {b} are replaced, {principle} where the judge is given one.
        max_tokens: longest verdict; it is decoded greedily.
    """

    def __init__(self, respondent: Respondent, template: str, max_tokens: int, system: str | None = None) -> None:
        self._respondent, self._template = respondent, template
        self._max_tokens, self._system = max_tokens, system

    async def judge(self, prompt: Prompt, a: str, b: str, principle: str = "") -> Judgement:
        """Which one is better; without an answer from the judge the comparison is masked, and says why."""
        shown = conversation_text(prompt)
        orders = ((a, b), (b, a))
        texts = [fill_template(self._template, prompt=shown, a=x, b=y, principle=principle) for x, y in orders]
        asked = (Question(text, self._max_tokens, self._system) for text in texts)
        replies = await asyncio.gather(*(self._respondent.ask(question) for question in asked))
        silence = first_silence(replies)
        if silence is not None:
            return Judgement(None, (None, None), silence)
        ab, ba = replies
        return Judgement.of((ab.text, ba.text), (ab.cut_off, ba.cut_off))


class RubricJudge:
    """Marks the samples of a group one by one; the parts are ``<name>_<axis>``, each in [0, 1].

    Args:
        weight: of the mean over axes in the total reward; 0: everything is only measured.
    """

    def __init__(
        self, respondent: Respondent, rubric: RubricSettings, max_tokens: int, system: str | None = None,
        name: str = "judge", weight: float = 1.0,
    ) -> None:  # fmt: skip
        self._respondent, self._rubric, self._max_tokens, self._system = respondent, rubric, max_tokens, system
        self._name, self._weight = name, weight

    async def score(self, group: TrajectoryGroup) -> GroupRewards:
        """Rewards of one group; what could not be marked is NaN with a failure of its kind, never a low mark.

        Raises:
            EndpointError: nobody is answered any more.
        """
        started, axes = time.monotonic(), self._rubric.axes
        prompt = conversation_text(group.prompt)
        marked = await asyncio.gather(*(self._mark(prompt, t) for t in group.trajectories))
        parts = {part_name(self._name, a.name): np.full(len(marked), np.nan) for a in axes}
        totals, failures = np.full(len(marked), np.nan), []
        for i, marks in enumerate(marked):
            values = {}
            for axis in axes:
                part, mark = part_name(self._name, axis.name), marks[axis.name]
                if isinstance(mark, RewardFailure):
                    failures.append((i, mark))
                values[axis.name] = parts[part][i] = np.nan if isinstance(mark, RewardFailure) else mark
            totals[i] = self._weight * weighted_mean(values, axes)
        measured = tuple(part_name(self._name, a.name) for a in axes if not (a.weight and self._weight))
        if not self._weight:
            totals = np.zeros(len(marked))
        return GroupRewards(group.group_id, totals, parts, tuple(failures), time.monotonic() - started, measured)

    async def _mark(self, prompt: str, trajectory: Trajectory) -> dict[str, float | RewardFailure]:
        names = {axis.name: part_name(self._name, axis.name) for axis in self._rubric.axes}
        if trajectory.finish_reason == "abort" or not trajectory.text.strip():
            why = "the sample was aborted" if trajectory.finish_reason == "abort" else "an empty completion has no mark"
            return {axis: RewardFailure(part, "not_a_number", why) for axis, part in names.items()}
        reply = await self._respondent.ask(
            Question(self._rubric.ask(prompt, trajectory.text), self._max_tokens, self._system)
        )
        if reply.silence is not None:
            return {axis: RewardFailure(part, reply.silence, reply.detail) for axis, part in names.items()}
        found: dict[str, float | RewardFailure] = {}
        for axis, mark in self._rubric.read(reply.text, reply.cut_off).items():
            detail = f"said {reply.text[:80]!r}"
            unread = None if mark.failure is None else RewardFailure(names[axis], mark.failure, detail)
            found[axis] = unread if unread is not None else float(mark.value or 0.0)
        return found


def part_name(judge: str, axis: str) -> str:
    """The reward part of one axis."""
    return f"{judge}_{axis}"


def first_silence(replies: Sequence[Reply]) -> Silence | None:
    """Why a question of several was not answered."""
    return next((reply.silence for reply in replies if reply.silence is not None), None)


def conversation_text(prompt: Prompt) -> str:
    """What a judge is shown of a prompt: its text, or its only message, or all messages with their roles."""
    source = prompt.source
    if source is None:
        return prompt.text
    if isinstance(source, str):
        return source
    if len(source) == 1:
        return str(source[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in source)
