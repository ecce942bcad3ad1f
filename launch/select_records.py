"""From the records of a labelling run to the answers that are kept: an SFT set, or the best of n of every prompt.

Pure but for the schemas.  The order of the rows is that of the prompt stream.
May import: pyarrow, trainers.best_of_n, launch.select_config.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from launch.select_config import SelectSettings
from trainers.best_of_n import top_indices

METADATA_KEY = b"burnish.select"
Record = Mapping[str, Any]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass
class Selection:
    """What came of a run; JSON values."""

    num_prompts: int = 0
    num_candidates: int = 0
    num_rows: int = 0
    num_prompts_without: int = 0  # prompts of which no answer was kept
    num_agreed: int = 0  # prompts whose candidates all said the same, and so had no score of a comparison
    dropped: Counter[str] = field(default_factory=Counter)  # candidates, by reason
    highest: float = -math.inf  # score of any candidate
    num_scored: int = 0
    _sum_scored: float = 0.0
    _sum_kept: float = 0.0

    def seen(self, record: Record) -> None:
        scores = [score for score in record["labels"]["scores"] if score is not None]
        self.num_prompts += 1
        self.num_candidates += len(record["candidates"])
        self.highest = max([self.highest, *scores])
        self.num_scored += len(scores)
        self._sum_scored += sum(scores)

    def kept(self, scores: Sequence[float], agreed: bool = False) -> None:
        """Of one prompt; ``agreed``: there is none, but an answer."""
        self.num_rows += len(scores) + agreed
        self.num_prompts_without += not scores and not agreed
        self._sum_kept += sum(scores)
        self.num_agreed += agreed

    def to_dict(self) -> dict[str, Any]:
        """Counts, and the mean score of all scored answers and of those that were kept."""
        means = {"mean_score_sampled": self._sum_scored / self.num_scored} if self.num_scored else {}
        num_kept = self.num_rows - self.num_agreed
        means |= {"mean_score_kept": self._sum_kept / num_kept} if num_kept else {}
        means |= {"num_agreed": self.num_agreed} if self.num_agreed else {}
        return {
            "num_prompts": self.num_prompts, "num_candidates": self.num_candidates, "num_rows": self.num_rows,
            "num_prompts_without": self.num_prompts_without, "dropped": dict(self.dropped.most_common()), **means,
        }  # fmt: skip


def choose(record: Record, settings: SelectSettings) -> tuple[list[int], Counter[str]]:
    """(candidates of one prompt that are kept, best first; reasons why the others are not).

    Equal texts of a prompt count once, so the best k are k different answers.
    """
    candidates, scores = record["candidates"], record["labels"]["scores"]
    why: dict[int, str] = {}
    first: dict[str, int] = {}
    for i in top_indices([math.inf if s is None else s for s in scores], len(scores)):
        candidate, score = candidates[i], scores[i]
        if candidate["finish_reason"] == "abort":
            why[i] = "aborted"
        elif not candidate["text"].strip():
            why[i] = "empty"
        elif score is None:
            why[i] = "unscored"
        elif settings.drop_truncated and candidate["finish_reason"] == "length":
            why[i] = "truncated"
        elif settings.threshold is not None and score < settings.threshold:
            why[i] = "below_threshold"
        elif first.setdefault(candidate["text"], i) != i:
            why[i] = "duplicate"
    left = [None if i in why else score for i, score in enumerate(scores)]
    ranked = top_indices(left, len(left))
    kept = ranked[: settings.top_k]
    why |= dict.fromkeys(ranked[len(kept) :], "not_among_top_k")
    return kept, Counter(why.values())


def agreed(record: Record, settings: SelectSettings) -> int | None:
    """The first of the candidates that were compared, where they all say the same; else None.

    Equal texts are not compared, so none of them has a score; and any of them is the best.
    """
    candidates = record["candidates"]
    whys = {candidate["finish_reason"] for candidate in candidates}
    may_be_kept = settings.threshold is None and whys <= {"stop", *(() if settings.drop_truncated else ("length",))}
    return 0 if may_be_kept and record["labels"]["dropped"].keys() == {"identical"} and _is_one(candidates) else None


def _is_one(candidates: Sequence[Mapping[str, Any]]) -> bool:
    return len({candidate["text"] for candidate in candidates}) == 1


def sft_rows(records: Iterable[Record], settings: SelectSettings, selection: Selection) -> Iterator[dict[str, Any]]:
    """prompt, completion and where they come from; ``selection`` is filled on the way.

    An answer that an earlier turn of its prompt gave already is a duplicate.
    """
    written: set[tuple[str, str]] = set()
    for record in records:
        selection.seen(record)
        kept, dropped = choose(record, settings)
        fresh = [i for i in kept if (record["prompt_id"], record["candidates"][i]["text"]) not in written]
        dropped["duplicate"] += len(kept) - len(fresh)
        selection.dropped.update(+dropped)
        selection.kept([record["labels"]["scores"][i] for i in fresh])
        for i in fresh:
            candidate = record["candidates"][i]
            written.add((record["prompt_id"], candidate["text"]))
            yield {
                "prompt": record["prompt"], "completion": _answer(record, i), "score": record["labels"]["scores"][i],
                "num_candidates": len(record["candidates"]), "candidate": i, "seed": candidate["seed"],
                "temperature": candidate["temperature"], **_shared(record),
            }  # fmt: skip


def answer_rows(
    records: Iterable[Record], settings: SelectSettings, selection: Selection, compares: bool = False
) -> Iterator[dict[str, Any]]:
    """One row a prompt: the best candidate that may be kept, null where there is none, and the scores of all.

    ``compares``: candidates are scored by being compared; where they all say the same, that is the answer.
    """
    for record in records:
        selection.seen(record)
        kept, dropped = choose(record, settings)
        unanimous = agreed(record, settings) if compares and not kept else None
        best = kept[0] if kept else unanimous
        if unanimous is not None:
            dropped["unscored"] -= 1
        scores = record["labels"]["scores"]
        selection.dropped.update(+dropped)
        selection.kept([scores[i] for i in kept], agreed=unanimous is not None)
        yield {
            "prompt": record["prompt"], "completion": None if best is None else _answer(record, best),
            "score": None if best is None else scores[best],
            "finish_reason": None if best is None else record["candidates"][best]["finish_reason"],
            "candidate": best, "scores": scores, **_shared(record),
        }  # fmt: skip


def sft_schema(conversational: bool, metadata: Mapping[str, Any]) -> pa.Schema:
    """Of :func:`sft_rows`; the provenance stands in the metadata under ``burnish.select``."""
    own = [("score", pa.float64()), ("num_candidates", pa.int32()), ("candidate", pa.int32()), ("seed", pa.int64()),
           ("temperature", pa.float64())]  # fmt: skip
    return _schema(conversational, own, metadata)


def answer_schema(conversational: bool, metadata: Mapping[str, Any]) -> pa.Schema:
    """Of :func:`answer_rows`."""
    own = [("score", pa.float64()), ("finish_reason", pa.string()), ("candidate", pa.int32()),
           ("scores", pa.list_(pa.float64()))]  # fmt: skip
    return _schema(conversational, own, metadata)


def _schema(conversational: bool, own: Sequence[tuple[str, pa.DataType]], metadata: Mapping[str, Any]) -> pa.Schema:
    text = _MESSAGES if conversational else pa.string()
    shared = [("prompt_id", pa.string()), ("position", pa.int64()), ("turn", pa.int64()), ("columns", pa.string())]
    fields = [("prompt", text), ("completion", text), *own, *shared]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata).encode()})


def _answer(record: Record, index: int) -> Any:
    """Text where the prompt is text, messages where it is messages: as TRL has them."""
    text = record["candidates"][index]["text"]
    return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]


def _shared(record: Record) -> dict[str, Any]:
    own = {name: record[name] for name in ("prompt_id", "position", "turn")}
    return {**own, "columns": json.dumps(record["columns"])}
