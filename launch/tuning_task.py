"""What the tasks of a run that learns from files ask of the driver they share (launch/tune.py), and it of them.

A task is built before Ray starts: its constructor reads and checks all data and raises InputError for what cannot
be used.  The driver then makes the run folder, lets the task write what the ranks read (and compute what is needed
for it, with workers of its own), starts the ranks, and draws the units of every step from the task's datasets (a unit
is an example, or a prompt with all its answers).  Data reach the ranks as files in the run folder, which on a cluster
lies on a disk they all see; a step sends indices.

What a task's rank class must have, besides EngineRank's methods (actors/rank.py):

    __init__(rank, rendezvous, model_path, settings, dtype, device, num_steps, seed, lora=a plan or None,
             **task.rank_kwargs(folder))
    update(payload, step) -> dict[str, float]      one optimizer step; the same on every rank; called on all at once;
                                                   "num_tokens" is that of the step, the driver adds it up

Every name a metric has must stand in trainers/metrics.py.
May import: cluster.{layout, placement, worker_group}, launch.{model_facts, telemetry, tuning_config}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.layout import Layout, NodeSupply
from cluster.placement import RayHandle
from cluster.worker_group import WorkerGroup
from launch.model_facts import ModelFacts
from launch.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class BaseModelFolder:
    """The checked folder that training starts from."""

    path: str
    facts: ModelFacts
    max_length: int  # longest text, in tokens: the least of model.max_length, the model's own and learner.token_budget
    tokenizer: Any  # actors.modeling.load_tokenizer(path)
    adapter: str | None = None  # folder of the adapter that training goes on from; path is then its base


@dataclass(frozen=True, slots=True)
class TuningFleet:
    """The ranks while they run."""

    ranks: WorkerGroup
    deadline_s: float
    layout: Layout
    device: str  # cpu or cuda
    dtype: str

    async def call(self, method: str, *args: Any) -> Any:
        """``method`` on every rank at once; what rank 0 returned."""
        return (await self.ranks.call_all(method, *args, deadline_s=self.deadline_s))[0]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a task may start workers of its own before the ranks are there."""

    handle: RayHandle | None  # None: in this process
    nodes: list[NodeSupply]
    telemetry: Telemetry


class TuningTask(Protocol):
    """One kind of training.  ``Task(config: TuningConfig, base: BaseModelFolder)`` prepares and checks the data."""

    @property
    def rank_class(self) -> type:
        """A subclass of actors.rank.EngineRank."""

    @property
    def sizes(self) -> Sequence[int]:
        """Units in each dataset of data.train, in their order; each at least 1."""

    @property
    def digest(self) -> str:
        """Names the training data; a checkpoint made with other data is refused."""

    @property
    def summary(self) -> str:
        """One line for the terminal: what there is to train on, what was left out."""

    @property
    def report(self) -> Mapping[str, Any]:
        """The same as counts, for events.jsonl; JSON values."""

    @property
    def key_metrics(self) -> Sequence[str]:
        """Of the table at the end, in its order."""

    def write(self, folder: Path) -> None:
        """Write what the ranks read into ``folder`` (of the run, there already); the same bytes on a resume."""

    async def before_ranks(self, site: Site, folder: Path) -> None:
        """Called after ``write``, while no rank is there: its workers are gone on return.  ``folder``: as of write."""

    def rank_kwargs(self, folder: Path) -> dict[str, Any]:
        """Further arguments of ``rank_class``, which can be pickled; ``folder`` is that of ``write``."""

    def payload(self, drawn: Sequence[tuple[int, int]], step: int) -> Any:
        """What ``update`` gets for the units ``drawn`` ([(dataset, index)]); small: it goes through the driver."""

    async def evaluate(self, fleet: TuningFleet, step: int) -> Mapping[str, float]:
        """Metrics (``eval/...``) on held-out data; only called when evaluation.every is set."""

    async def after_training(self, fleet: TuningFleet, exported: Path) -> Mapping[str, Any]:
        """Called once with the folder that was exported; what it returns goes into an event.  May write there."""
