"""Stands in for the commands of a comparison: checks each one's whole configuration and leaves what it would leave."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from launch.compare import compare
from launch.compare_config import CompareConfig
from launch.compare_rows import Row
from launch.compare_stage import StageError
from launch.config import RunConfig
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.overrides import load_config, resolve
from trainers.experience import Prompt

RAW: dict[str, Any] = {
    "run": {"name": "cmp"},
    "compare": {"budget": 64, "groups_per_step": 4, "samples_per_prompt": 4, "best_of": [2, 3]},
    "model": {"path": "builtin:tiny-llama"},
    "prompts": {"train": {"path": "/nowhere/train.jsonl"}, "eval": {"path": "/nowhere/eval.jsonl"}, "chat": False},
    "rewards": [{"name": "letter", "function": "regex", "args": {"pattern": "[a-k]"}}],
    "generator": {"sampling": {"max_tokens": 8}},
    "learner": {"token_budget": 512, "optimizer": {"lr": 1e-2}},
    "reference": {"token_budget": 1024},
    "telemetry": {"wandb": "disabled"},
    "cluster": {"backend": "in_process", "device": "cpu"},
}


def config_of(*overrides: str) -> CompareConfig:
    config = resolve(copy.deepcopy(RAW), overrides, "stub").config
    assert isinstance(config, CompareConfig)
    return config


def prompts() -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts."""

    def made(name: str, count: int) -> list[Prompt]:
        ids = np.arange(4, dtype=np.int32)
        return [Prompt(f"{name}-{i}", ids, f"{name} {i}?", f"{name} {i}?", {"answer": str(i)}) for i in range(count)]

    return made("train", 16), made("held", 6)


class Machine:
    """Runs comparisons in the folder ``place``, in no time."""

    seconds, kl = 1.5, 0.25  # of every stage; of every policy

    def __init__(
        self,
        place: Path,
        fails: dict[str, str] | None = None,
        stops: set[str] | None = None,
        score: Callable[[int], float] = lambda i: float(i % 3 == 0),
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.folder = place, place / "cmp"
        self.fails, self.stops, self.score = fails or {}, stops or set(), score
        self.has_checkpoint = True
        self.reaches: dict[str, str] = {}  # stage that fails -> the checkpoint that it leaves
        self.ran: list[str] = []
        self.resumed: list[bool] = []
        self.overrides: dict[str, dict[str, str]] = {}
        self.before: Callable[[str], Any] = lambda stage: None
        self.prompts = prompts

    def compare(self, *overrides: str, page: Path | None = None) -> list[Row]:
        config = config_of(f"run.directory={self.place}", *overrides)
        return compare(config, Console(quiet=True), page, run=self.run, prepare=lambda config: self.prompts())

    def run(self, arguments: Sequence[str], log: Path, deadline_s: float) -> float:
        command, recipe, *rest = arguments
        assert command in ("train", "label", "eval") and log.parent.is_dir() and deadline_s > 0
        given = [key for key in rest if key != "--resume"]
        config = load_config(recipe, given).config
        name = config.run.name
        self.before(name)
        self.ran.append(name)
        self.overrides[name] = dict(key.split("=", 1) for key in given)  # type: ignore[misc]
        if command == "train":
            self.resumed.append(len(rest) > len(given))
        run = Path(config.run.directory) / name
        if name in self.fails:
            if name in self.reaches:
                (run / "checkpoints" / self.reaches[name]).mkdir(parents=True, exist_ok=True)
            raise StageError(self.fails[name])
        if name in self.stops:
            if self.has_checkpoint:
                (run / "checkpoints" / "step-000002").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        run.mkdir(exist_ok=True)
        if isinstance(config, LabelConfig):
            self._label(config, run)
        elif isinstance(config, EvalConfig):
            self._evaluate(config, run)
        else:
            self._train(config, run)
        return self.seconds

    def _label(self, config: LabelConfig, run: Path) -> None:
        assert config.run.num_prompts is not None and Path(config.prompts.train.path or "").is_file()
        size = config.sampling.num_candidates
        lines = [
            {
                "position": at, "prompt": f"train {at}?",
                "candidates": [{"text": f"{at} {i}", "ids": [1, 2], "finish_reason": "stop"} for i in range(size)],
                "labels": {"scores": [self.score(at * size + i) for i in range(size)]},
            }
            for at in range(config.run.num_prompts)
        ]  # fmt: skip
        (run / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "preferences.parquet").touch()

    def _train(self, config: Any, run: Path) -> None:
        if isinstance(config, RunConfig):
            groups = config.run.groups_per_step * (1 + config.filtering.zero_variance)
            rows = [
                {"step": s, "groups/num_generated": groups, "num_tokens": 100 * s, "time/generate_s": 2.0,
                 "throughput/generate_tokens_per_s": 5.0}
                for s in range(1, config.run.num_steps + 1)
            ]  # fmt: skip
        else:
            assert Path(config.data.train[0].path).is_file()
            rows = [{"step": s, "num_tokens": 100 * s} for s in range(1, 9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for kind in ("export", "checkpoints"):
            (run / kind / f"step-{rows[-1]['step']:06d}").mkdir(parents=True)

    def _evaluate(self, config: EvalConfig, run: Path) -> None:
        assert config.model.path == RAW["model"]["path"] or Path(config.model.path).is_dir()
        rng = np.random.default_rng(zlib.crc32(config.run.name.encode()))
        sides = ["policy"] if config.base.path is None else ["policy", "base"]
        count = len(prompts()[1]) * config.eval.num_samples
        table = {
            "model": [side for side in sides for _ in range(count)],
            "completion_ids": [list(range(int(rng.integers(1, 8)))) for _ in range(count * len(sides))],
            "reward": rng.integers(0, 2, count * len(sides)).astype(float),
        }
        for name in config.reward_names:
            table[f"rewards/{name}"] = rng.random(count * len(sides)) / 2
        if len(sides) == 2:
            table["policy_logprobs"] = [[-1.0, -1.0]] * count + [None] * count
            table["base_logprobs"] = [[-1.125, -1.125]] * count + [None] * count
        pq.write_table(pa.table(table), run / "samples.parquet")
        (run / "eval.json").write_text("{}")
