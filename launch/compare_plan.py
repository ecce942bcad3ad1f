"""What a comparison runs, in its order: each stage one `burnish` command, every configuration checked before the first.

    base   best-of-n   per seed: label (all offline methods) -> train, evaluate (each method)

May import: launch.*, trainers.{errors, preference_training, presets}.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare_config import CompareConfig
from launch.compare_methods import BEST_OF_N, WEIGHTS, Method
from launch.compare_recipes import Raw, Recipes, drawn_per_step, label_name, rows_path
from launch.overrides import resolve
from launch.tuning_config import TuningConfig
from trainers.errors import InputError
from trainers.preference_training import PreferenceSettings
from trainers.presets import PRESETS

BASE, BEST = "base", "best-of-n"  # evaluations of the base model


@dataclass(frozen=True, slots=True)
class Stage:
    """One command, and what has to be there before."""

    name: str  # of its run folder
    command: str  # train, label or eval
    recipe: str  # a key of Plan.recipes
    overrides: tuple[str, ...]
    result: str  # what it leaves, a glob below the comparison's folder
    after: tuple[str, ...] = ()  # names of stages
    evaluates: str | None = None  # the stage whose model it judges


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison whose every run has a valid configuration."""

    stages: tuple[Stage, ...]
    recipes: Mapping[str, Raw]
    settings: Mapping[str, dict[str, Any]]  # method -> what its row says of how it was run

    def by_name(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def run_name(method: Method, seed: int) -> str:
    """The training run of a method; its evaluation has ``-eval`` behind it."""
    return f"{method.name}-seed-{seed}"


def make_plan(config: CompareConfig, folder: Path) -> Plan:
    """Everything that will run below ``folder`` (absolute).

    Raises:
        InputError: a run would have no valid configuration, or its steps do not come out even with the budget.
    """
    made, compare = Recipes(config, folder), config.compare
    recipes: dict[str, Raw] = {"eval": made.evaluation()}
    _checked("eval", recipes["eval"], config.compare.own("eval"))
    trained = [method for method in config.methods if method.kind != "search"]
    if any(method.kind == "offline" for method in trained):
        recipes["label"] = made.label()
        _checked("label", recipes["label"], config.compare.own("label"))
    settings: dict[str, dict[str, Any]] = {}
    for method in trained:
        recipes[method.name] = raw = made.training(method)
        checked = _checked(method.name, raw, compare.of(method))
        own = compare.of(method)
        if method.kind == "online":
            said = _of_online(method, checked, config)
            raw["run"]["num_steps"] = said["steps"]
        else:
            said = _of_offline(checked)
        if method.is_labelled and not any(key in own for key in WEIGHTS):
            said["strength"] = f"{_beta(checked)}; good and bad answers weigh alike as a whole"
        settings[method.name] = said | {"besides": own}
    stages = [_evaluation(BASE, None, "base.path=null")]
    if BEST_OF_N in compare.algorithms:
        most = compare.eval_samples * (1 + max(compare.best_of))
        stages.append(_evaluation(BEST, None, "base.path=null", f"eval.num_samples={most}"))
    for seed in compare.seeds:
        stages += _of_seed(trained, seed, folder)
    for stage in stages:
        _checked(stage.recipe, copy.deepcopy(recipes[stage.recipe]), {}, stage.overrides)
    return Plan(tuple(stages), recipes, settings)


def _of_seed(trained: list[Method], seed: int, folder: Path) -> list[Stage]:
    stages = []
    if any(method.kind == "offline" for method in trained):
        name = label_name(seed)
        named = (f"run.name={name}", f"run.seed={seed}")
        stages.append(Stage(name, "label", "label", named, f"{name}/preferences.parquet"))
    for method in trained:
        name, after = run_name(method, seed), tuple[str, ...]()
        own: tuple[str, ...] = (f"run.name={name}", f"run.seed={seed}")
        if method.kind == "offline":
            after = (label_name(seed),)
            own = (*own, f"data.train.0.path={json.dumps(str(rows_path(folder, method, seed)))}")
        stages.append(Stage(name, "train", method.name, own, f"{name}/export/step-*", after))
        stages.append(_evaluation(f"{name}-eval", name))
    return stages


def _evaluation(name: str, of: str | None, *overrides: str) -> Stage:
    after = () if of is None else (of,)
    return Stage(name, "eval", "eval", (f"run.name={name}", *overrides), f"{name}/eval.json", after, of)


def _checked(name: str, raw: Raw, keys: Mapping[str, Any], overrides: tuple[str, ...] = ()) -> Any:
    """The configuration of ``raw``, in which ``keys`` are set."""
    written = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    try:
        return resolve(raw, [*written, *overrides], f"recipes/{name}.yaml").config
    except InputError as error:
        reason = f"{error.reason} (in the recipe of {name})"
        raise InputError(error.field, error.value, reason, error.remedy) from error


def _beta(config: TuningConfig) -> str:
    assert isinstance(config.algorithm, PreferenceSettings)
    return f"beta {config.algorithm.option('beta'):g}"


def _of_offline(config: TuningConfig) -> dict[str, Any]:
    algorithm = config.algorithm
    assert isinstance(algorithm, PreferenceSettings)
    strength = ", ".join(f"{key} {algorithm.option(key):g}" for key in algorithm.kind.defaults)
    return {
        "lr": config.learner.optimizer.lr,
        "passes": config.run.num_epochs,
        "length": f"passes: {config.run.num_epochs:g}, in batches of {config.run.batch_size}",
        "strength": strength,
    }


def _of_online(method: Method, config: Any, comparison: CompareConfig) -> dict[str, Any]:
    """Its steps are as many as the budget surely lasts for."""
    budget, cost, run = comparison.compare.budget, drawn_per_step(config), config.run
    if budget % cost:
        reason = f"one step of {method.name} may sample and label {cost} answers, which does not go into it"
        if config.filtering.zero_variance:
            reason += f" (filtering.max_refills={config.filtering.max_refills})"
        near = max(budget // cost, 1) * cost
        remedy = f"use for instance {near}, or change compare.overrides.{method.name}"
        raise InputError("compare.budget", budget, reason, remedy)
    steps, updates = budget // cost, config.algorithm.num_updates
    more = " and a greedy one" if config.algorithm.needs_greedy else ""
    strength = f"kl_coef {config.algorithm.kl_coef:g}"
    if PRESETS[method.name].overlong_share:
        strength += "; long answers are not punished: the reward is the task's"
    return {
        "lr": config.learner.optimizer.lr,
        "steps": steps,
        "passes": float(config.algorithm.num_epochs),
        "updates": updates,
        "warmup": config.algorithm.ppo.value_warmup_steps if config.algorithm.needs_critic else 0,
        "length": f"{steps} steps of {run.groups_per_step} x {run.samples_per_prompt}{more}, "
        f"{updates} update{'s' * (updates > 1)} each",
        "strength": strength,
        "per_prompt": run.samples_per_prompt + int(config.algorithm.needs_greedy),
    }
