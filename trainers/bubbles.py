"""The bubble table: how much of each role's time was useful, where the rest went, and what would help.  Pure.

The advice is derived from the totals by the rules below, one for each way to lose time.
May import: trainers.{accounting, time_ledger, waiting}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from trainers.accounting import USEFUL, Cause
from trainers.time_ledger import Entry, Times
from trainers.waiting import GENERATOR, LEARNER

WORTH_MENTIONING = 0.1  # of a role's time: the largest loss below it calls for nothing
SHOWN_LOSSES = 3
STARTING = ((Cause.START, ""), (Cause.WAIT, "start"))
SATURATED = 0.9  # useful: this role is what the others wait for


@dataclass(frozen=True, slots=True)
class RoleTime:
    """The time of all workers of a role together, in ns."""

    role: str
    num_workers: int
    times: Times

    @property
    def wall(self) -> int:
        return sum(self.times.values())

    @property
    def running(self) -> RoleTime:
        """Without the time in which it, or somebody it waited for, was starting: a longer run has no more of it."""
        return replace(self, times={key: t for key, t in self.times.items() if key not in STARTING})

    @property
    def useful_fraction(self) -> float:
        """Of the wall time; 0.0 where there is none."""
        return self.fraction(USEFUL)

    def fraction(self, causes: Collection[Cause], whom: str | None = None) -> float:
        """Share of the causes; ``whom``: of the waits for it alone."""
        found = sum(t for (cause, of), t in self.times.items() if cause in causes and whom in (None, of))
        return found / self.wall if self.wall else 0.0

    @property
    def losses(self) -> list[tuple[Cause, str, float]]:
        """(cause, for whom, share of the time), the largest first; everything that was not useful."""
        found = [(c, w, t / self.wall) for (c, w), t in self.times.items() if c not in USEFUL and t > 0]
        return sorted(found, key=lambda loss: -loss[2])


def by_role(totals: Mapping[str, Times], roles: Mapping[str, str]) -> list[RoleTime]:
    """Workers added up.  ``roles``: of every worker, in the order of the table."""
    found: dict[str, Counter[tuple[Cause, str]]] = {}
    num_workers: Counter[str] = Counter()
    for worker, role in roles.items():
        found.setdefault(role, Counter()).update(totals.get(worker, {}))
        num_workers[role] += 1
    return [RoleTime(role, num_workers[role], times) for role, times in found.items()]


def metrics(entries: Sequence[Entry], roles: Mapping[str, str]) -> dict[str, float]:
    """One step's metrics (names in trainers/metrics.py); causes that did not occur in it are left out."""
    totals: dict[str, Counter[tuple[Cause, str]]] = {}
    for entry in entries:
        totals.setdefault(entry.worker, Counter())[entry.cause, entry.whom] += entry.end - entry.start
    found: dict[str, float] = {}
    for role in by_role(totals, roles):
        if not role.wall:
            continue
        found[f"accounting/{role.role}/useful_fraction"] = role.useful_fraction
        for cause in sorted({cause for cause, _ in role.times}):
            found[f"accounting/{role.role}/{cause}_fraction"] = role.fraction({cause})
        for whom in sorted({whom for cause, whom in role.times if cause == Cause.WAIT}):
            found[f"accounting/{role.role}/wait_for_{whom}_fraction"] = role.fraction({Cause.WAIT}, whom)
    return found


# --- what would help ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What of the configuration the advice depends on."""

    max_staleness: int = 0
    shares_devices: bool = False  # roles take turns on one device: more workers of one slow the others


_WAIT = {  # for whom a generator or a learner waits -> remedy
    "score": "more scorers: reward_workers.num_workers, or num_workers of the reward model",
    "reference": "more reference workers: reference.num_workers",
    "critic": "more critic ranks (critic.num_workers), and critic.overlap=true where it has devices of its own",
    "push": "a faster push: push.backend=nccl or ipc, push.directory in memory; or larger steps, which push less often",
    "checkpoint": "a larger checkpoint.every",
    "evaluation": "a larger evaluation.every, or fewer held-out prompts (prompts.eval)",
}
_OWN = {  # what a worker does that is not useful -> remedy
    Cause.PUSH: _WAIT["push"],
    Cause.PAUSE: _WAIT["push"],
    Cause.CHECKPOINT: _WAIT["checkpoint"],
    Cause.EVALUATE: _WAIT["evaluation"],
    Cause.PREFILL_AGAIN: "generators were lost: see the faults in events.jsonl",
    Cause.IDLE: "the controller was busy, or the machine: give it a core of its own",
}


def advice(role: RoleTime, setting: Setting) -> str:
    """One line: what would help against the largest loss of a role, its start left out.

    Roles that feed the learner (scorers, reference, critic) may wait: that costs the run nothing, so they are told
    only when they hold the others up, or when fewer of them would do.
    """
    role = role.running
    if role.role not in (GENERATOR, LEARNER):
        return _feeder(role)
    cause, whom, share = next(iter(role.losses), (Cause.IDLE, "", 0.0))
    if share < WORTH_MENTIONING:
        return "nothing: no loss above 10 %"
    if cause != Cause.WAIT:
        return _OWN[cause]
    if whom in (GENERATOR, LEARNER):
        return _between(role.role, whom, setting)
    return _WAIT[whom]


def _between(role: str, whom: str, setting: Setting) -> str:
    """Generators and learner wait for each other, or for their own kind."""
    overlap = "run.max_staleness=1, so that sampling and learning overlap"
    if role == whom == LEARNER:
        return "an even share for every rank: a smaller learner.token_budget, or more samples a step"
    if role == whom == GENERATOR:
        longest = "a smaller generator.sampling.max_tokens: the others wait for the longest samples"
        return f"{overlap}; or {longest}" if setting.max_staleness == 0 else longest
    more = "more learner ranks: learner.num_workers" if whom == LEARNER else "more generators: generator.num_workers"
    if setting.max_staleness == 0:
        return overlap if setting.shares_devices else f"{overlap}; then {more}"
    return more


def _feeder(role: RoleTime) -> str:
    if role.useful_fraction >= SATURATED:
        return "more of them: they are at work all the time"
    needed = max(1, -int(-role.useful_fraction * role.num_workers // SATURATED))
    if needed < role.num_workers:
        return f"fewer of them: {needed} of {role.num_workers} would do"
    return "nothing: it waits for work and holds nobody up"
