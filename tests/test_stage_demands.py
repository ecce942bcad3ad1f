"""What commands that train nothing ask of the machines is known, and refused, before their first worker."""

from __future__ import annotations

from typing import Any

import pytest
from stand_in import StandIn

from cluster.errors import ShortfallError
from cluster.layout import NodeSupply
from launch.cli import main
from launch.eval_config import EvalConfig
from launch.eval_fleet import GENERATOR, LOGPROBS, EvalCluster
from launch.overrides import load_config
from launch.stage_demands import num_gpus, num_workers, plan_stages, stage_demands

TINY = "builtin:tiny-llama"
EVAL: dict[str, Any] = {
    "run": {"name": "eval"}, "model": {"path": TINY}, "base": {"path": TINY, "num_workers": 2},
    "prompts": {"train": {"path": "/train.jsonl"}, "eval": {"path": "/eval.jsonl"}},
    "rewards": [{"function": "bare_number"}],
    "reward_models": [{"name": "one", "path": "/one", "num_workers": 3}],
    "judges": [{"path": TINY, "generator": {"tensor_parallel_size": 2, "num_workers": 2}}],
    "eval": {"win_by": "bare_number", "judge": {"path": TINY, "generator": {"tensor_parallel_size": 4}}},
    "generator": {"num_workers": 5, "gpus_per_worker": 0.5}, "cluster": {"backend": "in_process", "device": "cpu"},
}  # fmt: skip


def test_the_stages_of_an_evaluation_are_those_that_it_goes_through() -> None:
    config = EvalConfig.model_validate(EVAL)
    stages, cluster = stage_demands(config, True), EvalCluster(config)
    try:
        judge = config.eval.judge
        assert judge is not None
        made = {
            "sampling": [cluster.engines("policy", "/policy", 64)],
            "scoring": cluster.scorers("/policy"),
            "judging": [cluster.engines("judge", "/judge", 64, judge.generator)],
            "log-probs": [cluster.logprobs("/policy")],
        }
    finally:
        cluster.close()
    own = {"eval.judge.generator": GENERATOR, "base": LOGPROBS}  # fields, which refusals name
    assert stages.keys() == made.keys()
    for name, roles in made.items():
        gpus = [(own.get(d.name, d.name), d.num_workers, d.gpus_per_worker) for d in stages[name]]
        assert gpus == [(role.name, len(role.kwargs), role.gpus) for role in roles]
    assert num_gpus(stages, colocate=False) == 7 and num_workers(stages) == 6


@pytest.mark.parametrize(
    ("name", "field"),
    [("gpu-8x-rejection", "generator"), ("gpu-8x-best-of-n", "reward_models"), ("gpu-8x-judge-label", "generator"),
     ("gpu-8x-revise", "generator"), ("gpu-8x-compare", "")],
)  # fmt: skip
def test_a_node_that_is_too_small_is_refused_by_the_role_that_has_no_place(name: str, field: str) -> None:
    config = load_config(name, ["generator.num_workers=4"] if name == "gpu-8x-best-of-n" else []).config
    with pytest.raises(ShortfallError) as caught:
        plan_stages(config, [NodeSupply("small", 32, 4)])
    assert caught.value.field.startswith(field) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("cpu-revise", "revising"), ("cpu-best-of-n", "scoring"), ("cpu-compare", "stages, and a place for every worker"),
     ("cpu-judge-label", "sampling and scoring")],
)  # fmt: skip
def test_every_kind_of_command_is_validated_to_its_places(
    name: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with StandIn() as server:
        judge = [f"label.judge.endpoint.base_url={server.url}"] if name == "cpu-judge-label" else []
        assert main(["validate", name, f"model.path={TINY}", "model.max_length=512", *judge]) == 0
        assert main(["validate", name, "model.path=/nowhere", *judge]) == 2
    out, err = capfd.readouterr()
    assert said in out and f"{name}: configuration, models, data and places are valid" in out
    assert err.count("burnish: ") == 1 and "/nowhere" in err


def test_validate_refuses_a_command_without_a_place_and_shows_the_places_of_one_with(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["validate", "cpu-rejection", "cluster.device=cuda"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "cluster.device" in lines[0] and "1 GPUs" in lines[0]
    assert main(["validate", "cpu-rejection"]) == 0
    said = capfd.readouterr().out
    assert "sampling and scoring" in said and "this machine" in said and "places are valid" in said
