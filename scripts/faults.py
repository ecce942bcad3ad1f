"""Which faults there are, and a seeded schedule of them.  Pure: the same seed makes the same schedule.

A fault falls in a phase that the run itself shows (events.jsonl, metrics.jsonl), never after a guessed time.
May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

NUM_COSTLY = 5  # times for each kind that takes a minute or two, where others are cheaper and have room for the rest
MAX_GAP = 6  # rows of metrics between the end of one fault and the next one


class Act(StrEnum):
    """What is done to the target."""

    KILL = "kill"  # kill -9
    FREEZE = "freeze"  # SIGSTOP; SIGCONT when the run is well again without it
    PAUSE = "pause"  # SIGSTOP; SIGCONT as soon as it is suspected
    SLOW = "slow"  # SIGSTOP and SIGCONT by turns
    FILL = "fill"  # no room on the disk until a checkpoint has failed
    TERMINATE = "terminate"  # SIGTERM
    CUT = "cut"  # the network of a host; healed when Ray has given the node up


class Phase(StrEnum):
    """What the run is doing at that moment."""

    SAMPLING = "sampling"  # a row of metrics has just been recorded: the next groups are being sampled
    PUSHING = "pushing"  # the event ``pushing``
    SAVING = "saving"  # the row of a step that is saved


class Ends(StrEnum):
    """What shows that the run is well again."""

    REPLACED = "replaced"  # another worker stands in the place of the dead one
    RECOVERED = "recovered"  # the same worker works again
    WENT_ON = "went on"  # steps were recorded all the while
    RESTARTED = "restarted"  # a step was recorded after the death, in the same run or after ``--resume``
    RESUMED = "resumed"  # a step was recorded after ``--resume``
    SAVED = "saved"  # a checkpoint after the one that failed
    ADOPTED = "adopted"  # the host came back as a new node, and as many generators as are wanted work again


@dataclass(frozen=True, slots=True)
class Kind:
    """``target``: a role, or engine (of a generator), host (of a generator, not of the driver), driver, everything
    (driver and all workers), disk.
    """

    act: Act
    target: str
    phases: tuple[Phase, ...]
    ends: Ends

    @property
    def is_costly(self) -> bool:
        """Whether it takes an engine, a group of ranks or the whole run to start again: half a minute or more."""
        restarts = self.ends in (Ends.RESTARTED, Ends.RESUMED, Ends.ADOPTED)
        return restarts or (self.ends is Ends.REPLACED and self.target in ("generator", "engine"))


_ANY = (Phase.SAMPLING, Phase.PUSHING, Phase.SAVING)
_EARLY = (Phase.SAMPLING,)

KINDS: Mapping[str, Kind] = {
    "kill_generator": Kind(Act.KILL, "generator", (Phase.SAMPLING, Phase.PUSHING), Ends.REPLACED),
    "kill_engine": Kind(Act.KILL, "engine", (Phase.SAMPLING, Phase.PUSHING), Ends.REPLACED),
    "freeze_generator": Kind(Act.FREEZE, "generator", _EARLY, Ends.REPLACED),
    "stall_push": Kind(Act.FREEZE, "generator", (Phase.PUSHING,), Ends.REPLACED),
    "pause_generator": Kind(Act.PAUSE, "generator", _EARLY, Ends.RECOVERED),
    "slow_generator": Kind(Act.SLOW, "generator", _EARLY, Ends.WENT_ON),
    "kill_reward_worker": Kind(Act.KILL, "reward_workers", _EARLY, Ends.REPLACED),
    "kill_reward_model": Kind(Act.KILL, "reward_models.0", _EARLY, Ends.REPLACED),
    "kill_reference": Kind(Act.KILL, "reference", _EARLY, Ends.REPLACED),
    "kill_learner": Kind(Act.KILL, "learner", _ANY, Ends.RESTARTED),
    "freeze_learner": Kind(Act.FREEZE, "learner", _EARLY, Ends.RESTARTED),
    "kill_critic": Kind(Act.KILL, "critic", _ANY, Ends.RESTARTED),
    "kill_driver": Kind(Act.KILL, "driver", _ANY, Ends.RESUMED),
    "kill_everything": Kind(Act.KILL, "everything", _ANY, Ends.RESUMED),
    "terminate_driver": Kind(Act.TERMINATE, "driver", (Phase.SAMPLING, Phase.PUSHING), Ends.RESUMED),
    "fill_disk": Kind(Act.FILL, "disk", _EARLY, Ends.SAVED),
    "cut_network": Kind(Act.CUT, "host", (Phase.SAMPLING, Phase.PUSHING), Ends.ADOPTED),
    "kill_node": Kind(Act.KILL, "host", (Phase.SAMPLING, Phase.PUSHING), Ends.ADOPTED),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault to come."""

    number: int
    kind: str  # of KINDS
    phase: Phase
    choice: float  # in [0, 1): which of the workers of the target's role
    gap: int  # rows of metrics to be recorded after the fault before is over


def schedule(seed: int, num_faults: int, kinds: Sequence[str]) -> tuple[Fault, ...]:
    """``num_faults`` faults in random order; each of ``kinds`` comes as often as any other, or once more.

    In a schedule long enough for ``NUM_COSTLY`` of each, kinds that end in a new engine or a new start of the run come
    that often, or half as often as cheap ones; those of hosts come ``NUM_COSTLY`` times at most beside others.

    Raises:
        KeyError: an unknown kind.
    """
    random = Random(f"{seed} {num_faults} {' '.join(kinds)}")
    each = num_faults // len(kinds)
    hosts = [kind for kind in kinds if KINDS[kind].target == "host"]
    costly = [kind for kind in kinds if KINDS[kind].is_costly and kind not in hosts]
    times = dict.fromkeys(hosts, min(NUM_COSTLY, each))
    if each >= NUM_COSTLY:
        times |= dict.fromkeys(costly, max(NUM_COSTLY, each // 2))
    rest = [kind for kind in kinds if kind not in times]
    if not rest:  # nothing is cheaper
        times, rest = {}, [*kinds]
    names = [kind for kind, num in times.items() for _ in range(num)]
    num_each, more = divmod(num_faults - len(names), len(rest))
    names += [*rest * num_each, *random.sample(rest, more)]
    random.shuffle(names)
    return tuple(
        Fault(number, name, random.choice(KINDS[name].phases), random.random(), random.randint(1, MAX_GAP))
        for number, name in enumerate(names)
    )


def deal(faults: Sequence[Fault], runs: Mapping[str, Collection[str]]) -> dict[str, tuple[Fault, ...]]:
    """The faults of each run, in their order: each to the run with the fewest of those that have its target.

    ``runs``: by name, the kinds that a run can suffer.  Raises ValueError for a fault that no run can.
    """
    dealt: dict[str, list[Fault]] = {name: [] for name in runs}
    # Those with the least choice first, so that the others even it out.
    for fault in sorted(faults, key=lambda f: sum(f.kind in kinds for kinds in runs.values())):
        able = [name for name, kinds in runs.items() if fault.kind in kinds]
        if not able:
            raise ValueError(f"no run can suffer {fault.kind}; there are {sorted(runs)}")
        dealt[min(able, key=lambda name: len(dealt[name]))].append(fault)
    return {name: tuple(sorted(found, key=lambda f: f.number)) for name, found in dealt.items()}
