"""Laws of ``algorithm.name``: what it brings along, what wins over it, where that is shown, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from launch.config import RunConfig
from launch.loop_settings import loop_settings
from launch.overrides import dump_yaml, load_config
from launch.preset_values import with_preset
from launch.resuming import made_with
from trainers.algorithm_table import PAGE, renewed
from trainers.algorithms import AlgorithmSettings
from trainers.errors import InputError
from trainers.presets import PRESETS, Name, merged

ROOT = Path(__file__).parent.parent
RECIPE = "cpu-two-by-two"


def config(name: str, *overrides: str, recipe: str = RECIPE) -> RunConfig:
    return load_config(recipe, [f"algorithm.name={name}", *overrides]).config  # type: ignore[no-any-return]


def refuse(name: str, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        config(name, *overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def values_of(name: str) -> dict[str, Any]:
    """Dotted key -> value of everything that a preset has."""
    preset = PRESETS[name]
    found = {f"filtering.{key}": value for key, value in preset.filtering.items()}
    for key, value in preset.algorithm.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"algorithm.{key}.{below}".rstrip("."): v for below, v in nested}
    return found


def at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


# --- one value an algorithm -----------------------------------------------------------------------


def test_every_name_is_one_frozen_value_with_its_paper() -> None:
    assert list(PRESETS) == list(get_args(Name))
    for preset in PRESETS.values():
        year, dot, number = preset.paper.partition(".")
        assert dot and len(year) == 4 and len(number) == 5 and preset.definition and preset.title
        with pytest.raises(AttributeError):
            preset.paper = "0000.00000"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["grpo"]  # type: ignore[index]


def test_no_two_names_mean_the_same() -> None:
    seen = [
        AlgorithmSettings.model_validate({"name": name}).model_dump_json(exclude={"name"})
        + str((dict(preset.filtering), preset.overlong_share, preset.algorithm.get("baseline"), name == "ppo"))
        for name, preset in PRESETS.items()
    ]
    assert len(set(seen)) == len(PRESETS)


def test_the_defaults_are_grpos_and_a_preset_holds_only_what_differs() -> None:
    default = AlgorithmSettings()
    assert default.name == "grpo" and not PRESETS["grpo"].algorithm
    for name in PRESETS:
        for key, value in values_of(name).items():
            root = {"algorithm": default, "filtering": RunConfig.model_fields["filtering"].default}
            section, _, rest = key.partition(".")
            assert at(root[section], rest) != value, f"{name}: {key} is the default"


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_has_the_values_of_its_algorithm_and_says_where_they_are_from(name: str) -> None:
    resolved = load_config(RECIPE, [f"algorithm.name={name}"])
    for key, value in values_of(name).items():
        assert at(resolved.config, key) == value
        assert resolved.origins[key] == f"preset {name}"
    assert resolved.origins["algorithm.entropy_coef"] == "default"
    assert resolved.origins["algorithm.name"] == "command line"
    shown = [line for line in dump_yaml(resolved).splitlines() if line.endswith(f"# preset {name}")]
    assert len(shown) == sum(origin == f"preset {name}" for origin in resolved.origins.values())


@pytest.mark.parametrize("name", PRESETS)
def test_no_name_starts_a_reference_by_itself_but_the_one_whose_loss_is_made_of_it(name: str) -> None:
    assert config(name).algorithm.needs_reference == (name == "online_dpo")


@pytest.mark.parametrize("name", PRESETS)
def test_the_resolved_configuration_of_every_algorithm_loads_again_as_an_equal_one(name: str, tmp_path: Path) -> None:
    resolved = load_config(RECIPE, [f"algorithm.name={name}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(resolved), encoding="utf-8")
    again = load_config(str(tmp_path / "config.yaml"))
    assert again.config == resolved.config
    assert not [key for key, origin in again.origins.items() if origin.startswith("preset")]
    assert RunConfig.model_validate(resolved.config.model_dump()) == resolved.config


# --- what the recipe says wins ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "override", "key", "value"),
    [
        ("dr_grpo", "algorithm.aggregation=sequence", "algorithm.aggregation", "sequence"),
        ("dapo", "algorithm.clip_high=0.2", "algorithm.clip_high", 0.2),
        ("dapo", "filtering.zero_variance=false", "filtering.zero_variance", False),
        ("gspo", "algorithm.ratio=sequence_token", "algorithm.ratio", "sequence_token"),
        ("cispo", "algorithm.correction.cap=3", "algorithm.correction.cap", 3.0),
        ("remax", "algorithm.baseline=group_mean", "algorithm.baseline", "group_mean"),
        ("ppo", "algorithm.kl_placement=loss", "algorithm.kl_placement", "loss"),
    ],
)
def test_a_key_that_is_set_wins_over_the_name_and_the_others_stay(
    name: str, override: str, key: str, value: Any
) -> None:
    resolved = load_config(RECIPE, [f"algorithm.name={name}", override])
    assert at(resolved.config, key) == value and resolved.origins[key] == "command line"
    for other, expected in values_of(name).items():
        if other != key:
            assert at(resolved.config, other) == expected


def test_a_recipe_that_sets_a_key_wins_as_the_command_line_does() -> None:
    resolved = load_config("cpu-ppo", ["algorithm.name=rloo", "algorithm.ppo={}"])
    assert resolved.config.algorithm.aggregation == "token" and resolved.config.algorithm.baseline == "leave_one_out"
    assert resolved.origins["algorithm.aggregation"] == "recipe cpu-ppo.yaml"
    assert resolved.origins["algorithm.baseline"] == "preset rloo"


def test_with_its_switch_turned_nothing_is_left_of_a_section() -> None:
    """Else the cap of a correction that is off would be refused, and nobody set it."""
    chosen = config("cispo", "algorithm.correction.kind=none").algorithm.correction
    assert (chosen.kind, chosen.cap) == ("none", 2.0)
    preset = {"s": {"kind": "a", "x": 2}}
    assert merged({"s": {"kind": "a", "own": 1}}, preset) == {"s": {"kind": "a", "own": 1, "x": 2}}
    assert merged({"s": {"kind": "b"}}, preset) == {"s": {"kind": "b"}}
    assert merged({"s": None}, {"s": {"kind": "a"}}) == {"s": None}


# --- DAPO's other sections -------------------------------------------------------------------------


def test_dapo_punishes_the_last_fifth_of_max_tokens_and_leaves_accuracy_what_it_was() -> None:
    found = config("dapo", "generator.sampling.max_tokens=100")
    assert [(r.name, r.function, r.weight, r.args) for r in found.rewards[1:]] == [
        ("overlong", "length", 1.0, {"max_tokens": 100, "buffer_tokens": 20})
    ]
    assert found.evaluation.reward is None and found.reward_names[0] == "has_letter"


def test_dapo_beside_reward_models_alone_does_not_take_the_punishment_for_accuracy() -> None:
    models = "reward_models=[{name: taste, path: /models/taste}]"
    found = config("dapo", "rewards=[]", models)
    assert found.reward_names == ["overlong", "taste"] and found.evaluation.reward == "taste"
    assert config("dapo", "rewards=[]", models, "evaluation.reward=overlong").evaluation.reward == "overlong"


JUDGE = "{path: /models/judge}"
AXES = "{path: /models/judge, name: mine, rubric: {axes: [{name: kind, question: '?'}]}}"


@pytest.mark.parametrize(
    ("judge", "part", "by"), [(JUDGE, "judge_helpful", None), (AXES, "mine_kind", "mine_kind")]
)
def test_dapo_beside_judges_alone_punishes_too_and_takes_their_first_axis_for_accuracy(
    judge: str, part: str, by: str | None
) -> None:
    found = config("dapo", "rewards=[]", f"judges=[{judge}]")
    assert found.reward_names[:2] == ["overlong", part]
    assert found.evaluation.reward == part and found.filtering.by == by, "three axes: none alone is what was right"


def test_dapo_compares_groups_by_accuracy_where_it_adds_its_punishment_unless_told_otherwise() -> None:
    assert config("dapo").filtering.by == "has_letter"
    assert config("dapo", "rewards=[{function: trainers.verifiers:has_letter, args: {letter: e}}]").filtering.by == (
        "has_letter"
    )
    measured = "rewards=[{function: bare_number, weight: 0}, {function: has_letter, args: {letter: e}}]"
    assert config("dapo", measured).filtering.by == "has_letter", "what weighs"
    assert config("dapo", measured.replace("weight: 0", "weight: 1")).filtering.by is None, "several weigh"
    assert config("dapo", "filtering.by=overlong").filtering.by == "overlong"
    assert config("dapo", "filtering.by=null").filtering.by is None
    assert config("grpo").filtering.by is None
    assert "none of the rewards" in str(refuse("dapo", "filtering.by=accuracy"))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_length_reward_of_the_recipe_takes_the_place_of_dapos(weight: float) -> None:
    own = f"rewards.1={{function: length, weight: {weight}, args: {{max_tokens: 16, buffer_tokens: 8}}}}"
    found = config("dapo", own)
    assert [(r.name, r.weight) for r in found.rewards[1:]] == [("length", weight)]


def test_nothing_is_learned_from_a_punishment_alone() -> None:
    assert "rewards is empty" in str(refuse("dapo", "rewards=[]"))


def test_what_is_malformed_is_left_to_the_checks_that_name_it() -> None:
    assert refuse("dapo", "generator.sampling.max_tokens=many").field == "generator.sampling.max_tokens"
    assert refuse("dapo", "filtering=3").field == "filtering"
    for raw in ({"algorithm": 3}, {"algorithm": {"name": []}}, {"algorithm": {"name": "dapo"}, "rewards": "x"}):
        assert with_preset(raw).get("rewards") == raw.get("rewards")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "override", "field", "words"),
    [
        ("gspo", "algorithm.ppo.gamma=0.9", "algorithm.ppo.gamma", "name=gspo, which has no critic"),
        ("grpo", "algorithm.ppo.reward_shaping.clip=5", "algorithm.ppo.reward_shaping", "set name=ppo"),
        ("ppo", "algorithm.baseline=greedy", "algorithm.baseline", "the critic is the baseline"),
        ("ppo", "algorithm.scale=none", "algorithm.scale", "the critic is the baseline"),
        ("cispo", "algorithm.clip_high=0.28", "algorithm.clip_high", "correction.kind=cispo"),
        ("cispo", "algorithm.ratio=sequence", "algorithm.ratio", "correction.kind=cispo"),
        ("grpo", "algorithm.baseline=greedy", "algorithm.scale", "baseline=greedy compares with no group"),
        ("remax", "algorithm.scale=std", "algorithm.scale", "use scale=batch or scale=none"),
        ("reinforce_plus_plus", "algorithm.scale=std", "algorithm.scale", "baseline=none"),
        ("remax", "filtering.zero_variance=true", "filtering.zero_variance", "algorithm.baseline=greedy"),
        ("reinforce_plus_plus", "filtering.zero_variance=true", "filtering.zero_variance", "algorithm.baseline=none"),
        ("rloo", "run.samples_per_prompt=1", "run.samples_per_prompt", "at least 2"),
        ("dapo", "run.samples_per_prompt=1", "run.samples_per_prompt", "at least 2"),
        ("gspo", "algorithm.ratio=word", "algorithm.ratio", "one of token, sequence, sequence_token"),
    ],
)
def test_a_key_that_means_nothing_with_the_algorithm_is_refused(
    name: str, override: str, field: str, words: str
) -> None:
    error = refuse(name, override)
    assert error.field == field and words in str(error)


def test_k1_that_a_name_brought_along_is_refused_in_the_loss() -> None:
    assert "kl_placement=reward" in str(refuse("remax", "algorithm.kl_coef=0.1", "algorithm.kl_placement=loss"))


def test_an_unknown_algorithm_is_refused_with_those_there_are() -> None:
    error = refuse("reinforce++")
    assert error.field == "algorithm.name" and "reinforce_plus_plus, reinforce_plus_plus_baseline" in error.remedy
    with pytest.raises(ValidationError):
        AlgorithmSettings.model_validate({"name": "reinforce++"})


@pytest.mark.parametrize("name", ["remax", "reinforce_plus_plus", "ppo"])
def test_one_sample_a_prompt_is_enough_where_no_group_is_the_baseline(name: str) -> None:
    assert config(name, "run.samples_per_prompt=1").algorithm.name == name


# --- what follows from it --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_only_remax_asks_for_a_greedy_completion(name: str) -> None:
    assert loop_settings(config(name)).greedy_baseline == (name == "remax")


def test_finished_groups_without_a_greedy_reward_are_no_use_to_remax() -> None:
    assert made_with(config("grpo")) == made_with(config("rloo")) != made_with(config("remax"))


def test_the_table_in_the_documentation_is_the_generated_one() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == renewed(page), "run: python -m trainers.algorithm_table"
    with pytest.raises(ValueError, match="needs the lines"):
        renewed("# Algorithms\n")


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_shows_what_a_run_would_have(name: str) -> None:
    (row,) = [line for line in (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
              if line.startswith(f"| `{name}` |") and "arxiv" not in line]  # fmt: skip
    chosen = config(name).algorithm
    if chosen.learns_from_pairs:
        assert f"beta {chosen.kl_coef:g}" in row and "pairs" in row
        return
    if chosen.correction.kind == "cispo":
        assert f"weight at most {chosen.correction.cap:g}" in row
    else:
        assert f"{chosen.clip_low:g} / {chosen.clip_high:g}" in row
    assert f"in the {chosen.kl_placement}, {chosen.kl_estimator}" in row
    assert ("greedy" in row) == chosen.needs_greedy and ("critic" in row) == chosen.needs_critic
