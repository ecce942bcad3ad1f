"""Counts the prompts that a run was trained on, from the batches that its learner wrote.

    python -m scripts.count_prompts runs/my-run [--epoch-size 64]

Every prompt of an epoch must have been trained on exactly once along the lineage that survived: the steps of
metrics.jsonl.  Files with the suffix ``.superseded`` are of lineages that were left, and are not counted.  This knows
nothing of ledgers, checkpoints or configurations, so it cannot share a mistake with them; it counts rows of
trajectories/*.parquet.  It is for runs that drop no group (``filtering``), on a dataset without copies.
May import: pyarrow.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

COLUMNS = ("group_id", "sample_index", "prompt_ids")
FILE = re.compile(r"step-(\d+)\.parquet")
SUPERSEDED = "step-*.parquet.superseded*"
NUM_SHOWN = 8  # offenders named in one line

Prompt = tuple[int, ...]  # its token ids


@dataclass(frozen=True)
class Count:
    """What was found; ``problems`` is empty when every prompt was trained on as often as it had to be."""

    num_steps: int
    num_groups: int
    num_prompts: int  # distinct
    num_epochs: int  # whole ones
    num_superseded: int  # files left aside
    problems: tuple[str, ...]


def count_prompts(folder: Path, epoch_size: int | None = None) -> Count:
    """Count a run folder.

    Args:
        epoch_size: prompts in an epoch; by default as many as differ, which cannot see a prompt that never came.
    """
    problems: list[str] = []
    steps = _steps(folder / "metrics.jsonl", problems)
    files = {int(m[1]): path for path in (folder / "trajectories").glob("*") if (m := FILE.fullmatch(path.name))}
    problems += _lines("batch without a step in metrics.jsonl", sorted(files.keys() - set(steps)))
    problems += _lines("step without a batch", sorted(set(steps) - files.keys()))
    where: dict[str, list[int]] = {}  # group id -> steps that trained on it
    prompt_of: dict[str, Prompt] = {}
    for step in sorted(set(steps) & files.keys()):
        for group, prompt in _groups(files[step], step, problems):
            where.setdefault(group, []).append(step)
            if prompt_of.setdefault(group, prompt) != prompt:
                problems.append(f"group {group} of step {step} has another prompt than in step {where[group][0]}")
    twice = {group: at for group, at in where.items() if len(at) > 1}
    problems += _lines("group trained on more than once", [f"{g} at steps {at}" for g, at in twice.items()])
    missing = set(map(str, range(len(where)))) - where.keys()
    problems += _lines("position of the stream that was skipped", sorted(int(position) for position in missing))
    times = Counter(prompt_of[group] for group, at in where.items() for _ in at)
    size = epoch_size or len(times)
    num_epochs = sum(times.values()) // size if size else 0
    problems += _epochs(times, size, num_epochs)
    superseded = list((folder / "trajectories").glob(SUPERSEDED))
    return Count(len(steps), sum(times.values()), len(times), num_epochs, len(superseded), tuple(problems))


def _steps(path: Path, problems: list[str]) -> list[int]:
    """Trained steps in the order of the rows; step 0 is an evaluation."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    steps = [int(row["step"]) for row in rows if row["step"] > 0]
    if steps != list(range(1, len(steps) + 1)):
        problems.append(f"the steps of {path.name} are not 1, 2, 3 ...: {_few(steps)}")
    return steps


def _groups(path: Path, step: int, problems: list[str]) -> Iterator[tuple[str, Prompt]]:
    """(id, prompt) of each group of one batch; a group whose samples do not belong together is a problem."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in pq.read_table(path, columns=list(COLUMNS)).to_pylist():
        groups.setdefault(str(row["group_id"]), []).append(row)
    usual = Counter(len(rows) for rows in groups.values()).most_common(1)
    for group, rows in groups.items():
        prompts = {tuple(row["prompt_ids"]) for row in rows}
        if len(prompts) > 1:
            problems.append(f"group {group} of step {step} has {len(prompts)} prompts")
        if {row["sample_index"] for row in rows} != set(range(len(rows))) or len(rows) != usual[0][0]:
            problems.append(f"group {group} of step {step} has a sample twice or lacks one")
        yield group, prompts.pop()


def _epochs(times: Mapping[Prompt, int], size: int, num_epochs: int) -> list[str]:
    """After n whole epochs and a part of one every prompt was there n times, or n + 1 times."""
    problems = []
    if len(times) != size and (num_epochs or len(times) > size):
        problems.append(f"{len(times)} prompts were trained on; an epoch has {size}")
    wrong = {prompt: n for prompt, n in times.items() if n not in (num_epochs, num_epochs + 1)}
    shown = [f"{_few(prompt)}: {n} times" for prompt, n in wrong.items()]
    return problems + _lines(f"prompt not trained on {num_epochs} or {num_epochs + 1} times", shown)


def _lines(what: str, found: Sequence[object]) -> list[str]:
    return [f"{len(found)} x {what}: {_few(found)}"] if found else []


def _few(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:NUM_SHOWN])) + (", ..." if len(values) > NUM_SHOWN else "")


def main() -> int:
    """Exit code 1 when a prompt is missing or was trained on twice."""
    parser = argparse.ArgumentParser(prog="count_prompts", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--epoch-size", type=int, default=None, help="prompts in an epoch")
    arguments = parser.parse_args()
    count = count_prompts(arguments.run, arguments.epoch_size)
    for problem in count.problems:
        print(f"count_prompts: {problem}", file=sys.stderr)  # noqa: T201 - the command's answer
    print(  # noqa: T201
        f"{arguments.run.name}: {count.num_groups} groups in {count.num_steps} steps, {count.num_prompts} prompts, "
        f"{count.num_epochs} whole epochs; {count.num_superseded} superseded batches left aside: "
        + ("not every prompt once an epoch" if count.problems else "every prompt once an epoch")
    )
    return 1 if count.problems else 0


if __name__ == "__main__":
    sys.exit(main())
