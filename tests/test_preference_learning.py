"""Preference learning on a model: one loss however the batch is cut up, references computed once, rows refused."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors import preference_learner
from actors.model_folders import resolve_model
from actors.modeling import PackedPolicy, load_policy, load_tokenizer
from actors.preference_learner import PreferenceLearner
from actors.preference_objective import PreferenceBatch
from actors.settings import LearnerSettings
from actors.state_saving import SaveBegun, SaveOutcome
from cluster.host import num_cpus
from cluster.layout import NodeSupply
from launch.cli import main
from launch.journal import read_rows
from launch.model_facts import check_model_folder
from launch.preference_task import PreferenceTask
from launch.tuning_config import TuningConfig
from launch.tuning_task import BaseModelFolder, Site
from trainers.comparisons import Comparison, ComparisonTable, write_comparisons
from trainers.errors import InputError, VerificationError
from trainers.labelled_answers import read_preference, with_mismatched
from trainers.metrics import check
from trainers.planted_pairs import labelled_rows, preference_rows
from trainers.preference_losses import AnswerLogps, mismatched_kl, paired_outcome, unpaired_outcome
from trainers.preference_training import LABELLED, LOSSES, LossName, PreferenceSettings
from trainers.prompt_format import PromptFormat
from trainers.reference_logps import read_reference, reference_key, reference_rows, write_reference

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = "builtin:tiny-llama"
PLAIN = PromptFormat(chat=False)
CPU = torch.device("cpu")
TOLERANCE = 1e-5  # relative to a parameter's largest gradient element
OVERRIDES: dict[str, tuple[str, ...]] = {
    "sigmoid": (),
    "robust": ("algorithm.label_smoothing=0.2",),
    "ipo": (),
    "kto": tuple(f"data.{part}.function=trainers.planted_pairs:labelled_rows" for part in ("train.0", "eval")),
    "orpo": (),
    "simpo": (),
}
RUN_S = 300.0  # one run with Ray; about 20 s on two idle cores


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model(TINY))


@pytest.fixture(scope="module")
def policy() -> PackedPolicy:
    return load_policy(resolve_model(TINY), 256)


def settings(loss: str) -> PreferenceSettings:
    return PreferenceSettings(name="dpo", loss=loss, label_smoothing=0.2 * (loss == "robust"))  # type: ignore[arg-type]


def comparisons(loss: str, tokenizer: Any, num: int = 9) -> list[Comparison]:
    """Pairs, and a ranking of three answers, of unlike lengths; or labelled answers with mismatched ones."""
    if LOSSES[loss].rows == LABELLED:  # type: ignore[index]
        rows = labelled_rows(num, 3)
    else:
        ranking = {"prompt": "abc", "completions": ["x", "yy y", "z" * 40], "ranks": [2, 1, 3]}
        rows = [*preference_rows(num - 1, 3), ranking]
    read = [read_preference(row, "row", tokenizer, PLAIN, loss) for row in rows]  # type: ignore[arg-type]
    return with_mismatched(read, 0, 1024, "data") if LOSSES[loss].rows == LABELLED else read  # type: ignore[index]


def reference_of(loss: str, batch: Sequence[Comparison]) -> list[np.ndarray] | None:
    """Numbers near those of the tiny model, so that no sigmoid saturates; None without a reference."""
    draw = np.random.default_rng(5)
    if not LOSSES[loss].has_reference:  # type: ignore[index]
        return None
    return [np.array([-5.77 * len(a) + draw.normal() for a in c.completion_ids]) for c in batch]


# --- one loss, however the batch is cut up --------------------------------------------------------


def one_by_one(model: Any, batch: Sequence[Comparison]) -> list[list[torch.Tensor]]:
    """Sums of log-probs by transformers' own attention, one text after the other."""
    found = []
    for c in batch:
        row = []
        for answer in c.completion_ids:
            ids = torch.from_numpy(np.concatenate([c.prompt_ids, answer]).astype(np.int64))
            logps = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
            row.append(logps.gather(1, ids[1:, None])[len(c.prompt_ids) - 1 :].sum())
        found.append(row)
    return found


def naive(loss: str, batch: Sequence[Comparison]) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32, local_files_only=True)
    logps, made, reference = one_by_one(model, batch), settings(loss), reference_of(loss, batch)

    def picked(where: Sequence[tuple[int, int]]) -> AnswerLogps:
        lengths = torch.tensor([float(len(batch[i].completion_ids[k])) for i, k in where])
        theirs = None if reference is None else torch.tensor([float(reference[i][k]) for i, k in where])
        return AnswerLogps(torch.stack([logps[i][k] for i, k in where]), theirs, lengths)

    if loss == "kto":
        other = picked([(i, 1) for i in range(len(batch))])
        kl = mismatched_kl(float(other.ratio.detach().sum()), len(batch))
        label = torch.tensor([c.label is True for c in batch])
        judged = picked([(i, 0) for i in range(len(batch))])
        found = unpaired_outcome(judged, label, int(label.sum()), len(batch), kl, made)
    else:
        pairs = [(i, pair) for i, c in enumerate(batch) for pair in c.pairs]
        weights = torch.tensor([1 / (len(batch) * len(batch[i].pairs)) for i, _ in pairs], dtype=torch.float64)
        chosen, rejected = (picked([(i, pair[side]) for i, pair in pairs]) for side in (0, 1))
        found = paired_outcome(chosen, rejected, weights, made)
    found.loss.backward()
    return found.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed(
    policy: PackedPolicy, loss: str, batch: Sequence[Comparison], token_budget: int, share: bool, num_ranks: int = 1
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """(metrics, gradient, packs of a rank): what the ranks do, one after the other."""
    made = PreferenceBatch(batch, reference_of(loss, batch), settings(loss), share, CPU)
    policy.zero_grad()
    if made.needs_kl:
        total = 0.0
        for rank in range(num_ranks):
            for members in made.plan(rank, num_ranks, token_budget, mismatched=True):
                part = made.share(members, mismatched=True)
                with torch.no_grad():
                    total += float(made.mismatched_ratios(policy(part.pack, 1.0, with_entropy=False)[0], part))
        made.settle_kl(total)
    metrics = dict.fromkeys(made.nothing().metrics, 0.0)
    for rank in range(num_ranks):
        plan = made.plan(rank, num_ranks, token_budget)
        for members in plan:
            part = made.share(members)
            outcome = made.outcome(policy(part.pack, 1.0, with_entropy=False)[0], part)
            outcome.loss.float().backward()  # type: ignore[no-untyped-call]
            metrics = {name: value + float(outcome.metrics[name]) for name, value in metrics.items()}
    gradient = {n: p.grad.clone() for n, p in policy.hf_model.named_parameters() if p.grad is not None}
    return metrics, gradient, len(plan)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_do_not_depend_on_micro_batches_packing_or_ranks(
    loss: str, policy: PackedPolicy, tokenizer: Any
) -> None:
    batch = comparisons(loss, tokenizer)
    longest = max(c.cost(False) for c in batch)
    expected_loss, expected = naive(loss, batch)
    assert any(float(g.abs().max()) > 1e-4 for g in expected.values())
    counts = []
    for budget, share, num_ranks in ((4096, True, 1), (4096, False, 1), (longest, False, 1), (longest, True, 3)):
        metrics, gradient, num_packs = packed(policy, loss, batch, budget, share, num_ranks)
        counts.append(num_packs)
        assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)  # of ipo: the square of float32 margins
        assert gradient.keys() == expected.keys()
        for name, whole in expected.items():
            assert float((gradient[name] - whole).abs().max()) <= TOLERANCE * float(whole.abs().max()), name
    assert counts[0] == 1 < counts[2], "the budgets cut nothing up"


def test_a_rank_without_a_pair_left_runs_one_that_counts_for_nothing(policy: PackedPolicy, tokenizer: Any) -> None:
    for loss in ("sigmoid", "kto"):
        batch = comparisons(loss, tokenizer)[:1]
        alone, many = (packed(policy, loss, batch, 4096, True, ranks) for ranks in (1, 4))
        assert many[0] == pytest.approx(alone[0])
        assert all(torch.equal(many[1][name], gradient) for name, gradient in alone[1].items())


def test_chosen_and_rejected_stay_in_one_pack_with_their_prompt_computed_once(tokenizer: Any) -> None:
    batch = comparisons("sigmoid", tokenizer)
    made = PreferenceBatch(batch, reference_of("sigmoid", batch), settings("sigmoid"), True, CPU)
    parts = [made.share(m) for m in made.plan(0, 1, max(c.cost(True) for c in batch))]
    assert sorted(m for part in parts for m in part.members) == list(range(len(batch)))
    for part in parts:
        answers = [len(batch[m].completion_ids) for m in part.members]
        assert [len(block.completions) for block in part.pack.layout.blocks] == answers


# --- a rank -----------------------------------------------------------------------------------


def make_rank(folder: Path, policy: PackedPolicy, loss: str, monkeypatch: pytest.MonkeyPatch) -> PreferenceLearner:
    """A rank with torch's own AdamW in the place of DeepSpeed, alone in its group."""
    monkeypatch.setattr(preference_learner.dist, "all_reduce", lambda tensor: None)
    rank = PreferenceLearner.__new__(PreferenceLearner)
    rank.rank, rank.device, rank.share_prompts, rank.num_steps = 0, CPU, True, 10
    rank.settings, rank.algorithm = LearnerSettings(token_budget=300), settings(loss)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)

    def step(lr: float) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    rank.engine = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, forward=policy, set_boundary=lambda is_last: None, backward=backward, step=step
    )
    rank._tables = {name: ComparisonTable(folder / f"{name}.arrow") for name in ("train", "held_out")}
    files = [folder / f"reference.{name}.parquet" for name in ("train", "held_out")]
    rank._reference = {f.name.split(".")[1]: reference_rows(f) for f in files if f.exists()}
    return rank


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "orpo"])
def test_a_rank_starts_at_its_reference_learns_and_names_its_metrics_as_trl_does(
    loss: LossName, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(resolve_model(TINY), 256)
    for name, some in (("train", comparisons(loss, tokenizer, 24)), ("held_out", comparisons(loss, tokenizer, 8))):
        write_comparisons(some, tmp_path / f"{name}.arrow")
        if LOSSES[loss].has_reference:
            with torch.no_grad():
                rows = [np.array([float(x) for x in row]) for row in one_by_one(hf_model(), some)]
            write_reference(tmp_path / f"reference.{name}.parquet", rows, "key")
    rank = make_rank(tmp_path, policy, loss, monkeypatch)
    before = rank.evaluate()
    metrics = [rank.update([(8 * step + i) % 24 for i in range(8)], step) for step in range(9)]
    after = rank.evaluate()
    assert after["loss"] < before["loss"] and metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"] - 1e-6
    for name in [*metrics[0], *(f"eval/{name}" for name in after)]:
        check(name)
    common = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    own = {"sigmoid": {"rewards/accuracies"}, "kto": {"kl"}}.get(
        loss, {"rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    )
    assert after.keys() == common | own
    if loss == "sigmoid":
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if loss == "kto":
        assert before["loss"] == pytest.approx(0.5, abs=1e-6) and before["kl"] == pytest.approx(0, abs=1e-4)
    if LOSSES[loss].has_reference:
        assert before["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32, local_files_only=True)


# --- rows ---------------------------------------------------------------------------------------


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ANSWER = {"prompt": "p", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("loss", "row", "reason"),
    [
        ("sigmoid", ANSWER, r"holds one labelled answer, and loss=sigmoid learns from pairs; give prompt, chosen, "
         r"rejected.* or set algorithm.loss=kto"),
        ("simpo", ANSWER, "loss=simpo learns from pairs"),
        ("kto", PAIR, "compared, and loss=kto learns .* give prompt, completion, label; or set algorithm.loss=sigmoid"),
        ("kto", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}, "give prompt, completion, label"),
        ("ipo", {"prompt": "p", "completion": "a"}, "is an example of SFT.*algorithm.name=sft"),
        ("orpo", {"messages": [{"role": "user", "content": "x"}]}, "is an example of SFT"),
        ("kto", {"prompt": "p", "completion": "a"}, "has no label"),
        ("kto", ANSWER | {"label": 1}, "label is neither true nor false"),
        ("sigmoid", PAIR | {"rejected": "a"}, "chosen and rejected are identical"),
        ("ipo", {"prompt": "p", "completions": ["a", "a"], "ranks": [1, 2]}, "answers 0 and 1 are identical"),
        ("sigmoid", {"prompt": "p", "chosen": "a"}, "has no column rejected"),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_is_refused_with_the_right_one(
    loss: LossName, row: dict[str, Any], reason: str, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_preference(row, "rows.jsonl:3", tokenizer, PLAIN, loss)
    assert caught.value.field == "rows.jsonl:3" and "\n" not in str(caught.value)


def test_a_labelled_answer_keeps_its_label_on_disk(tokenizer: Any, tmp_path: Path) -> None:
    rows = [ANSWER, ANSWER | {"label": False, "prompt": "q"}]
    read = [read_preference(row, "row", tokenizer, PLAIN, "kto") for row in rows]
    write_comparisons([*read, *comparisons("sigmoid", tokenizer, 2)], tmp_path / "t.arrow")
    table = ComparisonTable(tmp_path / "t.arrow")
    assert [table[i].label for i in range(len(table))] == [True, False, None, None]


def test_a_labelled_answer_that_was_cut_off_gets_no_eos_that_nobody_sampled(tokenizer: Any) -> None:
    whole, cut = (
        read_preference(ANSWER | {"finish_reason": reason}, "row", tokenizer, PLAIN, "kto").completion_ids[0]
        for reason in ("stop", "length")
    )
    assert whole[-1] == tokenizer.eos_token_id and whole[:-1].tolist() == cut.tolist()


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2, 4, 1), (5, 5), (7, 1, 2)])
def test_a_mismatched_answer_is_of_another_prompt_and_each_serves_once(sizes: tuple[int, ...]) -> None:
    answers = [
        Comparison(f"p{g}", np.arange(4, dtype=np.int32), (np.array([g, i, 9], dtype=np.int32),), label=True)
        for g, size in enumerate(sizes)
        for i in range(size)
    ]
    found = with_mismatched(answers, 3, 100, "data")
    assert [f.completion_ids[0].tolist() for f in found] == [a.completion_ids[0].tolist() for a in answers]
    others = [tuple(f.completion_ids[1].tolist()) for f in found]
    assert all(f"p{other[0]}" != f.prompt_id for f, other in zip(found, others, strict=True))
    if max(sizes) * 2 <= sum(sizes):
        assert sorted(others) == sorted(tuple(a.completion_ids[0].tolist()) for a in answers)
    assert others == [tuple(f.completion_ids[1].tolist()) for f in with_mismatched(answers, 3, 100, "data")]
    assert all(len(f.completion_ids[1]) == 1 for f in with_mismatched(answers, 3, 5, "data")), "cut to fit"


def test_answers_to_one_prompt_alone_have_no_mismatched_ones(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="all of them answer one prompt"):
        with_mismatched([read_preference(ANSWER, "row", tokenizer, PLAIN, "kto")] * 3, 0, 100, "data.train")


# --- the reference ------------------------------------------------------------------------------


class Events:
    """What a run is told, in place of its telemetry."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def phase(self, name: str, done: int, total: int) -> None:
        self.events.append({"kind": "phase", "name": name, "done": done, "total": total})

    def sources(self) -> list[tuple[str, str]]:
        return [(e["data"], e["source"]) for e in self.events if e["kind"] == "reference"]


def task_of(tmp_path: Path, tokenizer: Any, loss: str = "sigmoid", num: int = 12, **sections: Any) -> PreferenceTask:
    base = resolve_model(TINY)
    function = f"trainers.planted_pairs:{'labelled' if loss == 'kto' else 'preference'}_rows"
    raw: dict[str, Any] = {
        "run": {"name": "x", "num_steps": 2, "batch_size": 4, "directory": str(tmp_path / "runs")},
        "model": {"path": base, "max_length": 128, "dtype": "float32"},
        "data": {"train": [{"function": function, "args": {"num": num, "seed": 1}}], "format": {"chat": False}},
        "algorithm": {"name": "dpo", "loss": loss},
        "cluster": {"backend": "in_process", "device": "cpu"},
        **sections,
    }
    config = TuningConfig.model_validate(raw)
    return PreferenceTask(config, BaseModelFolder(base, check_model_folder(base), 128, tokenizer))


def settled(task: PreferenceTask, folder: Path) -> Events:
    """The run folder as the ranks find it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = Events()
    site: Any = Site(None, [NodeSupply("this process", num_cpus(), 0)], told)  # type: ignore[arg-type]
    task.write(folder)
    asyncio.run(task.before_ranks(site, folder))
    return told


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_the_reference_is_asked_once_and_its_answers_are_used_again(
    loss: str, tokenizer: Any, tmp_path: Path
) -> None:
    task = task_of(tmp_path, tokenizer, loss, num=40, evaluation={"size": 8})
    told = settled(task, tmp_path / "first")
    assert told.sources() == [("train", "computed"), ("held_out", "computed")]
    kwargs = task.rank_kwargs(tmp_path / "first")
    for name, file in kwargs["reference"].items():
        table = ComparisonTable(tmp_path / "first" / f"{name}.arrow")
        with torch.no_grad():
            expected = one_by_one(hf_model(), [table[i] for i in range(len(table))])
        for row, theirs in zip(reference_rows(Path(file)), expected, strict=True):
            np.testing.assert_allclose(row, [float(x) for x in theirs], rtol=1e-5)
    again = task_of(tmp_path, tokenizer, loss, num=40, evaluation={"size": 8})
    assert settled(again, tmp_path / "second").sources() == [("train", "cache"), ("held_out", "cache")]
    for name in ("train", "held_out"):
        first, second = (reference_rows(tmp_path / f / f"reference.{name}.parquet") for f in ("first", "second"))
        assert [row.tolist() for row in first] == [row.tolist() for row in second]


def test_a_damaged_file_of_the_reference_is_computed_again(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer)
    settled(task, tmp_path / "first")
    cache = sorted((tmp_path / "runs" / "reference-logprobs").iterdir())
    assert len(cache) == 2
    rows = reference_rows(tmp_path / "first" / "reference.train.parquet")
    (damaged,) = [f for f in cache if len(reference_rows(f)) == len(rows)]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    told = settled(task, tmp_path / "second")
    assert ("train", "damaged") in told.sources() and ("train", "computed") in told.sources()
    assert ("held_out", "cache") in told.sources()
    again = reference_rows(tmp_path / "second" / "reference.train.parquet")
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def test_a_file_of_the_reference_says_what_it_is_of(tokenizer: Any, tmp_path: Path) -> None:
    some = comparisons("sigmoid", tokenizer, 4)
    rows = [np.zeros(len(c.completion_ids)) - 1.5 for c in some]
    key = reference_key(some, "model", "float32")
    other = [reference_key(some, "other", "float32"), reference_key(some, "model", "bfloat16"),
             reference_key(some[::-1], "model", "float32"), reference_key(some[:3], "model", "float32")]  # fmt: skip
    assert len({key, *other}) == 5
    file = tmp_path / "x" / f"{key}.parquet"
    write_reference(file, rows, key)
    assert [row.tolist() for row in read_reference(file, some, key)] == [row.tolist() for row in rows]
    with pytest.raises(VerificationError, match="not of"):
        read_reference(file, some, other[0])
    with pytest.raises(VerificationError, match="rows of other answers"):
        read_reference(file, some[:3], key)
    file.write_text("no parquet")
    with pytest.raises(VerificationError, match="cannot be read"):
        reference_rows(file)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_a_loss_without_a_reference_loads_none(loss: str, tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer, loss)
    assert settled(task, tmp_path / "run").events == []
    assert task.rank_kwargs(tmp_path / "run")["reference"] == {}
    assert not (tmp_path / "runs").exists()


# --- the task -----------------------------------------------------------------------------------


def test_a_task_holds_prompts_out_only_where_it_evaluates(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, tokenizer)
    held, learned = ({c.prompt_id for c in some} for some in (task._held_out, task._train))
    assert held and not held & learned and sum(task.sizes) + task.report["num_held_out"] == 12
    whole = task_of(tmp_path, tokenizer, evaluation={"every": 0})
    assert whole.sizes == [12] and whole.report["num_held_out"] == 0
    assert "12 comparisons of" in whole.summary and whole.payload([(0, 3), (0, 5)], 0) == [3, 5]
    labelled = task_of(tmp_path, tokenizer, "kto", evaluation={"every": 0})
    assert "desirable" in labelled.summary and labelled.report["num_desirable"] == sum(
        bool(row["label"]) for row in labelled_rows(12, 1)
    )


def test_other_labels_are_other_data_for_a_checkpoint_and_the_same_for_the_reference(tokenizer: Any) -> None:
    from dataclasses import replace

    from trainers.comparisons import digest

    some = comparisons("kto", tokenizer)
    turned = [replace(some[0], label=not some[0].label), *some[1:]]
    assert digest(some) != digest(turned)
    assert reference_key(some, "m", "float32") == reference_key(turned, "m", "float32")


# --- refused before anything is allocated ---------------------------------------------------------


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main(list(words)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("burnish: ") and "; " in lines[0], lines
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("algorithm.loss=orpo", "reference.num_workers=2"),
         ("reference = ", "algorithm.loss=orpo has no reference", "leave the section out")),
        (("algorithm.loss=simpo", "reference.path=builtin:tiny-llama"), ("algorithm.loss=simpo has no reference",)),
        (("algorithm.loss=ipo", "algorithm.label_smoothing=0.1"),
         ("algorithm.label_smoothing = 0.1", "loss=ipo has no label smoothing, only sigmoid and robust have")),
        (("algorithm.gamma=0.3",), ("algorithm.gamma = 0.3", "loss=sigmoid has no gamma, only simpo has")),
        (("algorithm.loss=dpo",), ("algorithm.loss = 'dpo'", "sigmoid", "robust", "ipo", "kto", "orpo", "simpo")),
        (("algorithm.loss=robust",), ("algorithm.label_smoothing", "give that share, or use loss=sigmoid")),
        (("alarms.action=roll_back",), ("alarms.action = 'roll_back'", "only a run that samples goes back")),
        (("algorithm.loss=kto", f"model.path={TINY}"), ("data.train.0 row 1", "give prompt, completion, label")),
        ((*OVERRIDES["kto"], f"model.path={TINY}"), ("data.train.0 row 1", "or set algorithm.loss=kto")),
        (("reference.token_budget=64", f"model.path={TINY}"), ("reference.token_budget = 64", "raise it")),
        (("reference.path=nowhere", f"model.path={TINY}"), ("reference.path = 'nowhere'",)),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_one_line(
    overrides: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capfd, "train", "cpu-dpo", f"run.directory={tmp_path / 'runs'}", *overrides)
    for words in expected:
        assert words in line, line
    assert not (tmp_path / "runs").exists()


def test_a_reference_beside_another_algorithm_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, "train", "cpu-sft", "reference.num_workers=2")
    assert "algorithm.name=sft has no reference" in line


# --- the driver, with a rank that only tells a story ------------------------------------------------


class Falling:
    """Both kinds of answers become less likely under it, and the margin grows."""

    def __init__(self, **kwargs: Any) -> None:
        assert kwargs["reference"].keys() == {"train", "held_out"} and kwargs["algorithm"].loss == "sigmoid"
        assert all(len(reference_rows(Path(file))) for file in kwargs["reference"].values())
        self.num_updates = 0

    def update(self, indices: list[int], step: int) -> dict[str, float]:
        self.num_updates = step + 1
        return {"loss": 0.6, "num_tokens": 10.0 * len(indices)}

    def evaluate(self) -> dict[str, float]:
        worse = float(self.num_updates)
        return {"loss": 0.6, "rewards/chosen": -worse, "rewards/rejected": -3 * worse, "rewards/margins": 2 * worse}

    def begin_save(self, directory: str) -> SaveBegun:
        Path(directory).mkdir()
        (Path(directory) / "state").write_text(str(self.num_updates))
        return SaveBegun(0.0, 0)

    def save_outcome(self) -> SaveOutcome:
        return SaveOutcome({}, 0.0)

    def load(self, directory: str) -> None:
        self.num_updates = int((Path(directory) / "state").read_text())

    def export(self, directory: str) -> None:
        Path(directory).mkdir(parents=True)


def test_the_alarm_of_falling_likelihood_stops_a_run_with_a_checkpoint_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreferenceTask, "rank_class", Falling)
    command = [
        "train", "cpu-dpo", f"run.directory={tmp_path}", "run.name=run", f"model.path={TINY}", "model.dtype=float32",
        "run.num_steps=8", "run.batch_size=4", "data.train.0.args.num=12", "data.eval.args.num=4", "evaluation.every=1",
        "checkpoint.every=0", "alarms.actions.falling_likelihood=stop", "cluster.backend=in_process",
        "telemetry.wandb=disabled",
    ]  # fmt: skip
    assert main(command) == 0
    events = rows_of(tmp_path / "run", "events.jsonl")
    (alarm,) = [e for e in events if e["kind"] == "alarm"]
    # Evaluated at steps 0 to 4: the trend of the first four readings, and that of the next four.
    assert (alarm["name"], alarm["step"], alarm["since"], alarm["action"]) == ("falling_likelihood", 4, 3, "stop")
    assert events[-1]["kind"] == "stopped" and events[-1]["step"] == 4
    assert [e["source"] for e in events if e["kind"] == "reference"] == ["computed", "computed"]
    assert main([*command, "--resume"]) == 0
    events = rows_of(tmp_path / "run", "events.jsonl")
    assert len([e for e in events if e["kind"] == "alarm"]) == 1, "it is raised already"
    assert events[-1]["kind"] == "finished" and [e["source"] for e in events if e["kind"] == "reference"][2:] == [
        "cache", "cache"
    ]  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(9)) and rows[8]["num_tokens"] == 8 * 40


# --- whole runs ---------------------------------------------------------------------------------

NUM_STEPS = 6


def run(folder: Path, loss: str, *more: str, name: str | None = None) -> Path:
    """One run in a process of its own: DeepSpeed does not survive the end of its process group."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "launch.cli", "train", "cpu-dpo", f"run.directory={folder}", f"run.name={name or loss}",
        f"model.path={TINY}", "model.dtype=float32", f"algorithm.loss={loss}", *OVERRIDES[loss],
        f"run.num_steps={NUM_STEPS}", "run.batch_size=8", "data.train.0.args.num=48", "data.eval.args.num=16",
        "learner.optimizer.lr=3e-4", "learner.optimizer.schedule=constant", "learner.optimizer.warmup_steps=0",
        "evaluation.every=3", "checkpoint.every=2", "cluster.backend=in_process", "telemetry.wandb=disabled", *more,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / (name or loss)


def rows_of(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(read_rows(folder / file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    exported = AutoModelForCausalLM.from_pretrained(folder / "export" / f"step-{NUM_STEPS:06d}", dtype=torch.float32)
    return dict(exported.state_dict())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_each_loss_learns_records_and_exports(loss: LossName, runs: Path) -> None:
    folder = run(runs, loss, "data.train.0.args.num=8")  # all of it in every step
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[-1]["loss"] < rows[1]["loss"] and rows[-1]["rewards/margins"] > rows[1]["rewards/margins"]
    assert all(math.isfinite(row["eval/loss"]) for row in rows[:: NUM_STEPS // 2])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert all(math.isfinite(row[name]) for row in rows[1:])
    if loss in ("sigmoid", "robust"):
        for value in (rows[0]["eval/loss"], rows[1]["loss"]):
            assert value == pytest.approx(math.log(2), abs=1e-4)
    if loss == "kto":
        assert rows[1]["kl"] >= 0 and rows[0]["eval/loss"] == pytest.approx(0.5, abs=1e-3)
    events = rows_of(folder, "events.jsonl")
    assert events[-1]["kind"] == "finished"
    sources = {e["source"] for e in events if e["kind"] == "reference"}
    assert bool(sources) == LOSSES[loss].has_reference
    before = hf_model().state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(folder).items())


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_S)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_cut(tmp_path: Path) -> None:
    whole = run(tmp_path, "sigmoid", name="whole")
    run(tmp_path, "sigmoid", "run.num_steps=4", name="cut")
    resumed = run(tmp_path, "sigmoid", "--resume", name="cut")
    assert [row["step"] for row in rows_of(resumed)] == list(range(NUM_STEPS + 1))
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_S)
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_two_ranks_with_zero_2_under_ray_train_as_one_rank_does(loss: str, tmp_path: Path) -> None:
    one = run(tmp_path, loss, name="one")
    two = run(
        tmp_path, loss, "cluster.backend=ray", "learner.num_workers=2", "learner.zero_stage=2",
        "learner.token_budget=400", "model.max_length=256", f"algorithm.reference_cache={tmp_path / 'other'}",
        name="two",
    )  # fmt: skip
    for ours, theirs in zip(rows_of(two), rows_of(one), strict=True):
        for name in {"loss", "grad_norm", "eval/loss", "kl", "rewards/margins", "logps/chosen"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3), name
    expected = weights(one)
    assert all(torch.allclose(tensor, expected[name], atol=2e-4) for name, tensor in weights(two).items())
