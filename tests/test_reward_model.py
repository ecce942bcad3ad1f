"""A reward model: one score for one text whatever lies beside it, one gradient however it is cut up, refusals."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.end_scores import end_scores
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_model import RewardModel, check_reward_model
from actors.scalar_model import load_scalar, scalar_pad_token_id
from actors.settings import LearnerSettings, OptimizerSettings, RewardModelSettings
from cluster.rendezvous import Rendezvous, free_port
from trainers.comparisons import Comparison, ComparisonTable, write_comparisons
from trainers.errors import InputError
from trainers.experience import Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion, encode_group
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat
from trainers.reward_report import judge
from trainers.reward_training import RewardTrainingSettings

TINY = "builtin:tiny-llama"
PLAIN = PromptFormat(chat=False)
CPU = torch.device("cpu")
FP32_TOLERANCE = 2e-5  # on scores of size 1
GRADIENT_TOLERANCE = 1e-5  # relative to a parameter's largest gradient element
DEADLINE_S = 240.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_folder(folder: Path, num_labels: int = 1, pad_is_eos: bool = False) -> str:
    """tiny-llama as a sequence classifier with a random head, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(resolve_model(TINY))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_pretrained(resolve_model(TINY), num_labels=num_labels)
        torch.nn.init.normal_(model.score.weight, std=0.3)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("reward"))


def planted(num: int, seed: int) -> list[Comparison]:
    """Pairs and rankings in which answers with more of the letter z are better; margins on some."""
    tokenizer, draw = load_tokenizer(resolve_model(TINY)), np.random.default_rng(seed)
    found = []
    for i in range(num):
        size = 2 if i % 3 else 4
        # Unlike counts of z, in answers of unlike lengths: length must not give the order away.
        counts = draw.choice(6, size, replace=False)
        answers = ["".join(draw.permutation(list("z" * c + "abc" * int(draw.integers(1, 4))))) for c in counts]
        row: dict[str, Any] = {"prompt": f"prompt {seed}.{i} " * int(draw.integers(1, 4)), "completions": answers}
        row["scores"] = [float(c) for c in counts]
        margin = "scores" if i % 5 == 1 else None
        found.append(read_comparison(row, "here", tokenizer, PLAIN, margin))
    return found


def settings(
    ranks: int = 1, zero_stage: int = 0, token_budget: int = 4096, lr: float = 1e-3, head_lr_factor: float = 1.0
) -> LearnerSettings:
    optimizer = OptimizerSettings(lr=lr, head_lr_factor=head_lr_factor)
    return LearnerSettings(
        num_workers=ranks, zero_stage=zero_stage, token_budget=token_budget, optimizer=optimizer,  # type: ignore[arg-type]
        start_deadline_s=DEADLINE_S,
    )  # fmt: skip


def make_learner(path: str, data: Path, rank: int = 0, ranks: int = 1, port: int = 0, **options: Any) -> Any:
    from actors.reward_learner import RewardModelLearner

    algorithm = options.pop("algorithm", RewardTrainingSettings())
    return RewardModelLearner(
        rank, Rendezvous("127.0.0.1", port or free_port(), ranks), path, settings(ranks, **options), "float32", "cpu",
        num_steps=1000, seed=5, algorithm=algorithm, data_folder=str(data),
    )  # fmt: skip


# --- one text, one score ------------------------------------------------------------------------


def padded_scores(path: str, comparisons: Sequence[Comparison], pad: int | None = None) -> np.ndarray:
    """transformers' own scores of one right-padded batch; ``pad`` instead of the folder's own pad token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if pad is not None:
        model.config.pad_token_id = pad
        tokenizer.pad_token_id = pad
    texts = [np.concatenate([c.prompt_ids, a]).tolist() for c in comparisons for a in c.completion_ids]
    batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A learner on a causal model whose pad token is EOS, before and after training, and what it exported."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(resolve_model(TINY), root / "base")
    tokenizer = load_tokenizer(resolve_model(TINY))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(root / "base")
    held_out = planted(60, seed=3)
    write_comparisons(planted(240, seed=2), root / "train.arrow")
    write_comparisons(held_out, root / "held_out.arrow")
    learner = make_learner(str(root / "base"), root, lr=2e-3)
    before = learner.score("held_out")
    metrics = [learner.update(list(range(step * 24 % 240, step * 24 % 240 + 24)), step) for step in range(60)]
    scores = learner.score("held_out")
    learner.export(str(root / "export"))
    yield SimpleNamespace(root=root, learner=learner, held_out=held_out, before=before, scores=scores, metrics=metrics)
    learner.close()


def test_the_first_loss_is_ln_2_and_the_first_accuracy_a_coin_flip(trained: SimpleNamespace) -> None:
    first = trained.metrics[0]
    # Some pairs have a margin, so ask without: the scores of a new head are 0.
    assert all((s == 0).all() for s in trained.before)
    report = judge(trained.held_out, trained.before)
    assert report.loss == pytest.approx(math.log(2), abs=1e-12)
    assert report.accuracy.value == 0.5 == pytest.approx(first["accuracy"])
    batch = [i for i in range(24) if trained.learner.train[i].margins is None]
    fresh = make_first_loss(trained, batch)
    assert fresh == pytest.approx(math.log(2), abs=1e-7)


def make_first_loss(trained: SimpleNamespace, batch: list[int]) -> float:
    """Loss of a new head on ``batch``: the trained head is set to zero for it, and back."""
    weight = trained.learner.engine.engine.module.hf_model.score.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    metrics, _ = trained.learner.gradients(batch)
    with torch.no_grad():
        weight.copy_(kept)
    return float(metrics["loss"])


def test_training_recovers_the_planted_preference(trained: SimpleNamespace) -> None:
    report = judge(trained.held_out, trained.scores)
    assert report.accuracy.value > 0.9 and report.accuracy.low > 0.8
    assert report.loss < 0.35
    last = trained.metrics[-1]
    assert last["accuracy"] > 0.9 and last["margin"] > 1.0 and last["loss"] < 0.5
    assert last["min_reward"] < last["mean_reward"] < last["max_reward"]
    assert trained.metrics[0]["grad_norm"] > 0 and last["learner/shared_prompt_fraction"] > 0


def test_an_export_pads_with_another_token_than_eos_and_scores_alike_in_padded_batches(
    trained: SimpleNamespace,
) -> None:
    export, tokenizer = str(trained.root / "export"), load_tokenizer(str(trained.root / "export"))
    config = json.loads((trained.root / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    ours = np.concatenate(trained.scores)
    np.testing.assert_allclose(padded_scores(export, trained.held_out), ours, rtol=1e-4, atol=1e-4)
    # What would happen otherwise: the score would be read one token before the end.
    wrong = padded_scores(export, trained.held_out, tokenizer.eos_token_id)
    assert np.abs(wrong - ours).max() > 0.05


def test_a_tokenizer_with_no_token_left_to_pad_with_is_refused() -> None:
    only = SimpleNamespace(eos_token_id=2, pad_token_id=2, unk_token_id=None, bos_token_id=2, all_special_ids=[2])
    with pytest.raises(InputError, match="only special token is EOS"):
        scalar_pad_token_id(only, "model.path", "x")


# --- the task -----------------------------------------------------------------------------------


def test_a_task_splits_by_prompt_trains_and_leaves_statistics_and_report(tmp_path: Path, trained: Any) -> None:
    from launch.model_facts import check_model_folder
    from launch.reward_task import RewardTask
    from launch.tuning_config import TuningConfig
    from launch.tuning_task import BaseModelFolder

    base = str(trained.root / "base")
    rows = [{"prompt": f"p{i % 40}", "chosen": f"z{i}", "rejected": f"a{i}"} for i in range(80)]
    rows.append({"prompt": "p" * 300, "chosen": "z", "rejected": "a"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [{"prompt": "q", "completion": "z" * i + "a"} for i in range(5)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    config = TuningConfig.model_validate({
        "run": {"name": "x", "num_steps": 2, "batch_size": 8},
        "model": {"path": base, "max_length": 64},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "format": {"chat": False}},
        "algorithm": {"name": "reward", "reference_samples": str(tmp_path / "samples.jsonl")},
        "evaluation": {"size": 20},
    })  # fmt: skip
    task = RewardTask(config, BaseModelFolder(base, check_model_folder(base), 64, load_tokenizer(base)))
    assert task.sizes == [60] and task.report["num_held_out"] == 20
    assert task.report["num_too_long"]["data.train.0"] == 1 and "1 rows left out" in task.summary
    task.write(tmp_path)
    ids = [{ComparisonTable(tmp_path / f"{n}.arrow")[i].prompt_id for i in range(m)} for n, m in
           (("train", 60), ("held_out", 20))]  # fmt: skip
    assert not ids[0] & ids[1]
    assert task.payload([(0, 3), (0, 5)], 0) == [3, 5]

    trained.learner.data_folder = tmp_path

    async def call(method: str, *args: Any) -> Any:
        return getattr(trained.learner, method)(*args)

    fleet: Any = SimpleNamespace(call=call)
    metrics = asyncio.run(task.evaluate(fleet, 0))
    assert 0 <= metrics["eval/pair_accuracy_low"] <= metrics["eval/pair_accuracy"] <= metrics["eval/pair_accuracy_high"]
    export = tmp_path / "export"
    trained.learner.export(str(export))
    asyncio.run(task.after_training(fleet, export))
    stats = json.loads((export / "reward_stats.json").read_text())
    scores = np.concatenate(trained.learner.score("reference_samples"))
    assert (stats["mean"], stats["num"]) == (pytest.approx(float(scores.mean()), rel=1e-6), 5)
    assert stats["std"] == pytest.approx(float(scores.std()), rel=1e-5)
    report = json.loads((export / "reward_report.json").read_text())
    assert report["accuracy"]["value"] == metrics["eval/pair_accuracy"] and report["num_pairs"] == 20
    assert report["reliability"] and report["accuracy_by_length_difference"] and report["scores"]["margin"]["num"] == 20
    assert (export / "reward_report.svg").read_text().count("Reliability") >= 1

    # The statistics normalise the very samples they were made of to mean 0 and deviation 1.
    model = RewardModel(RewardModelSettings(name="rm", path=str(export), normalize=True), base, "float32", "cpu")
    tokenizer = load_tokenizer(base)
    texts = [np.array([*tokenizer.encode(s["completion"]), tokenizer.eos_token_id], dtype=np.int32) for s in samples]
    part = model.score_groups([sampled("q", texts)])[0].parts["rm"]
    assert part.mean() == pytest.approx(0, abs=1e-4) and part.std() == pytest.approx(1, abs=1e-4)


def task_of(rows: list[dict[str, Any]], tmp_path: Path, grouped: bool = False, **data: Any) -> Any:
    from launch.model_facts import check_model_folder
    from launch.reward_task import RewardTask
    from launch.tuning_config import TuningConfig
    from launch.tuning_task import BaseModelFolder

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = resolve_model(TINY)
    config = TuningConfig.model_validate({
        "run": {"name": "x", "num_steps": 2, "batch_size": 8}, "model": {"path": base},
        "algorithm": {"name": "reward", "group_by_prompt": grouped},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "format": {"chat": False}, **data},
    })  # fmt: skip
    return RewardTask(config, BaseModelFolder(base, check_model_folder(base), 64, load_tokenizer(base)))


def test_a_task_may_learn_from_all_rows_of_a_prompt_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": c, "rejected": r} for i in range(4) for c, r in ("ab", "bc", "ac")]
    apart, together = task_of(rows, tmp_path), task_of(rows, tmp_path, grouped=True)
    assert sum(apart.sizes) + apart.report["num_held_out"] == 12
    assert sum(together.sizes) + together.report["num_held_out"] == 4 and together.report["num_pairs"] == 9


def test_a_task_refuses_rows_it_cannot_learn_from(tmp_path: Path) -> None:
    good = [{"prompt": f"p{i}", "chosen": "z", "rejected": "a"} for i in range(3)]
    with pytest.raises(InputError, match=r"rows.jsonl:4 = .*identical"):
        task_of([*good, good[0] | {"rejected": "z"}], tmp_path)
    with pytest.raises(InputError, match="nothing is left of it once prompts are held out"):
        task_of(good[:1], tmp_path)
    with pytest.raises(InputError, match="has no prompt that is not in data.train too"):
        task_of(good, tmp_path, eval={"path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(InputError, match="each is too long to learn from"):
        task_of([row | {"chosen": "z" * 70} for row in good], tmp_path)
    pairs = {"function": "trainers.planted_pairs:preference_rows", "args": {"num": 30, "seed": 1}}
    task = task_of(good, tmp_path, train=[pairs | {"args": {"num": 30, "seed": 1, "noise": 0}}], eval=None)
    assert task.sizes[0] + task.report["num_held_out"] + task.report["num_too_long"]["data.train.0"] == 30


def test_the_accuracy_of_a_report_is_as_certain_as_its_prompts_are_many() -> None:
    answer = np.zeros(3, dtype=np.int32)
    pair = [Comparison(f"p{i % 10}", answer, (answer, answer), ((0, 1),)) for i in range(200)]
    # Pairs of one prompt stand or fall together: 200 pairs say no more than 10 prompts.
    scores = [np.array([1.0, 0.0]) if i % 10 < 7 else np.array([0.0, 1.0]) for i in range(200)]
    report, apart = (
        judge(pair, scores),
        judge([Comparison(f"q{i}", answer, (answer, answer), ((0, 1),)) for i in range(200)], scores),
    )
    assert report.accuracy.value == apart.accuracy.value == 0.7
    assert (report.accuracy.n, apart.accuracy.n) == (10, 200)
    assert report.accuracy.high - report.accuracy.low > 3 * (apart.accuracy.high - apart.accuracy.low)
    assert report.loss == pytest.approx(0.7 * np.logaddexp(0, -1) + 0.3 * np.logaddexp(0, 1))
    with pytest.raises(ValueError, match="one score for each answer"):
        judge(pair, scores[1:])


# --- in reinforcement learning ------------------------------------------------------------------


def sampled(
    prompt: str, completions: Sequence[np.ndarray], reasons: Sequence[str] | None = None, source: Any = None
) -> TrajectoryGroup:
    tokenizer = load_tokenizer(resolve_model(TINY))
    version = WeightVersion(0, 0)
    trajectories = tuple(
        Trajectory(
            sample_index=i, seed=i, completion_ids=ids, behavior_logprobs=np.zeros(ids.shape[0], dtype=np.float32),
            text=tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=reasons[i] if reasons else "stop",  # type: ignore[arg-type]
            version_spans=(VersionSpan(version, ids.shape[0]),),
        )
        for i, ids in enumerate(completions)
    )  # fmt: skip
    prompt_ids = np.array(tokenizer.encode(prompt), dtype=np.int32)
    return TrajectoryGroup("g", Prompt("p", prompt_ids, prompt, source), trajectories)


def answers(texts: Sequence[str], ended: bool = True) -> list[np.ndarray]:
    tokenizer = load_tokenizer(resolve_model(TINY))
    tail = [tokenizer.eos_token_id] if ended else []
    return [np.array([*tokenizer.encode(t), *tail], dtype=np.int32) for t in texts]


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


# --- one gradient, however it is cut up ----------------------------------------------------------

ALGORITHM = RewardTrainingSettings(centering_coef=0.05, label_smoothing=0.1)
BATCH = list(range(11))
HEAD_LR_FACTOR = 8.0
BUDGETS = ((4096, True), (4096, False), (400, True), (400, False))


def rank_main(rank: int, ranks: int, zero_stage: int, port: int, folder: str) -> None:
    """One rank; rank 0 leaves its gradients in ``folder``."""
    torch.set_num_threads(1)
    learner = make_learner(
        f"{folder}/model", Path(folder), rank, ranks, port, zero_stage=zero_stage, algorithm=ALGORITHM,
        head_lr_factor=HEAD_LR_FACTOR,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for token_budget, share in BUDGETS:
        learner.settings, learner.share_prompts = settings(ranks, zero_stage, token_budget), share
        found[f"{token_budget}/{share}"] = learner.gradients(BATCH)
    found["one comparison"] = learner.gradients(BATCH[:1])
    found["scores"] = learner.score("train")
    before = learner.weights.whole_state(torch.float32)
    learner.update(BATCH, 0)
    after = learner.weights.whole_state(torch.float32)
    learner.begin_save(f"{folder}/state-{ranks}-{zero_stage}")
    assert learner.save_outcome(DEADLINE_S).error is None
    torch.distributed.barrier()
    learner.update(BATCH, 1)
    found["next"] = learner.weights.whole_state(torch.float32)
    learner.load(f"{folder}/state-{ranks}-{zero_stage}")
    learner.update(BATCH, 1)
    found["next after a load"] = learner.weights.whole_state(torch.float32)
    if rank == 0:
        found["moved"] = {name: float((after[name] - before[name]).abs().max()) for name in before}
        torch.save(found, Path(folder) / f"found-{ranks}-{zero_stage}.pt")
    learner.close()


@functools.cache
def data_folder() -> tempfile.TemporaryDirectory[str]:
    root = tempfile.TemporaryDirectory(prefix="burnish-reward-")
    make_folder(Path(root.name) / "model")
    write_comparisons(planted(11, seed=4), Path(root.name) / "train.arrow")
    return root


@functools.cache
def run(ranks: int, zero_stage: int) -> Any:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["actors.learner", "deepspeed", "transformers.models.llama.modeling_llama"])
    root, port = data_folder().name, free_port()
    started = [
        processes.Process(target=rank_main, args=(rank, ranks, zero_stage, port, root), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(DEADLINE_S)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    if any(code != 0 for code in codes):
        return f"{ranks} ranks, ZeRO {zero_stage}: exit codes {codes} (None: hangs)"
    return torch.load(Path(root) / f"found-{ranks}-{zero_stage}.pt", weights_only=False)


def naive(indices: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients), text by text, float64, transformers' own attention: the mean over comparisons of the mean
    over their pairs.
    """
    from transformers import AutoModelForSequenceClassification

    root = Path(data_folder().name)
    model = AutoModelForSequenceClassification.from_pretrained(root / "model", dtype=torch.float64)
    table, smoothing, total = ComparisonTable(root / "train.arrow"), ALGORITHM.label_smoothing, 0.0
    for index in indices:
        c = table[index]
        scores = [
            model(torch.from_numpy(np.concatenate([c.prompt_ids, a]).astype(np.int64))[None]).logits[0, 0]
            for a in c.completion_ids
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for pair, (better, worse) in enumerate(c.pairs):
            d = scores[better] - scores[worse] - (c.margins[pair] if c.margins else 0.0)
            log_p, log_q = -torch.log1p(torch.exp(-d)), -torch.log1p(torch.exp(d))
            loss = loss - (1 - smoothing) * log_p - smoothing * log_q
            loss = loss + ALGORITHM.centering_coef * (scores[better] + scores[worse]) ** 2
        loss = loss / len(c.pairs) / len(indices)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert list(found) == list(expected)
    return max(
        float((found[n].double() - e.double()).abs().max() / e.double().abs().max()) for n, e in expected.items()
    )


@pytest.mark.parametrize("where", [(1, 0), (2, 2), (2, 3)])
def test_gradient_and_step_are_those_of_the_naive_loss_whatever_the_packing_ranks_and_zero_stage(
    where: tuple[int, int],
) -> None:
    found = run(*where)
    assert isinstance(found, dict), found
    loss, expected = naive(BATCH)
    for token_budget, share in BUDGETS:
        metrics, gradients = found[f"{token_budget}/{share}"]
        assert largest_error(gradients, expected) <= GRADIENT_TOLERANCE, (token_budget, share)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        whole = found["4096/True"][0]
        for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "center_rewards_loss"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    assert largest_error(found["one comparison"][1], naive(BATCH[:1])[1]) <= GRADIENT_TOLERANCE
    # AdamW's first step is the learning rate itself, whatever the gradient: only the head's is another one.
    for name, moved in found["moved"].items():
        assert moved == pytest.approx(1e-3 * (HEAD_LR_FACTOR if name == "score.weight" else 1), rel=0.05), name
    for name, tensor in found["next"].items():  # backbone and head are two groups of the optimizer
        assert torch.equal(found["next after a load"][name], tensor), name
    baseline = run(1, 0)["scores"]
    for a, b in zip(found["scores"], baseline, strict=True):
        np.testing.assert_allclose(a, b, atol=FP32_TOLERANCE)
