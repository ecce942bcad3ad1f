"""What a labelling run writes: one record a prompt while it goes on, preferences and a summary at its end.

The records (``labelled.jsonl``) hold everything that was sampled and said, in the order of arrival; the preferences
are made from them in the order of the prompt stream, so they do not depend on who was faster, or on a kill between.
May import: pyarrow, numpy, trainers.{experience, labellers}, launch.{judge_counts, label_config, run_folder}.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.judge_counts import JudgeCounts
from launch.label_config import LabelConfig
from launch.run_folder import replace_with
from trainers.experience import TrajectoryGroup
from trainers.labellers import Labels, Outcome, label_seed, rank, select

ROWS_PER_BATCH = 4096
METADATA_KEY = b"burnish.label"
_IDS, _MESSAGES = pa.list_(pa.int32()), pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def record_of(
    position: int,
    turn: int,
    group: TrajectoryGroup,
    temperatures: Sequence[float],
    labels: Labels,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known of one prompt, as JSON.  ``notes``: what else the labeller said."""
    prompt = group.prompt
    return {
        "position": position,
        "turn": turn,
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.source,
        "prompt_ids": prompt.token_ids.tolist(),
        "columns": dict(prompt.columns),
        "candidates": [
            {
                "text": t.text, "ids": t.completion_ids.tolist(), "finish_reason": t.finish_reason, "seed": t.seed,
                "temperature": temperature,
            }
            for t, temperature in zip(group.trajectories, temperatures, strict=True)
        ],
        "labels": asdict(labels),
        **({"notes": dict(notes)} if notes else {}),
    }  # fmt: skip


class RecordFile:
    """``labelled.jsonl``: appended to line by line, and read again at the end or after a kill.

    Of several records of one position the last one counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[int, int] = {}  # position -> where its line starts
        end = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # torn by a kill: this prompt is labelled again
                    self._offsets[json.loads(line)["position"]] = end
                    end += len(line)
        self._file = path.open("ab")
        self._file.truncate(end)

    @property
    def positions(self) -> set[int]:
        """Positions in the prompt stream that are labelled."""
        return set(self._offsets)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it survives a kill of this process from here on."""
        self._file.seek(0, os.SEEK_END)
        self._offsets[record["position"]] = self._file.tell()
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records in the order of the prompt stream."""
        with self.path.open("rb") as lines:
            for position in sorted(self._offsets):
                lines.seek(self._offsets[position])
                yield json.loads(lines.readline())

    def close(self) -> None:
        self._file.close()


@dataclass
class Summary:
    """What came of a run; JSON values."""

    num_prompts: int = 0
    num_candidates: int = 0
    num_rows: int = 0
    num_identical: int = 0  # candidates whose text an earlier candidate of the same prompt has
    num_truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)  # comparisons without a value
    judge: JudgeCounts = field(default_factory=JudgeCounts)
    _sums: dict[str, float] = field(default_factory=dict)

    def sampled(self, candidates: Sequence[Mapping[str, Any]], labels: Labels) -> None:
        self.num_prompts += 1
        self.num_candidates += len(candidates)
        self.num_identical += len(candidates) - len({c["text"] for c in candidates})
        self.num_truncated += sum(c["finish_reason"] == "length" for c in candidates)
        self.masked.update(o.reason for o in labels.outcomes if o.reason is not None)

    def kept(self, best: Mapping[str, Any], best_score: float, worst: Mapping[str, Any], worst_score: float) -> None:
        self.num_rows += 1
        tokens = len(best["ids"]), len(worst["ids"])
        terms = {
            "chosen_score": best_score, "rejected_score": worst_score, "chosen_tokens": tokens[0],
            "rejected_tokens": tokens[1], "length_difference": tokens[0] - tokens[1],
        }  # fmt: skip
        self._sums = {name: self._sums.get(name, 0.0) + term for name, term in terms.items()}

    def to_dict(self) -> dict[str, Any]:
        """Counts, and means over the rows; of a ranking its best and its worst candidate."""
        return {
            "num_prompts": self.num_prompts, "num_candidates": self.num_candidates, "num_rows": self.num_rows,
            "num_identical": self.num_identical, "num_truncated": self.num_truncated,
            "dropped": dict(self.dropped.most_common()), "masked": dict(self.masked.most_common()),
            **self.judge.to_dict(),
            **{f"mean_{name}": total / self.num_rows for name, total in self._sums.items()},
        }  # fmt: skip


def preferences(
    records: Iterable[Mapping[str, Any]], config: LabelConfig, constants: Mapping[str, Any], summary: Summary
) -> Iterator[dict[str, Any]]:
    """Rows of the output; ``summary`` is filled on the way.  ``constants``: provenance that all rows share."""
    for record in records:
        raw = record["labels"]
        labels = Labels(tuple(raw["scores"]), tuple(Outcome(*o) for o in raw["outcomes"]), raw["dropped"])
        summary.sampled(record["candidates"], labels)
        summary.judge.add(record.get("notes", {}), labels)
        if config.output.rows == "pairs":
            yield from _pair_rows(record, labels, config, constants, summary)
        else:
            yield from _ranking_rows(record, labels, constants, summary)


def _pair_rows(
    record: Mapping[str, Any], labels: Labels, config: LabelConfig, constants: Mapping[str, Any], summary: Summary
) -> Iterator[dict[str, Any]]:
    seed = label_seed(config.run.seed, record["prompt_id"], record["turn"], "tie")
    kept, dropped = select(labels, config.keep.pairs, config.keep.drop_ties, seed)
    summary.dropped.update(dropped)
    for pair in kept:
        row: dict[str, Any] = {"prompt": record["prompt"]}
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        for side, index in sides.items():
            row[side] = _answer(record, index)
        row["prompt_ids"] = record["prompt_ids"]
        for side, index in sides.items():
            candidate = record["candidates"][index]
            row |= {f"{side}_{name}": candidate[name] for name in ("ids", "temperature", "seed", "finish_reason")}
            row |= {f"{side}_score": labels.scores[index], f"{side}_index": index}
        row["is_tie"] = pair.is_tie
        best, worst = record["candidates"][pair.chosen], record["candidates"][pair.rejected]
        summary.kept(best, row["chosen_score"], worst, row["rejected_score"])
        yield row | _common(record, constants, (pair.chosen, pair.rejected))


def _ranking_rows(
    record: Mapping[str, Any], labels: Labels, constants: Mapping[str, Any], summary: Summary
) -> Iterator[dict[str, Any]]:
    candidates = record["candidates"]
    ranked, dropped = rank(labels, [c["text"] for c in candidates])
    summary.dropped.update(dropped)
    if not ranked:
        return
    order = [index for index, _ in ranked]
    scores = [labels.scores[index] for index in order]
    row: dict[str, Any] = {
        "prompt": record["prompt"],
        "completions": [_answer(record, index) for index in order],
        "ranks": [place for _, place in ranked],
        "prompt_ids": record["prompt_ids"],
        "completion_ids": [candidates[index]["ids"] for index in order],
        "completion_scores": scores,
        "completion_indices": order,
    }
    for plural, name in (("temperatures", "temperature"), ("seeds", "seed"), ("finish_reasons", "finish_reason")):
        row[f"completion_{plural}"] = [candidates[index][name] for index in order]
    assert scores[0] is not None and scores[-1] is not None  # rank() leaves out what has none
    summary.kept(candidates[order[0]], scores[0], candidates[order[-1]], scores[-1])
    yield row | _common(record, constants, order)


def _answer(record: Mapping[str, Any], index: int) -> Any:
    """Text where the prompt is text, messages where it is messages: as TRL has them."""
    text = record["candidates"][index]["text"]
    return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]


def _common(record: Mapping[str, Any], constants: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """What rows of both forms have; ``indices``: the candidates of the row, in its order."""
    own = {name: record[name] for name in ("prompt_id", "position", "turn")}
    notes = record.get("notes", {})
    own["principle"] = notes.get("principle")
    parts = {name: [values[i] for i in indices] for name, values in notes.get("parts", {}).items()}
    own["parts"] = json.dumps(parts) if parts else None
    return {**own, "columns": json.dumps(record["columns"]), **constants}


# --- files --------------------------------------------------------------------------------------


def schema(conversational: bool, rows: str, constants: Iterable[str], metadata: Mapping[str, Any]) -> pa.Schema:
    """The Parquet schema; the whole provenance stands in its metadata under ``burnish.label``."""
    text = _MESSAGES if conversational else pa.string()
    fields: list[tuple[str, pa.DataType]] = [("prompt", text)]
    of_one = (("temperature", pa.float64()), ("seed", pa.int64()), ("finish_reason", pa.string()))
    if rows == "pairs":
        fields += [("chosen", text), ("rejected", text), ("prompt_ids", _IDS)]
        for side in ("chosen", "rejected"):
            fields.append((f"{side}_ids", _IDS))
            fields += [(f"{side}_{name}", kind) for name, kind in of_one]
            fields += [(f"{side}_score", pa.float64()), (f"{side}_index", pa.int32())]
        fields.append(("is_tie", pa.bool_()))
    else:
        fields += [("completions", pa.list_(text)), ("ranks", pa.list_(pa.int32())), ("prompt_ids", _IDS)]
        fields += [("completion_ids", pa.list_(_IDS)), ("completion_scores", pa.list_(pa.float64()))]
        fields.append(("completion_indices", _IDS))
        fields += [(f"completion_{name}s", pa.list_(kind)) for name, kind in of_one]
    fields += [("prompt_id", pa.string()), ("position", pa.int64()), ("turn", pa.int64())]
    fields += [("principle", pa.string()), ("parts", pa.string()), ("columns", pa.string())]
    fields += [(name, pa.string()) for name in constants]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata).encode()})


def write_preferences(
    path: Path, rows: Iterator[dict[str, Any]], shape: pa.Schema, jsonl: bool, folder: Path | None = None
) -> None:
    """Write all rows and rename the file into place.

    Args:
        folder: of the run; given, only what this run wrote is replaced, and it is refused by an InputError otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if jsonl:
            with scratch.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            with pq.ParquetWriter(scratch, shape) as writer:
                for batch in _batches(rows):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=shape))
        if folder is None:
            os.replace(scratch, path)
        else:
            replace_with(scratch, path, folder)
    finally:
        scratch.unlink(missing_ok=True)


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
