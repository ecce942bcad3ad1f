"""Finished groups that no update has used yet, beside the checkpoint that they belong to.

One Arrow file, a row a group, in the order in which the groups finished: what the controller knows of a group in
columns, its tokens and the reference's log-probs as the buffers they travel in.  A critic's values are left out:
they are taken again from the critic that the checkpoint holds.
May import: numpy, pyarrow, cluster.transport, trainers.{experience, protocols}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.transport import fetch_all, put
from trainers.experience import GroupRewards, GroupSummary, RewardFailure, WeightVersion
from trainers.protocols import LearnerGroup

UNTRAINED = "untrained.arrow"  # in the checkpoint's folder

_VERSION = pa.struct([("incarnation", pa.int32()), ("step", pa.int64())])
_NUMBERS = pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("prompt_id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_completion_tokens", pa.list_(pa.int32())),
        ("finish_reasons", pa.list_(pa.string())),
        ("oldest_version", _VERSION),
        ("newest_version", _VERSION),
        ("oldest_versions", pa.list_(_VERSION)),
        ("generator", pa.string()),
        ("generate_s", pa.float64()),
        ("totals", _NUMBERS),
        ("parts", pa.list_(pa.struct([("name", pa.string()), ("values", _NUMBERS)]))),
        (
            "failures",
            pa.list_(
                pa.struct(
                    [("sample", pa.int32()), ("reward", pa.string()), ("kind", pa.string()), ("detail", pa.string())]
                )
            ),
        ),
        ("score_s", pa.float64()),
        ("measured", pa.list_(pa.string())),
        ("greedy_reward", pa.float64()),  # null where that is not the baseline
        ("trajectories", pa.large_binary()),
        ("reference_logprobs", pa.large_binary()),  # null without a reference
    ]
)


def encode_spool(groups: Sequence[LearnerGroup], deadline_s: float) -> bytes:
    """The file's content.  Blocks until the groups' payloads are here; DeadlineError when one does not come."""
    payloads = fetch_all([g.payload for g in groups], deadline_s)
    with_reference = [g.reference_payload for g in groups if g.reference_payload is not None]
    references = iter(fetch_all(with_reference, deadline_s))
    rows = [
        _columns(g) | {
            "trajectories": pa.py_buffer(payload).to_pybytes(),
            "reference_logprobs": None if g.reference_payload is None else pa.py_buffer(next(references)).to_pybytes(),
        }
        for g, payload in zip(groups, payloads, strict=True)
    ]  # fmt: skip
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_spool(path: Path) -> list[LearnerGroup]:
    """What :func:`encode_spool` was given, in its order; the payloads are owned by this process."""
    with pa.memory_map(str(path)) as file:
        return [_group(row) for row in pa.ipc.open_file(file).read_all().to_pylist()]


def _columns(group: LearnerGroup) -> dict[str, Any]:
    summary, rewards = group.summary, group.rewards
    return {
        "group_id": summary.group_id,
        "prompt_id": summary.prompt_id,
        "num_prompt_tokens": summary.num_prompt_tokens,
        "num_completion_tokens": list(summary.num_completion_tokens),
        "finish_reasons": list(summary.finish_reasons),
        "oldest_version": summary.oldest_version._asdict(),
        "newest_version": summary.newest_version._asdict(),
        "oldest_versions": [v._asdict() for v in summary.oldest_versions],
        "generator": summary.generator,
        "generate_s": summary.generate_s,
        "totals": rewards.totals.tolist(),
        "parts": [{"name": name, "values": values.tolist()} for name, values in rewards.parts.items()],
        "failures": [
            {"sample": i, "reward": f.reward, "kind": f.kind, "detail": f.detail} for i, f in rewards.failures
        ],
        "score_s": rewards.score_s,
        "measured": list(rewards.measured),
        "greedy_reward": group.greedy_reward,
    }


def _group(row: Mapping[str, Any]) -> LearnerGroup:
    summary = GroupSummary(
        group_id=row["group_id"],
        prompt_id=row["prompt_id"],
        num_prompt_tokens=row["num_prompt_tokens"],
        num_completion_tokens=tuple(row["num_completion_tokens"]),
        finish_reasons=tuple(row["finish_reasons"]),
        oldest_version=WeightVersion(**row["oldest_version"]),
        newest_version=WeightVersion(**row["newest_version"]),
        generator=row["generator"],
        generate_s=row["generate_s"],
        oldest_versions=tuple(WeightVersion(**v) for v in row["oldest_versions"]),
    )
    rewards = GroupRewards(
        group_id=row["group_id"],
        totals=np.array(row["totals"], dtype=np.float64),
        parts={part["name"]: np.array(part["values"], dtype=np.float64) for part in row["parts"]},
        failures=tuple((f["sample"], RewardFailure(f["reward"], f["kind"], f["detail"])) for f in row["failures"]),
        score_s=row["score_s"],
        measured=tuple(row["measured"]),
    )
    reference = row["reference_logprobs"]
    return LearnerGroup(
        summary,
        rewards,
        put(pa.py_buffer(row["trajectories"])),
        None if reference is None else put(pa.py_buffer(reference)),
        greedy_reward=row.get("greedy_reward"),  # a file from before there was such a baseline has no such column
    )
