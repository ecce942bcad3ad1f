"""Laws of configuration: every value has an origin, every refusal names key, value and remedy."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from launch.config import RunConfig
from launch.config_keys import all_keys, dotted, slot_at
from launch.label_config import LabelConfig
from launch.overrides import dump_yaml, leaves, load_config, print_config
from launch.recipe_files import list_recipes, parse_yaml
from launch.redaction import REDACTED, redact
from launch.revise_config import ReviseConfig
from launch.select_config import SelectConfig
from trainers.errors import InputError


def refuse(*overrides: str, recipe: str = "cpu-demo") -> InputError:
    with pytest.raises(InputError) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", list_recipes())
def test_a_resolved_configuration_loads_again_as_an_equal_one(name: str, tmp_path: Path) -> None:
    awkward = [
        'prompts.template="Q: {prompt}\\n\\té # no comment \\U0001F600"',
        "prompts.system=- yes: no",
        'generator.sampling.stop=["\\n", "a, b", "[x]", "null", "1e5", "", "# no", "é"]',
        "generator.engine_args={a: [1, {b: 1e-9, '': null}], '7': 2024-01-01, 'x: y': 'on', empty: {}, none: []}",
        "telemetry.tags=['yes', 'no', '1']",
        "learner.optimizer.eps=1e-30",
        'data.format.template="Q: {prompt}\\n\\té # no comment"',
        "data.train.0.args={a: [1, {b: 1e-9, '': null}], '7': 2024-01-01, empty: {}, none: []}",
        "data.train.0.weights=[[0, 1.0], [1e-3, 2]]",
    ]
    kind = type(load_config(name).config)
    if kind in (LabelConfig, ReviseConfig, SelectConfig):  # they say elsewhere how they sample
        awkward = [o for o in awkward if not o.startswith("generator.sampling")]
    there = [o for o in awkward if slot_at(kind, tuple(o.partition("=")[0].split("."))) is not None]
    resolved = load_config(name, there)
    assert len(there) >= 3
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(resolved), encoding="utf-8")
    again = load_config(str(file))
    assert again.config == resolved.config
    assert dump_yaml(again).count("# recipe") == dump_yaml(resolved).count("  # ")


def test_every_leaf_has_the_origin_it_came_from() -> None:
    resolved = load_config("cpu-demo", ["run.seed=7", "learner.optimizer.betas.0=0.8", "prompts.eval.args={seed: 5}"])
    assert set(resolved.origins) == {dotted(key) for key, _ in leaves(resolved.config)}
    assert resolved.origins["run.seed"] == "command line"
    assert resolved.origins["learner.optimizer.betas"] == "command line"
    assert resolved.origins["prompts.eval.args.seed"] == "command line"
    assert resolved.origins["learner.optimizer.lr"] == "recipe cpu-demo.yaml"
    assert resolved.origins["rewards.0.args.dataset"] == "recipe cpu-demo.yaml"
    assert resolved.origins["learner.optimizer.eps"] == "default"
    assert resolved.config.learner.optimizer.betas == (0.8, 0.99)
    assert resolved.config.prompts.eval is not None and resolved.config.prompts.eval.args == {"seed": 5}


def test_later_overrides_win_and_list_items_can_be_changed_and_added() -> None:
    overrides = ["run.seed=1", "run.seed=2", "rewards.0.weight=3", "rewards.1={function: bare_number}"]
    config = load_config("cpu-demo", overrides).config
    assert config.run.seed == 2
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("accuracy", 3.0), ("bare_number", 1.0)]


def test_text_is_taken_as_written() -> None:
    overrides = ["run.name=007", "prompts.system=A: B", "prompts.template={prompt}", "telemetry.project='1'"]
    config = load_config("cpu-demo", overrides).config
    assert (config.run.name, config.prompts.system, config.prompts.template) == ("007", "A: B", "{prompt}")
    assert config.telemetry.project == "1"
    assert load_config("cpu-demo", ["prompts.system=null"]).config.prompts.system is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lerner.zero_stage", "learner.zero_stage"),
        ("learner.lr", "learner.optimizer.lr"),
        ("lr", "learner.optimizer.lr"),
        ("rewards.0.wieght", "rewards.0.weight"),
        ("generator.sampling.temprature", "generator.sampling.temperature"),
        ("algorithm.beta", "learner.optimizer.betas"),
        ("run.steps", "run.num_steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, nearest: str) -> None:
    error = refuse(f"{key}=1")
    assert error.field == key and error.remedy == f"the nearest one is {nearest}"


def test_an_unknown_key_of_a_recipe_comes_before_what_it_made_missing(tmp_path: Path) -> None:
    text = "run: {name: x, num_stepz: 3, groups_per_step: 1}\nmodel: {path: p}\n"
    (tmp_path / "r.yaml").write_text(text)
    error = refuse(recipe=str(tmp_path / "r.yaml"))
    assert error.field == "run.num_stepz" and "run.num_steps" in error.remedy
    assert "further error" in error.remedy


def test_the_nearest_key_to_every_existing_key_with_a_letter_lost_is_that_key() -> None:
    for key in all_keys(RunConfig):
        head, _, last = key.rpartition(".")
        if len(last) < 6 or slot_at(RunConfig, tuple(key.split("."))) is None:
            continue
        misspelt = f"{head}.{last[:3]}{last[4:]}".lstrip(".")
        if slot_at(RunConfig, tuple(misspelt.split("."))) is None:
            assert f"the nearest one is {key}" in refuse(f"{misspelt}=1").remedy


@pytest.mark.parametrize(
    ("override", "field", "value", "words"),
    [
        ("run.num_steps=many", "run.num_steps", "many", "a whole number, at least 1"),
        ("run.num_steps=0", "run.num_steps", 0, "at least 1"),
        ("learner.zero_stage=4", "learner.zero_stage", 4, "one of 0, 1, 2, 3"),
        ("model.dtype=fp8", "model.dtype", "fp8", "one of auto, float32, bfloat16"),
        ("checkpoint.export=perhaps", "checkpoint.export", "perhaps", "true or false"),
        ("generator.gpus_per_worker=x", "generator.gpus_per_worker", "x", "a number, at least 0, or null"),
        ("learner.optimizer=3", "learner.optimizer", 3, "a mapping"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(override: str, field: str, value: object, words: str) -> None:
    error = refuse(override)
    assert (error.field, error.value) == (field, value) and words in error.remedy


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("learner.offload_param=cpu", "learner.offload_param", "zero_stage=3"),
        ("generator.sampling.top_p=0.9", "generator.sampling.top_p", "use top_p=1.0"),
        ("algorithm.num_minibatches=3", "run.groups_per_step", "algorithm.num_minibatches"),
        ("prompts.train.path=x", "prompts.train", "exactly one of path and procedural"),
        ("prompts.eval=null", "prompts.eval", "evaluation.every=0"),
    ],
)
def test_sections_that_disagree_are_refused_in_one_line(override: str, field: str, words: str) -> None:
    error = refuse(override)
    assert words in str(error)
    if field != "prompts.eval":  # its message names the other section's key first
        assert error.field == field


def test_groups_of_equal_rewards_are_not_dropped_where_a_critic_is_the_baseline() -> None:
    error = refuse("filtering.zero_variance=true", recipe="cpu-ppo")
    assert error.field == "filtering.zero_variance" and "algorithm.name=ppo" in str(error)


def test_one_process_that_computes_one_thing_at_a_time_is_never_ahead() -> None:
    error = refuse("run.max_staleness=2", "cluster.backend=in_process")
    assert error.field == "run.max_staleness" and "cluster.backend=ray" in str(error)
    assert load_config("cpu-demo", ["run.max_staleness=2"]).config.run.max_staleness == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed", "dotted.key=value"),
        ("=1", "dotted.key=value"),
        ("rewards.3.weight=1", "1 items"),
        ("learner.token_budget=[", "not valid YAML"),
        ("run.seed.deep=1", "no such key"),
        ("run..seed=1", "no such key"),
    ],
)
def test_a_malformed_override_is_refused(override: str, words: str) -> None:
    assert words in str(refuse(override))


@pytest.mark.parametrize("text", ["", "- a\n", "run: [\n", "run: {seed: 1, seed: 2}\n"])
def test_a_recipe_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert refuse(recipe=str(tmp_path / "r.yaml")).field == "recipe"


def test_recipes_read_numbers_as_people_write_them() -> None:
    assert parse_yaml("{a: 1e-5, b: -1E+6, c: 2024-01-01, d: 1.5e3}") == {
        "a": 1e-5, "b": -1e6, "c": "2024-01-01", "d": 1500.0,
    }  # fmt: skip


def test_the_printed_configuration_shows_each_origin_and_is_the_dump() -> None:
    resolved = load_config("cpu-demo", ["run.seed=7"])
    out = io.StringIO()
    print_config(resolved, Console(file=out, width=60))
    assert re.search(r"seed: 7 +# command line", out.getvalue())
    assert parse_yaml(out.getvalue()) == parse_yaml(dump_yaml(resolved))


@pytest.mark.parametrize(
    "override",
    [
        "rewards.0.args={api_key: zq7}", "rewards.0.args={headers: {Authorization: Bearer zq7}}",
        "generator.engine_args={hf_token: zq7}", "prompts.train.args.db={password: zq7}",
        f"prompts.system=Use hf_{'q' * 30}", "rewards.0.args={places: [https://me:zq7@host/]}",
        "judges=[{endpoint: {base_url: http://h/v1, model: m, parameters: {api_key: zq7}}}]",
        "rewards.0.args={client-secret: zq7}", f"rewards.0.args={{judge: sk-{'q' * 30}}}",
    ],
)  # fmt: skip
def test_a_secret_is_refused_by_its_key_and_not_shown(override: str) -> None:
    refused = refuse(override)
    assert refused.field.startswith(override.partition("=")[0]) and refused.value == REDACTED
    assert "zq7" not in str(refused) and "qqq" not in str(refused) and "environment variable" in refused.remedy


def test_what_only_sounds_like_a_secret_is_no_secret() -> None:
    spared = {
        "api_key_env": "KEY", "key": "answer", "stop_token": "</s>", "hf_token": True, "tokenizer": "a/b",
        "api_key": None, "path": f"/hub/snapshots/{'0f' * 20}/model", "revision": "0f" * 20, "key_column": "id",
    }  # fmt: skip
    found = load_config("cpu-demo", [f"generator.engine_args={json.dumps(spared)}"]).config
    assert found.generator.engine_args == spared
    assert redact(spared)["path"] == spared["path"], "a commit in a path is no key"
