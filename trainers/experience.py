"""The records that travel through one lap: Prompt -> Trajectory -> TrajectoryGroup -> ScoredGroup.

Every stage returns a new, richer, frozen record; nothing is filled in later.  Token-sized columns
travel as Arrow buffers (``encode_group`` / ``decode_group``) that the controller forwards by
reference and never opens; what the controller needs to decide (lengths, versions, why a sample
ended) is the small ``GroupSummary``.

Axes: P prompt tokens, T completion tokens of one sample, G samples of one prompt.
May import: numpy, pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

FinishReason = Literal["stop", "length", "abort"]


class WeightVersion(NamedTuple):
    """Which weights: ``step`` counts pushes, ``incarnation`` counts restores from a checkpoint.

    A number is never reused after a rollback, because a restore raises the incarnation.
    """

    incarnation: int
    step: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.step}"


class VersionSpan(NamedTuple):
    """A run of ``num_tokens`` consecutive completion tokens sampled under one weight version."""

    version: WeightVersion
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised once.  The generator and the learner both use these very ids."""

    prompt_id: str  # digest of the rendered text: equal questions have equal ids
    token_ids: np.ndarray  # int32 [P]
    text: str  # what token_ids decode to, chat template applied
    source: Any = None  # the dataset's own ``prompt`` value (a string or a list of messages)
    columns: Mapping[str, Any] = field(default_factory=dict)  # further columns, JSON values


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled completion and the record of how it was sampled."""

    sample_index: int  # 0 <= sample_index < G
    seed: int  # the sampling stream: derived from run seed, prompt id and sample index
    completion_ids: np.ndarray  # int32 [T], the closing EOS included when it was sampled
    behavior_logprobs: np.ndarray  # float32 [T], under the distribution that was sampled
    text: str  # completion decoded, special tokens left out
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]  # lengths sum to T

    @property
    def num_tokens(self) -> int:
        return int(self.completion_ids.shape[0])


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The G completions of one prompt, in sample order."""

    group_id: str  # unique in a run: "<position in the prompt stream>"
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the controller knows of a group without opening its tokens."""

    group_id: str
    prompt_id: str
    num_prompt_tokens: int
    num_completion_tokens: tuple[int, ...]  # [G]
    finish_reasons: tuple[FinishReason, ...]  # [G]
    oldest_version: WeightVersion
    newest_version: WeightVersion
    generator: str
    generate_s: float
    oldest_versions: tuple[WeightVersion, ...] = ()  # [G], of each sample's first token; empty: not known

    @property
    def num_samples(self) -> int:
        return len(self.num_completion_tokens)


FailureKind = Literal[
    "raised", "timeout", "nan", "wrong_count", "not_a_number", "abstained",
    # a judge that is not answered (trainers/asking.py), or whose reply cannot be read (trainers/rubric.py)
    "too_long", "refused", "unavailable", "nonsense",
    "empty", "cut_off", "missing", "no_number", "out_of_range", "contradictory",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """A reward that could not be had.  It masks its sample; it never becomes the number 0."""

    reward: str  # name of the reward function
    kind: FailureKind
    detail: str


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """Rewards of one group, small enough for everyone to hold."""

    group_id: str
    totals: np.ndarray  # float64 [G], NaN where the sample is masked
    parts: Mapping[str, np.ndarray]  # name -> float64 [G], NaN where that part has no value
    failures: tuple[tuple[int, RewardFailure], ...] = ()  # (sample index, what happened)
    score_s: float = 0.0
    measured: tuple[str, ...] = ()  # parts of weight 0: they are only looked at, and their failures mask nothing

    @property
    def valid(self) -> np.ndarray:
        """bool [G]: samples that may be trained on."""
        finite: np.ndarray = np.isfinite(self.totals)
        return finite


def may_train(summary: GroupSummary, rewards: GroupRewards, mask_truncated: bool) -> np.ndarray:
    """bool [G]: has a reward, has tokens, and was not cut off where that masks a sample."""
    reasons = summary.finish_reasons
    cut = np.array([r == "abort" or (r == "length" and mask_truncated) for r in reasons], dtype=bool)
    kept: np.ndarray = rewards.valid & (np.array(summary.num_completion_tokens) > 0) & ~cut
    return kept


def summarize(group: TrajectoryGroup, generator: str, generate_s: float) -> GroupSummary:
    """The controller's view of ``group``."""
    versions = [span.version for t in group.trajectories for span in t.version_spans]
    if not versions:
        raise ValueError(f"group {group.group_id}: no trajectory carries a version span")
    return GroupSummary(
        group_id=group.group_id,
        prompt_id=group.prompt.prompt_id,
        num_prompt_tokens=int(group.prompt.token_ids.shape[0]),
        num_completion_tokens=tuple(t.num_tokens for t in group.trajectories),
        finish_reasons=tuple(t.finish_reason for t in group.trajectories),
        oldest_version=min(versions),
        newest_version=max(versions),
        generator=generator,
        generate_s=generate_s,
        oldest_versions=tuple(
            min((span.version for span in t.version_spans), default=min(versions)) for t in group.trajectories
        ),
    )


# --- Arrow ------------------------------------------------------------------------------------

VERSION_SPAN = pa.struct([("incarnation", pa.int32()), ("step", pa.int64()), ("num_tokens", pa.int32())])

GROUP_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("prompt_source", pa.string()),  # JSON
        ("columns", pa.string()),  # JSON
        ("prompt_ids", pa.list_(pa.int32())),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("completion_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("version_spans", pa.list_(VERSION_SPAN)),
    ]
)


def encode_group(group: TrajectoryGroup) -> pa.Buffer:
    """The group as one Arrow IPC stream, a row a sample; Ray moves the buffer without a copy."""
    prompt = group.prompt
    rows = [
        {
            "group_id": group.group_id,
            "prompt_id": prompt.prompt_id,
            "prompt_text": prompt.text,
            "prompt_source": json.dumps(prompt.source),
            "columns": json.dumps(dict(prompt.columns)),
            "prompt_ids": prompt.token_ids,
            "sample_index": t.sample_index,
            "seed": t.seed,
            "completion_ids": t.completion_ids,
            "behavior_logprobs": t.behavior_logprobs,
            "text": t.text,
            "finish_reason": t.finish_reason,
            "version_spans": [
                {"incarnation": s.version.incarnation, "step": s.version.step, "num_tokens": s.num_tokens}
                for s in t.version_spans
            ],
        }
        for t in group.trajectories
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, GROUP_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=GROUP_SCHEMA))
    return sink.getvalue()


def decode_group(buffer: pa.Buffer | bytes) -> TrajectoryGroup:
    """Inverse of :func:`encode_group`; arrays are views of the buffer and read-only."""
    table = pa.ipc.open_stream(buffer).read_all().combine_chunks()
    first = {n: table[n][0].as_py() for n in GROUP_SCHEMA.names[:5]}
    prompt = Prompt(
        prompt_id=first["prompt_id"],
        token_ids=_row(table["prompt_ids"], 0),
        text=first["prompt_text"],
        source=json.loads(first["prompt_source"]),
        columns=json.loads(first["columns"]),
    )
    trajectories = tuple(
        Trajectory(
            sample_index=table["sample_index"][i].as_py(),
            seed=table["seed"][i].as_py(),
            completion_ids=_row(table["completion_ids"], i),
            behavior_logprobs=_row(table["behavior_logprobs"], i),
            text=table["text"][i].as_py(),
            finish_reason=table["finish_reason"][i].as_py(),
            version_spans=tuple(
                VersionSpan(WeightVersion(s["incarnation"], s["step"]), s["num_tokens"])
                for s in table["version_spans"][i].as_py()
            ),
        )
        for i in range(table.num_rows)
    )
    return TrajectoryGroup(first["group_id"], prompt, trajectories)


def _row(column: pa.ChunkedArray, i: int) -> np.ndarray:
    row: np.ndarray = column[i].values.to_numpy()
    return row


LOGPROBS_SCHEMA = pa.schema([("logprobs", pa.list_(pa.float32()))])


def encode_logprobs(per_sample: Sequence[np.ndarray]) -> pa.Buffer:
    """Log-probabilities of a group's completions, one float32 [T] row a sample."""
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([pa.array(list(per_sample), type=pa.list_(pa.float32()))], schema=LOGPROBS_SCHEMA)
    with pa.ipc.new_stream(sink, LOGPROBS_SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def decode_logprobs(buffer: pa.Buffer | bytes) -> list[np.ndarray]:
    """Inverse of :func:`encode_logprobs`."""
    column = pa.ipc.open_stream(buffer).read_all().combine_chunks()["logprobs"]
    return [_row(column, i) for i in range(len(column))]
