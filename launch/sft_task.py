"""SFT as a task of the driver: rows to examples, and the file that the ranks read.

May import: actors.{example_files, sft_learner}, trainers.{examples, sft}, launch.*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.example_files import write_examples
from actors.sft_learner import SFTLearner
from launch.bad_rows import DROP_THEM
from launch.row_settings import HeldOutSettings
from launch.tuning_config import TuningConfig
from launch.tuning_data import load_examples
from launch.tuning_task import BaseModelFolder, Site, TuningFleet
from trainers.examples import Example
from trainers.sft import SFTSettings

HELD_OUT = "eval"


class SFTTask:
    """A :class:`launch.tuning_task.TuningTask`.

    Raises:
        InputError: a row that cannot be read, or a dataset of which nothing is left.
    """

    rank_class = SFTLearner
    key_metrics = ("loss", "eval/loss", "grad_norm", "time/step_s", "throughput/learn_tokens_per_s")

    def __init__(self, config: TuningConfig, base: BaseModelFolder) -> None:
        assert isinstance(config.algorithm, SFTSettings)
        self._config, self._base = config, base
        self._left_out: dict[str, dict[str, int]] = {}
        self._names = config.data.names
        self._train = [
            self._examples(dataset, f"data.train.{i}", name)
            for i, (dataset, name) in enumerate(zip(config.data.train, self._names, strict=True))
        ]
        held_out = config.data.eval if config.evaluation.every else None
        self._held_out = [] if held_out is None else self._examples(held_out, "data.eval", HELD_OUT)
        self._held_out = self._held_out[: config.evaluation.size]
        self.sizes = [len(examples) for examples in self._train]
        self.digest = _digest(self._train)
        left = sum(sum(counts.values()) for counts in self._left_out.values())
        self.summary = f"{sum(self.sizes)} examples to learn from, {len(self._held_out)} held out"
        if left:
            self.summary += f"; {left} left out: " + "; ".join(
                f"{name} {', '.join(f'{count} {reason}' for reason, count in counts.items())}"
                for name, counts in self._left_out.items()
                if counts
            )
        self.report = {
            "num_examples": dict(zip(self._names, self.sizes, strict=True)),
            "num_held_out": len(self._held_out),
            "num_target_tokens": int(sum(e.mask.sum() for examples in self._train for e in examples)),
            "left_out": self._left_out,
        }

    def _examples(self, dataset: HeldOutSettings, field: str, name: str) -> list[Example]:
        settings = self._config.algorithm
        assert isinstance(settings, SFTSettings)
        found, self._left_out[name] = load_examples(
            dataset, field, self._base.tokenizer, self._base.max_length, self._config.data.format, settings.truncate,
            "raise model.max_length and learner.token_budget, or set algorithm.truncate=true",
            self._config.data.on_bad_row, DROP_THEM,
        )  # fmt: skip
        return found

    def write(self, folder: Path) -> None:
        for name, examples in zip(self._names, self._train, strict=True):
            write_examples(folder / f"train.{name}.arrow", examples)
        if self._held_out:
            write_examples(folder / f"{HELD_OUT}.arrow", self._held_out)

    async def before_ranks(self, site: Site, folder: Path) -> None:
        pass

    def rank_kwargs(self, folder: Path) -> dict[str, Any]:
        there = folder.absolute()
        return {
            "train": {name: str(there / f"train.{name}.arrow") for name in self._names},
            "held_out": str(there / f"{HELD_OUT}.arrow") if self._held_out else None,
        }

    def payload(self, drawn: Sequence[tuple[int, int]], step: int) -> Any:
        return list(drawn)

    async def evaluate(self, fleet: TuningFleet, step: int) -> Mapping[str, float]:
        if not self._held_out:
            return {}
        found = await fleet.call("evaluate")
        return {f"eval/{name}": value for name, value in found.items()}

    async def after_training(self, fleet: TuningFleet, exported: Path) -> Mapping[str, Any]:
        return {}


def _digest(datasets: Sequence[Sequence[Example]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for examples in datasets:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(example.input_ids.shape[0].to_bytes(8, "little"))
            digest.update(example.input_ids.tobytes())
            digest.update(example.mask.tobytes())
    return digest.hexdigest()
