"""The push: the learner's new weights into every generator, verified.  Drives both sides.

    file    rank 0 writes one sealed file; every generator maps it
    nccl    each serving rank stages, then sends to its engines over groups of two parties
    ipc     a rank shares its staged buckets with the engine on the same GPU

A generator is a member only after a push that was verified; one that fails ends the push with an
error that names it.  ``transport`` "group" is the state machine of ``nccl``; between CPU processes
it runs over gloo.
May import: actors.*, cluster.*, trainers.protocols.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.weight_channel import WeightManifest
from cluster.worker_group import WorkerGroup
from trainers.errors import VerificationError
from trainers.experience import WeightVersion
from trainers.protocols import PushReport

Transport = Literal["file", "group", "ipc"]


class Publisher:
    """Pushes versions; ``WeightPublisher`` of the loop."""

    def __init__(
        self,
        learner: WorkerGroup,
        generators: WorkerGroup,
        transport: Transport,
        directory: Path,
        dtype: str,
        bucket_bytes: int,
        workers_per_engine: int,
        deadline_s: float,
        staggered: bool = False,
    ) -> None:
        """``staggered``: one generator pauses at a time, because the others sample meanwhile; else all at once."""
        self.learner, self.generators, self.transport = learner, generators, transport
        self.directory, self.dtype, self.bucket_bytes = directory, dtype, bucket_bytes
        self.workers_per_engine, self.deadline_s = workers_per_engine, deadline_s
        self.staggered = staggered
        self._connected = transport != "group"

    def serving_rank(self, engine: int) -> int:
        """Engine e is served by learner rank e mod R: no rank is a bottleneck."""
        return engine % len(self.learner)

    async def push(self, version: WeightVersion) -> PushReport:
        """Bring every generator to ``version``, or raise."""
        started = time.perf_counter()
        if not self._connected:
            await self._connect()
        if self.transport == "file":
            manifest, loads = await self._push_file(version)
        else:
            manifest, loads = await self._push_staged(version)
        sent = WeightManifest.from_dict(manifest)
        return PushReport(
            version=version,
            num_bytes=sent.num_bytes,
            push_s=time.perf_counter() - started,
            pause_s=max(r["pause_s"] for r in loads),
            num_verified=min(r["num_after_load"] for r in loads),
            num_arrival_verified=max(r["num_at_arrival"] for r in loads),
        )

    async def _push_file(self, version: WeightVersion) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path = self.directory / f"weights-{version}.safetensors"
        manifests = await self.learner.call_all(
            "weights_call", "publish_file", str(path), str(version), self.dtype, deadline_s=self.deadline_s
        )
        info = {"transport": "file", "path": str(path)}
        loads = await self._each(
            lambda e: self.generators.call(e, "load_weights", info, manifests[0], deadline_s=self.deadline_s)
        )
        for old in self.directory.glob("weights-*.safetensors"):
            if old != path:  # the newest stays: it is how a late generator catches up
                old.unlink(missing_ok=True)
        return manifests[0], loads

    async def _push_staged(self, version: WeightVersion) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        serving = {self.serving_rank(e) for e in range(len(self.generators))}
        manifests = await self.learner.call_all(
            "stage_weights",
            str(version),
            self.dtype,
            self.bucket_bytes,
            deadline_s=self.deadline_s,
            per_worker=[(rank in serving,) for rank in range(len(self.learner))],
        )
        manifest = manifests[0]
        return manifest, await self._each(lambda e: self._deliver(e, manifest))

    async def _each(self, load: Callable[[int], Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
        """``load`` of every engine, in engine order.  Requests that run keep their KV cache and go on afterwards."""
        engines = range(len(self.generators))
        if self.staggered:
            return [await load(e) for e in engines]
        return list(await asyncio.gather(*(load(e) for e in engines)))

    async def _deliver(self, engine: int, manifest: dict[str, Any]) -> dict[str, Any]:
        rank = self.serving_rank(engine)
        info: dict[str, Any] = {
            "transport": self.transport,
            "tensors": manifest["tensors"],
            "fingerprints": manifest["fingerprints"],
            "bucket_bytes": self.bucket_bytes,
        }
        if self.transport == "ipc":
            info["handles"] = await self.learner.call(rank, "weights_call", "share", deadline_s=self.deadline_s)
            loaded = await self.generators.call(engine, "load_weights", info, manifest, deadline_s=self.deadline_s)
        else:
            _, loaded = await asyncio.gather(
                self.learner.call(rank, "weights_call", "send", _group(engine), deadline_s=self.deadline_s),
                self.generators.call(engine, "load_weights", info, manifest, deadline_s=self.deadline_s),
            )
        return dict(loaded)

    async def _connect(self) -> None:
        """One process group for each engine: its serving rank and its tensor-parallel workers."""
        for engine in range(len(self.generators)):
            rank = self.serving_rank(engine)
            address, port = await self.learner.call(rank, "meeting_point", deadline_s=self.deadline_s)
            size = 1 + self.workers_per_engine
            init = {
                "group": _group(engine), "address": address, "port": port, "rank_offset": 1, "size": size,
                "deadline_s": self.deadline_s,
            }  # fmt: skip
            await asyncio.gather(
                self.learner.call(
                    rank, "weights_call", "open_group", _group(engine), address, port, size, self.deadline_s,
                    deadline_s=self.deadline_s,
                ),
                self.generators.call(engine, "init_transfer", init, deadline_s=self.deadline_s),
            )  # fmt: skip
        self._connected = True

    async def probe(self, prompts: list[np.ndarray], max_tokens: int, seed: int, tolerance: float) -> dict[str, float]:
        """Do generator and learner mean the same by the same weights?  Log-probs of the same tokens.

        Raises:
            VerificationError: the mean absolute difference of some generator exceeds ``tolerance`` nats.
        """
        worst = 0.0
        for engine in range(len(self.generators)):
            samples = await asyncio.gather(
                *(
                    self.generators.call(engine, "probe", p.tolist(), max_tokens, seed + i, deadline_s=self.deadline_s)
                    for i, p in enumerate(prompts)
                )
            )
            scored = await self.learner.call_all(
                "score", prompts, [ids for ids, _ in samples], deadline_s=self.deadline_s
            )
            difference = np.concatenate([np.abs(b - p) for (_, b), p in zip(samples, scored[0], strict=True)])
            worst = max(worst, float(difference.mean()))
            if difference.mean() > tolerance:
                raise VerificationError(
                    f"push.probe_tolerance = {tolerance:g}: generator-{engine} and the learner differ by "
                    f"{difference.mean():.4f} nats a token on the same weights; check model.dtype and the model's "
                    "support in vLLM, or raise the tolerance if you know why"
                )
        return {"mean_difference": worst}


def _group(engine: int) -> str:
    return f"weights-to-generator-{engine}"
