"""A reward model: one score for one text whatever lies beside it, in reinforcement learning too, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_model_kit import (
    CPU,
    PLAIN,
    TINY,
    answers,
    folder,
    make_folder,
    padded_scores,
    planted,
    sampled,
)

from actors.end_scores import end_scores
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_model import RewardModel, check_reward_model
from actors.scalar_model import load_scalar
from actors.settings import RewardModelSettings
from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.experience import encode_group

__all__ = ["folder"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

FP32_TOLERANCE = 2e-5  # on scores of size 1

# --- one text, one score ------------------------------------------------------------------------


def packed_scores(path: str, comparisons: Sequence[Comparison], token_budget: int, share: bool) -> np.ndarray:
    model = load_scalar(path, "path").eval()
    owner = [i for i, c in enumerate(comparisons) for _ in c.completion_ids]
    answers = [a for c in comparisons for a in c.completion_ids]
    prompts = [comparisons[i].prompt_ids for i in owner]
    found = end_scores(model, prompts, answers, owner, token_budget, share, CPU)
    return np.array([found[i] for i in range(len(owner))])


def test_neighbours_packing_padding_and_row_order_never_change_a_score(folder: str) -> None:
    comparisons = planted(9, seed=1)
    alone = np.concatenate([packed_scores(folder, [c], 4096, False) for c in comparisons])
    assert alone.std() > 0.05  # else the law says nothing
    for token_budget, share in ((4096, True), (4096, False), (120, True), (120, False)):
        np.testing.assert_allclose(packed_scores(folder, comparisons, token_budget, share), alone, atol=FP32_TOLERANCE)
    backwards = packed_scores(folder, comparisons[::-1], 200, True)
    sizes = [len(c.completion_ids) for c in comparisons[::-1]]
    np.testing.assert_allclose(
        np.concatenate(np.split(backwards, np.cumsum(sizes)[:-1])[::-1]), alone, atol=FP32_TOLERANCE
    )
    np.testing.assert_allclose(padded_scores(folder, comparisons), alone, atol=FP32_TOLERANCE)


def test_scores_that_differ_by_a_thousandth_do_not_tie_in_bfloat16(folder: str) -> None:
    head = load_scalar(folder, "model.path").hf_model.score
    weight = head.weight.detach()[0]  # type: ignore[union-attr]
    along = weight / weight.square().sum()  # a hidden state whose score is 1
    hidden = torch.stack([3.0 * along, 3.001 * along]).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = head(hidden)[:, 0]  # type: ignore[operator]
    assert (high - low).item() == pytest.approx(1e-3, rel=1e-2)
    (high - low).backward()
    torch.testing.assert_close(hidden.grad, torch.stack([-weight, weight]), rtol=0, atol=0)  # exact, not rounded


def test_eos_is_learned_where_it_is_the_pad_token_too(tmp_path: Path) -> None:
    model: Any = load_scalar(make_folder(tmp_path, pad_is_eos=True), "model.path").hf_model
    embedding, eos = model.get_input_embeddings(), model.config.eos_token_id
    embedding(torch.tensor([eos])).sum().backward()
    assert (embedding.weight.grad[eos] == 1).all()


# --- in reinforcement learning ------------------------------------------------------------------


def reward_model(path: str, **options: Any) -> RewardModel:
    return RewardModel(
        RewardModelSettings(name="rm", path=path, **options), resolve_model(TINY), "float32", "cpu", PLAIN
    )


def test_sampled_tokens_are_scored_as_they_are_and_what_cannot_be_scored_is_masked(folder: str) -> None:
    model = reward_model(folder, weight=0.5, token_budget=64)
    completions = [*answers(["zab", "a"]), *answers(["abc"], ended=False), np.zeros(0, dtype=np.int32),
                   *answers(["b"]), *answers(["a" * 80])]  # fmt: skip
    reasons = ["stop", "stop", "length", "stop", "abort", "stop"]
    group = sampled("what?", completions, reasons)
    (rewards,) = model.score([encode_group(group)], 5.0)
    expected = packed_scores(folder, [Comparison("p", group.prompt.token_ids, tuple(completions[:3]))], 4096, False)
    np.testing.assert_allclose(rewards.parts["rm"][:3], expected, atol=FP32_TOLERANCE)
    np.testing.assert_allclose(rewards.totals[:3], 0.5 * expected, atol=FP32_TOLERANCE)
    assert np.isnan(rewards.totals[3:]).all() and not rewards.valid[3:].any()
    assert [(i, f.reward) for i, f in rewards.failures] == [(3, "rm"), (4, "rm"), (5, "rm")]
    assert "empty" in rewards.failures[0][1].detail and "aborted" in rewards.failures[1][1].detail
    assert "64" in rewards.failures[2][1].detail
    clipped = reward_model(folder, clip=float(np.abs(expected).min()) / 2)
    assert np.ptp(np.abs(clipped.score_groups([group])[0].parts["rm"][:3])) == 0


def test_groups_scored_in_one_call_get_what_each_gets_alone(folder: str) -> None:
    model = reward_model(folder, token_budget=64)
    groups = [
        sampled("what?", answers(["zab", "a"])),
        sampled("and this one?", [*answers(["abc"]), np.zeros(0, dtype=np.int32)]),  # whose second sample fails
        sampled("what?", answers(["zab", "bb", "c"])),  # the first group's prompt again, and the first one's sample
    ]
    together = model.score_groups(groups)
    for group, found in zip(groups, together, strict=True):
        (alone,) = model.score_groups([group])
        assert found.group_id == group.group_id and found.failures == alone.failures
        np.testing.assert_allclose(found.parts["rm"], alone.parts["rm"], atol=FP32_TOLERANCE)
    assert len(together[1].failures) == 1 and not np.isnan(together[0].parts["rm"]).any()
    assert together[0].parts["rm"][0] != pytest.approx(together[1].parts["rm"][0], abs=1e-3)


def test_a_model_with_another_tokenizer_reads_the_text_again_with_its_own(folder: str, tmp_path: Path) -> None:
    other = shifted_tokenizer(folder, tmp_path)
    group = sampled("what?", [*answers(["zab"]), *answers(["zab"], ended=False)], source="what?")
    expected = reward_model(folder).score_groups([group])[0].parts["rm"]
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)  # EOS is part of what is scored
    found = reward_model(other, retokenize=True).score_groups([group])[0].parts["rm"]
    np.testing.assert_allclose(found, expected, atol=FP32_TOLERANCE)


def shifted_tokenizer(folder: str, tmp_path: Path) -> str:
    """The same model under a vocabulary whose characters are numbered backwards, embeddings to match."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    plain = [token for token, i in vocabulary.items() if i >= 3]
    turned = dict(zip(plain, [vocabulary[t] for t in reversed(plain)], strict=True))
    content["model"]["vocab"] = vocabulary | turned
    file.write_text(json.dumps(content))
    assert Tokenizer.from_file(str(file)).token_to_id(plain[0]) == vocabulary[plain[-1]]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    table = model.get_input_embeddings().weight
    rows = table.detach().clone()
    with torch.no_grad():
        for token, i in turned.items():
            table[i] = rows[vocabulary[token]]
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def refusal(path: str, max_length: int | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_reward_model(
            RewardModelSettings(name="rm", path=path, **options), load_tokenizer(resolve_model(TINY)), max_length
        )
    return str(caught.value)


def test_a_reward_model_that_does_not_fit_the_policy_is_refused_before_anything_is_allocated(
    folder: str, tmp_path: Path
) -> None:
    check_reward_model(RewardModelSettings(name="rm", path=folder), load_tokenizer(resolve_model(TINY)), 1024)
    other = shifted_tokenizer(folder, tmp_path)
    assert "reward_models.rm.path" in refusal(other) and "retokenize=true" in refusal(other)
    with pytest.raises(InputError, match="tokenizer is not the policy's"):
        reward_model(other)
    assert "gives 2 numbers" in refusal(make_folder(tmp_path / "wide", num_labels=2))
    assert "is no reward model but LlamaForCausalLM" in refusal(resolve_model(TINY))
    assert "has no config.json" in refusal(str(tmp_path / "nowhere"))
    assert "reward_stats.json is missing" in refusal(folder, normalize=True)
    assert "use at least 600" in refusal(folder, 600, token_budget=512)
    assert "it was built for 1024 tokens" in refusal(folder, 2000, token_budget=4096)
    (tmp_path / "wide" / "reward_stats.json").write_text('{"mean": 0.0, "std": 0.0, "num": 2, "reference": "x"}')
    shutil.copy(tmp_path / "wide" / "reward_stats.json", tmp_path / "other")
    assert "deviation 0.0" in refusal(other, normalize=True, retokenize=True)
    ending = load_tokenizer(folder)
    ending.eos_token = "<|pad|>"
    shutil.copytree(folder, tmp_path / "ending")
    ending.save_pretrained(tmp_path / "ending")
    assert "its texts end with <|pad|>, the policy's with <|im_end|>" in refusal(str(tmp_path / "ending"))


def test_a_reward_model_of_the_wrong_width_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives 3 numbers"):
        load_scalar(make_folder(tmp_path / "wide", num_labels=3), "model.path")
