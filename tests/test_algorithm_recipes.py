"""Every algorithm has a shipped recipe for two cores and one for 8 GPUs, valid as a whole with its name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from launch.compare_config import CompareConfig
from launch.compare_methods import DEFAULTS, METHODS
from launch.compare_plan import make_plan
from launch.config import RunConfig
from launch.demands import num_gpus_asked
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.overrides import load_config, resolve
from launch.tuning_config import TuningConfig
from launch.tuning_place import demands, reference_demands
from trainers.preference_training import LOSSES, LossName
from trainers.presets import PRESETS

KTO = ("data.train.0.function=trainers.planted_pairs:labelled_rows",
       "data.eval.function=trainers.planted_pairs:labelled_rows")  # fmt: skip
SMOOTHED = ("algorithm.label_smoothing=0.1",)


def offline(loss: str) -> tuple[str, ...]:
    """What a loss needs besides its name, as the first lines of the recipes say."""
    return (f"algorithm.loss={loss}", *(SMOOTHED if loss == "robust" else ()))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["cpu-two-by-two", "cpu-demo"])
def test_every_policy_gradient_algorithm_runs_from_a_cpu_recipe_by_its_name(recipe: str, name: str) -> None:
    config = load_config(recipe, [f"algorithm.name={name}"]).config
    assert isinstance(config, RunConfig) and config.algorithm.name == name and config.cluster.device == "cpu"


@pytest.mark.parametrize("name", PRESETS)
def test_every_policy_gradient_algorithm_fits_the_8_gpus_of_a_recipe(name: str) -> None:
    recipe = {"ppo": "gpu-8x-ppo", "online_dpo": "gpu-8x-online-dpo"}.get(name, "gpu-8x-dapo")
    config = load_config(recipe, [f"algorithm.name={name}"]).config
    assert config.algorithm.name == name and config.cluster.device == "cuda"
    assert num_gpus_asked(config) == 8


@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_preference_loss_runs_from_the_cpu_recipe_by_its_name(loss: str) -> None:
    config = load_config("cpu-dpo", [*offline(loss), *(KTO if loss == "kto" else ())]).config
    assert isinstance(config, TuningConfig) and config.algorithm.loss == loss  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_preference_loss_fits_the_8_gpus_of_the_recipe(loss: str) -> None:
    own = () if LOSSES[loss].has_reference else ("reference=null",)  # type: ignore[index]
    config = load_config("gpu-8x-dpo", [*offline(loss), *own]).config
    assert config.algorithm.loss == loss
    asked = [d.num_workers * d.gpus_per_worker for d in (*demands(config, True), *reference_demands(config, True))]
    assert set(asked) == {8}, "the ranks, and before them the reference"


def test_conservative_dpo_is_dpo_with_label_smoothing() -> None:
    for recipe in ("cpu-dpo", "gpu-8x-dpo"):
        assert load_config(recipe, [*SMOOTHED]).config.algorithm.label_smoothing == 0.1


# --- the comparison -------------------------------------------------------------------------------


def planned(recipe: str, names: tuple[str, ...]) -> tuple[CompareConfig, dict[str, Any]]:
    """The comparison of ``names``, and the whole configuration of each of its runs by name."""
    config = load_config(recipe, [f"compare.algorithms=[{', '.join(names)}]"]).config
    assert isinstance(config, CompareConfig)
    plan = make_plan(config, Path("/somewhere/compare"))
    raws = {name: dict(raw) for name, raw in plan.recipes.items()}
    return config, {s.name: resolve(raws[s.recipe], s.overrides, s.name).config for s in plan.stages}


@pytest.mark.parametrize("recipe", ["cpu-compare", "gpu-8x-compare"])
def test_the_shipped_comparisons_are_of_the_default_algorithms_and_hold_for_all(recipe: str) -> None:
    config = load_config(recipe).config
    assert config.compare.algorithms == DEFAULTS and len(config.compare.seeds) > 1
    _, found = planned(recipe, tuple(METHODS))
    assert sum(isinstance(c, RunConfig) for c in found.values()) == len(PRESETS) * len(config.compare.seeds)
    assert any(isinstance(c, LabelConfig) for c in found.values())
    assert any(isinstance(c, EvalConfig) for c in found.values())


def test_every_run_of_the_gpu_comparison_uses_the_8_gpus_it_has() -> None:
    _, found = planned("gpu-8x-compare", tuple(METHODS))
    for name, config in found.items():
        if isinstance(config, RunConfig):
            assert num_gpus_asked(config) == 8, name
        elif isinstance(config, TuningConfig):
            asked = [d.num_workers for d in (*demands(config, True), *reference_demands(config, True))]
            assert set(asked) == {8}, name
        else:
            assert config.generator.num_workers == 8, name


def test_several_updates_a_batch_tell_gspo_and_cispo_from_grpo() -> None:
    for recipe in ("cpu-compare", "gpu-8x-compare"):
        _, found = planned(recipe, ("grpo", "gspo", "cispo"))
        assert all(c.algorithm.num_updates > 1 for c in found.values() if isinstance(c, RunConfig))
