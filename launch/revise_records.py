"""What ``burnish revise`` writes: a record an answer while it goes on; SFT rows, preferences and a summary at its end.

May import: pyarrow, trainers.*, launch.revise_config.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from launch.revise_config import ReviseConfig
from trainers.constitution import Revised, Round
from trainers.experience import Prompt
from trainers.verdicts import LOSS, TIE, WIN, Judgement, combine, judge_report
from trainers.win_rate import win_rate

METADATA_KEY = b"burnish.revise"
Record = Mapping[str, Any]
_TEXTS = pa.list_(pa.string())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def record_of(
    position: int, turn: int, prompt: Prompt, sampled: Mapping[str, Any], revised: Revised, judgement: Judgement | None
) -> dict[str, Any]:
    """Everything that is known of one answer, as JSON.  ``sampled``: how the original came to be.

    ``principles``, ``critiques`` and ``revisions`` are of one length.  Of a round that failed the principle is there,
    the critique where that was said (else null), and null for the revision.
    """
    rounds: list[tuple[str, str | None, str | None]] = [(r.principle, r.critique, r.revision) for r in revised.rounds]
    if revised.unfinished is not None:
        rounds.append((*revised.unfinished, None))
    return {
        "position": position, "turn": turn, "prompt_id": prompt.prompt_id, "prompt": prompt.source,
        "columns": dict(prompt.columns), "original": revised.original, "sampled": dict(sampled),
        "principles": [name for name, _, _ in rounds], "critiques": [critique for _, critique, _ in rounds],
        "revisions": [revision for _, _, revision in rounds], "failure": revised.failure,
        "judgement": None if judgement is None else {
            "said": judgement.said, "verdicts": judgement.verdicts, "why": judgement.why,
            "failures": judgement.failures,
        },
    }  # fmt: skip


def rounds_of(record: Record) -> tuple[Round, ...]:
    """The rounds of a record that came to an end."""
    columns = (record[name] for name in ("principles", "critiques", "revisions"))
    return tuple(Round(*row) for row in zip(*columns, strict=True) if row[2] is not None)


def judgement_of(record: Record) -> Judgement | None:
    """The judgement in a record."""
    found = record["judgement"]
    if found is None:
        return None
    said = None if found["said"] is None else tuple(found["said"])
    return Judgement(said, tuple(found["verdicts"]), found["why"], tuple(found["failures"]))


def sft_rows(records: Iterable[Record], config: ReviseConfig) -> Iterator[dict[str, Any]]:
    """prompt, completion: every whole revision, or those that win in both orders (``revise.keep``)."""
    for record in records:
        if record["failure"] is not None:
            continue
        if config.revise.keep == "wins" and _label(record) != WIN:
            continue
        completion = _answer(record, record["revisions"][-1])
        yield {"prompt": record["prompt"], "completion": completion} | _shared(record)


def preference_rows(records: Iterable[Record], dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """prompt, chosen, rejected: as the judge says in both orders; without a judge the revision is preferred.

    A pair of equal texts, a tie, and what the judge could not say are left out and counted in ``dropped``.
    """
    for record in records:
        if record["failure"] is not None:
            continue
        revision, original = record["revisions"][-1], record["original"]
        if revision == original:
            dropped["identical"] += 1
            continue
        label = WIN if record["judgement"] is None else _label(record)
        if label not in (WIN, LOSS):
            dropped["tie" if label == TIE else _why(record)] += 1
            continue
        sides = (revision, original) if label == WIN else (original, revision)
        chosen, rejected = (_answer(record, text) for text in sides)
        yield {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected} | _shared(record)


def summary_of(records: Iterable[Record], num_sft: int, num_pairs: int, dropped: Mapping[str, int]) -> dict[str, Any]:
    """Counts; with a judge how often the revision wins over the original, ties as half, with its interval."""
    kept = list(records)
    whole = [r for r in kept if r["failure"] is None]
    failures = Counter(": ".join(r["failure"]) for r in kept if r["failure"] is not None)
    found: dict[str, Any] = {
        "num_answers": len(kept), "num_revised": len(whole),
        "num_unchanged": sum(r["revisions"][-1] == r["original"] for r in whole),
        "failures": dict(failures.most_common()),
        "principles": dict(Counter(p for r in whole for p in r["principles"])),
        "num_sft_rows": num_sft, "num_preference_rows": num_pairs, "dropped": dict(Counter(dropped).most_common()),
    }  # fmt: skip
    judged = [(r, j) for r, j in ((r, judgement_of(r)) for r in whole) if j is not None]
    if judged:
        outcomes, prompts = [j.outcome for _, j in judged], [r["prompt_id"] for r, _ in judged]
        found["win_rate"] = win_rate(outcomes, prompts)
        found["num_wins"], found["num_losses"] = outcomes.count(WIN), outcomes.count(LOSS)
        found["num_ties"], found["num_left_out"] = outcomes.count(TIE), outcomes.count(None)
        found["judge"] = judge_report([j for _, j in judged], prompts)
    return found


def schema(conversational: bool, columns: tuple[str, ...], metadata: Mapping[str, Any]) -> pa.Schema:
    """The Parquet schema of rows with ``columns`` of text or messages; provenance in ``burnish.revise``."""
    text = _MESSAGES if conversational else pa.string()
    fields: list[tuple[str, pa.DataType]] = [(name, text) for name in columns]
    fields += [("original", pa.string()), ("principles", _TEXTS), ("critiques", _TEXTS), ("revisions", _TEXTS)]
    fields += [("outcome", pa.float64()), ("prompt_id", pa.string()), ("position", pa.int64()), ("turn", pa.int64())]
    return pa.schema([*fields, ("columns", pa.string())], metadata={METADATA_KEY: json.dumps(metadata).encode()})


def _label(record: Record) -> float | None:
    judgement = judgement_of(record)
    return None if judgement is None else combine(*judgement.verdicts, "masked").value


def _why(record: Record) -> str:
    judgement = judgement_of(record)
    assert judgement is not None
    return judgement.why or combine(*judgement.verdicts, "masked").reason or "unlabelled"


def _answer(record: Record, text: str) -> Any:
    """Text where the prompt is text, messages where it is messages: as TRL has them."""
    return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]


def _shared(record: Record) -> dict[str, Any]:
    own = {name: record[name] for name in ("original", "principles", "critiques", "revisions")}
    judgement = judgement_of(record)
    own["outcome"] = None if judgement is None else judgement.outcome
    own |= {name: record[name] for name in ("prompt_id", "position", "turn")}
    return {**own, "columns": json.dumps(record["columns"])}
