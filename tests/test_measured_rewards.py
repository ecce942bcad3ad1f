"""Laws of what is measured beside the training: parts of weight 0, shares of a batch, what an update changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from actors.experience_batch import contributing
from actors.mixed_scorer import merge
from actors.parameter_change import SAMPLED, ParameterChange
from actors.update_totals import UpdateTotals
from launch.overrides import load_config
from trainers.algorithms import AlgorithmSettings
from trainers.errors import InputError
from trainers.experience import (
    FinishReason,
    GroupRewards,
    GroupSummary,
    Prompt,
    RewardFailure,
    Trajectory,
    TrajectoryGroup,
    WeightVersion,
)
from trainers.metrics import check
from trainers.protocols import LearnerGroup
from trainers.rewards import RewardSettings, load_reward, score_group
from trainers.step_metrics import group_metrics

NAN = float("nan")
FUNCTIONS = """
def length(completions): return [None if c == "-" else float(len(c)) for c in completions]
def gold(completions): return [float("nan") if c == "bad" else 9.0 for c in completions]
"""


def scored(tmp_path: Path, texts: Sequence[str], *weights: tuple[str, float]) -> GroupRewards:
    (tmp_path / "parts.py").write_text(FUNCTIONS)
    ids = np.array([5], np.int32)
    samples = tuple(Trajectory(i, 0, ids, np.zeros(1, np.float32), text, "stop", ()) for i, text in enumerate(texts))
    group = TrajectoryGroup("7", Prompt("p", ids, "prompt"), samples)
    rewards = [
        load_reward(RewardSettings(name=name, function=f"{tmp_path / 'parts.py'}:{name}", weight=weight))
        for name, weight in weights
    ]
    return asyncio.run(score_group(rewards, group, 5.0, 0))


def test_a_part_of_weight_0_is_recorded_and_its_failures_mask_nothing(tmp_path: Path) -> None:
    texts = ["ab", "bad", "-"]
    found = scored(tmp_path, texts, ("length", 2.0), ("gold", 0.0))
    np.testing.assert_array_equal(found.totals, [4.0, 6.0, NAN])  # "-": nothing that weighs applies to it
    np.testing.assert_array_equal(found.parts["gold"], [9.0, NAN, 9.0])
    assert [(i, f.reward, f.kind) for i, f in found.failures] == [(1, "gold", "nan"), (2, "length", "abstained")]
    assert found.measured == ("gold",)
    weighed = scored(tmp_path, texts, ("length", 2.0), ("gold", 1.0))
    np.testing.assert_array_equal(weighed.totals, [13.0, NAN, 9.0])


def part(name: str, values: list[float], weight: float, *failures: tuple[int, str]) -> GroupRewards:
    found = tuple((i, RewardFailure(name, kind, "")) for i, kind in failures)  # type: ignore[arg-type]
    measured = () if weight else (name,)
    return GroupRewards("7", weight * np.array(values), {name: np.array(values)}, found, measured=measured)


def test_a_scorer_that_only_measures_decides_nothing() -> None:
    model = part("taste", [1.0, 2.0, NAN], 0.5, (2, "not_a_number"))
    gold = part("gold", [NAN, 5.0, 5.0], 0.0, (0, "timeout"))
    merged = merge([gold, model])
    np.testing.assert_array_equal(merged.totals, [0.5, 1.0, NAN])
    assert list(merged.parts) == ["gold", "taste"] and merged.measured == ("gold",)
    assert [i for i, _ in merged.failures] == [0, 2]
    unheard = merge([gold, part("taste", [NAN, 2.0, 3.0], 1.0, (0, "abstained"))])
    np.testing.assert_array_equal(unheard.totals, [NAN, 2.0, 3.0])  # 0.0 would be a reward that nobody gave
    np.testing.assert_array_equal(merge([gold]).totals, [0.0, 0.0, 0.0])


def test_a_failed_measured_part_hides_no_abstention_beside_a_model() -> None:
    functions = GroupRewards(
        "7", np.array([NAN]), {"f": np.array([NAN]), "gold": np.array([NAN])},
        ((0, RewardFailure("f", "abstained", "")), (0, RewardFailure("gold", "raised", ""))), measured=("gold",),
    )  # fmt: skip
    np.testing.assert_array_equal(merge([functions, part("taste", [2.0], 1.0)]).totals, [2.0])


def test_a_run_in_which_nothing_weighs_is_refused() -> None:
    with pytest.raises(InputError, match="weight 0"):
        load_config("cpu-two-by-two", ["rewards=[{function: regex, args: {pattern: a}, weight: 0}]"])


# --- shares of a batch --------------------------------------------------------------------------


def batch(*totals: list[float]) -> list[LearnerGroup]:
    version = WeightVersion(0, 0)
    ended: tuple[FinishReason, ...] = ("stop",)
    return [
        LearnerGroup(
            GroupSummary(str(i), "p", 2, (3,) * len(t), ended * len(t), version, version, "g", 0.0),
            GroupRewards(str(i), np.array(t), {"r": np.array(t)}), None, None,
        )
        for i, t in enumerate(totals)
    ]  # fmt: skip


def test_masked_samples_are_a_share_and_groups_without_a_reward_have_no_spread() -> None:
    metrics = group_metrics(batch([1.0, 3.0], [2.0, 2.0], [NAN, NAN], [1.0, NAN]), WeightVersion(0, 0))
    assert metrics["failures/masked_fraction"] == pytest.approx(3 / 8)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3), "the third group has no rewards that could be equal"
    assert metrics["reward_std"] == pytest.approx(np.sqrt(2) / 3)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1])
def test_equal_rewards_are_equal_though_their_mean_is_rounded(value: float) -> None:
    equal = [[value] * n for n in range(2, 13)]
    assert group_metrics(batch(*equal), WeightVersion(0, 0))["frac_reward_zero_std"] == 1
    assert group_metrics(batch(*equal, [value, value + 1e-9]), WeightVersion(0, 0))["frac_reward_zero_std"] < 1


def test_a_kl_that_is_only_measured_is_measured_on_samples_without_an_advantage_too() -> None:
    weights, advantages = np.array([0.5, 0.5, 0.0, 0.5]), np.array([0.0, 1.0, 1.0, 0.0])
    plain = AlgorithmSettings(name="grpo", kl_coef=0.0)
    assert contributing(range(4), weights, advantages, plain) == [1]
    assert contributing(range(4), weights, advantages, plain.model_copy(update={"measure_kl": True})) == [0, 1, 3]


def test_equal_rewards_in_a_group_alarm_only_where_a_group_is_compared() -> None:
    for name, watched in (("grpo", True), ("rloo", True), ("reinforce_plus_plus", False), ("remax", False)):
        config = load_config("cpu-demo", [f"algorithm.name={name}"]).config
        assert (config.watched.dead_groups is not None) == watched
        assert config.watched.model_copy(update={"dead_groups": config.alarms.dead_groups}) == config.alarms


def test_a_value_that_is_missing_is_counted_once_and_one_that_nobody_owes_is_no_failure() -> None:
    (group,) = batch([NAN, NAN, 1.0])
    members = tuple((0, RewardFailure("rm", "nan", f"member {i}: its score is nan")) for i in range(3))
    more = tuple((i, RewardFailure(*what, "")) for i, *what in
                 ((0, "f", "timeout"), (1, "rm", "nan"), (1, "rm", "too_long")))  # fmt: skip
    abstained = tuple((i, RewardFailure("math", "abstained", "returned None")) for i in range(3))
    failed = replace(group, rewards=replace(group.rewards, failures=members + more + abstained))
    metrics = group_metrics([failed], WeightVersion(0, 0))
    assert metrics["failures/num_reward"] == 3, "rm of two samples, f of one"
    kinds = {name: value for name, value in metrics.items() if name.startswith("failures/kind/")}
    assert kinds == {"failures/kind/nan": 2, "failures/kind/timeout": 1, "failures/kind/too_long": 1,
                     "failures/kind/abstained": 3}  # fmt: skip


def test_where_no_completion_ended_by_itself_there_is_no_length_of_those_that_did() -> None:
    (group,) = batch([1.0, 2.0])
    cut = replace(group, summary=replace(group.summary, finish_reasons=("length", "length")))
    assert np.isnan(group_metrics([cut], WeightVersion(0, 0))["completions/mean_terminated_length"])
    assert check("completions/mean_terminated_length").definition.endswith("null if none did")


def test_single_samples_have_no_spread_at_all() -> None:
    metrics = group_metrics(batch([1.0], [2.0]), WeightVersion(0, 0))
    assert not {"reward_std", "frac_reward_zero_std"} & metrics.keys() and metrics["reward"] == 1.5


# --- the update ---------------------------------------------------------------------------------


def test_means_over_no_token_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: None)
    totals = UpdateTotals(torch.device("cpu"))
    metrics = totals.reduced()
    assert metrics.keys() == {"loss", "learner/num_microbatches", "learner/shared_prompt_fraction"}
    assert totals.num_trained == 0
    totals.sums += 2.0
    metrics = totals.reduced()
    assert (metrics["entropy"], metrics["ratio/mean"], totals.num_trained) == (1.0, 1.0, 2.0)


class Engine:
    """Named parameters, whole already."""

    def __init__(self, *sizes: int) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(str(i), p) for i, p in enumerate(self.parameters)]

    def whole(self, parameters: list[torch.nn.Parameter]) -> Any:
        return contextlib.nullcontext()


def test_changed_parameters_are_counted_by_size_and_frozen_ones_are_not() -> None:
    engine = Engine(30, 10, 999)
    small, other, frozen = engine.parameters
    frozen.requires_grad_(False)
    change = ParameterChange(engine)  # type: ignore[arg-type]
    change.look()
    assert change.fraction() == 0.0
    change.look()
    small.data[:15] += 1e-30
    other.data += 1.0
    assert change.fraction() == pytest.approx((15 + 10) / 40)


def test_of_a_large_tensor_elements_from_end_to_end_are_looked_at() -> None:
    engine = Engine(20 * SAMPLED)
    change = ParameterChange(engine)  # type: ignore[arg-type]
    change.look()
    engine.parameters[0].data[: 5 * SAMPLED] = 1.0
    assert change.fraction() == pytest.approx(0.25, abs=1e-3)
