"""The reference's log-probs of a run's comparisons: taken from the cache, or computed before the ranks start.

    data --(digest of model, tokens, dtype)--> cache/KEY.parquet --there and intact--> run folder
                                                    `--else: reference workers, once--^

The workers are the ones of RL (actors/reference.py).  They are gone again before the ranks take their GPUs.
May import: actors.scorer_pools, cluster.transport, trainers.*, launch.*.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from actors.scorer_pools import ReferencePool
from cluster.transport import fetch, put
from launch.label_prepare import folder_digest
from launch.tuning_config import TuningConfig
from launch.tuning_place import dtype_of, references_of
from launch.tuning_task import Site
from trainers.comparisons import Comparison
from trainers.errors import InputError, VerificationError
from trainers.experience import (
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    decode_logprobs,
    encode_group,
    summarize,
)
from trainers.preference_training import PreferenceSettings
from trainers.protocols import GeneratedGroup
from trainers.reference_logps import read_reference, reference_key, write_reference

CACHE = "reference-logprobs"  # below run.directory
AT_ONCE = 1024  # comparisons encoded and on their way to the workers
WRITTEN = WeightVersion(0, 0)  # nobody sampled these answers


def reference_file(folder: Path, name: str) -> Path:
    """What the ranks read for the comparisons ``name``."""
    return folder / f"reference.{name}.parquet"


async def write_references(
    config: TuningConfig, model_path: str, sets: Mapping[str, Sequence[Comparison]], site: Site, folder: Path
) -> None:
    """Write the log-probs of each of ``sets`` into ``folder``; what the cache has is verified and used again.

    Raises:
        InputError: a log-prob that is no finite number.
    """
    assert isinstance(config.algorithm, PreferenceSettings)
    given = config.algorithm.reference_cache
    cache = Path(config.run.directory) / CACHE if given is None else Path(given).expanduser()
    digest, dtype = await asyncio.to_thread(folder_digest, model_path), dtype_of(config, site.nodes)
    keys = {name: reference_key(comparisons, digest, dtype) for name, comparisons in sets.items()}
    missing = []
    for name, comparisons in sets.items():
        path = cache / f"{keys[name]}.parquet"
        try:
            if path.exists():
                read_reference(path, comparisons, keys[name])
                site.telemetry.event("reference", data=name, source="cache", path=str(path))
                continue
        except VerificationError as error:
            site.telemetry.event("reference", data=name, source="damaged", path=str(path), reason=str(error))
        missing.append(name)
    if missing:
        total, done = sum(len(sets[name]) for name in missing), 0
        async with references_of(config, model_path, site) as pool:
            for name in missing:
                started, before = time.perf_counter(), done

                def count(num: int, before: int = before) -> None:
                    site.telemetry.phase("reference", before + num, total)

                rows = await scored(pool, sets[name], config.reference_settings.deadline_s, count)
                done += len(rows)
                path = cache / f"{keys[name]}.parquet"
                write_reference(path, rows, keys[name])
                took = round(time.perf_counter() - started, 2)
                site.telemetry.event("reference", data=name, source="computed", path=str(path), compute_s=took)
    for name in sets:
        shutil.copyfile(cache / f"{keys[name]}.parquet", reference_file(folder, name))


async def scored(
    pool: ReferencePool, comparisons: Sequence[Comparison], deadline_s: float, progress: Callable[[int], None]
) -> list[np.ndarray]:
    """float64 [K] of each comparison: the sum of each answer's token log-probs."""
    rows: list[np.ndarray] = []
    for first in range(0, len(comparisons), AT_ONCE):
        some = [_group(i, c) for i, c in enumerate(comparisons[first : first + AT_ONCE], first)]
        asked = [GeneratedGroup(summarize(group, "data", 0.0), put(encode_group(group))) for group in some]
        for payload in await asyncio.gather(*(pool.logprobs(group) for group in asked)):
            tokens = decode_logprobs(fetch(payload, deadline_s))
            rows.append(np.array([row.astype(np.float64).sum() for row in tokens]))
        progress(len(rows))
    for i, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise InputError("reference", row.tolist(), f"log-probs of comparison {i} are not finite",
                             "set model.dtype=float32, or leave its row out")  # fmt: skip
    return rows


def _group(index: int, comparison: Comparison) -> TrajectoryGroup:
    """A comparison as the reference knows what it scores: as if its answers had been sampled."""
    answers = tuple(
        Trajectory(
            sample_index=i, seed=0, completion_ids=ids, behavior_logprobs=np.zeros(len(ids), dtype=np.float32), text="",
            finish_reason="stop", version_spans=(VersionSpan(WRITTEN, len(ids)),),
        )
        for i, ids in enumerate(comparison.completion_ids)
    )  # fmt: skip
    return TrajectoryGroup(str(index), Prompt(comparison.prompt_id, comparison.prompt_ids, ""), answers)
