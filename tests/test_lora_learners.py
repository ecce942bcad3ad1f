"""Every way to learn trains an adapter: real DeepSpeed ranks, one after the other in a process of their own.

Whole runs, with generators, are in tests/test_lora_runs.py.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_kit import comparisons
from rank_processes import run_ranks
from reward_model_kit import planted
from test_gradient_invariance import DEADLINE_S, MAX_TOKENS, MODEL, TEMPERATURE, recorded_batch
from test_sft import examples

from actors.example_files import write_examples
from actors.lora_settings import LoRAPlan, LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.settings import CriticSettings, LearnerSettings, OptimizerSettings, SamplingSettings
from cluster.rendezvous import Rendezvous, free_port
from cluster.weight_channel import bit_sum
from trainers.algorithms import PRESETS, AlgorithmSettings
from trainers.comparisons import write_comparisons
from trainers.preference_training import LOSSES, PreferenceSettings
from trainers.reward_training import RewardTrainingSettings

pytestmark = pytest.mark.timeout(2 * DEADLINE_S)

LORA = LoRASettings(rank=4, alpha=8.0)
STEPS = 5  # a head of zeros moves first, then B, then A
GREEDY = (0.5, 1.0, 0.0, 0.2)  # rewards of the greedy answers, which ReMax asks for
SAMPLED = tuple(name for name in PRESETS if name != "ppo")
PREFERENCES = ("sigmoid", "ipo", "kto", "orpo", "simpo")
ALL = (*SAMPLED, "ppo", "critic", *PREFERENCES, "sft", "reward")
START: dict[str, float] = {  # the first loss, of a policy that is its reference, whatever the model
    "online_dpo": math.log(2), "sigmoid": math.log(2), "ipo": 25.0, "kto": 0.5, "reward": math.log(2),
}  # fmt: skip


# --- in the rank's process ------------------------------------------------------------------------


def settings(kind: type[LearnerSettings], **more: Any) -> Any:
    optimizer = OptimizerSettings(lr=1e-2, warmup_steps=0, schedule="constant")
    return kind(zero_stage=1, token_budget=400, logprob_chunk=16, optimizer=optimizer, start_deadline_s=DEADLINE_S,
                **more)  # fmt: skip


class Watched:
    """What an adapter's training may change, before and after."""

    def __init__(self, rank: Any) -> None:
        self._adapter = rank.adapter
        self.base, self.trained = self._bits(), self._matrices()

    def _bits(self) -> dict[str, int]:
        trained = {name for name, _ in self._adapter.trained()}
        return {name: bit_sum(t) for name, t in self._adapter.base() if name not in trained}

    def _matrices(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._adapter.trained()}

    def outcome(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        after = self._matrices()
        moved = {name: float((after[name] - tensor).abs().max()) for name, tensor in self.trained.items()}
        return {"base": (self.base, self._bits()), "moved": moved, "rows": rows}


def arguments(port: int) -> dict[str, Any]:
    return {"rank": 0, "rendezvous": Rendezvous("127.0.0.1", port, 1), "model_path": resolve_model(MODEL),
            "dtype": "float32", "device": "cpu", "num_steps": 100, "seed": 5}  # fmt: skip


def policy_of(name: str, port: int) -> Any:
    from actors.learner import DeepSpeedLearner

    keys = {"name": name, "kl_coef": 0.1} | ({"num_epochs": 2, "num_minibatches": 2} if name == "ppo" else {})
    return DeepSpeedLearner(
        **arguments(port), settings=settings(LearnerSettings), algorithm=AlgorithmSettings.model_validate(keys),
        sampling=SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS), lora=LoRAPlan(LORA, reference=True),
    )  # fmt: skip


def batch() -> list[Any]:
    """The recorded batch without reference log-probs: the learner is its own reference."""
    alone = [replace(g, reference_payload=None) for g in recorded_batch()]
    return [replace(g, greedy_reward=worth) for g, worth in zip(alone, GREEDY, strict=True)]


def sampled(name: str, port: int, folder: str) -> dict[str, Any]:
    learner = policy_of(name, port)
    watched = Watched(learner)
    return {name: watched.outcome([dict(learner.update(batch(), step).metrics) for step in range(STEPS)])}


def ppo(name: str, port: int, folder: str) -> dict[str, Any]:
    """Policy and critic, an adapter each; a lap as the controller has them make it."""
    from actors.critic import CriticLearner

    learner = policy_of(name, port)
    critic = CriticLearner(**arguments(port), settings=settings(CriticSettings, lora=LORA), algorithm=learner.algorithm)
    watched, rows = {"ppo": Watched(learner), "critic": Watched(critic)}, dict[str, list[Any]](ppo=[], critic=[])
    for step in range(STEPS):
        groups = batch()
        _, *values = critic.values([g.payload for g in groups], DEADLINE_S)
        groups = [replace(g, values_payload=row) for g, row in zip(groups, values, strict=True)]
        prepared, targets = learner.prepare(groups, [g.rewards.totals for g in groups], 0.1)
        assert prepared is not None and targets is not None
        payload = [targets.to_pybytes()]
        critic_row = critic.update(groups, step, payload).metrics
        rows["critic"].append(dict(critic_row) | {k.removeprefix("critic/"): v for k, v in critic_row.items()})
        rows["ppo"].append(dict(learner.update(groups, step, payload, 0.1).metrics) | dict(prepared.metrics))
    return {who: watched[who].outcome(rows[who]) for who in watched}


def preference(name: str, port: int, folder: str) -> dict[str, Any]:
    from actors.preference_learner import PreferenceLearner

    plan = LoRAPlan(LORA, reference=LOSSES[name].has_reference)  # type: ignore[index]
    learner = PreferenceLearner(
        **arguments(port), settings=settings(LearnerSettings), lora=plan, data_folder=f"{folder}/{name}", reference={},
        algorithm=PreferenceSettings(name="dpo", loss=name),  # type: ignore[arg-type]
    )  # fmt: skip
    watched = Watched(learner)
    return {name: watched.outcome([learner.update(range(9), step) for step in range(STEPS)])}


def sft(name: str, port: int, folder: str) -> dict[str, Any]:
    from actors.sft_learner import SFTLearner

    files = {"some": f"{folder}/examples.arrow"}
    learner = SFTLearner(
        **arguments(port), settings=settings(LearnerSettings), train=files, held_out=None, lora=LoRAPlan(LORA)
    )
    watched = Watched(learner)
    return {name: watched.outcome([learner.update([(0, i) for i in range(6)], step) for step in range(STEPS)])}


def reward(name: str, port: int, folder: str) -> dict[str, Any]:
    from actors.reward_learner import RewardModelLearner

    learner = RewardModelLearner(
        **arguments(port), settings=settings(LearnerSettings), algorithm=RewardTrainingSettings(),
        data_folder=f"{folder}/reward", lora=LoRAPlan(LORA),
    )  # fmt: skip
    watched = Watched(learner)
    return {name: watched.outcome([learner.update(range(11), step) for step in range(STEPS)])}


TASKS: dict[str, Callable[[str, int, str], dict[str, Any]]] = {
    **dict.fromkeys(SAMPLED, sampled), "ppo": ppo, **dict.fromkeys(PREFERENCES, preference), "sft": sft,
    "reward": reward,
}  # fmt: skip


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        found |= task(name, port, folder)
        torch.save(found, Path(folder) / "found.pt")


# --- in the test's process ------------------------------------------------------------------------


@functools.cache
def everything() -> tuple[dict[str, Any], str | None]:
    """(what was found by name, what went wrong after it)."""
    tokenizer = load_tokenizer(resolve_model(MODEL))
    with tempfile.TemporaryDirectory(prefix="burnish-lora-") as folder:
        for loss in PREFERENCES:
            (Path(folder) / loss).mkdir()
            write_comparisons(comparisons(loss, tokenizer), Path(folder) / loss / "train.arrow")
        (Path(folder) / "reward").mkdir()
        pairs = [replace(c, margins=None) for c in planted(11, seed=4)]
        write_comparisons(pairs, Path(folder) / "reward" / "train.arrow")
        write_examples(Path(folder) / "examples.arrow", examples())
        wrong = run_ranks(one_rank, 1, free_port(), folder, deadline_s=DEADLINE_S)
        there = Path(folder) / "found.pt"
        return (torch.load(there, weights_only=False) if there.exists() else {}), wrong


def found_for(name: str) -> dict[str, Any]:
    found, wrong = everything()
    if name not in found:
        pytest.fail(f"{wrong}, after {', '.join(found) or 'nothing'}")
    return dict(found[name])


@pytest.mark.parametrize("name", ALL)
def test_steps_move_every_matrix_of_the_adapter_and_no_bit_of_the_base(name: str) -> None:
    found = found_for(name)
    before, after = found["base"]
    assert before == after and len(before) >= 20
    with_head = {"score.weight"} if name in ("reward", "critic") else set()
    assert {n for n in found["moved"] if ".lora_" not in n} == with_head
    assert len(found["moved"]) == 28 + len(with_head) and min(found["moved"].values()) > 1e-6
    assert len(found["rows"]) == STEPS
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in found["rows"])


@pytest.mark.parametrize("name", START)
def test_the_first_loss_is_that_of_a_model_that_is_its_own_reference(name: str) -> None:
    assert found_for(name)["rows"][0]["loss"] == pytest.approx(START[name], rel=1e-5)


@pytest.mark.parametrize("name", [*PREFERENCES, "sft", "reward", "critic"])
def test_a_few_steps_on_the_same_batch_lower_its_loss(name: str) -> None:
    losses = [row["loss"] for row in found_for(name)["rows"]]
    assert losses[-1] < losses[0] - 1e-3 * abs(losses[0])


@pytest.mark.parametrize("name", [*SAMPLED, "ppo"])
def test_the_policy_starts_at_its_reference_and_at_ratio_1_and_moves_away(name: str) -> None:
    rows = found_for(name)["rows"]
    assert rows[0]["ratio/first_minibatch_max_deviation"] < 1e-5
    measured = "objective/kl" if name == "ppo" else "kl"
    assert abs(rows[0][measured]) < 1e-5 and max(abs(row[measured]) for row in rows) > 1e-3
    assert rows[0]["learner/reference_s"] > 0
    if name == "online_dpo":
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and rows[-1]["rewards/margins"] > 0.01
