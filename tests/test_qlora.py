"""QLoRA: a frozen base in 4 or 8 bits, and that what is trained, exported and merged is one model.

bitsandbytes is an optional extra (`pip install 'burnish[qlora]'`): what computes with it is skipped where it is absent.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import bare_rank, comparisons, tokenizer
from preference_kit import run as run_preferences
from test_end_to_end import SMALL, Start, start
from test_lora import CPU, LORA, logprobs, moved, policy_of, sums, texts
from torch import nn
from transformers import AutoModelForCausalLM

from actors.adapted_model import TrainedModelSettings
from actors.adapter_export import AdapterCopy, export_adapter
from actors.adapter_files import WEIGHTS, read_header
from actors.lora_settings import QUANTIZED_BYTES, LoRAPlan
from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.quantization import dequantised, is_packed
from actors.scalar_model import load_scalar
from actors.sequence_packing import text_pack
from launch.adapters import check_policy
from launch.cli import main
from launch.demands import estimates
from launch.model_facts import check_model_folder
from launch.overrides import load_config
from trainers.comparisons import write_comparisons
from trainers.errors import InputError
from trainers.preference_training import PreferenceSettings

__all__ = ["start", "tokenizer"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_LIBRARY = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="bitsandbytes is not installed: burnish[qlora]")
KINDS = tuple(QUANTIZED_BYTES)
# Largest difference of a log-prob, in nats, between the adapter beside its quantised base and merged into the
# dequantised one.  int8 quantises what a layer is given too, a row at a time (arXiv:2208.07339), and a merged model
# does not; in bfloat16 a merged weight is rounded once more.
TOLERANCE = {
    ("nf4", "float32"): 1e-5, ("fp4", "float32"): 1e-5, ("int8", "float32"): 0.02,
    ("nf4", "bfloat16"): 0.03, ("fp4", "bfloat16"): 0.03, ("int8", "bfloat16"): 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model("builtin:tiny-llama")


def exported(base: str, folder: Path, kind: str | None) -> str:
    """An adapter that says it was trained on a base of that precision."""
    policy = moved(policy_of(base))
    policy.adapter.plan = replace(policy.adapter.plan, quantization=kind)
    AdapterCopy(policy.adapter)(folder)
    return str(folder)


# --- what an adapter says, which needs no library ---------------------------------------------------


def test_an_adapter_says_in_which_precision_its_base_was(base: str, tmp_path: Path) -> None:
    for kind in (None, "nf4", "int8"):
        assert read_header(exported(base, tmp_path / str(kind), kind)).quantization == (kind or "none")


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ("nf4", None, "trained on its base in nf4; set model.quantization=nf4, or merge it"),
        ("nf4", "int8", "trained on its base in nf4; set model.quantization=nf4"),
        (None, "nf4", "trained on its base as it lies on the disk, not quantised; leave it out, or merge it"),
    ],
)
def test_an_adapter_is_not_gone_on_from_in_another_precision(
    base: str, trained: str | None, asked: Any, expected: str, tmp_path: Path
) -> None:
    path = exported(base, tmp_path / "a", trained)
    with pytest.raises(InputError) as refused:
        check_policy(TrainedModelSettings(path=path, lora=LORA, quantization=asked))
    assert str(refused.value).startswith(f"model.quantization = {asked!r}: ") and expected in str(refused.value)


def test_of_an_adapter_that_does_not_say_nothing_is_asked(base: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = exported(base, tmp_path / "a", "nf4")
    save_file(load_file(f"{path}/{WEIGHTS}"), f"{path}/{WEIGHTS}")  # peft's have no metadata of Burnish's
    assert read_header(path).quantization is None
    assert check_policy(TrainedModelSettings(path=path, lora=LORA)).path == base


def test_without_the_library_an_adapter_of_a_quantised_base_is_merged_only_knowingly(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = exported(base, tmp_path / "a", "nf4"), str(tmp_path / "out")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "actors.quantization.importlib.util.find_spec",
        lambda name, *more: None if name == "bitsandbytes" else found(name, *more),
    )
    assert main(["merge", path, out]) == 2
    said = capsys.readouterr().err
    assert "--quantization = 'nf4': bitsandbytes is not installed; pip install 'burnish[qlora]'" in said
    assert "--quantization none merges into the base as it lies on the disk, which is another model" in said
    assert main(["merge", path, out, "--quantization", "none"]) == 0
    assert "as it lies on the disk, WHICH IS ANOTHER MODEL: the adapter was trained on a base in nf4" in (
        capsys.readouterr().out
    )


def test_a_precision_of_another_time_is_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(base, tmp_path / "a", "ternary")
    assert main(["merge", path, str(tmp_path / "out")]) == 2
    assert "it was trained on a base in ternary, which is not known here" in capsys.readouterr().err


# --- the numbers ------------------------------------------------------------------------------------


def quantised_layer(base: str, kind: str, weight: torch.Tensor) -> Any:
    """A linear layer of that weight as a quantised model has it."""
    model = load_policy(base, 64, torch.float32, lora=LoRAPlan(LORA, quantization=kind)).hf_model  # type: ignore[arg-type]
    made = type(model.get_submodule("model.layers.0.self_attn.q_proj.base_layer"))
    rows, columns = weight.shape
    more = {"has_fp16_weights": False} if kind == "int8" else {"quant_type": kind, "compress_statistics": True}
    layer = made(columns, rows, bias=False, **more)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def normal_float() -> torch.Tensor:
    """The 16 numbers of nf4 (arXiv:2305.14314, section 3): quantiles of a normal distribution, 0, the largest 1."""
    ends = torch.tensor([0.9677083], dtype=torch.float64)
    up, down = (torch.linspace(ends.item(), 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    found = torch.cat([torch.special.ndtri(up), torch.zeros(1, dtype=torch.float64), -torch.special.ndtri(down)])
    return (found / found.max()).sort().values


@needs_library
def test_four_bits_are_the_nearest_quantile_of_the_largest_weight_of_each_64(base: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = (torch.rand(8, 128, generator=draw) - 0.5) * 0.9
    weight.view(-1, 64)[:, 7] = 0.5  # the same in every block: their second quantisation then loses nothing
    found = dequantised(quantised_layer(base, "nf4", weight)).double()
    codes = 0.5 * normal_float()
    nearest = codes[(weight.double()[..., None] - codes).abs().argmin(-1)]
    torch.testing.assert_close(found, nearest, atol=1e-5, rtol=0)
    assert len(found.unique()) == 16


@needs_library
def test_eight_bits_are_127ths_of_the_largest_weight_of_each_row(base: str) -> None:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (6, 64), generator=draw).float()
    whole[:, 3] = 127
    weight = whole * torch.tensor([1.0, 0.5, 2.0, 0.25, 0.125, 4.0])[:, None] / 1024
    assert torch.equal(dequantised(quantised_layer(base, "int8", weight)), weight)
    rough = weight + 0.3 / 1024 * torch.rand(weight.shape, generator=draw)
    error = (dequantised(quantised_layer(base, "int8", rough)) - rough).abs()
    assert error.max() > 0 and (error <= rough.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)).all()


# --- training ---------------------------------------------------------------------------------------


def frozen_bits(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Every byte that is not trained, as it lies in memory."""
    return {
        name: p.detach().clone().contiguous().view(torch.uint8)
        for name, p in policy.named_parameters()
        if not p.requires_grad
    }


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised_and_the_rest_is_not(base: str, kind: Any) -> None:
    policy = policy_of(base, quantization=kind)
    packed = {name for name, p in policy.hf_model.named_parameters() if is_packed(p)}
    assert packed == {f"{name}.base_layer.weight" for name in policy.adapter.targets}  # type: ignore[union-attr]
    taken = sum(p.numel() * p.element_size() for p in policy.hf_model.parameters() if is_packed(p))
    facts = check_policy(TrainedModelSettings(path=base, lora=LORA, quantization=kind)).facts
    assert facts.quantized == (sum(o * i for o, i in policy.adapter.targets.values()), taken)  # type: ignore[union-attr]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_dpo_on_a_quantised_base_starts_at_ln_2_and_leaves_its_every_bit(
    base: str, kind: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(base, quantization=kind, reference=True)
    before, read = frozen_bits(policy), sums(policy)
    started = {name: p.detach().clone() for name, p in policy.adapter.matrices()}  # type: ignore[union-attr]
    write_comparisons(comparisons("sigmoid", tokenizer), tmp_path / "train.arrow")
    algorithm = PreferenceSettings(name="dpo", loss="sigmoid")
    rank = bare_rank(policy, algorithm, {"train": tmp_path / "train.arrow"}, monkeypatch)
    losses = [rank.update(range(9), i)["loss"] for i in range(5)]
    # Rounding flips some of the eight bits that int8 gives what a layer is given; the reference is in another pack.
    within = 1e-3 if kind == "int8" else 1e-5
    assert losses[0] == pytest.approx(math.log(2), abs=within) and losses[-1] < 0.6
    after = frozen_bits(policy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sums(policy) == read
    assert all(not torch.equal(p, started[name]) for name, p in policy.adapter.matrices())  # type: ignore[union-attr]


@needs_library
def test_a_reward_model_on_a_quantised_base_has_a_head_in_float32_that_is_trained(base: str, tmp_path: Path) -> None:
    scalar = load_scalar(base, "model.path", torch.bfloat16, lora=LoRAPlan(LORA, quantization="nf4"))
    head: Any = scalar.hf_model.score
    assert head.weight.dtype == torch.float32 and head.weight.requires_grad and not is_packed(head.weight)
    rows = texts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scalar(text_pack(range(len(rows)), rows, [np.arange(len(row)) > 0 for row in rows], CPU))
    (scores - 1).square().mean().backward()
    assert head.weight.grad.abs().max() > 0
    scalar.hf_model.config.pad_token_id = 0
    export_adapter(scalar.adapter, tmp_path, torch.float32)  # type: ignore[arg-type]
    again = load_scalar(str(tmp_path), "model.path")
    assert torch.equal(again.hf_model.score.weight, head.weight)  # type: ignore[union-attr]


# --- one model --------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_export_scores_as_the_model_that_was_trained(
    base: str, kind: Any, dtype: str, tmp_path: Path
) -> None:
    compute = getattr(torch, dtype)
    policy = moved(policy_of(base, dtype=compute, quantization=kind))
    export_adapter(policy.adapter, tmp_path / "out", compute)
    merged = load_policy(str(tmp_path / "out"), 64, compute)
    difference = (logprobs(merged, compute) - logprobs(policy, compute)).abs().max()
    assert difference <= TOLERANCE[kind, dtype]
    if kind != "int8":  # whose weights are nearer to the base's than its rounding of what they are given
        plain = moved(policy_of(base, dtype=compute))
        assert (logprobs(plain, compute) - logprobs(policy, compute)).abs().max() > 2 * difference
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_model_that_was_trained_and_another_one_only_when_it_is_told_to(
    base: str, kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = moved(policy_of(base, quantization=kind))
    export_adapter(policy.adapter, tmp_path / "export", torch.float32)
    adapter = str(tmp_path / "export" / "adapter")
    assert read_header(adapter).quantization == kind
    assert main(["merge", adapter, str(tmp_path / "merged")]) == 0
    assert f"quantised to {kind} and dequantised, as it was trained on" in capsys.readouterr().out
    assert main(["merge", adapter, str(tmp_path / "other"), "--quantization", "none"]) == 0
    assert "WHICH IS ANOTHER MODEL" in capsys.readouterr().out
    states = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("export", "merged", "other")
    }
    assert all(torch.equal(states["export"][name], states["merged"][name]) for name in states["export"])
    assert not all(torch.equal(states["export"][name], states["other"][name]) for name in states["export"])
    # What peft wrote says nothing of its base: it is merged as it is told to.
    from safetensors.torch import load_file, save_file

    file = Path(adapter) / WEIGHTS
    save_file(load_file(file), file)
    assert main(["merge", adapter, str(tmp_path / "told"), "--quantization", kind]) == 0
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "told", dtype=torch.float32).state_dict()
    assert all(torch.equal(states["export"][name], told[name]) for name in told)


@needs_library
def test_an_adapter_of_a_quantised_base_is_gone_on_from_where_it_was(base: str, tmp_path: Path) -> None:
    first = moved(policy_of(base, quantization="nf4"))
    AdapterCopy(first.adapter)(tmp_path)
    found = check_policy(TrainedModelSettings(path=str(tmp_path), lora=LORA, quantization="nf4"))
    policy = policy_of(found.path, quantization="nf4", start=found.adapter, reference=True)
    assert torch.equal(logprobs(policy), logprobs(first))


# --- PPO's critic -----------------------------------------------------------------------------------


def test_a_critic_is_quantised_under_an_adapter_alone_and_counted_so_whatever_the_policy_is(base: str) -> None:
    ppo = ["algorithm.name=ppo", f"model.path={base}"]
    with pytest.raises(InputError, match=r"critic.quantization.*cannot be trained"):
        load_config("cpu-two-by-two", [*ppo, "critic.quantization=nf4"])
    adapter = [*ppo, "critic.lora.rank=4", "critic.zero_stage=1"]
    # Of 7B; the tiny one is mostly its table of tokens.
    facts = replace(check_model_folder(base), num_params=7 * 10**9, hidden=4096, intermediate=11008, layers=32)
    of_policy = replace(facts, num_adapter_params=10**7, quantized=(6 * 10**9, 3 * 10**9))
    for known in (facts, of_policy):
        whole, lora, int8, nf4 = (
            estimates(load_config("cpu-two-by-two", more).config, known, True, 2)["critic"].total
            for more in (ppo, adapter, [*adapter, "critic.quantization=int8"], [*adapter, "critic.quantization=nf4"])
        )
        assert whole > 2 * lora and lora - int8 > 4e9 and int8 - nf4 == pytest.approx((lora - nf4) / 3, rel=0.2)


# --- whole runs -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.slow
def test_a_dpo_run_on_a_quantised_base_starts_at_ln_2_resumes_and_says_what_it_was_trained_on(tmp_path: Path) -> None:
    more = ("model.lora.rank=4", "model.quantization=nf4", "learner.optimizer.lr=1e-2")
    whole = run_preferences(tmp_path, "sigmoid", *more, name="whole")
    run_preferences(tmp_path, "sigmoid", *more, "run.num_steps=4", name="cut")
    resumed = run_preferences(tmp_path, "sigmoid", *more, "--resume", name="cut")
    found = [list(map(json.loads, (f / "metrics.jsonl").read_text().splitlines())) for f in (whole, resumed)]
    assert found[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5) and found[0][-1]["loss"] < 0.69
    for ours, theirs in zip(*found, strict=True):
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-5)
    adapter = next((whole / "export").glob("*/adapter"))
    assert read_header(adapter).quantization == "nf4"
    # The export is what `burnish merge` makes of the adapter.
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    states = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (adapter.parent, tmp_path / "merged")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-6, rtol=0)


@needs_library
@pytest.mark.slow
def test_generators_serve_the_dequantised_merged_model_that_is_trained(start: Start) -> None:
    run = start(
        "qlora", *SMALL, "model.lora.rank=4", "model.lora.alpha=8", "model.quantization=nf4", "model.dtype=float32",
        "algorithm.kl_coef=0.05", "learner.optimizer.lr=0.01", "run.num_steps=2", "cluster.backend=in_process",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    ready = next(e for e in run.rows("events.jsonl") if e["kind"] == "ready")
    assert ready["num_verified"] > 0 and ready["probe_mean_difference"] < 1e-3
    first, last = (run.rows("metrics.jsonl")[i] for i in (0, -1))
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-7
    assert abs(last["sampling/mismatch_kl/k1"]) < 1e-4  # of the model that sampled to the one that is trained


@needs_library
@pytest.mark.slow
def test_policy_and_critic_train_adapters_on_quantised_bases_and_the_critic_goes_on_in_its_precision(
    start: Start,
) -> None:
    keys = (
        *SMALL, "algorithm.name=ppo", "model.lora.rank=4", "model.quantization=nf4", "model.dtype=float32",
        "critic.lora.rank=4", "learner.optimizer.lr=0.01", "critic.optimizer.lr=0.01",
        "cluster.backend=in_process", "checkpoint.every=1",
    )  # fmt: skip
    run = start("qlora", *keys, "critic.quantization=nf4", "run.num_steps=3")
    assert run.end() == 0, run.tail()
    for row in run.rows("metrics.jsonl"):
        assert row["ratio/first_minibatch_max_deviation"] < 1e-3 and math.isfinite(row["critic/loss"])
    changed = start("qlora", *keys, "critic.quantization=int8", "run.num_steps=4", "--resume")
    assert changed.end() == 2 and "resume with critic.quantization=nf4" in changed.tail()
    resumed = start("qlora", *keys, "critic.quantization=nf4", "run.num_steps=4", "--resume")
    assert resumed.end() == 0, resumed.tail()
    assert [row["step"] for row in resumed.rows("metrics.jsonl")] == [1, 2, 3, 4]
