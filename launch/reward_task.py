"""Reward-model training as a task of the driver: rows to comparisons, held-out judgement, the files of an export.

May import: actors.reward_learner, trainers.*, launch.*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.reward_learner import RewardModelLearner
from actors.scalar_model import scalar_pad_token_id
from launch.bad_rows import dropped_rows, read_rows
from launch.comparison_data import ComparisonData
from launch.datasets import Row
from launch.reward_files import PLOT, REPORT, write_reward_files
from launch.row_settings import HeldOutSettings
from launch.tuning_config import TuningConfig
from launch.tuning_data import load_located_rows
from launch.tuning_task import BaseModelFolder, Site, TuningFleet
from trainers.comparisons import Comparison, digest, write_comparisons
from trainers.errors import InputError
from trainers.preferences import read_comparison, read_sample
from trainers.reward_report import RewardReport, judge
from trainers.reward_training import RewardTrainingSettings

REFERENCE = "reference_samples"


class RewardTask:
    """A :class:`launch.tuning_task.TuningTask`.

    Raises:
        InputError: a row that cannot be read, or a dataset of which nothing is left.
    """

    rank_class = RewardModelLearner
    key_metrics = ("loss", "accuracy", "eval/pair_accuracy", "eval/ece", "grad_norm", "time/step_s")

    def __init__(self, config: TuningConfig, base: BaseModelFolder) -> None:
        assert isinstance(config.algorithm, RewardTrainingSettings)
        self._config, self._base, self._settings = config, base, config.algorithm
        scalar_pad_token_id(base.tokenizer, "model.path", base.path)  # refused now, not at the export
        data = ComparisonData(config, base, self._read, self._settings.group_by_prompt)
        self._train, self._held_out = data.split(data.train())
        self._left_out = data.left_out
        self._reference = self._reference_samples()
        self.sizes = [len(part) for part in self._train]
        self._first = np.cumsum([0, *self.sizes])
        flat = [c for part in self._train for c in part]
        self.digest = digest(flat)
        num_prompts = len({c.prompt_id for c in flat})
        left = sum(self._left_out.values())
        self.summary = (
            f"{len(flat)} comparisons of {num_prompts} prompts to learn from, {len(self._held_out)} of "
            f"{len({c.prompt_id for c in self._held_out})} other prompts held out"
        ) + (f"; {left} rows left out as too long" if left else "")
        self.summary += dropped_rows(data.bad)
        self.report: Mapping[str, Any] = {
            "num_comparisons": dict(zip(config.data.names, self.sizes, strict=True)),
            "num_pairs": sum(len(c.pairs) for c in flat),
            "num_prompts": num_prompts,
            "num_held_out": len(self._held_out),
            "num_too_long": self._left_out,
            "num_bad": data.num_bad,
        }

    # --- data ---------------------------------------------------------------------------------

    def _read(self, where: str, row: Row) -> Comparison:
        return read_comparison(
            row, where, self._base.tokenizer, self._config.data.format, self._settings.margin_column
        )

    def _reference_samples(self) -> list[Comparison]:
        path = self._settings.reference_samples
        if path is None:
            return []
        field = f"algorithm.{REFERENCE}"
        rows = load_located_rows(HeldOutSettings(path=path), field)  # type: ignore[call-arg]
        tokenizer, form = self._base.tokenizer, self._config.data.format
        read, _ = read_rows(rows, lambda where, row: read_sample(row, where, tokenizer, form), field)
        kept = [c for c in read if c.longest <= self._base.max_length]
        self._left_out[field] = len(read) - len(kept)
        if len(kept) < 2:
            raise InputError(field, path, f"{len(kept)} of its samples can be scored: they have no deviation",
                             "give two or more that fit model.max_length")  # fmt: skip
        return kept

    # --- the driver's calls -------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        write_comparisons([c for part in self._train for c in part], folder / "train.arrow")
        write_comparisons(self._held_out, folder / "held_out.arrow")
        if self._reference:
            write_comparisons(self._reference, folder / f"{REFERENCE}.arrow")

    async def before_ranks(self, site: Site, folder: Path) -> None:
        pass

    def rank_kwargs(self, folder: Path) -> dict[str, Any]:
        return {"algorithm": self._settings, "data_folder": str(folder.absolute())}

    def payload(self, drawn: Sequence[tuple[int, int]], step: int) -> list[int]:
        return [int(self._first[dataset]) + index for dataset, index in drawn]

    async def evaluate(self, fleet: TuningFleet, step: int) -> Mapping[str, float]:
        return (await self._judge(fleet)).metrics()

    async def after_training(self, fleet: TuningFleet, exported: Path) -> Mapping[str, Any]:
        report = await self._judge(fleet)
        if self._reference:
            scores = np.concatenate(await fleet.call("score", REFERENCE))
            reference = f"samples in {self._settings.reference_samples}"
        else:
            scores, reference = report.all_scores, "held-out answers, chosen and rejected"
        stats = write_reward_files(exported, report, scores, reference)
        return {
            "report": str(exported / REPORT), "plot": str(exported / PLOT), "accuracy": str(report.accuracy),
            "ece": report.calibration_error, "mean": stats.mean, "std": stats.std,
        }  # fmt: skip

    async def _judge(self, fleet: TuningFleet) -> RewardReport:
        return judge(self._held_out, await fleet.call("score", "held_out"), self._settings.num_bins)
