"""What a labelling run sampled, as KTO learns from it: each answer good or bad, by the same scores as the rankings.

May import: launch.journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.journal import read_rows


@dataclass(frozen=True, slots=True)
class Labelled:
    """Counts of a labelling run."""

    num_sampled: int
    num_tokens: int  # of all answers
    num_good: int
    num_bad: int
    num_prompts: int
    num_ranked: int  # prompts two of whose answers got unlike scores: where all are alike, nothing is preferred

    @property
    def desirable_weight(self) -> float | None:
        """So that good and bad answers weigh alike as a whole (arXiv:2402.01306, section 4.2); None: one is missing."""
        return self.num_bad / self.num_good if self.num_good and self.num_bad else None


def labelled_rows(records: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Labelled]:
    """``prompt, completion, label`` of every answer with a score, and counts of all answers.

    An answer is good where its score is above the mean of all of them.  The order does not depend on that of
    ``records``.
    """
    ordered = sorted(records, key=lambda record: int(record["position"]))
    scored = [
        (record["prompt"], answer, score)
        for record in ordered
        for answer, score in zip(record["candidates"], record["labels"]["scores"], strict=True)
        if score is not None
    ]
    mean = sum(score for _, _, score in scored) / max(1, len(scored))
    rows = [
        {
            "prompt": prompt,
            "completion": answer["text"] if isinstance(prompt, str) else [_said(answer["text"])],
            "label": score > mean,
            "score": score,
            "finish_reason": answer["finish_reason"],
        }
        for prompt, answer, score in scored
    ]
    answers = [answer for record in ordered for answer in record["candidates"]]
    num_good = sum(row["label"] for row in rows)
    spread = [{score for score in record["labels"]["scores"] if score is not None} for record in ordered]
    counts = Labelled(
        len(answers), sum(len(a["ids"]) for a in answers), num_good, len(rows) - num_good, len(ordered),
        sum(len(scores) > 1 for scores in spread),
    )  # fmt: skip
    return rows, counts


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read_labelled(run: Path) -> Labelled:
    """Counts of the labelling run in ``run``."""
    return labelled_rows(read_rows(run / "labelled.jsonl"))[1]


def write_labelled(run: Path, target: Path) -> Labelled:
    """Write the labelled answers of the run in ``run`` as JSONL, by one rename."""
    rows, counts = labelled_rows(read_rows(run / "labelled.jsonl"))
    fresh = target.with_name(f".{target.name}.tmp")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(fresh, target)
    return counts
