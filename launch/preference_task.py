"""Offline preference learning as a task of the driver: rows to comparisons, reference log-probs, held-out metrics.

Held out are whole prompts, as launch/comparison_data.py says, where ``evaluation.every`` asks for an evaluation.
May import: actors.{model_folders, preference_learner}, trainers.*, launch.*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.model_folders import resolve_model
from actors.preference_learner import HELD_OUT, TRAIN, PreferenceLearner
from launch.bad_rows import dropped_rows
from launch.comparison_data import ComparisonData
from launch.datasets import Row
from launch.model_facts import check_model_folder
from launch.prepare import same_tokenizer
from launch.tuning_config import TuningConfig
from launch.tuning_reference import reference_file, write_references
from launch.tuning_task import BaseModelFolder, Site, TuningFleet
from trainers.comparisons import Comparison, digest, write_comparisons
from trainers.errors import InputError
from trainers.labelled_answers import read_preference, with_mismatched
from trainers.preference_training import LABELLED, PreferenceSettings


class PreferenceTask:
    """A :class:`launch.tuning_task.TuningTask`.

    Raises:
        InputError: a row that cannot be read or that another loss learns from, a dataset of which nothing is left, or
            a reference that cannot be used.
    """

    rank_class = PreferenceLearner
    key_metrics = (
        "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "eval/loss",
        "eval/rewards/accuracies", "grad_norm", "time/step_s",
    )  # fmt: skip

    def __init__(self, config: TuningConfig, base: BaseModelFolder) -> None:
        assert isinstance(config.algorithm, PreferenceSettings)
        self._config, self._base, self._settings = config, base, config.algorithm
        self._reference_path = self._checked_reference()
        data = ComparisonData(config, base, self._read)
        train, held_out = data.train(), list[Comparison]()
        if config.evaluation.every:
            train, held_out = data.split(train)
        self.sizes = [len(part) for part in train]
        self._first = np.cumsum([0, *self.sizes])
        flat = [c for part in train for c in part]
        kinds = {"num_pairs": sum(len(c.pairs) for c in flat)}
        if self._settings.kind.rows == LABELLED:
            kinds = {"num_desirable": sum(c.label is True for c in flat)}
            flat = with_mismatched(flat, config.run.seed, base.max_length, "data.train")
            held = "evaluation.size" if config.data.eval is None else "data.eval"
            held_out = held_out and with_mismatched(held_out, config.run.seed, base.max_length, held)
        self._train, self._held_out = flat, held_out
        self.digest = digest(flat)
        num_prompts, left = len({c.prompt_id for c in flat}), sum(data.left_out.values())
        what = "comparisons" if "num_pairs" in kinds else f"answers ({kinds['num_desirable']} of them desirable)"
        self.summary = f"{self._settings.loss}: {len(flat)} {what} of {num_prompts} prompts to learn from, " + (
            f"{len(held_out)} of {len({c.prompt_id for c in held_out})} other prompts held out"
        )
        if left:
            self.summary += f"; {left} rows left out as too long"
        self.summary += dropped_rows(data.bad)
        self.report: Mapping[str, Any] = {
            "num_comparisons": dict(zip(config.data.names, self.sizes, strict=True)),
            **kinds,
            "num_prompts": num_prompts,
            "num_held_out": len(held_out),
            "num_too_long": data.left_out,
            "num_bad": data.num_bad,
        }

    def _read(self, where: str, row: Row) -> Comparison:
        return read_preference(row, where, self._base.tokenizer, self._config.data.format, self._settings.loss)

    def _checked_reference(self) -> str | None:
        """Folder of the reference; None where the loss has none, or the ranks are it."""
        if not self._config.has_reference_workers:
            return None
        settings = self._config.reference_settings
        if settings.token_budget < self._base.max_length:
            raise InputError(
                "reference.token_budget", settings.token_budget,
                f"the longest text may have {self._base.max_length} tokens", "raise it, or lower model.max_length",
            )  # fmt: skip
        if settings.path is None:
            return self._base.path
        path = resolve_model(settings.path)
        check_model_folder(path, "reference.path")
        same_tokenizer(self._base.tokenizer, path, "reference.path", settings.path)
        return path

    # --- the driver's calls -------------------------------------------------------------------

    def _sets(self) -> dict[str, list[Comparison]]:
        return {TRAIN: self._train} | ({HELD_OUT: self._held_out} if self._held_out else {})

    def write(self, folder: Path) -> None:
        for name, comparisons in self._sets().items():
            write_comparisons(comparisons, folder / f"{name}.arrow")

    async def before_ranks(self, site: Site, folder: Path) -> None:
        if self._reference_path is not None:
            await write_references(self._config, self._reference_path, self._sets(), site, folder)

    def rank_kwargs(self, folder: Path) -> dict[str, Any]:
        there = folder.absolute()
        names = self._sets() if self._reference_path is not None else ()
        reference = {name: str(reference_file(there, name)) for name in names}
        return {"algorithm": self._settings, "data_folder": str(there), "reference": reference}

    def payload(self, drawn: Sequence[tuple[int, int]], step: int) -> list[int]:
        return [int(self._first[dataset]) + index for dataset, index in drawn]

    async def evaluate(self, fleet: TuningFleet, step: int) -> Mapping[str, float]:
        found = await fleet.call("evaluate")
        return {f"eval/{name}": value for name, value in found.items()}

    async def after_training(self, fleet: TuningFleet, exported: Path) -> Mapping[str, Any]:
        return {}
