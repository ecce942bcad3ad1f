"""Fakes that take the time they are told to take: a generator and a learner without a model.

    python -m benchmarks.paced train RECIPE key=value ...       `burnish train` with these two in place of the engines

Everything else of such a run is real: Ray, placement, dispatch, liveness, replacement, pushes, ledger, loop, rewards.
They need next to no processor time, so a machine with few cores can show what many generators do.
Pace: ``generator.engine_args`` {token_s, load_s, start_s} and ``learner.deepspeed`` {update_s}, all in s.
May import: numpy, pyarrow, actors.{settings, state_saving}, launch.*, trainers.*.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from actors.settings import GeneratorSettings, LearnerSettings
from actors.state_saving import SaveBegun, SaveOutcome
from trainers.experience import (
    GroupSummary,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.protocols import GroupRequest, LearnerGroup, UpdateReport

TOKEN, LOGPROB = 5, -1.0  # of every token; both sides of the start-up probe agree on it
SHORTEST = 0.25  # of max_tokens: lengths lie evenly between this and all of it


class PacedGenerator:
    """Stands for ``actors.generator.VLLMGenerator``: ``max_num_seqs`` samples at a time, ``token_s`` for each token."""

    def __init__(
        self, name: str, model_path: str, settings: GeneratorSettings, dtype: str, device: str, max_length: int,
        seed: int, version: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        self.name, self._pace = name, settings.engine_args
        self._version = WeightVersion(*version)
        time.sleep(self._pace["start_s"])  # a model is loaded
        self._seats = asyncio.Semaphore(settings.max_num_seqs)
        self._open = asyncio.Event()
        self._open.set()

    async def generate(self, request: GroupRequest) -> tuple[GroupSummary, pa.Buffer]:
        """As long as its samples take; how long these are depends on their seeds alone."""
        started = time.perf_counter()
        samples = await asyncio.gather(*(self._sample(request, i) for i in range(request.num_samples)))
        group = TrajectoryGroup(request.group_id, request.prompt, tuple(samples))
        return summarize(group, self.name, time.perf_counter() - started), encode_group(group)

    async def _sample(self, request: GroupRequest, index: int) -> Trajectory:
        num_tokens = sample_length(request.seeds[index], request.max_tokens)
        async with self._seats:
            await self._open.wait()
            version = self._version
            await asyncio.sleep(num_tokens * self._pace["token_s"])
            await self._open.wait()  # what is under way when the weights come stands still as well
        return Trajectory(
            index, request.seeds[index], np.full(num_tokens, TOKEN, np.int32),
            np.full(num_tokens, LOGPROB, np.float32), chr(ord("a") + request.seeds[index] % 26), "stop",
            (VersionSpan(version, num_tokens),),
        )  # fmt: skip

    async def load_weights(self, info: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
        """The engine stands still for ``load_s``."""
        self._open.clear()
        await asyncio.sleep(self._pace["load_s"])
        incarnation, step = manifest["version"].split(".")
        self._version = WeightVersion(int(incarnation), int(step))
        self._open.set()
        return {"pause_s": self._pace["load_s"], "num_after_load": 0, "num_at_arrival": 0}

    async def ping(self) -> str:
        return str(self._version)

    async def probe(self, prompt_ids: Sequence[int], max_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(max_tokens, TOKEN, np.int32), np.full(max_tokens, LOGPROB, np.float32)


def sample_length(seed: int, max_tokens: int) -> int:
    """Tokens of a sample."""
    shortest = max(1, round(SHORTEST * max_tokens))
    return shortest + seed % (max_tokens - shortest + 1)


class PacedLearner:
    """Stands for ``actors.learner.DeepSpeedLearner``: ``update_s`` for each update, no weights."""

    def __init__(self, rank: int, settings: LearnerSettings, **others: Any) -> None:
        self._update_s = settings.deepspeed["update_s"]

    def update(
        self, groups: Sequence[LearnerGroup], step: int, targets: Any = None, kl_coef: float | None = None
    ) -> UpdateReport:
        time.sleep(self._update_s)
        num_tokens = sum(n for group in groups for n in group.summary.num_completion_tokens)
        advantages = {group.summary.group_id: np.zeros(group.summary.num_samples) for group in groups}
        return UpdateReport({"loss": 0.0}, advantages, self._update_s, num_tokens)

    def weights_call(self, method: str, path: str, version: str, dtype: str) -> dict[str, Any]:
        """Of ``publish_file``: a version without tensors."""
        return {"version": version, "tensors": [], "fingerprints": {}}

    def score(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full(len(completion), LOGPROB, np.float32) for completion in completions]

    def begin_save(self, directory: str) -> SaveBegun:
        """There is no state: a checkpoint holds what the controller has."""
        return SaveBegun(0.0, 0)

    def save_outcome(self, wait_s: float = 0.0) -> SaveOutcome | None:
        return SaveOutcome({}, 0.0)


def main() -> int:
    """The command line of `burnish`, its engines replaced."""
    from benchmarks import paced  # workers find the classes by this name, not as those of __main__
    from launch import assemble, cli, trained_ranks

    with (
        mock.patch.object(assemble, "VLLMGenerator", paced.PacedGenerator),
        mock.patch.object(trained_ranks, "DeepSpeedLearner", paced.PacedLearner),
    ):
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
