"""Rows of data.train and data.eval as comparisons: read, measured, and held out by whole prompts.

Held-out comparisons are those of ``data.eval`` whose prompts are not trained on; without it whole prompts of
``data.train`` are held out, until they have ``evaluation.size`` comparisons (a tenth of all unless that is set).
May import: trainers.{comparisons, errors}, launch.*.
"""

from __future__ import annotations

from collections.abc import Callable

from launch.bad_rows import DROP_THEM, BadRows, read_rows
from launch.datasets import Row
from launch.row_settings import HeldOutSettings
from launch.tuning_config import TuningConfig
from launch.tuning_data import load_located_rows
from launch.tuning_task import BaseModelFolder
from trainers.comparisons import Comparison, grouped_by_prompt, split_by_prompt, without_prompts
from trainers.errors import InputError

HELD_OUT_SHARE = 10  # without data.eval and evaluation.size: one comparison in so many


class ComparisonData:
    """Reads the datasets of one run.

    Args:
        read: (where, row) -> the comparison it holds, or InputError.
        is_grouped: rows of one prompt are one comparison.
    """

    def __init__(
        self,
        config: TuningConfig,
        base: BaseModelFolder,
        read: Callable[[str, Row], Comparison],
        is_grouped: bool = False,
    ) -> None:
        self._config, self._base, self._read, self._is_grouped = config, base, read, is_grouped
        self.left_out: dict[str, int] = {}  # field -> rows that were too long
        self.bad: dict[str, BadRows] = {}  # field -> rows that were dropped

    def train(self) -> list[list[Comparison]]:
        """Of each dataset of data.train."""
        return [self.comparisons(dataset, f"data.train.{i}") for i, dataset in enumerate(self._config.data.train)]

    def comparisons(self, dataset: HeldOutSettings, field: str) -> list[Comparison]:
        """Those that fit; InputError when none is left, or as of :func:`launch.bad_rows.read_rows`."""
        rows, on_bad_row = load_located_rows(dataset, field), self._config.data.on_bad_row
        read, self.bad[field] = read_rows(rows, self._read, field, on_bad_row, DROP_THEM)
        if self._is_grouped:
            budget = self._config.learner.token_budget
            read = grouped_by_prompt(read, budget, self._base.max_length, self._share_prompts)
        kept = [c for c in read if self._fits(c)]
        self.left_out[field] = len(read) - len(kept)
        if not kept:
            raise InputError(field, f"{len(read)} rows", "each is too long to learn from",
                             "raise model.max_length and learner.token_budget")  # fmt: skip
        return kept

    def split(self, train: list[list[Comparison]]) -> tuple[list[list[Comparison]], list[Comparison]]:
        """(training parts, held out), with no prompt in common."""
        size, flat = self._config.evaluation.size, [c for part in train for c in part]
        if self._config.data.eval is not None:
            held = self.comparisons(self._config.data.eval, "data.eval")
            held = without_prompts(held, {c.prompt_id for c in flat})[:size]
            if not held:
                raise InputError("data.eval", self._config.data.eval.path or self._config.data.eval.function,
                                 "has no prompt that is not in data.train too", "use other prompts")  # fmt: skip
            return train, held
        _, held = split_by_prompt(flat, size or max(1, len(flat) // HELD_OUT_SHARE), self._config.run.seed)
        parts = [without_prompts(part, {c.prompt_id for c in held}) for part in train]
        for i, part in enumerate(parts):
            if not part:
                raise InputError(f"data.train.{i}", len(train[i]), "nothing is left of it once prompts are held out",
                                 "give more prompts, lower evaluation.size, or give data.eval")  # fmt: skip
        return parts, held

    def _fits(self, comparison: Comparison) -> bool:
        """One answer must fit the model, all answers together one micro-batch: they are compared in it."""
        cost = comparison.cost(self._share_prompts)
        return comparison.longest <= self._base.max_length and cost <= self._config.learner.token_budget

    @property
    def num_bad(self) -> dict[str, int]:
        """Rows that were dropped, of each dataset."""
        return {field: rows.num for field, rows in self.bad.items()}

    @property
    def _share_prompts(self) -> bool:
        """Before the ranks start it is not known whether their attention shares prompts; a CPU's does."""
        setting = self._config.learner.share_prompts
        return setting if setting is not None else self._config.cluster.device == "cpu"
