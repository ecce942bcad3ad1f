"""Adapters: the base stays as it is, a push of the adapter is a push of the model, files are peft's.

peft runs on a tiny model; real engines are in tests/test_lora_runs.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.adapter_export import AdapterCopy, export_adapter
from actors.adapter_files import CONFIG, WEIGHTS, base_fingerprint, read_header
from actors.adapter_source import AdapterSource, MergedSource, weight_source
from actors.fingerprints import compare, served_manifest
from actors.lora_settings import LoRAPlan, LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import PackedPolicy, load_policy, load_tokenizer
from actors.scalar_model import PackedScalar, load_scalar
from actors.sequence_packing import text_pack
from cluster.errors import DamagedError
from cluster.low_rank import merge
from cluster.merged_tensors import MergedTensors
from cluster.weight_channel import WeightManifest, bit_sum, read_weight_file

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "builtin:tiny-llama"
CPU = torch.device("cpu")
LORA = LoRASettings(rank=4, alpha=8.0)
ATTENTION = LoRASettings(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"), rslora=True)
# Largest difference of a log-prob, in nats, between the adapter beside its base and merged into it.  bfloat16 keeps 8
# bits: merging rounds each weight once more, and the tiny model's log-probs are near -5.8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model(TINY)


def policy_of(
    base: str, settings: LoRASettings = LORA, dtype: torch.dtype = torch.float32, **plan: Any
) -> PackedPolicy:  # fmt: skip
    torch.manual_seed(3)
    return load_policy(base, 64, dtype, lora=LoRAPlan(settings, **plan))


def moved(policy: Any, size: float = 0.2, seed: int = 5) -> Any:
    """The same model with an update that is not 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.adapter.matrices():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * size)
    return policy


def texts() -> list[np.ndarray]:
    draw = np.random.default_rng(4)
    return [draw.integers(3, 259, n, dtype=np.int32) for n in (17, 5, 29, 11)]


def logprobs(policy: PackedPolicy, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """float32 [N] of all tokens of all texts."""
    rows = texts()
    masks = [np.arange(len(row)) > 0 for row in rows]
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found, _ = policy(text_pack(range(len(rows)), rows, masks, CPU), 1.0, with_entropy=False)
    return found


def sums(policy: Any) -> dict[str, int]:
    return {name: bit_sum(tensor) for name, tensor in policy.adapter.base()}


def engine(rank: int = 0) -> Any:
    return SimpleNamespace(rank=rank, device=CPU)


# --- training -------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_only_its_matrices_are_trained(base: str) -> None:
    plain, policy = load_policy(base, 64), policy_of(base)
    assert torch.equal(logprobs(plain), logprobs(policy))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert all(p.dtype == torch.float32 for _, p in policy.adapter.matrices())  # type: ignore[union-attr]
    num_layers, shapes = 2, [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert count == num_layers * sum(4 * (rows + columns) for rows, columns in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_change_the_adapter_and_leave_every_bit_of_the_base(base: str, dtype: str) -> None:
    compute = getattr(torch, dtype)
    policy = policy_of(base, dtype=compute)
    before, started = sums(policy), logprobs(policy, compute)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    rows = texts()
    pack = text_pack(range(len(rows)), rows, [np.arange(len(row)) > 0 for row in rows], CPU)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
            loss = -policy(pack, 1.0)[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    assert sums(policy) == before
    with policy.adapter.off():  # type: ignore[union-attr]
        assert torch.equal(logprobs(policy, compute), started)
    assert not torch.equal(logprobs(policy, compute), started)


def test_the_gradient_of_an_adapter_does_not_depend_on_how_a_batch_is_packed(base: str) -> None:
    policy, rows = moved(policy_of(base)), texts()
    masks = [np.arange(len(row)) > 0 for row in rows]
    found = []
    for cut in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        policy.zero_grad()
        for members in cut:
            (-policy(text_pack(members, rows, masks, CPU), 1.0)[0].sum() / 58).backward()
        found.append([p.grad.clone() for _, p in policy.adapter.matrices()])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_the_scale_is_alpha_over_rank_or_its_root(base: str) -> None:
    assert LORA.scale == 2.0 and ATTENTION.scale == pytest.approx(4 / math.sqrt(2))
    for settings in (LORA, ATTENTION):
        deltas = policy_of(base, settings).adapter.deltas()  # type: ignore[union-attr]
        assert {delta.scale for delta in deltas} == {settings.scale}


# --- pushes ---------------------------------------------------------------------------------------


def received(source: AdapterSource, base: str, path: Path, dtype: str) -> tuple[WeightManifest, MergedTensors]:
    """A push by file as a vLLM worker takes it in."""
    said = source.publish_file(str(path), "0.3", dtype)
    assert said is not None
    manifest = WeightManifest.from_dict(json.loads(json.dumps(said)))
    version, tensors = read_weight_file(path)
    assert version == "0.3" and manifest.low_rank is not None
    return manifest, MergedTensors(manifest.low_rank, Path(base), dict(tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [LORA, ATTENTION])
def test_a_push_of_the_adapter_is_a_push_of_the_merged_model(
    base: str, settings: LoRASettings, dtype: str, tmp_path: Path
) -> None:
    compute = getattr(torch, dtype)
    policy = moved(policy_of(base, settings, compute), 0.05)
    manifest, merged = received(AdapterSource(engine(), policy.adapter), base, tmp_path / "adapter", dtype)
    served = dict(merged.tensors(CPU))
    whole = MergedSource(engine(), policy.adapter).publish_file(str(tmp_path / "merged"), "0.3", dtype)
    assert whole is not None
    pushed = dict(read_weight_file(tmp_path / "merged")[1])
    assert served.keys() == pushed.keys() and all(torch.equal(served[name], pushed[name]) for name in pushed)
    assert all(tensor.dtype == compute for tensor in served.values())
    assert whole["low_rank"] is None and manifest.num_bytes < WeightManifest.from_dict(whole).num_bytes / 4
    # What is served scores as the learner does, whose adapter stands beside its base.
    plain = load_policy(base, 64, compute)
    plain.hf_model.load_state_dict(served)
    difference = (logprobs(plain, compute) - logprobs(policy, compute)).abs().max()
    assert difference <= TOLERANCE[dtype]
    with policy.adapter.off():
        assert (logprobs(policy, compute) - logprobs(plain, compute)).abs().max() > 2 * difference


def test_what_a_generator_made_is_what_must_lie_in_its_memory(base: str, tmp_path: Path) -> None:
    policy = moved(policy_of(base))
    sent, merged = received(AdapterSource(engine(), policy.adapter), base, tmp_path / "adapter", "float32")
    in_memory = {name: (bit_sum(tensor), tensor.numel()) for name, tensor in merged.tensors(CPU)}
    expected = served_manifest(sent, [merged.served, merged.served], "generator-0")
    assert compare(expected, [in_memory], {}, "generator-0").num_after_load == len(in_memory)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(DamagedError, match=f"generator-0: {name}"):
        compare(expected, [in_memory | {name: (1, in_memory[name][1])}], {}, "generator-0")
    with pytest.raises(DamagedError, match=f"different tensors {name}"):
        served_manifest(sent, [merged.served, merged.served | {name: (1, 2)}], "generator-0")


def test_pushes_do_not_add_up_rounding(base: str, tmp_path: Path) -> None:
    policy = policy_of(base, dtype=torch.bfloat16)
    source = AdapterSource(engine(), policy.adapter)  # type: ignore[arg-type]
    for seed in range(20):
        moved(policy, 0.3, seed)
        served = dict(received(source, base, tmp_path / "weights", "bfloat16")[1].tensors(CPU))
    moved(policy, 0.0)
    back = dict(received(source, base, tmp_path / "weights", "bfloat16")[1].tensors(CPU))
    there = dict(policy.adapter.base())  # type: ignore[union-attr]
    assert all(torch.equal(back[name], there[name]) for name in there)
    assert not all(torch.equal(served[name], there[name]) for name in there)


def test_another_base_or_a_lost_matrix_is_no_push(base: str, tmp_path: Path) -> None:
    policy = moved(policy_of(base))
    manifest, merged = received(AdapterSource(engine(), policy.adapter), base, tmp_path / "adapter", "float32")
    assert manifest.low_rank is not None
    other = other_base(base, tmp_path / "other")
    with pytest.raises(DamagedError, match="model.norm.weight has fingerprint .* it is another base"):
        dict(MergedTensors(manifest.low_rank, Path(other), merged._sent).tensors(CPU))
    lost = "model.layers.0.self_attn.q_proj.lora_B.weight"
    with pytest.raises(DamagedError, match=f"{lost} was announced .* did not come"):
        sent = {name: tensor for name, tensor in merged._sent.items() if name != lost}
        dict(MergedTensors(manifest.low_rank, Path(base), sent).tensors(CPU))


def test_staged_buckets_hold_the_adapter_in_float32_whatever_the_model_computes_in(base: str, tmp_path: Path) -> None:
    policy = moved(policy_of(base, dtype=torch.bfloat16))
    source = weight_source(engine(), policy.adapter)
    staged = source.stage("0.1", "bfloat16", 4096, serves=True)
    assert staged is not None and {t["dtype"] for t in staged["tensors"]} == {"float32"}
    assert staged["low_rank"]["dtype"] == "bfloat16" and len(source._staged) > 3
    written = source.write_staged(str(tmp_path / "late"))
    assert written["low_rank"] == staged["low_rank"] and written["fingerprints"] == staged["fingerprints"]
    assert isinstance(weight_source(engine(), policy_of(base, merged_push=True).adapter), MergedSource)


def test_merging_is_the_sum_in_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    base, down, up = (torch.randn(shape, generator=draw) for shape in ((6, 5), (2, 5), (6, 2)))
    expected = base.double() + 0.7 * up.double() @ down.double()
    assert (merge(base, down, up, 0.7).double() - expected).abs().max() < 1e-6
    assert torch.equal(merge(base.bfloat16(), down, torch.zeros_like(up), 0.7), base.bfloat16())


# --- the reference --------------------------------------------------------------------------------


def test_a_policy_that_goes_on_from_an_adapter_is_its_own_reference_as_it_started(base: str, tmp_path: Path) -> None:
    first = moved(policy_of(base))
    AdapterCopy(first.adapter)(tmp_path)
    policy = policy_of(base, start=str(tmp_path), reference=True)
    started = logprobs(policy)
    assert torch.equal(started, logprobs(first))
    moved(policy, 0.4, seed=9)
    now = logprobs(policy)
    with policy.adapter.as_started():  # type: ignore[union-attr]
        assert torch.equal(logprobs(policy), started)
    assert torch.equal(logprobs(policy), now) and not torch.equal(now, started)
    assert all(p.requires_grad for _, p in policy.adapter.matrices())  # type: ignore[union-attr]


# --- files ----------------------------------------------------------------------------------------


def other_base(base: str, folder: Path) -> str:
    """A model of the same shape with one tensor changed."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return str(folder)


def hf_logits(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(texts()[0].astype(np.int64))[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("settings", [LORA, ATTENTION])
def test_peft_loads_the_adapter_and_transformers_the_merged_model(
    base: str, settings: LoRASettings, tmp_path: Path
) -> None:
    from peft import PeftModel

    policy = moved(policy_of(base, settings))
    export_adapter(policy.adapter, tmp_path / "out", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = hf_logits(plain)
    by_peft = hf_logits(PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter")).eval())
    merged = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (by_peft - merged).abs().max() < 1e-5 < (by_peft - untouched).abs().max()
    said = json.loads((tmp_path / "out" / "adapter" / CONFIG).read_text())
    assert said["base_model_name_or_path"] == base and said["r"] == settings.rank
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())) >= {"architectures", "hidden_size"}


def test_an_adapter_that_peft_wrote_is_gone_on_from(base: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    theirs = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    expected = hf_logits(theirs.eval())
    policy = policy_of(base, start=str(tmp_path))
    export_adapter(policy.adapter, tmp_path / "out", torch.float32)  # type: ignore[arg-type]
    merged = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (merged - expected).abs().max() < 1e-4


def test_a_reward_model_trains_its_head_beside_the_adapter_and_saves_both(base: str, tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    scalar = moved(load_scalar(base, "model.path", torch.bfloat16, lora=LoRAPlan(LORA)))
    head = scalar.hf_model.score.weight
    assert head.requires_grad and head.dtype == torch.float32
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(2)))
    assert not scalar.hf_model.model.norm.weight.requires_grad
    scalar.hf_model.config.pad_token_id = 0
    export_adapter(scalar.adapter, tmp_path, torch.float32)
    kwargs: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1}
    plain = AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=0, **kwargs)
    by_peft = hf_logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval())
    merged = hf_logits(AutoModelForSequenceClassification.from_pretrained(tmp_path, **kwargs))
    assert merged.shape == (1, 1) and (by_peft - merged).abs().max() < 0.05 * by_peft.abs().max()
    again: PackedScalar = load_scalar(base, "model.path", lora=LoRAPlan(LORA, start=str(tmp_path / "adapter")))
    assert torch.equal(again.hf_model.score.weight, head)  # type: ignore[arg-type,union-attr]


def test_a_checkpoint_holds_the_adapter_as_peft_reads_it_and_its_bytes_are_reported(base: str, tmp_path: Path) -> None:
    from actors.shards import Snapshot
    from actors.state_saving import StateWriter
    from cluster.manifest import digest_of

    policy = moved(policy_of(base))
    writer, copied = StateWriter(), AdapterCopy(policy.adapter)
    moved(policy, 9.0)  # training goes on
    snapshot = Snapshot((), (), (), torch.zeros(4, dtype=torch.uint8), {})
    writer.begin(tmp_path / "rank-0000.safetensors", lambda: snapshot, copied)
    outcome = writer.outcome(30.0)
    assert outcome is not None and outcome.error is None
    assert set(outcome.files) == {"rank-0000.safetensors", WEIGHTS, CONFIG}
    assert all(digest_of(tmp_path / name) == entry.blake2b for name, entry in outcome.files.items())
    header = read_header(tmp_path)
    assert header.base == base_fingerprint(base) and len(header.shapes) == 28
    found = policy_of(base, start=str(tmp_path))
    expected = dict(moved(policy_of(base)).adapter.matrices())
    assert all(torch.equal(p, expected[name]) for name, p in found.adapter.matrices())  # type: ignore[union-attr]
    writer.close()


def test_the_fingerprint_of_a_base_is_of_its_tensors_and_not_of_its_files(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert base_fingerprint(str(tmp_path / "sharded")) == base_fingerprint(base)
    assert base_fingerprint(other_base(base, tmp_path / "other")) != base_fingerprint(base)


def test_a_manifest_survives_its_way_through_dictionaries(base: str) -> None:
    source = weight_source(engine(), policy_of(base).adapter)
    staged = source.stage("0.1", "float32", 2**20, serves=True)
    assert staged is not None
    manifest = WeightManifest.from_dict(staged)
    assert WeightManifest.from_dict(asdict(manifest)) == manifest
