"""Estimates are the formulas they state; preflight finds each shortage and names its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from launch.demands import estimates, role_demands
from launch.estimate import MemoryEstimate, estimate_generator, estimate_learner, kv_bytes_per_token, show_bytes
from launch.model_facts import ModelFacts, check_model_folder
from launch.overrides import load_config
from launch.preflight import PROCESS_BYTES, preflight_report
from trainers.errors import InputError

GIB = 2**30
SHAPE = {"hidden": 64, "layers": 2, "intermediate": 128, "vocab": 1000, "logprob_chunk": 16, "token_budget": 100}
SEVEN = ModelFacts(7_600_000_000, 3584, 28, 28, 4, 152064, 32768, "Qwen2ForCausalLM", 18944, 128)
SMALL = ModelFacts(134_515_008, 576, 30, 9, 3, 49152, 8192, "LlamaForCausalLM", 1536, 64)


def learner(stage: int, ranks: int = 4, **changes: Any) -> dict[str, int]:
    return dict(estimate_learner(1_000_000, stage, ranks, **{**SHAPE, **changes}).parts)


def test_zero_stages_divide_optimizer_then_gradients_then_weights() -> None:
    plain, one, two, three = (learner(stage) for stage in range(4))
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4_000_000, 4_000_000, 8_000_000)
    assert (one["weights"], one["gradients"], one["optimizer"]) == (4_000_000, 4_000_000, 2_000_000)
    assert (two["weights"], two["gradients"], two["optimizer"]) == (4_000_000, 1_000_000, 2_000_000)
    assert (three["weights"], three["gradients"], three["optimizer"]) == (1_000_000, 1_000_000, 2_000_000)
    assert sum(two.values()) > sum(three.values())


def test_more_ranks_never_need_more_memory_each() -> None:
    for stage in range(4):
        totals = [sum(learner(stage, ranks).values()) for ranks in (1, 2, 4, 8)]
        assert totals == sorted(totals, reverse=True)


def test_offloading_moves_bytes_and_loses_none() -> None:
    kept = estimate_learner(1_000_000, 2, 4, **SHAPE)
    moved = estimate_learner(1_000_000, 2, 4, offload_optimizer=True, **SHAPE)
    assert moved.total + moved.offloaded_total == kept.total
    assert moved.offloaded["optimizer"] == 2_000_000


def test_activations_are_linear_in_the_token_budget_and_checkpointing_saves_them() -> None:
    assert learner(0, token_budget=200)["activations"] == 2 * learner(0)["activations"]
    assert learner(0, layers=32, checkpointing=True)["activations"] < learner(0, layers=32)["activations"] / 4


def test_logits_are_bounded_by_the_chunk_and_not_by_the_budget() -> None:
    assert learner(0, token_budget=10_000)["logits"] == learner(0)["logits"]


def test_a_generators_weights_and_cache_are_split_by_tensor_parallelism() -> None:
    shape = {"layers": 28, "kv_heads": 4, "head_dim": 128, "max_num_seqs": 1, "max_length": 1000}
    one = estimate_generator(1000, tensor_parallel_size=1, **shape)
    four = estimate_generator(1000, tensor_parallel_size=4, **shape)
    eight = estimate_generator(1000, tensor_parallel_size=8, **shape)
    assert one.parts["weights"] == 2000 and four.parts["weights"] == 500
    assert one.parts["kv cache"] == 1000 * kv_bytes_per_token(28, 4, 128) == 4 * four.parts["kv cache"]
    assert eight.parts["kv cache"] == four.parts["kv cache"]  # four key/value heads, copied beyond that


def test_bytes_are_shown_in_the_largest_unit() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1536, 3 * GIB)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


# ---- model folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 10, "max_position_embeddings": 64, "intermediate_size": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    tensors = {"a": torch.zeros(10, 8), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_parameters_are_counted_from_the_headers(folder: Path) -> None:
    facts = check_model_folder(folder)
    assert facts == ModelFacts(86, 8, 2, 2, 1, 10, 64, "LlamaForCausalLM", 16, 4)


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_each_defect_of_a_model_folder_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole, config = weights.read_bytes(), (folder / "config.json").read_text()

    def refuse(words: str) -> None:
        with pytest.raises(InputError) as caught:
            check_model_folder(folder)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    for size in (len(whole) - 1, 40, 8, 3, 0):
        shorten(weights, size)
        refuse("bytes" if size != len(whole) - 1 else "its header says")
        weights.write_bytes(whole)
    weights.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    refuse("header cannot be read")
    weights.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "z": "model-2.safetensors"}}))
    refuse("first model-2.safetensors")
    index.unlink()
    (folder / "config.json").write_text("{")
    refuse("cannot be read")
    (folder / "config.json").unlink()
    refuse("is missing")
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").unlink()
    refuse("has no tokenizer")
    weights.unlink()
    refuse("has no *.safetensors")
    with pytest.raises(InputError, match="no such folder"):
        check_model_folder(folder / "nowhere")


# ---- preflight


def node(name: str = "n0", gpus: int = 0, gpu_gib: float = 80, **changes: Any) -> dict[str, Any]:
    versions = {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.19", "vllm": "0.32", "ray": "2.60.0"}
    facts = {
        "hostname": name, "num_cpus": 64, "memory_bytes": 512 * GIB, "memory_free_bytes": 500 * GIB,
        "shm_free_bytes": 64 * GIB, "native_bfloat16": True, "versions": {**versions, "deepspeed": "0.19.8"},
        "gpus": [{"name": "GPU", "memory_bytes": int(gpu_gib * GIB)}] * gpus,
    }  # fmt: skip
    return {**facts, **changes}


def problems(recipe: str, facts: ModelFacts, nodes: list[dict[str, Any]], *overrides: str) -> dict[str, str]:
    report = preflight_report(load_config(recipe, overrides).config, facts, nodes)
    assert report.passed == (not report.problems) == all(row.passed for row in report.rows)
    report.show(Console(quiet=True))
    return {problem.field: str(problem) for problem in report.problems}


def test_the_recipes_fit_the_machines_they_are_written_for() -> None:
    two_cores = node(num_cpus=2, memory_free_bytes=14 * GIB, shm_free_bytes=2 * GIB)
    assert problems("cpu-demo", SMALL, [two_cores]) == {}
    assert problems("gpu-8x-grpo", SEVEN, [node(gpus=8)]) == {}
    assert problems("gpu-8x-dapo", SEVEN, [node(gpus=8)]) == {}
    small = ModelFacts(1_540_000_000, 1536, 28, 12, 2, 151936, 32768, "Qwen2ForCausalLM", 8960, 128)
    assert problems("gpu-1x-grpo", small, [node(gpus=1)]) == {}
    large = ModelFacts(32_760_000_000, 5120, 64, 40, 8, 152064, 32768, "Qwen2ForCausalLM", 27648, 128)
    assert problems("gpu-multinode-grpo", large, [node(f"n{i}", gpus=8) for i in range(4)]) == {}


def test_the_weights_on_their_way_are_counted_where_they_lie_and_on_the_ranks_that_send_them() -> None:
    def of_learner(recipe: str, *overrides: str) -> MemoryEstimate:
        return estimates(load_config(recipe, overrides).config, SEVEN, True, 2)["learner"]

    sent, by_file = of_learner("gpu-8x-grpo"), of_learner("gpu-8x-grpo", "push.backend=file")
    assert sent.staged == 2 * SEVEN.num_params and by_file.staged == 0 and sent.parts == by_file.parts
    shared = of_learner("gpu-1x-grpo")
    assert shared.parts["staged weights"] == 2 * SEVEN.num_params and shared.staged == 0
    # Four generators are served by four ranks of four, or by one of four.
    for overrides, serving in (((), 4), (("generator.num_workers=1",), 1)):
        assert_need(overrides, states=12 * SEVEN.num_params, serving=serving)


def test_the_host_has_room_for_the_models_on_their_way_to_the_gpus_or_for_the_checkpoints_whichever_is_more() -> None:
    """Bytes a parameter: 4 of every rank that reads, 12 of all ranks together that save."""
    assert_need((), states=12 * SEVEN.num_params)  # ZeRO 3: rank 0 alone reads
    assert_need(("learner.zero_stage=2",), states=4 * 4 * SEVEN.num_params)
    with_reference = ("algorithm.kl_coef=0.01", "generator.num_workers=3", "reference.num_workers=1")
    assert_need(with_reference, states=(12 + 2) * SEVEN.num_params, serving=3)
    # On the second of two nodes ranks 2 and 3 save and read nothing.
    learner = estimates(load_config("gpu-8x-grpo").config, SEVEN, True, 2)["learner"]
    assert learner.host_bytes([0]) == 4 * SEVEN.num_params and learner.host_bytes([2]) == 3 * SEVEN.num_params


def assert_need(overrides: tuple[str, ...], states: int, serving: int = 4) -> None:
    """gpu-8x-grpo finds so much host memory enough, and a little less too little."""
    config = load_config("gpu-8x-grpo", overrides).config
    workers = sum(demand.num_workers for demand in role_demands(config, True))
    need = workers * PROCESS_BYTES + states + serving * 2 * SEVEN.num_params
    for free in (need + 8, need - 8):
        report = preflight_report(config, SEVEN, [node(gpus=8, memory_free_bytes=free)])
        assert [row.passed for row in report.rows if row.check == "host memory"] == [free > need]
    assert need < node(gpus=8)["memory_free_bytes"]


@pytest.mark.parametrize(
    ("changes", "overrides", "field"),
    [
        ({"gpus": 7}, (), "learner.num_workers"),
        ({"gpus": 8, "gpu_gib": 24}, (), "learner.token_budget"),
        ({"gpus": 8, "gpu_gib": 14}, (), "generator.gpu_memory_utilization"),
        ({"gpus": 8}, ("model.max_length=40000", "learner.token_budget=40000"), "model.max_length"),
        ({"gpus": 8}, ("generator.tensor_parallel_size=3", "generator.num_workers=1"), "generator.tensor_parallel_size"),  # noqa: E501
        ({"gpus": 8}, ("push.backend=ipc",), "push.backend"),
        ({"gpus": 8}, ("cluster.num_nodes=2",), "cluster.num_nodes"),
        ({"gpus": 8}, ("push.backend=file",), None),
        ({"gpus": 8, "shm_free_bytes": GIB}, ("push.backend=file",), None),
        ({"gpus": 8, "memory_free_bytes": GIB}, (), "learner.token_budget"),
        ({"gpus": 8, "model_readable": False}, (), "model.path"),
    ],
)
def test_each_shortage_is_found_under_its_field(changes: Any, overrides: tuple[str, ...], field: str | None) -> None:
    found = problems("gpu-8x-grpo", SEVEN, [node(**changes)], *overrides)
    assert field in found if field else not found


def test_nodes_that_are_not_alike_are_found() -> None:
    odd = node("n1", gpus=8)
    odd["versions"] = {**odd["versions"], "torch": "2.12.0", "vllm": None}
    found = problems("gpu-8x-grpo", SEVEN, [node("n0", gpus=8), odd])
    assert "2.12.0 on n1" in found["torch"] and "not installed on n1" in found["vllm"]


def test_the_estimate_of_the_demo_is_near_what_adam_alone_must_take() -> None:
    config = load_config("cpu-demo").config
    parts = estimate_learner(
        SMALL.num_params, 1, 1, token_budget=config.learner.token_budget, hidden=SMALL.hidden, layers=SMALL.layers,
        intermediate=SMALL.intermediate, vocab=SMALL.vocab, logprob_chunk=1024,
    )  # fmt: skip
    assert 16 * SMALL.num_params < parts.total < 10 * GIB
