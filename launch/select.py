"""``burnish select``: n answers a prompt, the best ones as an SFT set; ``burnish answer``: every prompt's best answer.

    prompts -> lanes (bounded) -> generator -> who scores -> labelled.jsonl --select--> sft.parquet --> burnish train
                                                                           `--answer--> answers.parquet

Sampling and scoring are those of ``burnish label`` (launch/label.py), records, resuming and refusals included.
Rejection sampling: RAFT (arXiv:2304.06767), Llama 2 (arXiv:2307.09288, section 3.2.3).
May import: everything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from launch.config import DatasetSettings
from launch.label import Labelled, labelled, summary_table, write_summary
from launch.label_records import write_preferences
from launch.select_config import SelectConfig
from launch.select_records import Selection, answer_rows, answer_schema, sft_rows, sft_schema
from trainers.errors import InputError
from trainers.prompt_format import Messages

SFT, ANSWERS = "sft", "answers"


def select_answers(config: SelectConfig, console: Console, resume: bool = False) -> Path:
    """Sample, score, and write the answers that are kept.  Returns their file.

    Raises:
        InputError: something in the configuration, the model, the data or the scorer cannot be used, or no answer
            is good enough; ``--resume`` with another ``select`` chooses from the same answers.
    """
    with labelled(config.labelling(SFT), config.model_dump(mode="json"), console, resume) as found:
        selection = Selection()
        rows = list(sft_rows(_records(found), config.select, selection))
        if rows:
            _write(config, SFT, found, rows, sft_schema(_is_conversational(found), found.provenance))
        write_summary(found, selection.to_dict())
    console.print(summary_table(selection.to_dict(), "selection"))
    if not rows:
        raise _nothing_left(config, selection)
    return _told(config, SFT, console)


def answer_prompts(config: SelectConfig, console: Console, resume: bool = False) -> Path:
    """Answer every prompt with the best of n.  Returns the file: a row a prompt, with the scores of all candidates.

    Where no candidate may be kept (``select.threshold``, ``select.drop_truncated``) the answer is null.

    Raises:
        InputError: as :func:`select_answers`; or ``select`` asks for more than the best answer.
    """
    selection, _ = _answer(config, console, resume)
    console.print(summary_table(selection.to_dict(), "answers"))
    return _told(config, ANSWERS, console)


def answer_one(config: SelectConfig, prompt: str, console: Console, resume: bool = False) -> dict[str, Any]:
    """Answer ``prompt`` and print the answer; its row.  Nothing is left behind but ``output.path``, where it is given.

    Raises:
        InputError: as :func:`answer_prompts`; or there is something to resume.
    """
    if resume:
        raise InputError("--resume", prompt, "one prompt leaves no run to go on with", "leave out --resume")
    with tempfile.TemporaryDirectory(prefix="burnish-answer-") as folder:
        _, (row,) = _answer(of_one_prompt(config, prompt, folder), console, False)
    said = row["completion"]
    console.print("none of the candidates may be kept" if said is None else said, markup=False, highlight=False)
    shown = ", ".join("none" if score is None else f"{score:.4g}" for score in row["scores"])
    console.print(f"candidate {row['candidate']}; scores: {shown}", markup=False, highlight=False, soft_wrap=True)
    return row


def of_one_prompt(config: SelectConfig, prompt: str | Messages, folder: str) -> SelectConfig:
    """``config`` with ``prompt`` in place of its dataset, run below ``folder``."""
    train = DatasetSettings(function="launch.given_prompts:rows", args={"prompts": [prompt]})
    run = config.run.model_copy(update={"directory": folder, "num_prompts": 1})
    return config.model_copy(update={"run": run, "prompts": config.prompts.model_copy(update={"train": train})})


def _answer(config: SelectConfig, console: Console, resume: bool) -> tuple[Selection, list[dict[str, Any]]]:
    """(counts, rows), which are written."""
    if config.select.top_k != 1:
        raise InputError("select.top_k", config.select.top_k, "burnish answer gives every prompt one answer, the best",
                         "set select.top_k=1, or use burnish select")  # fmt: skip
    with labelled(config.labelling(ANSWERS), config.model_dump(mode="json"), console, resume) as found:
        selection = Selection()
        rows = list(answer_rows(_records(found), config.select, selection, config.compares))
        _write(config, ANSWERS, found, rows, answer_schema(_is_conversational(found), found.provenance))
        write_summary(found, selection.to_dict())
    return selection, rows


def _records(found: Labelled) -> Iterator[Mapping[str, Any]]:
    return (record for record in found.records if record["position"] < found.total)


def _is_conversational(found: Labelled) -> bool:
    return not isinstance(found.prepared.prompts[0].source, str)


def _write(config: SelectConfig, name: str, found: Labelled, rows: list[dict[str, Any]], shape: pa.Schema) -> None:
    write_preferences(config.target(name), iter(rows), shape, config.output.format == "jsonl", found.folder)


def _told(config: SelectConfig, name: str, console: Console) -> Path:
    console.print(f"{name}: {config.target(name)}", soft_wrap=True)
    return config.target(name)


def _nothing_left(config: SelectConfig, selection: Selection) -> InputError:
    """Why there is no SFT set."""
    told = ", ".join(f"{reason} {count}" for reason, count in selection.dropped.most_common()) or "none was sampled"
    again = "the samples are kept for --resume"
    if selection.dropped["below_threshold"]:
        return InputError(
            "select.threshold", config.select.threshold,
            f"none of {selection.num_candidates} answers is kept ({told}); the highest score is {selection.highest:g}",
            f"lower it ({again}), or raise sampling.num_candidates",
        )  # fmt: skip
    return InputError("select", f"{selection.num_candidates} answers", f"none is kept: {told}",
                      f"mend the cause that counts most ({again})")  # fmt: skip
