"""The ranks of learner and critic: what they are constructed with, and where those of one role meet.

They are launched when a run starts, and again, all of them, when one is lost: their states belong to one checkpoint.
May import: actors.{critic, example_files, fleet, learner, lora_settings, watched_parts}, cluster.*, launch.{config,
demands, node_probe, prepare}, trainers.*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.critic import CriticLearner
from actors.example_files import write_examples
from actors.fleet import CriticGang, LearnerGang
from actors.learner import DeepSpeedLearner
from actors.lora_settings import LoRAPlan
from actors.watched_parts import WatchedCritic
from cluster.layout import Layout, WorkerSlot
from cluster.placement import Placement, nodes_of_cluster
from cluster.places import Places
from cluster.rendezvous import Rendezvous, node_address
from cluster.worker_group import WorkerGroup
from launch.config import RunConfig
from launch.demands import other_port
from launch.node_probe import gather_facts
from launch.prepare import Prepared
from trainers.correction import resolved
from trainers.time_ledger import TimeLedger

Meetings = Mapping[str, tuple[str, int]]  # role -> address of rank 0's node, and a port that is free there


def meeting_on(
    node: str, here: str, facts: Sequence[Mapping[str, Any]], role: str = "learner", taken: int = 0
) -> tuple[str, int]:
    """Address and free port on ``node``, where rank 0 of ``role`` is; ``here``: the node of this process.

    ``taken``: a port of this node that was given to another role and is not listened on yet.
    """
    if node != here:
        name = "rendezvous" if role == "learner" else f"{role}_rendezvous"
        address, port = next(fact[name] for fact in facts if fact.get("node_id") == node)
        return address, port
    address = node_address()
    return address, other_port(address, taken)


class TrainedRanks:
    """``launch`` places and starts the workers of one role, as launch.assemble does it for all roles."""

    def __init__(
        self, config: RunConfig, prepared: Prepared, run_folder: Path, device: str, dtype: str, layout: Layout,
        placement: Placement | None, launch: Callable[..., WorkerGroup],
    ) -> None:  # fmt: skip
        """``device``: as torch calls it in every worker."""
        self._config, self._prepared, self._device, self._dtype = config, prepared, device, dtype
        self._placement, self._launch_group = placement, launch
        roles = ("learner",) if prepared.critic_path is None else ("learner", "critic")
        self._slots: dict[str, list[WorkerSlot]] = {role: list(layout.of(role)) for role in roles}
        limit = config.cluster.placement_deadline_s
        self._places = {role: Places(slots, placement, limit) for role, slots in self._slots.items()}
        self._num_ranks = {role: len(slots) for role, slots in self._slots.items()}
        self._texts: str | None = None
        if prepared.pretraining:
            texts = run_folder.absolute() / "pretraining.arrow"
            write_examples(texts, prepared.pretraining)
            self._texts = str(texts)

    def launch(self, meetings: Meetings) -> dict[str, WorkerGroup]:
        """Start every rank, in the state of step 0; does not wait for any of them.  The groups by role."""
        config = self._config
        kwargs = {"learner": self._learner_kwargs, "critic": self._critic_kwargs}
        factories = {"learner": DeepSpeedLearner, "critic": CriticLearner}
        deadlines = {"learner": config.learner.start_deadline_s, "critic": config.critic.start_deadline_s}
        return {
            role: self._launch_group(
                role, factories[role], kwargs[role](Rendezvous(*meetings[role], len(slots))),
                concurrency=1, deadline=deadlines[role], slots=tuple(slots),
            )
            for role, slots in self._slots.items()
        }  # fmt: skip

    async def relaunch(self, groups: Mapping[str, WorkerGroup]) -> dict[str, WorkerGroup]:
        """End every rank, whatever it is doing, and start others in their places, elsewhere where a node has gone.

        Raises:
            DeadlineError: the cluster has no room for one of them.
        """
        placement = self._placement
        if placement is None:
            raise ValueError("ranks in this process cannot be lost")
        end_all(groups)
        for role, places in self._places.items():
            for slot in self._slots[role]:
                places.give_back(slot)
            self._slots[role] = []
        for role, places in self._places.items():
            while len(self._slots[role]) < self._num_ranks[role]:
                self._slots[role].append(await places.take())
        return self.launch(await self._meet_again(placement))

    def gangs(self, groups: Mapping[str, WorkerGroup], ledger: TimeLedger) -> tuple[LearnerGang, CriticGang | None]:
        """All ranks of each role as the loop knows them."""
        learner, critic = self._config.learner, self._config.critic
        gang = LearnerGang(groups["learner"], learner.update_deadline_s)
        if "critic" not in groups:
            return gang, None
        return gang, WatchedCritic(groups["critic"], critic.update_deadline_s, critic.token_budget, ledger)

    async def _meet_again(self, placement: Placement) -> Meetings:
        """Ports that are free now: those of the start may still be held by what is ending."""
        nodes = nodes_of_cluster()
        of_role = {role: placement.node_of(slots[0]) for role, slots in self._slots.items()}
        away = set(of_role.values()) - {nodes[0].node_id}
        facts: Sequence[Mapping[str, Any]] = []
        if away:
            asked = [nodes[0], *(node for node in nodes if node.node_id in away)]
            facts = await gather_facts(self._config, self._prepared.model_path, asked)
        meetings: dict[str, tuple[str, int]] = {}
        for role, node in of_role.items():
            taken = max((port for _, port in meetings.values()), default=0)
            meetings[role] = meeting_on(node, nodes[0].node_id, facts, role, taken)
        return meetings

    def _learner_kwargs(self, rendezvous: Rendezvous) -> list[Mapping[str, Any]]:
        config = self._config
        correction = resolved(config.algorithm.correction, config.run.max_staleness)
        algorithm = config.algorithm.model_copy(update={"correction": correction})
        return [
            {
                "rank": rank, "rendezvous": rendezvous, "model_path": self._prepared.model_path,
                "settings": config.learner, "algorithm": algorithm, "sampling": config.generator.sampling,
                "dtype": self._dtype, "device": self._device, "num_steps": config.run.num_steps,
                "seed": config.run.seed, "pretraining": self._texts, "lora": self._lora_plan(),
            }
            for rank in range(config.learner.num_workers)
        ]  # fmt: skip

    def _lora_plan(self) -> LoRAPlan | None:
        config = self._config
        if config.model.lora is None:
            return None
        return LoRAPlan(
            config.model.lora, config.model.quantization, self._prepared.adapter, config.pushes_merged,
            config.checkpoint.export_merged, config.own_reference,
        )  # fmt: skip

    def _critic_kwargs(self, rendezvous: Rendezvous) -> list[Mapping[str, Any]]:
        config = self._config
        return [
            {
                "rank": rank, "rendezvous": rendezvous, "model_path": self._prepared.critic_path,
                "settings": config.critic, "algorithm": config.algorithm, "dtype": self._dtype,
                "device": self._device, "num_steps": config.run.num_steps, "seed": config.run.seed,
            }
            for rank in range(config.critic.num_workers)
        ]  # fmt: skip


def end_all(groups: Mapping[str, WorkerGroup]) -> None:
    """End every worker at once: one that waits in a collective for a lost peer answers no call to close."""
    for group in groups.values():
        for index in group.indices:
            group.end(index)
