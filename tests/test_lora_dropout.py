"""What is measured is the policy: dropout is on where a gradient is taken, and nowhere else.

The learner's own code on a tiny model, with the engine replaced by plain backward passes.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import bare_rank, comparisons, tokenizer
from test_gradient_invariance import MAX_TOKENS, TEMPERATURE, recorded_batch
from test_lora import moved, policy_of

from actors.adapter_export import AdapterCopy
from actors.adapter_reference import AdapterReference
from actors.critic import CriticLearner
from actors.experience_batch import ExperienceBatch
from actors.learner import DeepSpeedLearner
from actors.lora_settings import LoRAPlan, LoRASettings
from actors.model_folders import resolve_model
from actors.preference_learner import PreferenceLearner
from actors.scalar_model import load_scalar
from actors.settings import LearnerSettings, SamplingSettings
from trainers.algorithms import AlgorithmSettings
from trainers.comparisons import write_comparisons
from trainers.experience import decode_logprobs
from trainers.preference_training import PreferenceSettings

__all__ = ["tokenizer"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NOISY = LoRASettings(rank=4, alpha=8.0, dropout=0.5)


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model("builtin:tiny-llama")


def preference_rank(base: str, folder: Path, loss: str, tokenizer: Any, monkeypatch: Any) -> PreferenceLearner:
    """A rank whose policy has moved away from the adapter that it started from, which is its reference."""
    start = folder / "start"
    AdapterCopy(moved(policy_of(base, NOISY)).adapter)(start)
    policy = moved(policy_of(base, NOISY, start=str(start), reference=True), 0.4, seed=9).train()
    write_comparisons(comparisons(loss, tokenizer), folder / "train.arrow")
    files = dict.fromkeys(("train", "held_out"), folder / "train.arrow")
    return bare_rank(policy, PreferenceSettings(name="dpo", loss=loss), files, monkeypatch, lr=0)  # type: ignore[arg-type]


def test_dropout_is_on_where_a_gradient_is_taken(
    base: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = preference_rank(base, tmp_path, "sigmoid", tokenizer, monkeypatch)
    losses = {rank.update(range(9), i)["loss"] for i in range(3)}  # no step moves anything
    assert len(losses) == 3, "the other tests say nothing"


def test_the_kl_of_kto_is_of_the_policy_and_not_of_its_dropout(
    base: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = preference_rank(base, tmp_path, "kto", tokenizer, monkeypatch)
    found = [rank.update(range(9), i) for i in range(3)]
    assert len({metrics["loss"] for metrics in found}) == 3
    assert found[0]["kl"] > 0 and len({metrics["kl"] for metrics in found}) == 1
    assert rank.evaluate()["kl"] == found[0]["kl"]  # the same rows, held out


def test_an_evaluation_that_first_asks_for_the_reference_has_no_dropout_after_it_either(
    base: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = preference_rank(base, tmp_path, "sigmoid", tokenizer, monkeypatch)
    first, second = rank.evaluate(), rank.evaluate()
    assert first["loss"] == second["loss"] != pytest.approx(math.log(2))
    assert rank.engine.engine.module.training


def rank_of_batches(kind: Any, model: Any, algorithm: AlgorithmSettings) -> Any:
    rank = kind.__new__(kind)
    rank.rank, rank.device, rank.share_prompts, rank.payload_deadline_s = 0, CPU, True, 10.0
    rank.adapter, rank.settings, rank.algorithm = model.adapter, LearnerSettings(token_budget=64), algorithm
    rank.engine = SimpleNamespace(world_size=1, forward=model, engine=SimpleNamespace(module=model))
    rank.sampling = SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    rank.everyone = lambda mine: mine
    return rank


def test_log_probs_before_an_update_have_no_dropout_whatever_a_model_has_of_its_own(base: str) -> None:
    """Runs that sample refuse an adapter's dropout; a model may have some of its own, as this one is given."""
    algorithm = AlgorithmSettings(kl_coef=0.1, num_minibatches=2)
    policy = moved(policy_of(base, NOISY, reference=True)).train()
    rank = rank_of_batches(DeepSpeedLearner, policy, algorithm)
    rank._reference = AdapterReference(policy.adapter)
    batch = ExperienceBatch(recorded_batch(), algorithm, MAX_TOKENS)
    proximal = [rank._proximal(batch) for _ in range(2)]
    rows = [np.concatenate(found) for found in proximal]
    np.testing.assert_array_equal(rows[0], rows[1])
    prompt, completion = np.arange(5, 12, dtype=np.int32), np.arange(30, 39, dtype=np.int32)
    probes = [rank.score([prompt], [completion])[0] for _ in range(2)]
    np.testing.assert_array_equal(probes[0], probes[1])
    assert policy.training


def test_values_have_no_dropout(base: str) -> None:
    torch.manual_seed(0)
    scalar = moved(load_scalar(base, "critic.path", lora=LoRAPlan(NOISY))).train()
    torch.nn.init.normal_(scalar.hf_model.score.weight, generator=torch.Generator().manual_seed(1))
    rank = rank_of_batches(CriticLearner, scalar, AlgorithmSettings.model_validate({"name": "ppo"}))
    payloads = [group.payload for group in recorded_batch()]
    found = []
    for _ in range(2):
        _, *buffers = rank.values(payloads, 10.0)
        found.append(np.concatenate([row for buffer in buffers for row in decode_logprobs(buffer)]))
    assert np.abs(found[0]).max() > 0.01
    np.testing.assert_array_equal(found[0], found[1])
