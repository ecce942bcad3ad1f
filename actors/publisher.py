"""The push: the learner's new weights into every generator, verified.  Drives both sides.

    file    rank 0 writes one sealed file; every generator maps it
    nccl    each serving rank stages, then sends to its engines over groups of two parties
    ipc     a rank shares its staged buckets with the engine on the same GPU

A generator is a member only after a push that was verified.  One that fails or stalls in a push is expelled from
the roster with its reason, and the push is complete without it; a failure of the learner's side ends the push.  A
generator that joins catches up by file, whatever the transport, and takes part in the pushes after that over a group
of its own.  ``transport`` "group" is the state machine of ``nccl``; between CPU processes it runs over gloo.
May import: actors.*, cluster.*, trainers.protocols.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal, TypeVar

from actors.roster import Member, MemberGoneError, Roster
from cluster.errors import DeadlineError
from cluster.outcomes import Outcome, outcome
from cluster.weight_channel import WeightManifest
from cluster.worker_group import WorkerGroup
from trainers.errors import VerificationError
from trainers.experience import WeightVersion
from trainers.protocols import PushReport

Transport = Literal["file", "group", "ipc"]
T = TypeVar("T")

NUM_PARTS = 4  # of a fleet that is served part by part: three quarters sample, and a push is four deliveries long
SENDER_PATIENCE = 2.0  # of the deadline: a rank that waits in vain says itself that its engine did not come


class SenderError(Exception):
    """The learner's side of a push failed; ``cause`` is what it raised."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause
        super().__init__(cause)


class Publisher:
    """Pushes versions; ``WeightPublisher`` of the loop."""

    def __init__(
        self,
        learner: WorkerGroup,
        generators: WorkerGroup,
        roster: Roster,
        transport: Transport,
        directory: Path,
        dtype: str,
        bucket_bytes: int,
        workers_per_engine: int,
        deadline_s: float,
        staggered: bool = False,
    ) -> None:
        """``staggered``: a quarter of the fleet pauses at a time, the others sample meanwhile; else all at once."""
        self.learner, self.generators, self.roster, self.transport = learner, generators, roster, transport
        self.directory, self.dtype, self.bucket_bytes = directory, dtype, bucket_bytes
        self.workers_per_engine, self.deadline_s = workers_per_engine, deadline_s
        self.staggered = staggered
        self.version: WeightVersion | None = None  # of the last complete push
        self._connected: set[int] = set()  # engines that have met their serving rank
        self._turns: dict[int, asyncio.Lock] = {}  # of the engines of each serving rank
        self._sealed: tuple[Path, dict[str, Any]] | None = None  # with ``file``: the newest version's
        self._quiet = asyncio.Event()  # a first push is complete and none is going on
        self._door = asyncio.Lock()  # held by a push, and by a generator that joins while no push may begin
        self._num_joining = 0

    def serving_rank(self, engine: int) -> int:
        """Engine e is served by learner rank e mod R: no rank is a bottleneck."""
        return engine % len(self.learner)

    async def push(self, version: WeightVersion) -> PushReport:
        """Bring every member of the roster to ``version``; those that cannot be brought there are expelled."""
        async with self._door:
            return await self._push(version)

    async def _push(self, version: WeightVersion) -> PushReport:
        started = time.perf_counter()
        self._quiet.clear()
        if self.transport == "file":
            manifest, loads = await self._push_file(version)
        else:
            manifest, loads = await self._push_staged(version)
        self.version = version
        self._quiet.set()
        sent = WeightManifest.from_dict(manifest)
        return PushReport(
            version=version,
            num_bytes=sent.num_bytes,
            push_s=time.perf_counter() - started,
            pause_s=max((r["pause_s"] for r in loads), default=0.0),
            num_verified=min((r["num_after_load"] for r in loads), default=0),
            num_arrival_verified=max((r["num_at_arrival"] for r in loads), default=0),
        )

    def disconnect(self) -> None:
        """The learner is gone.  Until :attr:`learner` is another one and has pushed, nobody can join.

        The generators' groups with it are theirs to leave: each meets its new serving rank in the next push.
        """
        self._quiet.clear()
        self._connected.clear()
        self._turns.clear()
        for unsealed in self.directory.glob(".weights-*.partial"):  # its writer was ended
            unsealed.unlink(missing_ok=True)

    async def between_pushes(self) -> None:
        """Return when no push is going on and one is complete; every step of a push has a deadline."""
        await self._quiet.wait()

    async def _push_file(self, version: WeightVersion) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path = self._path(version)
        manifests = await self.learner.call_all(
            "weights_call", "publish_file", str(path), str(version), self.dtype, deadline_s=self.deadline_s
        )
        self._sealed = path, manifests[0]
        loads = await self._deliver(version, lambda member: self._load_file(member, path, manifests[0]))
        self._remove_files(path)  # the newest stays: it is how a late generator catches up
        return manifests[0], loads

    async def _push_staged(self, version: WeightVersion) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self._sealed = None
        if self.transport == "group":
            await self._part()
            await self._deliver(version, self._connect)
        serving = {self.serving_rank(member.index) for member in self.roster.members}
        manifests = await self.learner.call_all(
            "stage_weights",
            str(version),
            self.dtype,
            self.bucket_bytes,
            self.transport == "ipc",
            deadline_s=self.deadline_s,
            per_worker=[(rank in serving,) for rank in range(len(self.learner))],
        )
        loads = await self._deliver(version, lambda member: self._load_staged(member, manifests[0]))
        if self._num_joining:  # rank 0 has nothing else to do now; once it updates, a joiner would wait for its end
            path = self._path(version)
            written = await outcome(self._write_staged(path))
            self._sealed = None if written.error is not None else (path, written.value())
        self._remove_files(None if self._sealed is None else self._sealed[0])
        return manifests[0], loads

    async def _deliver(
        self, version: WeightVersion, part: Callable[[Member], Coroutine[Any, Any, dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """``part`` of every member; whoever fails is expelled.  Results of the others.

        Raises:
            Exception: of the learner's side, as it was raised.
        """

        async def one(member: Member) -> Outcome[dict[str, Any]]:
            return await outcome(member.during(part(member)))

        members = self.roster.members
        at_once = -(-len(members) // NUM_PARTS) if self.staggered else len(members)
        came: list[dict[str, Any]] = []
        for first in range(0, len(members), max(1, at_once)):
            together = members[first : first + at_once]
            outcomes = await asyncio.gather(*(one(member) for member in together))
            for member, found in zip(together, outcomes, strict=True):
                if isinstance(found.error, SenderError):
                    raise found.error.cause from found.error
                if found.error is None:
                    came.append(found.value())
                elif not isinstance(found.error, MemberGoneError):
                    reason = f"push of version {version}: {type(found.error).__name__}: {found.error}"
                    self.roster.expel(member, reason)  # at once: it may serve other weights than it says
        return came

    def _path(self, version: WeightVersion | str) -> Path:
        return self.directory / f"weights-{version}.safetensors"

    def _remove_files(self, kept: Path | None) -> None:
        for old in self.directory.glob("weights-*.safetensors"):
            if old != kept:
                old.unlink(missing_ok=True)

    async def _load_file(self, member: Member, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        info = {"transport": "file", "path": str(path)}
        loaded = await self.generators.call(
            member.index, "load_weights", info, manifest, deadline_s=self.deadline_s
        )
        return dict(loaded)

    async def _load_staged(self, member: Member, manifest: dict[str, Any]) -> dict[str, Any]:
        rank = self.serving_rank(member.index)
        info: dict[str, Any] = {
            "transport": self.transport,
            "tensors": manifest["tensors"],
            "fingerprints": manifest["fingerprints"],
            "bucket_bytes": self.bucket_bytes,
        }
        if self.transport == "ipc":
            shared = await outcome(self.learner.call(rank, "weights_call", "share", deadline_s=self.deadline_s))
            info["handles"] = _of_sender(shared)
            loaded = await self.generators.call(
                member.index, "load_weights", info, manifest, deadline_s=self.deadline_s
            )
            return dict(loaded)
        # One engine after the other, as the rank sends: who waits for a stalled one's deadline is not late itself.
        async with self._turns.setdefault(rank, asyncio.Lock()):
            sending = self.learner.call(
                rank, "weights_call", "send", _group(member.index), deadline_s=SENDER_PATIENCE * self.deadline_s
            )
            loading = self.generators.call(member.index, "load_weights", info, manifest, deadline_s=self.deadline_s)
            sent, came = await asyncio.gather(outcome(sending), outcome(loading))
        _of_sender(sent)
        return dict(came.value())

    async def _connect(self, member: Member) -> dict[str, Any]:
        """One process group for each engine: its serving rank and its tensor-parallel workers."""
        if member.index in self._connected:
            return {}
        group, rank = _group(member.index), self.serving_rank(member.index)
        met = await outcome(self.learner.call(rank, "meeting_point", deadline_s=self.deadline_s))
        address, port = _of_sender(met)
        size = 1 + self.workers_per_engine
        init = {
            "group": group, "address": address, "port": port, "rank_offset": 1, "size": size,
            "deadline_s": self.deadline_s,
        }  # fmt: skip
        opening = self.learner.call(
            rank, "weights_call", "open_group", group, address, port, size, self.deadline_s,
            deadline_s=SENDER_PATIENCE * self.deadline_s,
        )  # fmt: skip
        meeting = self.generators.call(member.index, "init_transfer", init, deadline_s=self.deadline_s)
        opened, joined = await asyncio.gather(outcome(opening), outcome(meeting))
        _of_sender(opened)
        joined.value()
        self._connected.add(member.index)
        return {}

    async def _part(self) -> None:
        """Close the groups of engines that have gone; nobody else's is touched."""
        present = {member.index for member in self.roster.members}
        for engine in sorted(self._connected - present):
            self._connected.discard(engine)
            rank = self.serving_rank(engine)
            await self.learner.call(rank, "weights_call", "close_group", _group(engine), deadline_s=self.deadline_s)

    # --- joining ------------------------------------------------------------------------------------

    async def catch_up(self, member: Member) -> str:
        """Bring a generator that is in no push to the present version by file, and admit it to the roster.

        Returns the version: no push is going on, and the generator serves what the others serve.  A push that comes
        meanwhile is not delayed at first; when one has come, the generator loads the newer version and the next push
        waits for that.  Otherwise a run whose laps are shorter than a load would never get a generator.
        """
        self._num_joining += 1
        try:
            await self.between_pushes()
            at = self.version
            loaded = await outcome(self._load_present(member))
            if self.version == at and self._quiet.is_set() and not _is_learners_deadline(loaded.error):
                return self._admit(member, loaded.value())
            while True:  # a newer version is out, its file took the place of this one, or rank 0 was long at an update
                await self.between_pushes()
                async with self._door:
                    if not self._quiet.is_set():  # the push that was waited for failed
                        continue
                    served = await self._load_present(member)
                    if self._quiet.is_set():  # the learner is the one that it was
                        return self._admit(member, served)
        finally:
            self._num_joining -= 1

    def _admit(self, member: Member, served: str) -> str:
        if served != str(self.version):
            raise VerificationError(f"{member.name} caught up with version {served}, the others serve {self.version}")
        self.roster.admit(member)
        return served

    async def _load_present(self, member: Member) -> str:
        if self._sealed is not None:
            await self._load_file(member, *self._sealed)
            return str(self.version)
        # The staged copy is whole whatever the learner is doing; only the rank itself is asked.
        path = self._path(f"{self.version}-for-{member.name}")
        manifest = await self._write_staged(path)
        await self._load_file(member, path, manifest)
        path.unlink(missing_ok=True)
        return str(manifest["version"])

    async def _write_staged(self, path: Path) -> dict[str, Any]:
        written = await self.learner.call(0, "weights_call", "write_staged", str(path), deadline_s=self.deadline_s)
        return dict(written)


def _of_sender(came: Outcome[T]) -> T:
    """What the learner's side gave.  A deadline that *it* waited out is the receiver's fault and raised as it is."""
    waited_in_vain = isinstance(came.error, DeadlineError) and not _is_learners_deadline(came.error)
    if came.error is not None and not waited_in_vain:
        raise SenderError(came.error)
    return came.value()


def _is_learners_deadline(error: BaseException | None) -> bool:
    """Whether a learner rank did not answer in time."""
    return isinstance(error, DeadlineError) and error.source.startswith("learner[")


def _group(engine: int) -> str:
    return f"weights-to-generator-{engine}"
