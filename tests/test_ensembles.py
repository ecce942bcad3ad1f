"""Laws of ensembles: what several scores become, what their disagreement masks, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from test_loop import World, run

from actors.mixed_scorer import merge
from actors.reward_ensemble import member_devices
from actors.settings import RewardModelSettings
from launch.demands import estimates
from launch.loop_settings import loop_settings
from launch.model_facts import ModelFacts
from launch.overrides import load_config
from trainers.ensembles import (
    EnsembleSettings,
    combine,
    disagreement_metrics,
    disagreement_name,
    ensemble_rewards,
    mask_disagreement,
)
from trainers.errors import InputError
from trainers.experience import GroupRewards, GroupSummary, RewardFailure, WeightVersion
from trainers.loop import LoopSettings
from trainers.metrics import check
from trainers.protocols import GeneratedGroup, LearnerGroup, UpdateReport

NAN = float("nan")
HOW = ("mean", "worst_case", "mean_minus_variance")
SCORES = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-8, 8, width=32)
)  # [M, S]


# --- combination ------------------------------------------------------------------------------


@given(SCORES)
def test_the_worst_case_is_never_above_the_mean_nor_is_the_mean_less_a_variance(scores: np.ndarray) -> None:
    mean = combine(scores, "mean")[0]
    assert (combine(scores, "worst_case")[0] <= mean + 1e-12).all()
    assert (combine(scores, "mean_minus_variance", 0.7)[0] <= mean + 1e-12).all()


@given(SCORES)
def test_lambda_0_is_the_mean(scores: np.ndarray) -> None:
    np.testing.assert_array_equal(combine(scores, "mean_minus_variance", 0.0)[0], combine(scores, "mean")[0])


@pytest.mark.parametrize("how", HOW)
@given(scores=SCORES, data=st.data())
def test_the_order_of_the_members_changes_no_bit(how: Any, scores: np.ndarray, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(scores))))
    for one, other in zip(combine(scores, how, 0.5), combine(scores[list(order)], how, 0.5), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", HOW)
def test_one_member_is_that_member_and_agrees_with_itself(how: Any) -> None:
    scores = np.array([[0.25, -3.0, 1e-3]], np.float32)
    reward, disagreement = combine(scores, how, 0.5)
    np.testing.assert_array_equal(reward, scores[0].astype(np.float64))
    np.testing.assert_array_equal(disagreement, 0.0)


@pytest.mark.parametrize("how", HOW)
@given(scores=SCORES, shift=st.floats(-5, 5))
def test_a_shift_of_every_member_shifts_the_reward_and_no_disagreement(
    how: Any, scores: np.ndarray, shift: float
) -> None:
    reward, disagreement = combine(scores, how, 0.5)
    moved, still = combine(scores.astype(np.float64) + shift, how, 0.5)
    np.testing.assert_allclose(moved, reward + shift, atol=1e-9)
    np.testing.assert_allclose(still, disagreement, atol=1e-6)


def test_the_three_combinations_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]], np.float32)  # variances 2/3 and 8
    np.testing.assert_allclose(combine(scores, "mean")[0], [2.0, 2.0])
    np.testing.assert_allclose(combine(scores, "worst_case")[0], [1.0, 0.0])
    np.testing.assert_allclose(combine(scores, "mean_minus_variance", 0.5)[0], [2 - 1 / 3, -2.0])
    np.testing.assert_allclose(combine(scores, "mean")[1], [np.sqrt(2 / 3), np.sqrt(8)])


@pytest.mark.parametrize("bad", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize("how", HOW)
def test_a_member_without_a_score_leaves_the_sample_without_a_reward_and_no_other_sample(how: Any, bad: float) -> None:
    scores = np.array([[1.0, bad, 2.0], [3.0, 0.0, 2.0]], np.float32)
    for found in combine(scores, how, 0.5):
        assert np.isfinite(found).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 3), (3,)])
def test_scores_of_no_member_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one member"):
        combine(np.zeros(shape, np.float32), "mean")


# --- rewards of a group -----------------------------------------------------------------------


def of_member(name: str, *scores: float, failures: tuple[tuple[int, RewardFailure], ...] = ()) -> GroupRewards:
    part = np.array(scores)
    return GroupRewards("7", part, {name: part}, failures, 0.25)


def test_members_and_disagreement_are_recorded_beside_the_reward_and_decide_nothing() -> None:
    settings = EnsembleSettings(combine="worst_case")
    scored = [of_member("rm.0", 1.0, 9.0), of_member("rm.1", 3.0, 8.0)]
    found = ensemble_rewards("rm", settings, 0.5, 5.0, scored)
    np.testing.assert_array_equal(found.totals, [0.5, 2.5])  # cut to 5, then weighed
    assert list(found.parts) == ["rm", "rm.0", "rm.1", "rm.disagreement"]
    np.testing.assert_array_equal(found.parts["rm.0"], [1.0, 9.0])  # not cut
    np.testing.assert_array_equal(found.parts["rm.disagreement"], [1.0, 0.5])
    assert found.measured == ("rm.0", "rm.1", "rm.disagreement")
    assert found.score_s == 0.5
    np.testing.assert_array_equal(merge([found, of_member("other", 1.0, 1.0)]).totals, [1.5, 3.5])
    only_measured = ensemble_rewards("rm", settings, 0.0, None, scored)
    assert only_measured.measured == ("rm", "rm.0", "rm.1", "rm.disagreement")


def test_a_failure_of_one_member_masks_the_sample_and_is_counted_and_is_never_0() -> None:
    failed = (1, RewardFailure("rm.1", "nan", "the model's score is nan"))
    scored = [of_member("rm.0", 1.0, 2.0), of_member("rm.1", 3.0, NAN, failures=(failed,))]
    found = ensemble_rewards("rm", EnsembleSettings(combine="mean"), 1.0, None, scored)
    assert found.valid.tolist() == [True, False]
    assert np.isnan(found.parts["rm"][1]) and found.parts["rm.0"][1] == 2.0
    assert [(i, f.reward, f.kind, f.detail) for i, f in found.failures] == [
        (1, "rm", "nan", "member 1: the model's score is nan")
    ]
    assert merge([found, of_member("other", 5.0, 5.0)]).valid.tolist() == [True, False]


# --- the mask ---------------------------------------------------------------------------------


def group(group_id: str, totals: list[float], disagreement: list[float], name: str = "rm") -> LearnerGroup:
    n, version = len(totals), WeightVersion(0, 0)
    summary = GroupSummary(group_id, "p", 2, (3,) * n, ("stop",) * n, version, version, "g", 0.0)
    parts = {name: np.array(totals), disagreement_name(name): np.array(disagreement)}
    return LearnerGroup(summary, GroupRewards(group_id, np.array(totals), parts), None, None)


BATCH = [group("0", [1.0, 2.0, NAN], [0.1, 0.9, 5.0]), group("1", [3.0, 4.0, 5.0], [0.2, 0.3, 2.0])]


def test_a_threshold_masks_what_is_above_it_and_counts_only_samples_that_had_a_reward() -> None:
    kept, num_masked = mask_disagreement(BATCH, {"rm": EnsembleSettings(combine="mean", mask_above=0.9)})
    assert num_masked == 1
    assert [g.rewards.valid.tolist() for g in kept] == [[True, True, False], [True, True, False]]
    np.testing.assert_array_equal(kept[1].rewards.parts["rm"], [3.0, 4.0, 5.0])  # the record stays
    assert BATCH[1].rewards.valid.all()  # nothing is changed in place


@given(st.floats(0.05, 0.95), st.lists(st.floats(0, 4), min_size=1, max_size=30))
def test_a_quantile_masks_no_more_than_its_share_of_the_whole_step(quantile: float, values: list[float]) -> None:
    cut = len(values) // 2
    batch = [group(str(i), [1.0] * len(v), v) for i, v in enumerate((values[:cut], values[cut:])) if v]
    settings = EnsembleSettings(combine="mean", mask_quantile=quantile)
    kept, num_masked = mask_disagreement(batch, {"rm": settings})
    assert num_masked <= np.ceil((1 - quantile) * (len(values) - 1)) and num_masked < len(values)
    masked = ~np.concatenate([g.rewards.valid for g in kept])
    assert masked.sum() == num_masked
    if num_masked:
        assert np.array(values)[masked].min() > np.array(values)[~masked].max()
    _, num_again = mask_disagreement(batch[::-1], {"rm": settings})
    assert num_again == num_masked


def test_members_that_agree_mask_nothing_and_without_a_mask_the_batch_is_as_it_was() -> None:
    batch = [group("0", [1.0, 2.0], [0.5, 0.5])]
    assert mask_disagreement(batch, {"rm": EnsembleSettings(combine="mean", mask_quantile=0.5)}) == (batch, 0)
    assert mask_disagreement(BATCH, {}) == (BATCH, 0)
    assert mask_disagreement([], {"rm": EnsembleSettings(combine="mean", mask_above=1.0)}) == ([], 0)


class EnsembleWorld(World):
    """The loop's fakes, with an ensemble that disagrees on the second sample of every group."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[bool]] = []
        self.recorded: list[list[bool]] = []

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        parts = {"rm": np.array([1.0, 2.0]), disagreement_name("rm"): np.array([0.25, 4.0])}
        return GroupRewards(group.summary.group_id, parts["rm"], parts)

    def record(self, step: int, batch: list[LearnerGroup], report: UpdateReport) -> None:
        self.recorded += [g.rewards.valid.tolist() for g in batch]

    async def update(self, groups: Any, step: int) -> UpdateReport:
        self.trained += [g.rewards.valid.tolist() for g in groups]
        return await super().update(groups, step)


def test_a_masked_sample_is_not_trained_on_and_its_reward_is_still_measured() -> None:
    world = EnsembleWorld()
    loop = world.loop(1)
    masks = {"rm": EnsembleSettings(combine="mean", mask_above=1.0)}
    loop.settings = LoopSettings(1, 2, 2, 0, 1.0, 8, 0, ensembles=masks)
    object.__setattr__(loop.parts, "on_update", world.record)
    run(loop)
    assert world.trained == [[True, False]] * 2 and world.recorded == [[True, True]] * 2
    ((_, row),) = world.rows
    assert row["reward"] == 1.5 and row["failures/num_samples_masked"] == 0
    assert row["disagreement/num_samples_masked"] == 2
    assert row["disagreement/mean"] == pytest.approx(2.125) and row["disagreement/top_quartile"] == 4.0
    assert row["rewards/rm.disagreement/mean"] == pytest.approx(2.125)
    for name in row:
        check(name)


# --- metrics ----------------------------------------------------------------------------------


def test_the_top_quartile_is_of_the_rewards_and_not_of_the_disagreements() -> None:
    rewards = [group("0", [4.0, 3.0, 2.0, 1.0], [0.5, 1.0, 2.0, 9.0]).rewards]
    found = disagreement_metrics(rewards, 3)
    assert found == {
        "disagreement/mean": 3.125, "disagreement/top_quartile": 0.5, "disagreement/num_samples_masked": 3.0,
    }  # fmt: skip


def test_failed_samples_have_no_disagreement_and_without_an_ensemble_there_is_no_metric() -> None:
    found = disagreement_metrics([BATCH[0].rewards], 0)
    assert found["disagreement/mean"] == pytest.approx(0.5)
    assert disagreement_metrics([GroupRewards("0", np.ones(2), {"r": np.ones(2)})], 0) == {}
    lost = disagreement_metrics([group("0", [NAN], [NAN]).rewards], 0)
    assert lost == {"disagreement/num_samples_masked": 0.0}


# --- configuration ----------------------------------------------------------------------------

TWO = '["/models/a", "/models/b"]'


def entry(**keys: Any) -> dict[str, Any]:
    return {"name": "rm", "path": ["/models/a", "/models/b"], "normalize": True, "ensemble": {"combine": "mean"}} | keys


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"path": "/models/a"}, "one model has no disagreement"),
        ({"path": ["/models/a"]}, "one model has no disagreement"),
        ({"path": []}, "names no model"),
        ({"path": ["/models/a", "/models/a"]}, "one of them twice"),
        ({"ensemble": None}, "nothing says how they become one reward"),
        ({"normalize": False}, "scores of different models are not"),
        ({"ensemble": {"combine": "mean", "same_scale": True}}, "normalize=true brings them there"),
        ({"ensemble": {"combine": "mean", "uncertainty_coef": 0.5}}, "combine=mean has no use for it"),
        ({"ensemble": {"combine": "worst_case", "uncertainty_coef": 0.0}}, "combine=worst_case has no use for it"),
        ({"ensemble": {"combine": "mean_minus_variance"}}, "so many times the variance"),
        ({"ensemble": {"combine": "mean", "mask_above": 1.0, "mask_quantile": 0.9}}, "there is mask_quantile"),
        ({"ensemble": {"combine": "median"}}, "worst_case"),
    ],
)
def test_an_ensemble_that_makes_no_sense_is_refused(keys: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RewardModelSettings.model_validate(entry(**keys))


def test_a_refusal_names_the_key_in_one_line() -> None:
    overrides = [f"reward_models.0.path={TWO}", "reward_models.0.ensemble.combine=mean",
                 "reward_models.0.ensemble.uncertainty_coef=0.5"]  # fmt: skip
    with pytest.raises(InputError) as refused:
        load_config("cpu-pipeline-ppo", overrides)
    assert refused.value.field == "reward_models.0.ensemble.uncertainty_coef" and refused.value.value == 0.5
    assert "\n" not in str(refused.value)


def test_a_part_that_a_member_is_called_like_is_refused() -> None:
    overrides = [f"reward_models.0.path={TWO}", "reward_models.0.ensemble.combine=mean", "rewards.0.name=proxy.1"]
    with pytest.raises(InputError, match="names must differ"):
        load_config("cpu-pipeline-ppo", overrides)
    with pytest.raises(InputError, match="names must differ"):
        load_config("cpu-pipeline-eval", [*overrides, "eval.gold=null"])


def test_members_are_single_models_with_the_entrys_settings_and_their_own_names() -> None:
    settings = RewardModelSettings.model_validate(entry(weight=2.0, clip=3.0, token_budget=77))
    assert [(m.name, m.path, m.weight, m.clip, m.ensemble) for m in settings.members] == [
        ("rm.0", "/models/a", 1.0, None, None), ("rm.1", "/models/b", 1.0, None, None),
    ]  # fmt: skip
    assert all(m.normalize and m.token_budget == 77 for m in settings.members)
    single = RewardModelSettings.model_validate({"name": "rm", "path": "/models/a"})
    assert single.members == [single] and single.part_names == ["rm"]


def test_only_ensembles_that_mask_reach_the_loop() -> None:
    overrides = [f"reward_models.0.path={TWO}", "reward_models.0.ensemble.combine=worst_case"]
    assert loop_settings(load_config("cpu-pipeline-ppo", overrides).config).ensembles == {}
    masking = load_config("cpu-pipeline-ppo", [*overrides, "reward_models.0.ensemble.mask_quantile=0.9"]).config
    assert list(loop_settings(masking).ensembles) == ["proxy"]


@pytest.mark.parametrize(
    ("gpus", "device", "places", "most"),
    [
        (None, "cuda:0", ["cuda:0"] * 3, 3),
        (0.5, "cuda:0", ["cuda:0"] * 3, 3),
        (2, "cuda:0", ["cuda:0", "cuda:1", "cuda:0"], 2),
        (3, "cuda:0", ["cuda:0", "cuda:1", "cuda:2"], 1),
        (3, "cpu", ["cpu"] * 3, 3),
    ],
)
def test_members_are_dealt_to_the_gpus_of_their_worker(gpus: Any, device: str, places: list[str], most: int) -> None:
    settings = RewardModelSettings.model_validate(entry(path=["/a", "/b", "/c"], gpus_per_worker=gpus))
    assert member_devices(settings, device) == places
    assert settings.num_on_a_device(device != "cpu") == most


def test_every_member_on_a_device_is_part_of_its_memory_before_anything_is_allocated() -> None:
    facts = ModelFacts(1000, hidden=8, layers=2, heads=2, kv_heads=1, vocab=64, max_length=64, architecture="x",
                       intermediate=16, head_dim=4)  # fmt: skip
    one = load_config("cpu-pipeline-ppo").config
    three = load_config("cpu-pipeline-ensemble").config
    asked = [estimates(c, facts, False, 4)["reward_models.0"].parts["weights"] for c in (one, three)]
    assert asked == [4000, 12000]
    wide = load_config("cpu-pipeline-ensemble", ["reward_models.0.gpus_per_worker=2"]).config
    assert estimates(wide, facts, True, 2)["reward_models.0"].parts["weights"] == 4000  # two of three on one GPU
