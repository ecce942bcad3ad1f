"""What is measured is the policy: an adapter's dropout is on where a gradient is taken, and nowhere else; a model's
own is never on.

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
from actors.modeling import load_policy
from actors.preference_learner import PreferenceLearner
from actors.scalar_model import load_scalar
from actors.sequence_packing import text_pack
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


def test_log_probs_before_an_update_have_no_dropout(base: str) -> None:
    """Runs that sample refuse an adapter's dropout; what is measured in them does not rest on that."""
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


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def dropping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose architecture drops activations, attention and, as OPT can, whole layers."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    tokens: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if request.param == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **tokens))
    else:
        model = OPTForCausalLM(OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
            max_position_embeddings=64, dropout=0.3, attention_dropout=0.2, layerdrop=0.5, **tokens,
        ))  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("read_weights", [True, False])
def test_what_is_trained_has_no_dropout_of_the_models_own(dropping: str, read_weights: bool) -> None:
    policy = load_policy(dropping, 16, read_weights=read_weights).train()
    if not read_weights:  # as the memory was
        for weight in policy.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    texts = [np.arange(5, 20), np.arange(3, 10)]
    pack = text_pack((0, 1), texts, [np.arange(len(t)) > 0 for t in texts], CPU)
    trained = [policy(pack, 1.0)[0] for _ in range(3)]
    assert all(torch.equal(found, trained[0]) for found in trained)
    torch.testing.assert_close(trained[0], policy.eval()(pack, 1.0)[0], rtol=0, atol=0)


def test_the_config_that_is_exported_keeps_the_models_own_dropout(dropping: str) -> None:
    from transformers import AutoConfig

    before, after = AutoConfig.from_pretrained(dropping).to_dict(), load_policy(dropping, 16).hf_model.config.to_dict()
    rates = {key: value for key, value in before.items() if "drop" in key}
    assert any(rates.values())
    assert {key: after[key] for key in rates} == rates
