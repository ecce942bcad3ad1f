"""A judge that is a reward, as the pools of scorers see it: beside its own engine, or in front of an endpoint.

Samples never pass the driver: the worker fetches a group, asks about each of its samples, and hands marks back.
May import: actors.{endpoint, generator, judge_settings, modeling, respondents}, cluster.transport, trainers.*.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.endpoint import EndpointRespondent
from actors.judge_settings import JudgeRewardSettings
from actors.modeling import load_tokenizer
from actors.respondents import EngineRespondent, OwnEngine
from cluster.transport import fetch
from trainers.asking import Respondent
from trainers.experience import GroupRewards, decode_group
from trainers.judge import PairJudge, RubricJudge
from trainers.protocols import GeneratedGroup
from trainers.win_judge import WinJudge

PAYLOAD_DEADLINE_S = 120.0


class JudgeWorker:
    """Marks group after group, many at a time.

    Args:
        cache, account: folders of replies and of what was spent, with an endpoint.
        engine: keyword arguments of VLLMGenerator, without one.
    """

    def __init__(
        self, settings: JudgeRewardSettings, field: str, cache: str = "", account: str = "",
        engine: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._generator: Any = None
        if settings.endpoint is not None:
            self._respondent: Respondent = EndpointRespondent(
                settings.endpoint, Path(cache), f"{field}.endpoint", Path(account)
            )
        else:
            from actors.generator import VLLMGenerator

            assert engine is not None
            self._generator = VLLMGenerator(**engine)
            self._respondent = EngineRespondent(
                OwnEngine(self._generator), load_tokenizer(engine["model_path"]), engine["max_length"], settings.chat,
                settings.name,
            )  # fmt: skip
        self._judge = reward_judge(settings, self._respondent)

    async def score(self, payload: list[Any], deadline_s: float) -> GroupRewards:
        """Marks of the one group in ``payload``; failures are values in it.

        Raises:
            EndpointError: nobody is answered any more.
        """
        buffer = await asyncio.to_thread(fetch, payload[0], deadline_s)
        return await self._judge.score(decode_group(buffer))

    async def close(self) -> None:
        await self._respondent.close()
        if self._generator is not None:
            self._generator.close()


class JudgeScorer:
    """A rubric judge of this process as a ``Scorer``."""

    def __init__(self, judge: RubricJudge) -> None:
        self._judge = judge

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        buffer = await asyncio.to_thread(fetch, group.payload, PAYLOAD_DEADLINE_S)
        return await self._judge.score(decode_group(buffer))


def reward_judge(settings: JudgeRewardSettings, respondent: Respondent) -> RubricJudge | WinJudge:
    """The judge that ``settings`` describe, asking ``respondent``."""
    if settings.pairwise:
        pairs = PairJudge(respondent, settings.template, settings.max_tokens, settings.system)
        return WinJudge(pairs, settings.part_names[0], settings.weight)
    return RubricJudge(
        respondent, settings.rubric, settings.max_tokens, settings.system, settings.name, settings.weight
    )
