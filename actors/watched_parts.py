"""Parts of the loop that note in a time ledger at which stage each group is, queues included.

Each does what the part it holds does; an evaluation's groups are no stage of a step and are not noted.
May import: actors.fleet, cluster.worker_group, trainers.{accounting, experience, protocols, time_ledger}.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from actors.fleet import CriticGang
from cluster.worker_group import WorkerGroup
from trainers.accounting import is_evaluating
from trainers.experience import GroupRewards
from trainers.protocols import GeneratedGroup, Payload, Reference, Scorer
from trainers.time_ledger import TimeLedger


class WatchedScorer:
    """A ``Scorer``."""

    def __init__(self, scorer: Scorer, ledger: TimeLedger) -> None:
        self.scorer, self.ledger = scorer, ledger

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        with _stage(self.ledger, "score"):
            return await self.scorer.score(group)


class WatchedReference:
    """A ``Reference``."""

    def __init__(self, reference: Reference, ledger: TimeLedger) -> None:
        self.reference, self.ledger = reference, ledger

    async def logprobs(self, group: GeneratedGroup) -> Payload:
        with _stage(self.ledger, "reference"):
            return await self.reference.logprobs(group)


class WatchedCritic(CriticGang):
    """All critic ranks, see :class:`actors.fleet.CriticGang`."""

    def __init__(self, workers: WorkerGroup, deadline_s: float, token_budget: int, ledger: TimeLedger) -> None:
        super().__init__(workers, deadline_s, token_budget)
        self.ledger = ledger

    async def values(self, group: GeneratedGroup) -> Payload:
        with _stage(self.ledger, "critic"):
            return await super().values(group)


def _stage(ledger: TimeLedger, name: str) -> AbstractContextManager[None]:
    return nullcontext() if is_evaluating() else ledger.stage(name)
