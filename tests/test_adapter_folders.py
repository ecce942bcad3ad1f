"""Adapters that others wrote: what is more than A and B is refused and not left out, and so is another base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reward_model_kit import make_folder
from safetensors.torch import load_file, save_file
from test_lora import LORA, hf_logits, moved, other_base, policy_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.adapted_model import TrainedModelSettings
from actors.adapter_export import AdapterCopy, export_adapter
from actors.adapter_files import CONFIG, WEIGHTS, read_header
from actors.lora_settings import LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_model import check_reward_model
from actors.settings import RewardModelSettings
from launch.adapter_start import PLAIN, check_plain, model_name
from launch.adapters import check_policy
from launch.cli import main
from launch.merge import merge_adapter
from launch.model_facts import check_model_folder
from trainers.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "builtin:tiny-llama"
HUB = "meta-llama/Llama-3.2-1B"


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model(TINY)


def by_peft(base: str, folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model with an adapter that peft wrote to ``folder``, whose every tensor has moved."""
    kwargs = {"pad_token_id": 0, "num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    torch.manual_seed(1)
    plain = auto.from_pretrained(base, dtype=torch.float32, **kwargs)
    model = get_peft_model(plain, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return model.eval()


def said_also(folder: Path, **options: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def trained_on(path: Path, lora: LoRASettings = LORA, with_head: bool = False, **more: Any) -> str:
    """The base that a run finds for the adapter in ``path``."""
    return check_policy(TrainedModelSettings(path=str(path), lora=lora, **more), with_head).path


def refusals(path: Path, out: Path, with_head: bool = False) -> list[str]:
    """What a run and `burnish merge` say of an adapter."""
    found = []
    for take in (lambda: trained_on(path, with_head=with_head), lambda: merge_adapter(str(path), out, None)):
        with pytest.raises(InputError) as refused:
            take()
        assert "\n" not in str(refused.value) and not out.exists()
        found.append(str(refused.value))
    return found


# --- more than A and B ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "has modules_to_save=['embed_tokens']"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head']"),
        ({"bias": "lora_only"}, "has bias=lora_only"),
        ({"bias": "all"}, "has bias=all"),
        ({"trainable_token_indices": [5, 7]}, "uses trainable_token_indices"),
        ({"use_dora": True}, "uses use_dora"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "uses alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights=olora"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "holds model.embed_tokens."),
    ],
)
def test_what_peft_trained_beside_a_and_b_is_refused_by_its_name(
    base: str, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    by_peft(base, tmp_path / "a", **options)
    for line in refusals(tmp_path / "a", tmp_path / "out"):
        assert expected in line and "merge it into its base with peft" in line, line


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "PiSSA", "what-comes-next"])
def test_a_start_that_may_change_the_base_is_refused(base: str, init: str, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "a")
    said_also(tmp_path / "a", init_lora_weights=init)
    assert all(f"has init_lora_weights={init}" in line for line in refusals(tmp_path / "a", tmp_path / "out"))


def test_an_option_that_nobody_here_knows_is_refused_and_what_peft_writes_by_default_is_not(
    base: str, tmp_path: Path
) -> None:
    by_peft(base, tmp_path / "a")
    said, header = json.loads((tmp_path / "a" / CONFIG).read_text()), read_header(tmp_path / "a")
    check_plain(said, header, "", with_head=False)
    others = {field.name for field in fields(LoraConfig)} - PLAIN - {"runtime_config"}  # which is never written
    assert {"use_dora", "rank_pattern", "layer_replication", "target_parameters"} < others
    for option in (*sorted(others), "use_something_new"):
        with pytest.raises(InputError, match=f"uses {option}, which is not supported"):
            check_plain(said | {option: [1]}, header, "", with_head=False)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "score.weight"])
def test_a_tensor_that_is_neither_a_nor_b_is_refused_whatever_the_configuration_says(
    base: str, name: str, tmp_path: Path
) -> None:
    by_peft(base, tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(4)}, file)
    assert all(f"holds {name}" in line for line in refusals(tmp_path / "a", tmp_path / "out"))
    with pytest.raises(InputError, match=f"holds {name}, which the model has no place for"):
        policy_of(base, start=str(tmp_path / "a"))  # the rank itself, which drops nothing either


def test_embeddings_that_peft_saves_beside_an_adapter_are_not_left_out(base: str, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "b").save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    assert all("neither A nor B" in line for line in refusals(tmp_path / "a", tmp_path / "out"))


def test_an_adapter_of_nothing_is_refused(base: str, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "a")
    save_file({}, tmp_path / "a" / WEIGHTS)
    assert all("holds no matrix" in line for line in refusals(tmp_path / "a", tmp_path / "out"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_a_start_that_leaves_the_base_is_taken_and_merges_as_peft_merges_it(
    base: str, init: Any, tmp_path: Path
) -> None:
    theirs = by_peft(base, tmp_path / "a", init_lora_weights=True if init == "eva" else init)
    said_also(tmp_path / "a", init_lora_weights=init)  # eva's A comes from data, its base from nowhere else
    assert trained_on(tmp_path / "a") == base
    merge_adapter(str(tmp_path / "a"), tmp_path / "out", None)
    ours = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (ours - hf_logits(theirs.merge_and_unload())).abs().max() < 1e-4


def test_the_head_of_a_reward_model_that_peft_trained_is_taken_and_kept(base: str, tmp_path: Path) -> None:
    theirs = by_peft(base, tmp_path / "a", AutoModelForSequenceClassification, task_type="SEQ_CLS")
    assert set(json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"]) == {"classifier", "score"}
    assert trained_on(tmp_path / "a", with_head=True) == base
    with pytest.raises(InputError, match="the head of a reward model, which a policy has no place for"):
        trained_on(tmp_path / "a")
    lines = merge_adapter(str(tmp_path / "a"), tmp_path / "out", None)
    assert "with the head of a reward model" in lines[0]
    kwargs: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1, "pad_token_id": 0}
    ours = hf_logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", **kwargs))
    assert (ours - hf_logits(theirs)).abs().max() < 1e-4


def test_an_adapter_is_one_also_with_the_configuration_of_its_base_beside_it(base: str, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "a", modules_to_save=["embed_tokens"])
    shutil.copy2(Path(base) / "config.json", tmp_path / "a")
    assert all("has modules_to_save" in line for line in refusals(tmp_path / "a", tmp_path / "out"))
    with pytest.raises(InputError, match="is an adapter, not a whole model"):
        check_model_folder(tmp_path / "a")
    shutil.copy2(Path(base) / "model.safetensors", tmp_path / "a")
    with pytest.raises(InputError, match="beside a whole model, and transformers would load that adapter too"):
        trained_on(tmp_path / "a")


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_no_reward_model_also_with_the_configuration_of_one_beside_it(
    base: str, beside: bool, tmp_path: Path
) -> None:
    by_peft(base, tmp_path / "a", AutoModelForSequenceClassification, task_type="SEQ_CLS")
    if beside:
        make_folder(tmp_path / "a")
    with pytest.raises(InputError, match=r"reward_models.taste.path = .*is an adapter.*burnish merge"):
        check_reward_model(RewardModelSettings(name="taste", path=str(tmp_path / "a")), load_tokenizer(base))


# --- another base ---------------------------------------------------------------------------------


def named(base: str, at: Path, name: str) -> Path:
    """The base in a folder of that name."""
    (at / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, at / name)
    return at / name


def taken(path: Path, on: Path, out: Path) -> bool:
    """Whether the adapter is trained on, and merged, on that base; both or neither."""
    found: list[bool] = []
    takes: tuple[Callable[[], Any], ...] = (
        lambda: trained_on(path, base=str(on)), lambda: merge_adapter(str(path), out, str(on)),
    )  # fmt: skip
    for take in takes:
        try:
            take()
            found.append(True)
        except InputError as error:
            assert f"the adapter was trained on {HUB}" in str(error) and "checked" in str(error)
            found.append(False)
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("folder", "is_it"),
    [
        ("Llama-3.2-1B", True),
        ("mirror/llama-3.2-1b", True),
        ("models--meta-llama--Llama-3.2-1B/snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08", True),
        ("Llama-3.2-3B", False),
        ("models--meta-llama--Llama-3.2-3B/snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08", False),
        ("Llama-3.2-1B/step-000032", False),
    ],
)
def test_an_adapter_without_a_fingerprint_is_taken_on_a_base_of_the_name_it_gives(
    base: str, folder: str, is_it: bool, tmp_path: Path
) -> None:
    by_peft(base, tmp_path / "a")
    said_also(tmp_path / "a", base_model_name_or_path=HUB)
    assert taken(tmp_path / "a", named(base, tmp_path, folder), tmp_path / "out") == is_it


def test_a_base_that_was_looked_at_may_have_any_name(base: str, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "a")
    said_also(tmp_path / "a", base_model_name_or_path=HUB)
    other = str(named(base, tmp_path, "my-copy"))
    with pytest.raises(InputError, match=r"model.base = .*model.base_checked=true"):
        trained_on(tmp_path / "a", base=other)
    assert trained_on(tmp_path / "a", base=other, base_checked=True) == other
    (tmp_path / "Llama-3.2-1B").symlink_to(other)
    assert taken(tmp_path / "a", tmp_path / "Llama-3.2-1B", tmp_path / "linked")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "out"), "--base", other]) == 2
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "out"), "--base", other, "--base-checked"]) == 0
    with pytest.raises(InputError, match="no base is given"):
        merge_adapter(str(tmp_path / "a"), tmp_path / "x", None, base_checked=True)
    with pytest.raises(ValueError, match="base_checked=true: no base is given"):
        TrainedModelSettings(path=str(tmp_path / "a"), lora=LORA, base_checked=True)


def test_the_fingerprint_decides_where_there_is_one_and_names_mean_nothing(base: str, tmp_path: Path) -> None:
    AdapterCopy(moved(policy_of(base)).adapter)(tmp_path / "a")
    said_also(tmp_path / "a", base_model_name_or_path=f"runs/earlier/export/{'step-000032'}")
    same = str(named(base, tmp_path, "snapshots/4e20de36"))
    assert trained_on(tmp_path / "a", base=same) == same
    other = other_base(base, tmp_path / "export" / "step-000032")
    with pytest.raises(InputError, match="trained on another base than"):
        trained_on(tmp_path / "a", base=other, base_checked=True)


def test_a_model_is_called_by_the_last_part_of_its_name_and_a_snapshot_by_its_model() -> None:
    assert model_name(HUB) == model_name("/models/Llama-3.2-1B/") == "llama-3.2-1b"
    assert model_name("/hub/models--Qwen--Qwen3-8B/snapshots/0a1b") == "qwen3-8b"
    assert model_name("") == ""


# --- what is no linear layer ----------------------------------------------------------------------


def mixture(base: str, folder: Path) -> str:
    """A tiny mixture of experts, whose experts are one tensor each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, moe_intermediate_size=64, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=256, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return str(folder)


def test_all_linear_is_refused_where_most_of_a_model_is_in_no_linear_layer(base: str, tmp_path: Path) -> None:
    path = mixture(base, tmp_path / "m")
    with pytest.raises(InputError) as refused:
        check_policy(TrainedModelSettings(path=path, lora=LORA))
    line = str(refused.value)
    assert "model.lora.target_modules = 'all-linear'" in line and "model.layers.N.mlp.experts.gate_up_proj" in line
    assert "% of the parameters are in no linear layer" in line and "q_proj" in line
    some = LORA.model_copy(update={"target_modules": ("q_proj", "v_proj")})
    facts = check_policy(TrainedModelSettings(path=path, lora=some)).facts
    assert facts.num_adapter_params == 2 * 4 * ((32 + 32) + (32 + 16))
    check_policy(TrainedModelSettings(path=base, lora=LORA))  # which is linear layers


# --- burnish merge --------------------------------------------------------------------------------


def test_merge_says_what_it_merged_into_what(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_adapter(moved(policy_of(base)).adapter, tmp_path / "e", torch.float32)
    assert main(["merge", str(tmp_path / "e" / "adapter"), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("14 layers, rank 4, scale 2")
    assert f"{base}, by its fingerprint" in lines[1]
    assert lines[1].endswith("as it lies on the disk, as it was trained on")
    assert lines[2] == f"wrote {tmp_path / 'out'}: the merged model in float32"
    by_peft(base, tmp_path / "p")
    assert main(["merge", str(tmp_path / "p"), str(tmp_path / "more")]) == 0
    said = capsys.readouterr().out
    assert "it has no fingerprint of it" in said and "does not say in which precision" in said
