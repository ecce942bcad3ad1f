"""Runs with an adapter: what is refused before anything is allocated, who the reference is, what memory it takes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import bare_rank
from test_algorithms_learner import PlainLearner
from test_gradient_invariance import MAX_TOKENS, recorded_batch
from test_lora import ATTENTION, LORA, logprobs, moved, other_base, policy_of
from transformers import AutoModelForCausalLM

from actors.adapted_model import TrainedModelSettings
from actors.adapter_export import AdapterCopy, export_adapter
from actors.adapter_files import CONFIG
from actors.adapter_reference import AdapterReference
from actors.experience_batch import ExperienceBatch
from actors.lora_settings import LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import load_policy, load_tokenizer
from actors.reference_pass import ReferencePass
from actors.update_totals import UpdateTotals
from launch.adapters import adapter_identity, check_identity, check_policy
from launch.cli import main
from launch.demands import estimates, role_demands
from launch.estimate import estimate_learner
from launch.merge import merge_adapter
from launch.overrides import load_config
from launch.prepare import prepare
from launch.tuning_place import reference_demands
from trainers.algorithms import AlgorithmSettings
from trainers.comparisons import write_comparisons
from trainers.errors import InputError
from trainers.experience import encode_logprobs
from trainers.labelled_answers import read_preference
from trainers.metrics import check
from trainers.planted_pairs import preference_rows
from trainers.preference_training import PreferenceSettings
from trainers.prompt_format import PromptFormat

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "builtin:tiny-llama"
CPU = torch.device("cpu")
R8, A4 = LoRASettings(rank=8, alpha=8.0), LoRASettings(rank=4, alpha=4.0)
Q4 = LoRASettings(rank=4, alpha=8.0, target_modules=("q_proj",))


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model(TINY)


def settings(path: str, lora: LoRASettings | None = LORA, **more: Any) -> TrainedModelSettings:
    return TrainedModelSettings(path=path, lora=lora, **more)


def adapter(base: str, folder: Path, lora: LoRASettings = LORA) -> str:
    AdapterCopy(moved(policy_of(base, lora)).adapter)(folder)
    return str(folder)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("cpu-lora-grpo", ("model.lora.rank=0",), ("model.lora.rank", "greater than or equal to 1")),
        ("cpu-lora-grpo", ("learner.zero_stage=3",), ("learner.zero_stage = 3", "use 0, 1 or 2 with LoRA")),
        ("cpu-lora-dpo", ("learner.zero_stage=3",), ("learner.zero_stage = 3", "use 0, 1 or 2 with LoRA")),
        ("cpu-demo", ("model.quantization=nf4",), ("model.quantization = 'nf4'", "cannot be trained; set lora")),
        ("cpu-demo", ("model.base=/base",), ("model.base = '/base'", "only an adapter has one")),
        ("cpu-demo", ("push.lora=adapter",), ("push.lora = 'adapter'", "there is no adapter; leave it out")),
        ("cpu-demo", ("checkpoint.export_merged=false",), ("checkpoint.export_merged = ", "leave it out")),
        ("cpu-demo", ("algorithm.kl_coef=0.1", "reference.source=adapter"), ("model.lora is not set", "leave it out")),
        ("cpu-lora-grpo", ("reference.num_workers=2",), ("reference.num_workers = 2", "set reference.source=actor")),
        ("cpu-lora-grpo", ("reference.source=adapter", "reference.path=/m"), ("reference.path=/m is another model",)),
        ("cpu-lora-dpo", ("algorithm.reference_cache=/x",), ("algorithm.reference_cache = '/x'", "source=actor")),
        ("cpu-lora-grpo", ("model.lora.dropout=0.1",), ("model.lora.dropout = 0.1", "use 0")),
        ("cpu-lora-grpo", ("model.quantization=nf4", "push.lora=adapter"), ("push.lora = 'adapter'", "use merged")),
        ("cpu-lora-grpo", ("model.lora.dropuot=0.1",), ("model.lora.dropuot", "dropout")),
    ],
)
def test_what_an_adapter_cannot_be_is_refused_in_one_line(
    recipe: str, overrides: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["train", recipe, f"run.directory={tmp_path / 'runs'}", *overrides]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and all(part in lines[0] for part in expected), lines
    assert not (tmp_path / "runs").exists()


def test_an_unknown_target_is_refused_with_the_layers_there_are(base: str) -> None:
    lora = LoRASettings(target_modules=("q_proj", "c_attn"))
    with pytest.raises(InputError) as refused:
        check_policy(settings(base, lora))
    line = str(refused.value)
    assert "model.lora.target_modules = 'c_attn'" in line
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in line and "lm_head" not in line


def test_the_layers_of_a_critics_adapter_are_looked_for_before_anything_starts() -> None:
    ppo = ("algorithm.name=ppo", "critic.lora.rank=4", "critic.lora.target_modules=[c_attn]")
    with pytest.raises(InputError, match="critic.lora.target_modules = 'c_attn': the model has no linear layer"):
        prepare(load_config("cpu-two-by-two", ppo).config)


@pytest.mark.parametrize(
    ("lora", "make", "expected"),
    [
        (None, lambda base, at: adapter(base, at), "is an adapter, not a whole model; set model.lora"),
        (R8, lambda base, at: adapter(base, at), "model.lora.rank = 8: the adapter in model.path has 4"),
        (A4, lambda base, at: adapter(base, at), "set model.lora.alpha=8"),
        (Q4, lambda base, at: adapter(base, at), "the model has no place for it"),
        (LORA, lambda base, at: (adapter(base, at / "a"), other_base(base, at / "b")), "trained on another base than"),
        (LORA, lambda base, at: renamed(base, at), "its base '/gone' is no model folder on this machine; set model"),
        (LORA, lambda base, at: broken(base, at), "adapter_model.safetensors cannot be read"),
        (LORA, lambda base, at: (base, base), "is a whole model, which has no base"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_or_shape_is_refused_in_one_line(
    base: str, lora: LoRASettings | None, make: Callable[[str, Path], Any], expected: str, tmp_path: Path
) -> None:
    made = make(base, tmp_path)
    path, of = (made, None) if isinstance(made, str) else made
    with pytest.raises(InputError) as refused:
        check_policy(TrainedModelSettings.model_construct(path=path, lora=lora, base=of, quantization=None))
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def renamed(base: str, folder: Path) -> str:
    """An adapter whose base lies elsewhere."""
    path = Path(adapter(base, folder)) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone"}))
    return str(folder)


def broken(base: str, folder: Path) -> str:
    (Path(adapter(base, folder)) / "adapter_model.safetensors").write_bytes(b"0" * 20)
    return str(folder)


def test_an_adapter_is_gone_on_from_on_the_base_it_names_or_the_one_that_is_given(base: str, tmp_path: Path) -> None:
    folder = renamed(base, tmp_path / "a")
    shutil.copytree(base, tmp_path / "moved")
    found = check_policy(settings(folder, base=str(tmp_path / "moved")), served_from_disk=True)
    assert found.path == str(tmp_path / "moved") and found.adapter == folder
    found = check_policy(settings(adapter(base, tmp_path / "b")))
    assert found.path == base and found.facts.num_adapter_params == 2 * 4 * (128 + 96 + 96 + 128 + 3 * 192)


def test_quantisation_without_its_library_is_refused_with_how_to_install_it(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.quantization.importlib.util.find_spec", lambda name: None)
    told = r"model.quantization = 'nf4': bitsandbytes is not installed; pip install 'burnish\[qlora\]'"
    with pytest.raises(InputError, match=told):
        check_policy(settings(base, quantization="nf4"))


def test_weights_under_other_names_are_pushed_merged(base: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name.replace("model.", "language_model.", 1): t for name, t in load_file(file).items()}, file)
    with pytest.raises(InputError, match="set push.lora=merged"):
        check_policy(settings(str(tmp_path / "m")), served_from_disk=True)
    check_policy(settings(str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"lora": None}, "model.lora = None: the checkpoint of step 7 holds an adapter"),
        ({"lora": LoRASettings(rank=5, alpha=8.0)}, "model.lora.rank = 5: the checkpoint of step 7 was made with 4"),
        ({"quantization": "nf4"}, "model.quantization = 'nf4': the checkpoint of step 7 was made with None"),
        ({"path": "other"}, "trained on another base"),
    ],
)
def test_a_checkpoint_of_another_adapter_or_base_is_not_gone_on_from(
    base: str, now: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    saved = json.loads(json.dumps(adapter_identity(settings(base))))
    check_identity(saved, settings(base, LoRASettings(rank=4, alpha=8.0, dropout=0.5)), 7)
    if "path" in now:
        now = {"path": other_base(base, tmp_path)}
    with pytest.raises(InputError, match=expected):
        check_identity(saved, settings(base).model_copy(update=now), 7)
    with pytest.raises(InputError, match="holds the whole model"):
        check_identity(None, settings(base), 7)


# --- who the reference is -------------------------------------------------------------------------


def test_with_an_adapter_no_reference_is_started_unless_it_is_asked_for() -> None:
    def roles(*overrides: str) -> set[str]:
        return {demand.name for demand in role_demands(load_config("cpu-lora-grpo", overrides).config, False)}

    assert "reference" not in roles()
    assert "reference" in roles("reference.source=actor") and "reference" in roles("reference.path=/models/other")
    config = load_config("cpu-lora-dpo").config
    assert config.own_reference and reference_demands(config, False) == []
    config = load_config("cpu-lora-dpo", ("reference.source=actor",)).config
    assert not config.own_reference and len(reference_demands(config, False)) == 1


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_policys_own_reference_gives_the_gradient_of_one_that_is_asked(base: str, placement: str) -> None:
    estimator = "k3" if placement == "loss" else "k1"
    algorithm = AlgorithmSettings(kl_coef=0.3, kl_placement=placement, kl_estimator=estimator, scale="none")
    groups = recorded_batch()
    plain = PlainLearner(load_policy(base, 16), algorithm)
    asked = []
    batch = ExperienceBatch(groups, algorithm, MAX_TOKENS)
    rows = plain._proximal(batch)  # of the base
    for group, start in zip(groups, np.cumsum([0, *(g.summary.num_samples for g in groups)])):
        own = rows[start : start + group.summary.num_samples]
        asked.append(replace(group, reference_payload=encode_logprobs(own)))
    alone = [replace(group, reference_payload=None) for group in groups]
    found = []
    for own, batch_of in ((True, alone), (False, asked)):
        policy = moved(policy_of(base, reference=own))
        learner = PlainLearner(policy, algorithm)
        learner._reference = AdapterReference(policy.adapter) if own else None
        fixed = learner._before_update(batch_of, None, None)
        assert (fixed.references is not None) == own
        learner._accumulate(fixed, fixed.batch.minibatches()[0], UpdateTotals(CPU), 0, 0)
        found.append([p.grad for _, p in policy.adapter.matrices()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert max(float(g.abs().max()) for g in found[0]) > 1e-4


def test_a_batch_that_was_prepared_is_not_scored_by_the_reference_again(base: str) -> None:
    policy = policy_of(base, reference=True)
    learner = PlainLearner(policy, AlgorithmSettings(kl_coef=0.1))
    batch = ExperienceBatch(recorded_batch(), learner.algorithm, MAX_TOKENS)
    reference, num_scored = AdapterReference(policy.adapter), 0

    def score(batch: ExperienceBatch) -> list[np.ndarray]:
        nonlocal num_scored
        num_scored += 1
        return learner._proximal(batch)

    prepared = reference.logprobs(batch, score)
    assert reference.logprobs(batch, score) is prepared and num_scored == 1
    assert reference.logprobs(batch, score) is not prepared and num_scored == 2
    assert reference.took_s() > 0 and reference.took_s() == 0


def test_preference_learning_starts_at_ln_2_and_its_reference_does_not_move(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(base)
    read = [
        read_preference(row, "row", tokenizer, PromptFormat(chat=False), "sigmoid") for row in preference_rows(16, 3)
    ]
    write_comparisons(read, tmp_path / "train.arrow")
    policy = policy_of(base, reference=True)
    algorithm = PreferenceSettings(name="dpo", loss="sigmoid")
    rank = bare_rank(policy, algorithm, {"train": tmp_path / "train.arrow"}, monkeypatch)
    metrics = [rank.update(range(16), i) for i in range(5)]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["loss"] < 0.6 and metrics[-1]["rewards/margins"] > 0
    assert metrics[0]["learner/reference_s"] > 0
    assert rank._own is not None
    known = dict(rank._own._known)
    again = ReferencePass(rank)  # the policy has moved on, what it started from has not
    for (_, i), row in known.items():
        np.testing.assert_allclose(again.rows("train", [i], [rank._tables["train"][i]])[0], row, rtol=1e-6)
    for name in metrics[0]:
        check(name)


# --- memory ---------------------------------------------------------------------------------------


def test_a_frozen_base_has_no_gradients_and_no_optimizer_states() -> None:
    shape = {"token_budget": 64, "hidden": 8, "layers": 2, "intermediate": 16, "vocab": 32, "logprob_chunk": 16}
    whole = estimate_learner(1000, 1, 4, **shape)
    found = estimate_learner(1000, 1, 4, adapter_params=40, **shape)
    assert found.parts["base"] == 2 * 1000 and found.parts["weights"] == 4 * 40 and found.parts["casts"] == 2 * 40
    assert found.parts["gradients"] == 4 * 40 and found.parts["optimizer"] == 8 * 40 // 4
    assert found.parts["activations"] == whole.parts["activations"]
    assert found.parts["logits"] == 2 * 4 * 16 * 32 + 32 * 8 * 2
    assert found.host_copy == 12 * 40 // 4 and found.total < whole.total
    packed = estimate_learner(1000, 1, 4, adapter_params=40, quantized=(800, 400), **shape)
    assert packed.parts["base"] == 2 * 200 + 400


def test_a_runs_estimate_knows_the_adapter(base: str) -> None:
    config = load_config("cpu-lora-grpo", (f"model.path={TINY}",)).config
    facts = check_policy(config.model).facts
    found = estimates(config, facts, on_gpu=False, compute_bytes=4)
    assert found["learner"].parts["base"] == 4 * facts.num_params and "reference" not in found
    assert found["learner"].parts["weights"] == 4 * facts.num_adapter_params


# --- burnish merge --------------------------------------------------------------------------------


def test_merge_writes_the_model_that_an_export_writes(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = moved(policy_of(base, ATTENTION))
    export_adapter(policy.adapter, tmp_path / "export", torch.float32)
    assert main(["merge", str(tmp_path / "export" / "adapter"), str(tmp_path / "merged")]) == 0
    assert "wrote" in capsys.readouterr().out
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("merged", "export")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_tokenizer(str(tmp_path / "merged")).get_vocab() == load_tokenizer(base).get_vocab()
    plain = load_policy(str(tmp_path / "merged"), 64)
    assert (logprobs(plain) - logprobs(policy)).abs().max() < 1e-5
    with pytest.raises(InputError, match="exists already"):
        merge_adapter(str(tmp_path / "export" / "adapter"), tmp_path / "merged", None)
    with pytest.raises(InputError, match="holds no adapter_config.json"):
        merge_adapter(base, tmp_path / "x", None)
    with pytest.raises(InputError, match="adapter = .*another base"):
        merge_adapter(str(tmp_path / "export" / "adapter"), tmp_path / "x", other_base(base, tmp_path / "other"))


def test_one_layer_of_several_of_a_name_is_adapted_alone_and_merged_again(base: str, tmp_path: Path) -> None:
    one = LORA.model_copy(update={"target_modules": ("layers.1.self_attn.q_proj",)})
    policy = moved(policy_of(base, settings=one))
    assert {name.partition(".lora_")[0] for name, _ in policy.adapter.matrices()} == {"model.layers.1.self_attn.q_proj"}
    export_adapter(policy.adapter, tmp_path / "export", torch.float32)
    merge_adapter(str(tmp_path / "export" / "adapter"), tmp_path / "merged", base)
    assert not torch.equal(logprobs(policy), logprobs(load_policy(base, 64)))
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "merged"), 64)), logprobs(policy), atol=1e-5, rtol=0)


def test_an_adapter_where_a_whole_model_is_needed_is_refused(base: str, tmp_path: Path) -> None:
    from launch.model_facts import check_model_folder

    with pytest.raises(InputError, match="burnish merge"):
        check_model_folder(adapter(base, tmp_path), "judges.0.path")
