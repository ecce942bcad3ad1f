"""Whole PPO runs on a tiny model: in one process and resumed; through Ray with a critic and a reward model apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_end_to_end import RUN_S, SMALL, Start, check_lineage, start

from actors.mixed_scorer import merge
from cluster.checkpoints import CheckpointStore
from launch.demands import role_demands
from launch.overrides import load_config
from launch.prepare import prepare
from launch.resuming import newest_checkpoint
from trainers.errors import InputError
from trainers.experience import GroupRewards, RewardFailure

__all__ = ["start"]  # a fixture

pytestmark = pytest.mark.timeout(2 * RUN_S + 300)

PPO = (
    "algorithm.name=ppo", "algorithm.aggregation=token", "algorithm.kl_coef=0.1", "algorithm.kl_placement=reward",
    "algorithm.kl_estimator=k1", "algorithm.num_epochs=2", "algorithm.num_minibatches=2",
    "algorithm.ppo.kl_target=0.001", "algorithm.ppo.kl_horizon=100", "critic.optimizer.lr=0.01", "evaluation.every=0",
)  # fmt: skip
NAN = float("nan")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as a reward run exports it, with a head that says something."""
    from actors.modeling import load_tokenizer
    from actors.scalar_model import load_scalar

    folder = str(tmp_path_factory.mktemp("reward"))
    source = prepare(load_config("cpu-two-by-two").config).model_path
    model = load_scalar(source, "path").hf_model
    torch.manual_seed(2)
    torch.nn.init.normal_(model.score.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    model.save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_in_one_process_learns_values_and_goes_on_with_its_critic_when_resumed(start: Start) -> None:
    arguments = (*SMALL, *PPO, "cluster.backend=in_process", "checkpoint.every=0", "checkpoint.export=false",
                 "algorithm.ppo.value_warmup_steps=1")  # fmt: skip
    first = start("ppo", *arguments, "run.num_steps=3")
    assert first.end() == 0, first.tail()
    rows = first.rows("metrics.jsonl")
    warm, second, third = rows
    assert "loss" not in warm and warm["critic/loss"] > 0 and warm["critic/value_mean"] == 0.0  # a head of zeros
    assert abs(second["objective/kl"]) < 1e-5, "the warm-up moved the policy"
    assert third["objective/kl"] > 0.001  # the target: the coefficient goes down at first, then up
    error = 0.2 * 16 / 100
    assert [row["kl_coef"] for row in rows] == pytest.approx([0.1, 0.1, 0.1 * (1 - error)])
    for row in (second, third):
        assert row["ratio/first_minibatch_max_deviation"] < 1e-4
        assert row["ratio/max"] > 1.0 + 1e-4
        assert row["time/learn_overlap_s"] == 0.0  # one place, one after the other
        assert row["objective/rlhf_reward"] == pytest.approx(
            row["objective/scores"] + row["objective/non_score_reward"]
        )
    checkpoint = CheckpointStore(first.folder / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.metadata["critic"] == {"num_workers": 1, "zero_stage": 1}

    resumed = start("ppo", *arguments, "run.num_steps=4", "--resume")
    assert resumed.end() == 0, resumed.tail()
    check_lineage(resumed.folder, 4, lambda step: 0 if step <= 3 else 1)
    last = resumed.rows("metrics.jsonl")[-1]
    assert last["kl_coef"] == pytest.approx(third["kl_coef"] * (1 + error))
    assert last["critic/value_mean"] != 0.0, "the critic began again"


@pytest.mark.slow  # about a minute on two cores: nine processes start
def test_through_ray_policy_and_critic_learn_at_once_beside_a_reward_model(start: Start, reward_model: str) -> None:
    run = start(
        "apart", *PPO, "run.num_steps=2", "generator.num_workers=1", "learner.zero_stage=2", "critic.num_workers=2",
        "critic.zero_stage=2", "critic.overlap=true", "run.samples_per_prompt=2", "checkpoint.export=false",
        f"reward_models=[{{name: taste, path: {reward_model}, weight: 0.5}}]", "model.dtype=float32",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    check_lineage(run.folder, 2, lambda step: 0)
    (ready,) = [e for e in run.rows("events.jsonl") if e["kind"] == "ready"]
    roles = [row["role"] for row in ready["layout"]]
    for role, num in (("learner", 2), ("critic", 2), ("reference", 1), ("reward_models.0", 1), ("reward_workers", 1)):
        assert roles.count(role) == num, role
    first, second = run.rows("metrics.jsonl")
    for row in (first, second):
        assert row["reward"] == pytest.approx(row["rewards/has_letter/mean"] + 0.5 * row["rewards/taste/mean"])
        assert row["time/learn_overlap_s"] > 0.0
        assert row["ratio/first_minibatch_max_deviation"] < 1e-4
    assert abs(first["objective/kl"]) < 1e-3 and first["failures/num_reward"] == 0
    assert abs(first["critic/value_mean"]) > 1e-3, "the critic starts from the reward model"
    checkpoint = CheckpointStore(run.folder / "checkpoints").latest()
    assert checkpoint is not None and len(list((checkpoint.path / "critic").glob("rank-*.safetensors"))) == 2


# --- scorers merged -------------------------------------------------------------------------------


def rewards(name: str, totals: list[float], *failures: tuple[int, str]) -> GroupRewards:
    found = tuple((i, RewardFailure(name, kind, "")) for i, kind in failures)  # type: ignore[arg-type]
    return GroupRewards("7", np.array(totals), {name: np.array(totals)}, found)


def test_totals_add_up_a_failure_masks_and_an_abstention_is_passed_over() -> None:
    functions = rewards("f", [1.0, 2.0, NAN, NAN, NAN], (2, "raised"), (3, "abstained"), (4, "abstained"))
    model = rewards("m", [0.5, NAN, 0.5, 0.5, NAN], (1, "not_a_number"), (4, "abstained"))
    merged = merge([functions, model])
    np.testing.assert_array_equal(merged.totals, [1.5, NAN, NAN, 0.5, NAN])
    assert list(merged.parts) == ["f", "m"] and [i for i, _ in merged.failures] == [1, 2, 3, 4, 4]


def test_a_nan_without_a_reason_masks_too_and_one_name_twice_is_refused() -> None:
    assert np.isnan(merge([rewards("f", [NAN]), rewards("m", [1.0])]).totals[0])
    with pytest.raises(ValueError, match="belong together"):
        merge([rewards("f", [1.0]), rewards("f", [1.0])])


# --- refused before anything is allocated -----------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["critic.num_workers=5", "algorithm.num_minibatches=4"], "critic.num_workers"),
        (["cluster.backend=in_process", "learner.num_workers=1", "critic.num_workers=2"], "critic.num_workers"),
        (["model.max_length=512", "critic.token_budget=256"], "critic.token_budget"),
        (["algorithm.ppo.kl_target=1", "algorithm.ppo.kl_horizon=3"], "kl_horizon=3 is too short"),
        (["rewards=[]"], "reward_models"),
        (["algorithm.scale=none"], "scale=none does nothing"),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_the_key_to_change(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config("cpu-two-by-two", ["algorithm.name=ppo", "algorithm.kl_coef=0.1", *overrides])


def test_one_sample_of_a_prompt_is_enough_with_a_critic_and_too_few_without() -> None:
    assert load_config("cpu-two-by-two", ["algorithm.name=ppo", "run.samples_per_prompt=1"]).config
    with pytest.raises(InputError, match="at least 2 samples"):
        load_config("cpu-two-by-two", ["run.samples_per_prompt=1"])


def test_a_critic_with_another_tokenizer_than_the_policys_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    source = prepare(load_config("cpu-two-by-two").config).model_path
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    vocabulary = dict.fromkeys(AutoTokenizer.from_pretrained(source).get_vocab(), 0) | {"<odd>": 1}
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<odd>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<odd>").save_pretrained(tmp_path)
    config = load_config("cpu-two-by-two", ["algorithm.name=ppo", f"critic.path={tmp_path}"]).config
    with pytest.raises(InputError, match=r"critic\.path.*tokenizer"):
        prepare(config)


def test_on_a_node_of_eight_gpus_every_role_of_the_recipe_has_gpus_of_its_own() -> None:
    config = load_config("gpu-8x-ppo").config
    demands = {demand.name: demand.num_workers * demand.gpus_per_worker for demand in role_demands(config, on_gpu=True)}
    assert demands == {"generator": 2, "learner": 2, "critic": 2, "reference": 1, "reward_models.0": 1}


def test_a_checkpoint_of_the_other_algorithm_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.begin(1)
    store.commit(1, {"learner": {"num_workers": 2, "zero_stage": 3}})
    with pytest.raises(InputError, match=r"algorithm\.name = 'ppo'.*no critic.*algorithm\.name=grpo"):
        newest_checkpoint(load_config("cpu-two-by-two", ["algorithm.name=ppo"]).config, tmp_path)
    store.begin(2)
    store.commit(2, {"learner": {"num_workers": 2, "zero_stage": 3}, "critic": {"num_workers": 2, "zero_stage": 1}})
    found = newest_checkpoint(load_config("cpu-two-by-two", ["algorithm.name=ppo"]).config, tmp_path)
    assert found is not None and found.step == 2, "ranks may be others than those that saved"
