"""The recipe of every run of a comparison: raw sections, made of those that the comparison itself has.  Pure.

What an algorithm draws besides the answers that it trains on comes out of the same budget: ReMax's greedy completion
takes the place of one sample, DAPO starts from half the prompts and may drop as many.  All have the task's reward:
DAPO's punishment of long answers is measured and weighs nothing, for where answers are short it would be another task.
May import: actors.settings, launch.{compare_config, compare_methods, config, label_config,
preset_values}, trainers.presets.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from actors.settings import ModelSettings
from launch.compare_config import CompareConfig
from launch.compare_methods import Method
from launch.config import RunConfig
from launch.label_config import LabelJudgeSettings
from launch.preset_values import punishment
from trainers.presets import PRESETS

Raw = dict[str, Any]
TRAIN, HELD_OUT = "data/train.jsonl", "data/held-out.jsonl"
SCORERS = ("rewards", "reward_models", "judges")
DEFAULT_EPOCHS = 1.0  # passes of offline methods over what was labelled


def label_name(seed: int) -> str:
    """The labelling run that all offline methods of ``seed`` learn from."""
    return f"label-seed-{seed}"


def rows_path(folder: Path, method: Method, seed: int) -> Path:
    """What an offline method learns from."""
    if method.is_labelled:
        return folder / "data" / f"labelled-seed-{seed}.jsonl"
    return folder / label_name(seed) / "preferences.parquet"


class Recipes:
    """Raw recipes of one comparison, whose files lie in ``folder`` (absolute)."""

    def __init__(self, config: CompareConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._given: Raw = config.model_dump(mode="json", exclude_unset=True)
        self._shown = {k: v for k, v in self._given["prompts"].items() if k not in ("train", "eval")}

    def label(self) -> Raw:
        """Sample the base model and rank its answers by the task's reward."""
        compare, sampling = self._config.compare, self._config.generator.sampling
        raw = self._untrained("reward_workers", "cluster")
        generator = self._sections("generator").get("generator", {})
        generator.pop("sampling", None)
        drawn = {
            "num_candidates": compare.samples_per_prompt, "temperatures": [sampling.temperature],
            "max_tokens": sampling.max_tokens, "stop": list(sampling.stop),
        }  # fmt: skip
        return {
            "run": self._run(label_name(0)) | {"num_prompts": compare.budget // compare.samples_per_prompt},
            **raw,
            "prompts": self._prompts(TRAIN),
            "sampling": drawn,
            "label": self._labeller(),
            "keep": {"pairs": "all"},
            "output": {"rows": "rankings"},
            "generator": generator,
        }

    def evaluation(self) -> Raw:
        """A policy against the base model on held-out prompts."""
        compare = self._config.compare
        base = self._sections("reference").get("reference", {})
        base.pop("source", None)
        if "logprob_chunk" in self._config.learner.model_fields_set:
            base["logprob_chunk"] = self._config.learner.logprob_chunk
        asked: Raw = {"num_samples": compare.eval_samples}
        if compare.eval_prompts is not None:
            asked["num_prompts"] = compare.eval_prompts
        return {
            "run": self._run("eval", seed=self._config.run.seed),
            **self._untrained(*SCORERS, "generator", "reward_workers", "telemetry", "cluster"),
            "base": {**base, "path": self._config.model.path},
            "prompts": self._prompts(HELD_OUT),
            "eval": asked,
        }

    def training(self, method: Method) -> Raw:
        """Of an offline or online method; ``run.num_steps`` of an online one is not known yet."""
        name = f"{method.name}-seed-0"
        ends = {"evaluation": {"every": 0}, "checkpoint": {"every": 0, "keep": 1}}
        compare, shared = self._config.compare, self._sections("model", "learner", "telemetry", "cluster")
        if method.kind == "offline":
            answers = compare.samples_per_prompt if method.is_labelled else 1
            run = {"num_epochs": DEFAULT_EPOCHS, "batch_size": compare.groups_per_step * answers}
            rows = {"name": "labelled", "path": str(rows_path(self._folder, method, 0))}
            form = {k: v for k, v in self._shown.items() if k != "shuffle"}
            reference = self._reference() if method.has_reference else {}
            algorithm = dict(method.algorithm)
            # One cache for all would let the first algorithm pay for the others; with an adapter there is none.
            if method.has_reference and not self._is_own_reference:
                algorithm["reference_cache"] = str(self._folder / "reference-logprobs" / method.name)
            return {
                "run": self._run(name) | run, **shared, "data": {"train": [rows], "format": form},
                "algorithm": algorithm, **reference, **ends,
            }  # fmt: skip
        preset = PRESETS[method.name]
        groups, samples = compare.groups_per_step, compare.samples_per_prompt
        filtering: Raw = {}
        if preset.filtering and groups % 2 == 0:
            groups, filtering = groups // 2, {"filtering": {"max_refills": 1}}
        if preset.algorithm.get("baseline") == "greedy":
            samples -= 1
        run = {"num_steps": 1, "groups_per_step": groups, "samples_per_prompt": samples}
        own = self._sections("critic") if method.name == "ppo" else {}
        sections = self._sections(*SCORERS, "generator", "reward_workers", "push") | self._reference()
        if preset.overlong_share:
            measured = punishment(self._config.generator.sampling.max_tokens, preset.overlong_share)
            sections["rewards"] = [*sections.get("rewards", []), measured | {"weight": 0.0}]
        return {
            "run": self._run(name) | run, **shared, "prompts": self._prompts(TRAIN),
            "algorithm": dict(method.algorithm), **filtering,
            **sections, **own, **ends,
        }  # fmt: skip

    def _run(self, name: str, seed: int = 0) -> Raw:
        return {"name": name, "directory": str(self._folder), "seed": seed}

    def _untrained(self, *names: str) -> Raw:
        """Sections of a run that trains nothing, and the model without what is said of its training."""
        found = self._sections("model", *names)
        found["model"] = {key: value for key, value in found["model"].items() if key in ModelSettings.model_fields}
        return found

    def _labeller(self) -> Raw:
        """The one scorer that weighs (:class:`CompareConfig` lets no second one pass), as a labelling run has it."""
        for model, settings in zip(self._given.get("reward_models", ()), self._config.reward_models, strict=True):
            if settings.weight:
                return {"source": "reward_model", "reward_model": copy.deepcopy(model)}
        for judge, asked in zip(self._given.get("judges", ()), self._config.judges, strict=True):
            if asked.weight:
                own = {key: value for key, value in judge.items() if key in LabelJudgeSettings.model_fields}
                own["rubric"] = asked.rubric.model_dump(mode="json")  # without one a labelling run compares pairs
                return {"source": "judge", "judge": copy.deepcopy(own) | {"max_tokens": asked.max_tokens}}
        return {"source": "function", **self._sections("rewards")}

    @property
    def _is_own_reference(self) -> bool:
        return self._config.model.lora is not None and self._config.reference.source != "actor"

    def _reference(self) -> Raw:
        """The section, where there are workers for it: with an adapter the learner is its own reference."""
        return {} if self._is_own_reference else self._sections("reference")

    def _prompts(self, file: str) -> Raw:
        return {**self._shown, "train": {"path": str(self._folder / file)}}

    def _sections(self, *names: str) -> Raw:
        """Those of the comparison that are set, as copies."""
        return {name: copy.deepcopy(self._given[name]) for name in names if name in self._given}


def drawn_per_step(config: RunConfig) -> int:
    """Answers that one step may sample and label, at most."""
    groups = config.run.groups_per_step
    if config.filtering.zero_variance:
        groups *= 1 + config.filtering.max_refills
    return groups * (config.run.samples_per_prompt + config.algorithm.needs_greedy)
