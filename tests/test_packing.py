"""Packed scoring equals the model's own, whatever lies beside a sample; and never holds [N, V]."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from actors.attention import DENSE_BLOCK_TOKENS
from actors.logprobs import chunked_logprobs
from actors.model_folders import resolve_model
from actors.modeling import PackedPolicy, load_policy
from actors.packing import build_pack
from actors.scoring import score_samples
from trainers.batching import Piece, SampleShape, plan_microbatches

pytestmark = pytest.mark.usefixtures("one_thread")

FP32_TOLERANCE = 2e-5  # nats, for log-probs near -6
CHUNK = 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> str:
    return resolve_model("builtin:tiny-llama")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokens look back 6 positions and no further."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("mistral")
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        MistralForCausalLM(config).save_pretrained(folder)
    return str(folder)


def sample_rows(
    groups: Sequence[tuple[int, Sequence[int]]], seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """(prompts, completions, group of each): ``groups`` lists prompt and completion lengths."""
    draw = np.random.default_rng(seed)
    prompts, completions, index = [], [], []
    for g, (num_prompt, lengths) in enumerate(groups):
        prompt = draw.integers(3, 259, num_prompt, dtype=np.int32)
        for t in lengths:
            prompts.append(prompt)
            completions.append(draw.integers(3, 259, t, dtype=np.int32))
            index.append(g)
    return prompts, completions, index


@functools.cache
def own_model(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def packed_policy(path: str) -> PackedPolicy:
    return load_policy(path, CHUNK)


@torch.no_grad()
def own_logprobs(path: str, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """transformers' model, transformers' eager attention, one unpacked row."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    logits = own_model(path)(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()


def packed_logprobs(
    policy: PackedPolicy, rows: tuple[list[np.ndarray], list[np.ndarray], list[int]],
    token_budget: int, share: bool, temperature: float = 1.0,
) -> dict[int, np.ndarray]:  # fmt: skip
    return score_samples(lambda pack: policy(pack, temperature)[0], *rows, token_budget, share, CPU)


GROUPS = [(9, (5, 1, 14)), (3, (2, 2)), (1, (8,)), (20, (3, 11, 6, 6))]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("token_budget", [40, 4096])
@pytest.mark.parametrize("share", [True, False])
def test_packed_scoring_equals_the_model_s_own(tiny: str, share: bool, token_budget: int, temperature: float) -> None:
    rows = sample_rows(GROUPS)
    found = packed_logprobs(packed_policy(tiny), rows, token_budget, share, temperature)
    assert sorted(found) == list(range(len(rows[0])))
    for i, (prompt, completion) in enumerate(zip(rows[0], rows[1], strict=True)):
        np.testing.assert_allclose(
            found[i], own_logprobs(tiny, prompt, completion, temperature), rtol=0, atol=FP32_TOLERANCE
        )


def test_an_empty_completion_has_an_empty_row(tiny: str) -> None:
    found = packed_logprobs(packed_policy(tiny), sample_rows([(4, (0, 3))]), 64, True)
    assert found[0].shape == (0,) and found[1].shape == (3,)


def test_a_block_beyond_the_dense_limit_is_scored_the_same(tiny: str) -> None:
    rows = sample_rows([(60, (150, 1, 110, 120))])
    assert DENSE_BLOCK_TOKENS < 60 + 150 + 110 + 120
    microbatch = (Piece((0, 1, 2, 3), 441),)
    pack = build_pack(microbatch, rows[0], rows[1])
    with torch.no_grad():
        found = packed_policy(tiny)(pack, 1.0)[0].split(pack.lengths)
    for i in range(4):
        expected = own_logprobs(tiny, rows[0][i], rows[1][i])
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.parametrize("share", [True, False])
def test_a_sliding_window_is_respected(mistral: str, share: bool) -> None:
    rows = sample_rows([(9, (5, 1, 14)), (3, (2, 20)), (1, (8,))], seed=1)
    found = packed_logprobs(packed_policy(mistral), rows, 4096, share)
    for i, (prompt, completion) in enumerate(zip(rows[0], rows[1], strict=True)):
        np.testing.assert_allclose(found[i], own_logprobs(mistral, prompt, completion), rtol=0, atol=FP32_TOLERANCE)


def test_beyond_its_window_a_token_sees_nothing(mistral: str) -> None:
    """Two layers of 6 reach 10 tokens back: a change 11 tokens before a prediction does not reach it."""
    prompts, completions, groups = sample_rows([(2, (30, 30))], seed=2)
    completions[1] = completions[0].copy()
    completions[1][0] = 5 if completions[0][0] != 5 else 6
    found = packed_logprobs(packed_policy(mistral), (prompts, completions, groups), 4096, True)
    assert np.abs(found[0][1:10] - found[1][1:10]).max() > 1e-4
    np.testing.assert_array_equal(found[0][12:], found[1][12:])


@settings(deadline=None, max_examples=15)
@given(data=st.data(), share=st.booleans())
def test_neighbours_and_row_order_never_change_a_logprob(tiny: str, data: st.DataObject, share: bool) -> None:
    prompts, completions, _ = sample_rows(GROUPS)
    order = data.draw(st.permutations(range(len(prompts))))
    kept = order[: data.draw(st.integers(1, len(order)))]
    groups = [next(g for g, p in enumerate(prompts) if p is prompts[i]) for i in kept]
    rows = ([prompts[i] for i in kept], [completions[i] for i in kept], groups)
    found = packed_logprobs(packed_policy(tiny), rows, data.draw(st.integers(31, 200)), share)
    everyone = alone(tiny)
    for k, i in enumerate(kept):
        np.testing.assert_allclose(found[k], everyone[i], rtol=0, atol=FP32_TOLERANCE)


@functools.cache
def alone(path: str) -> list[np.ndarray]:
    """Each sample of GROUPS in a pack of its own."""
    prompts, completions, _ = sample_rows(GROUPS)
    return [
        packed_logprobs(packed_policy(path), ([p], [c], [0]), 100, False)[0]
        for p, c in zip(prompts, completions, strict=True)
    ]


def test_gradient_checkpointing_gives_the_same_gradient(tiny: str) -> None:
    prompts, completions, groups = sample_rows(GROUPS)
    shapes = [SampleShape(g, i, len(prompts[i]), len(completions[i])) for i, g in enumerate(groups)]
    pack = build_pack(plan_microbatches(shapes, 1, 4096, True)[0][0], prompts, completions)
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(tiny, CHUNK, checkpointing=checkpointing).train()
        assert policy.hf_model.is_gradient_checkpointing == checkpointing
        logprobs, entropy = policy(pack, 0.9)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


# --- chunked log-probs ------------------------------------------------------------------------

N, HIDDEN, VOCABULARY = 23, 16, 101


def head_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("wants", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
def test_chunked_logprobs_equal_the_full_softmax_in_value_and_gradient(
    chunk: int, temperature: float, wants: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, N, generator=generator, dtype=torch.float64)
    a, b = a * (wants != "entropy"), b * (wants != "logprob")
    hidden, weight, targets = head_inputs(torch.float64)
    logp = (hidden @ weight.t() / temperature).log_softmax(-1)
    expected = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (expected[0] @ a + expected[1] @ b).backward()

    mine_hidden, mine_weight, _ = head_inputs(torch.float32)
    found = chunked_logprobs(mine_hidden, mine_weight, targets, temperature, chunk)
    (found[0] @ a.float() + found[1] @ b.float()).backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in ((mine_hidden.grad, hidden.grad), (mine_weight.grad, weight.grad)):
        assert mine is not None and theirs is not None
        assert float((mine.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    hidden, weight, targets = head_inputs(torch.float32)
    chunked_logprobs(hidden, weight.detach(), targets, 1.0, 5)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # Views of the weight, its cast and its gradient have the weight's own size.
            if isinstance(tensor, torch.Tensor) and set(tensor.shape) != {VOCABULARY, HIDDEN}:
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_one_chunk_of_logits(dtype: torch.dtype) -> None:
    chunk = 4
    hidden, weight, targets = head_inputs(dtype)
    with LargestTensor() as seen:
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, 0.7, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert seen.num_elements == max(chunk * VOCABULARY, N * HIDDEN)
