"""``burnish average``: reward models into one by the mean of their weights, with statistics to normalise it by.

The mean's own scores have another scale than any member's, so it has no ``reward_stats.json`` until samples are given
to score.
May import: transformers (inside a function), actors.*, trainers.*, launch.{bad_rows, row_settings, tuning_data}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from actors.end_scores import end_scores
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_model import STATS, RewardStats
from actors.scalar_model import is_scalar_folder, load_scalar
from actors.weight_average import average_models
from launch.bad_rows import read_rows
from launch.row_settings import HeldOutSettings
from launch.tuning_data import load_located_rows
from trainers.errors import InputError
from trainers.preferences import read_sample
from trainers.prompt_format import PromptFormat

TOKEN_BUDGET = 8192  # tokens scored at once


def average(members: Sequence[str], out: Path, reference: str | None, chat: bool) -> list[str]:
    """Average the folders ``members`` into ``out``; what was done, in lines for the terminal.

    Samples are read before anything is written, and scored before ``out`` is there.

    Args:
        reference: JSONL or Parquet file of prompt and completion, sampled from the policy that is to be trained.
        chat: the chat template is applied to its plain-text prompts.

    Raises:
        InputError: see :func:`actors.weight_average.average_models`; or samples that cannot be scored.
    """
    folders = [resolve_model(member) for member in members]
    if reference is None:
        return [*_distances(average_models(folders, out)), f"wrote {out}"]
    for folder in folders:
        if not (Path(folder) / "config.json").is_file() or not is_scalar_folder(folder):
            raise InputError("member", folder, "is no reward model, and scores are asked for",
                             "leave --reference out")  # fmt: skip
    texts = _read(reference, folders[0], chat)
    written: list[RewardStats] = []
    apart = average_models(
        folders, out, lambda scratch: written.append(write_stats(scratch, texts, f"samples in {reference}"))
    )
    (stats,) = written
    scored = f"{STATS}: mean {stats.mean:.4g}, deviation {stats.std:.4g} over {stats.num} samples"
    return [*_distances(apart), scored, f"wrote {out}"]


def _distances(apart: Mapping[str, float]) -> list[str]:
    return [f"{member}: {distance:.3g} of the first one's size away from it" for member, distance in apart.items()]


def _read(reference: str, folder: str, chat: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids of the prompt, of the completion) of every sample that fits the model in ``folder``.

    Raises:
        InputError: a row that is no sample, or fewer than two that fit.
    """
    form, tokenizer, longest = PromptFormat(chat=chat), load_tokenizer(folder), _longest(folder)
    samples = load_located_rows(HeldOutSettings.model_validate({"path": reference}), "reference")
    read, _ = read_rows(samples, lambda where, row: read_sample(row, where, tokenizer, form), "reference")
    kept = [(c.prompt_ids, c.completion_ids[0]) for c in read if c.longest <= longest]
    if len(kept) < 2:
        raise InputError("reference", reference, f"{len(kept)} of its samples fit the model: they have no deviation",
                         "give two or more")  # fmt: skip
    return kept


def _longest(folder: str) -> int:
    """Tokens of the longest sample that the model takes."""
    from transformers import AutoConfig

    config: object = AutoConfig.from_pretrained(folder, local_files_only=True)
    return min(TOKEN_BUDGET, int(getattr(config, "max_position_embeddings", TOKEN_BUDGET)))


def write_stats(folder: Path, texts: Sequence[tuple[np.ndarray, np.ndarray]], reference: str) -> RewardStats:
    """Score ``texts`` (ids of prompt and completion, int32 each) with the model in ``folder``; store mean and std."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_scalar(str(folder), "out").to(device).eval()
    prompts, completions = [p for p, _ in texts], [c for _, c in texts]
    found = end_scores(model, prompts, completions, range(len(texts)), TOKEN_BUDGET, False, device)
    scores = np.array([found[i] for i in range(len(texts))], dtype=np.float64)
    stats = RewardStats(float(scores.mean()), float(scores.std()), int(scores.size), reference)
    (folder / STATS).write_text(json.dumps(stats._asdict(), indent=2) + "\n", encoding="utf-8")
    return stats
