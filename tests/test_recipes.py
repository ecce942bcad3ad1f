"""Every shipped recipe is a complete, valid run; every job template is well-formed."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.errors import ShortfallError
from cluster.layout import NodeSupply
from launch.compare_config import CompareConfig
from launch.config import RunConfig
from launch.datasets import load_rows, prompt_key
from launch.eval_config import EvalConfig
from launch.label_config import LabelConfig
from launch.overrides import load_config
from launch.prepare import prompt_room
from launch.recipe_files import copy_recipe, describe_recipe, list_recipes, read_recipe
from launch.revise_config import ReviseConfig
from launch.select_config import SelectConfig
from launch.stage_demands import num_gpus, plan_stages, stage_demands
from launch.tuning_config import TuningConfig
from trainers.errors import InputError

ROOT = Path(__file__).parent.parent
STEPS = ("sft", "label", "reward", "ppo", "eval")
KINDS = (RunConfig, TuningConfig, LabelConfig, EvalConfig, ReviseConfig, SelectConfig, CompareConfig)
GPU_RECIPES = [name for name in list_recipes() if name.startswith("gpu-")]
PIPELINE = "cpu-pipeline-"  # these name files that earlier steps of the pipeline write


def has_its_prompts(name: str) -> bool:
    """Whether a recipe draws prompts that need no file; the others learn from files, label or evaluate."""
    return isinstance(load_config(name).config, RunConfig) and not name.startswith(PIPELINE)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_complete_and_says_what_it_is_for(name: str) -> None:
    resolved = load_config(name)
    assert isinstance(resolved.config, KINDS)
    assert resolved.config.run.name == name.removeprefix(PIPELINE)
    assert (resolved.config.run.directory == "runs/pipeline") == name.startswith(PIPELINE)
    assert 20 < len(describe_recipe(name)) < 200


@pytest.mark.parametrize("name", [n for n in list_recipes() if isinstance(load_config(n).config, RunConfig)])
def test_every_recipe_that_samples_leaves_room_for_a_prompt_in_each_model_that_it_has(name: str) -> None:
    assert prompt_room(load_config(name).config) >= 128


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("reference.token_budget=64", "algorithm.kl_coef=0.05"), "reference.token_budget"),
        (("critic.token_budget=64", "algorithm.name=ppo"), "critic.token_budget"),
        (("learner.token_budget=64", "generator.sampling.max_tokens=64"), "learner.token_budget"),
    ],
)
def test_a_model_whose_micro_batch_holds_no_prompt_is_named_and_one_that_is_not_there_is_not(
    overrides: tuple[str, ...], field: str
) -> None:
    longest = ("generator.sampling.max_tokens=100", "learner.token_budget=300", *overrides)
    with pytest.raises(InputError, match=f"{field} = 64") as caught:
        prompt_room(load_config("cpu-demo", longest).config)
    assert caught.value.field == field
    absent = (longest[0], longest[1], "reference.token_budget=64", "critic.token_budget=64", "algorithm.kl_coef=0")
    assert prompt_room(load_config("cpu-demo", absent).config) == 200


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("cpu-") and has_its_prompts(name)])
def test_a_cpu_recipe_has_enough_questions_to_train_on_and_to_hold_out(name: str) -> None:
    config = load_config(name).config
    assert config.prompts.eval is not None
    for seed in range(5):
        held_out = load_rows(config.prompts.eval, seed=seed, field="prompts.eval")
        keys = {prompt_key(row["prompt"]) for row in held_out}
        train = load_rows(config.prompts.train, seed=seed, field="prompts.train", exclude=keys)
        assert len(keys) == config.prompts.eval.size and len(train) == config.prompts.train.size
        assert not keys & {prompt_key(row["prompt"]) for row in train}


def test_the_format_trap_is_the_demo_with_one_more_reward() -> None:
    demo, trap = load_config("cpu-demo").config, load_config("cpu-format-trap").config
    assert trap.rewards[0] == demo.rewards[0]
    assert [(reward.name, reward.weight) for reward in trap.rewards[1:]] == [("format", 0.5)]
    same = {"run": demo.run, "rewards": demo.rewards, "evaluation": demo.evaluation, "checkpoint": demo.checkpoint}
    assert trap.model_copy(update=same) == demo


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_recipe_for_a_machine_without_a_gpu(kind: type) -> None:
    assert any(isinstance(load_config(name).config, kind) for name in list_recipes() if name.startswith("cpu-"))


def promised(name: str) -> int:
    """GPUs, by the name of the recipe."""
    return 32 if name == "gpu-multinode-grpo" else int(name.split("-")[1].removesuffix("x"))


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_a_gpu_recipe_asks_for_just_the_gpus_its_name_promises_and_has_a_place_for_each_worker(name: str) -> None:
    config = load_config(name).config
    nodes = [NodeSupply(f"node-{i}", 64, min(promised(name), 8)) for i in range(config.cluster.num_nodes or 1)]
    assert sum(node.num_gpus for node in nodes) == promised(name)
    assert num_gpus(stage_demands(config, True), config.cluster.colocate) == promised(name)
    assert plan_stages(config, nodes)
    with pytest.raises((ShortfallError, InputError), match=r"short|GPUs"):
        plan_stages(config, [replace(nodes[0], num_gpus=nodes[0].num_gpus - 1), *nodes[1:]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_recipe_for_eight_gpus(kind: type) -> None:
    assert any(isinstance(load_config(name).config, kind) for name in GPU_RECIPES if promised(name) == 8)


def test_the_recipes_of_the_pipeline_take_what_the_one_before_them_leaves() -> None:
    sft, label, reward, ppo, judge = (
        load_config(name).config for name in ("cpu-sft", *(f"{PIPELINE}{step}" for step in STEPS[1:]))
    )
    policy = f"runs/pipeline/sft/export/step-{sft.run.num_steps:06d}"
    assert [c.model.path for c in (label, reward, ppo)] == [policy] * 3 and judge.base.path == policy
    assert judge.model.path == f"runs/pipeline/ppo/export/step-{ppo.run.num_steps:06d}"
    assert judge.reward_models == ppo.reward_models
    assert reward.data.train[0].path == "runs/pipeline/label/preferences.parquet"
    assert f"cpu-sft/export/step-{sft.run.num_steps:06d}" in read_recipe("cpu-ppo")


def test_copying_a_recipe_never_overwrites(tmp_path: Path) -> None:
    target = copy_recipe("cpu-demo", tmp_path)
    assert target.read_text() == read_recipe("cpu-demo")
    with pytest.raises(InputError, match="exists already"):
        copy_recipe("cpu-demo", target)


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean cpu-demo"):
        load_config("cpu-dmeo")


def test_the_slurm_script_is_valid_bash_and_trains() -> None:
    script = ROOT / "launch" / "slurm" / "burnish.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "burnish train" in text and "ray status" in text


def test_the_ray_job_is_valid_yaml_and_trains() -> None:
    job = yaml.safe_load((ROOT / "launch" / "kubernetes" / "rayjob.yaml").read_text())
    assert job["kind"] == "RayJob"
    assert job["spec"]["entrypoint"].startswith("burnish train")
    nodes = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    images = {container["image"] for node in nodes for container in node["template"]["spec"]["containers"]}
    assert len(images) == 1, "every node must run one image"
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"]
    assert f"cluster.num_nodes={workers['replicas'] + 1}" in job["spec"]["entrypoint"]


@pytest.mark.parametrize("file", ["launch/slurm/burnish.sbatch", "launch/kubernetes/rayjob.yaml", "docker/Dockerfile"])
def test_a_ray_that_is_started_for_a_run_ends_the_engine_of_a_killed_generator(file: str) -> None:
    assert "RAY_process_group_cleanup_enabled" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_a_dockerfile_starts_from_an_image_and_runs_burnish(name: str) -> None:
    lines = (ROOT / "docker" / name).read_text().splitlines()
    instructions = [line.split()[0] for line in lines if line and line[0].isalpha()]
    assert instructions[0] in ("FROM", "ARG") and "FROM" in instructions
    assert any("burnish" in line for line in lines if line.startswith(("ENTRYPOINT", "CMD")))
