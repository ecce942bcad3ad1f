"""The one job of every benchmark: 8 prompts x 8 samples, up to 64 new tokens, GRPO with a KL term.

The generation benchmark records what it sampled; the learner benchmarks train on those very samples.
May import: numpy, pyarrow, torch, actors.{model_folders, modeling}, cluster.*, launch.{prompts, config}, trainers.*.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    decode_group,
    encode_group,
    encode_logprobs,
    summarize,
)
from trainers.protocols import GroupRequest, LearnerGroup
from trainers.sampling_seeds import sample_seed

MAX_PROMPT_TOKENS = 512
REFERENCE_NOISE = 0.01  # nats between behavior and reference log-probs, so that the KL term has a gradient
QUESTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # those of the recipe cpu-demo


@dataclass(frozen=True)
class Job:
    """What is sampled and trained on; the defaults are the published job."""

    model: str = "builtin:smollm2-135m-instruct"
    num_prompts: int = 8
    num_samples: int = 8
    max_tokens: int = 64
    beta: float = 0.04
    seed: int = 0
    device: str = "cpu"
    kv_cache_gib: float = 1.0

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Job:
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(cls)})

    def arguments(self) -> list[str]:
        """The command line that makes this job again in another process."""
        return [f"--{f.name.replace('_', '-')}={getattr(self, f.name)}" for f in fields(self)]

    @property
    def model_path(self) -> str:
        from actors.model_folders import resolve_model

        return resolve_model(self.model)

    @property
    def dtype(self) -> str:
        """The compute dtype that ``model.dtype: auto`` chooses here: "float32" or "bfloat16"."""
        from actors.modeling import compute_dtype
        from cluster.host import native_bfloat16

        return str(compute_dtype("auto", self.device == "cuda" or native_bfloat16())).removeprefix("torch.")

    @property
    def torch_device(self) -> str:
        return "cuda:0" if self.device == "cuda" else "cpu"


def job_parser(description: str, sides: Sequence[str]) -> argparse.ArgumentParser:
    """Arguments that every benchmark has.  With ``--side`` a process measures that side alone."""
    parser = argparse.ArgumentParser(description=description)
    for f in fields(Job):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    parser.add_argument("--side", choices=sides, default=None, help="measure one side, in this process")
    parser.add_argument("--output", type=Path, default=None, help="where the side's numbers go, as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def load_prompts(job: Job, num_prompts: int) -> list[Prompt]:
    """``num_prompts`` chain_sum questions, rendered and tokenised as a run would do it."""
    from actors.modeling import load_tokenizer
    from launch.config import DatasetSettings, PromptSettings
    from launch.prompts import load_prompts as load

    settings = PromptSettings.model_validate(
        {"train": DatasetSettings.model_validate({"procedural": "chain_sum", "args": QUESTIONS, "size": num_prompts})}
    )
    return load(settings, load_tokenizer(job.model_path), MAX_PROMPT_TOKENS, job.seed)[0]


def make_requests(job: Job, warm_up: bool = False) -> list[GroupRequest]:
    """The job's requests; those of the warm-up ask other questions, so that no timed prompt is cached."""
    chosen = load_prompts(job, 2 * job.num_prompts)
    chosen = chosen[job.num_prompts :] if warm_up else chosen[: job.num_prompts]
    return [
        GroupRequest(
            group_id=f"{'warm-up' if warm_up else 'job'}-{i}",
            prompt=prompt,
            num_samples=job.num_samples,
            seeds=tuple(sample_seed(job.seed, prompt.prompt_id, s, 0) for s in range(job.num_samples)),
            temperature=1.0,
            max_tokens=job.max_tokens,
        )
        for i, prompt in enumerate(chosen)
    ]


# --- recorded samples ---------------------------------------------------------------------------


def save_samples(path: Path, groups: Sequence[TrajectoryGroup]) -> None:
    """One file with every group, token ids and log-probs included."""
    pq.write_table(pa.table({"group": pa.array([encode_group(g).to_pybytes() for g in groups], pa.binary())}), path)


def load_samples(path: Path) -> list[TrajectoryGroup]:
    """Inverse of :func:`save_samples`; also reads the ``trajectories/step-*.parquet`` of a run."""
    table = pq.read_table(path)
    if "group" in table.column_names:
        return [decode_group(b) for b in table["group"].to_pylist()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["group_id"], []).append(row)
    return [_group_of_rows(group_id, rows) for group_id, rows in groups.items()]


def _group_of_rows(group_id: str, rows: list[dict[str, Any]]) -> TrajectoryGroup:
    prompt = Prompt(group_id, np.array(rows[0]["prompt_ids"], dtype=np.int32), rows[0]["prompt"])
    return TrajectoryGroup(group_id, prompt, tuple(
        make_trajectory(i, np.array(r["completion_ids"], np.int32), np.array(r["behavior_logprobs"], np.float32))
        for i, r in enumerate(rows)
    ))  # fmt: skip


def make_trajectory(index: int, completion_ids: np.ndarray, behavior_logprobs: np.ndarray) -> Trajectory:
    """A trajectory that is only counted and trained on: text and seed are left out."""
    spans = (VersionSpan(WeightVersion(0, 0), int(completion_ids.size)),)
    return Trajectory(index, 0, completion_ids, behavior_logprobs, "", "length", spans)


def random_groups(
    num_groups: int, num_samples: int, num_prompt: int, lengths: Sequence[int], vocabulary: int, seed: int = 0
) -> list[TrajectoryGroup]:
    """Groups of random tokens; sample s of each group has ``lengths[s % len(lengths)]`` completion tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = Prompt(str(g), rng.integers(3, vocabulary, num_prompt).astype(np.int32), "")
        sizes = [lengths[s % len(lengths)] for s in range(num_samples)]
        samples = tuple(
            make_trajectory(s, rng.integers(3, vocabulary, t).astype(np.int32),
                            rng.uniform(-6, -1, t).astype(np.float32))
            for s, t in enumerate(sizes)
        )  # fmt: skip
        groups.append(TrajectoryGroup(str(g), prompt, samples))
    return groups


def learner_groups(groups: Sequence[TrajectoryGroup], seed: int = 0) -> list[LearnerGroup]:
    """What the learner gets of ``groups``: random rewards (every group has a spread), a reference nearby."""
    rng = np.random.default_rng(seed)
    out = []
    for group in groups:
        references = [
            t.behavior_logprobs + rng.normal(0, REFERENCE_NOISE, t.num_tokens).astype(np.float32)
            for t in group.trajectories
        ]
        rewards = GroupRewards(group.group_id, rng.random(len(group.trajectories)), {})
        summary = summarize(group, "benchmark", 0.0)
        out.append(LearnerGroup(summary, rewards, encode_group(group), encode_logprobs(references)))
    return out


def completion_lengths(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """int64 [samples]."""
    return np.array([t.num_tokens for g in groups for t in g.trajectories], dtype=np.int64)


def describe_lengths(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """How long the samples really are, in tokens."""
    lengths = completion_lengths(groups)
    return {
        "num_samples": int(lengths.size),
        "num_tokens": int(lengths.sum()),
        "mean": round(float(lengths.mean()), 2),
        "median": float(np.median(lengths)),
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "prompt_mean": round(float(np.mean([g.prompt.token_ids.size for g in groups])), 2),
    }
