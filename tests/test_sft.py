"""SFT: the loss is transformers' own whatever the packing, and a run trains every example once, also when it is cut."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.example_files import ExampleFile, write_examples
from actors.model_folders import resolve_model
from actors.modeling import PackedPolicy, load_policy
from actors.sft_learner import TEMPERATURE, example_packs, sft_pack_loss
from actors.state_saving import SaveBegun, SaveOutcome
from cluster.checkpoints import CheckpointStore
from launch.cli import main
from launch.journal import read_rows
from launch.sft_task import SFTTask
from trainers.examples import Example, encode_example
from trainers.mixture import MixtureStream
from trainers.planted import sft_rows
from trainers.prompt_format import PromptFormat

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = "builtin:tiny-llama"
CHUNK = 256  # of log-probs
RUN_S = 240.0  # one run with Ray; about 20 s on two idle cores
TALK = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Yes, much more."},
]  # fmt: skip


def examples() -> list[Example]:
    """Of every kind, from 4 to about 100 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL), local_files_only=True)
    plain = PromptFormat(chat=False)
    rows = [*sft_rows(5, 0), {"messages": TALK}, {"text": "abc"}, {"text": "A longer text."}]
    made = [encode_example(row, tokenizer, 1000, form=plain if "prompt" in row else PromptFormat()) for row in rows]
    assert all(isinstance(e, Example) for e in made)
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def student() -> PackedPolicy:
    return load_policy(resolve_model(MODEL), CHUNK).eval()


def packed(student: PackedPolicy, token_budget: int) -> tuple[float, int, dict[str, torch.Tensor]]:
    """(loss, packs, gradient) of all examples with packs of ``token_budget``."""
    num_targets = sum(int(e.mask.sum()) for e in examples())
    packs = [pack for pack, _ in example_packs(examples(), 0, 1, token_budget, torch.device("cpu"))]
    student.zero_grad()
    total = 0.0
    for pack in packs:
        loss = sft_pack_loss(student(pack, TEMPERATURE, with_entropy=False)[0], num_targets)
        loss.backward()
        total += loss.item()
    named = student.hf_model.named_parameters()
    return total, len(packs), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name


# --- loss and gradient ----------------------------------------------------------------------------


def reference(model: str, texts: Sequence[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of transformers' own causal-LM loss, one example after the other."""
    hf = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32, local_files_only=True)
    count = sum(int(e.mask.sum()) for e in texts)
    total = 0.0
    for example in texts:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(example.mask)[None], -100)
        loss = hf(input_ids=ids, labels=labels).loss * example.mask.sum() / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


def test_loss_and_gradient_are_those_of_transformers_own_loss(student: PackedPolicy) -> None:
    loss, gradient = reference(MODEL, examples())
    found, _, ours = packed(student, 4096)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_same(ours, gradient)


def test_packing_changes_neither_loss_nor_gradient(student: PackedPolicy) -> None:
    together, one_pack, expected = packed(student, 4096)
    longest = max(e.input_ids.shape[0] for e in examples()) - 1
    for budget in (longest, 2 * longest):
        loss, num_packs, gradient = packed(student, budget)
        assert num_packs > one_pack == 1
        assert loss == pytest.approx(together, rel=1e-5)
        assert_same(gradient, expected)


def test_a_neighbour_in_the_pack_changes_no_log_prob(student: PackedPolicy) -> None:
    device = torch.device("cpu")
    with torch.no_grad():
        ((pack, _),) = example_packs(examples(), 0, 1, 4096, device)
        rows = dict(zip(pack.members, student(pack, TEMPERATURE)[0].split(pack.lengths), strict=True))
        for i, text in enumerate(examples()):
            ((alone, _),) = example_packs([text], 0, 1, 4096, device)
            torch.testing.assert_close(student(alone, TEMPERATURE)[0], rows[i], rtol=1e-5, atol=1e-5)


def test_pad_equal_to_eos_is_harmless(student: PackedPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(MODEL), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.eos_token
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    made = encode_example({"messages": TALK}, tokenizer, 1000)
    assert isinstance(made, Example)
    assert made.mask.tolist() == examples()[5].mask.tolist(), "an EOS is learned, whatever it is called"
    loss, _, gradient = packed(load_policy(str(folder), CHUNK).eval(), 4096)
    expected = packed(student, 4096)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert_same(gradient, expected[2])


def test_a_rank_without_work_runs_a_pack_of_weight_zero() -> None:
    batch = examples()[:1]
    packs = [list(example_packs(batch, r, 2, 4096, torch.device("cpu"))) for r in (0, 1)]
    assert [[is_filler for _, is_filler in mine] for mine in packs] == [[False], [True]]
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = sft_pack_loss(logprobs, 8, is_filler=True)
    loss.backward()
    assert float(loss) == 0 and logprobs.grad is not None and logprobs.grad.tolist() == [0, 0]
    assert float(sft_pack_loss(logprobs, 8)) == 0.5, "the denominator is the batch's, not the pack's"


def test_a_file_of_examples_gives_them_back(tmp_path: Path) -> None:
    write_examples(tmp_path / "some.arrow", examples())
    read = ExampleFile(str(tmp_path / "some.arrow"))
    assert len(read) == len(examples())
    for i, example in enumerate(examples()):
        assert read[i].input_ids.tolist() == example.input_ids.tolist()
        assert read[i].mask.tolist() == example.mask.tolist() and read[i].mask.dtype == np.bool_
        assert read[i].source_index == example.source_index


# --- runs -----------------------------------------------------------------------------------------

NUM_EXAMPLES, BATCH, NUM_STEPS = 40, 8, 5


def arguments(folder: Path, *more: str, name: str = "run") -> list[str]:
    return [
        "train", "cpu-sft", f"run.directory={folder}", f"run.name={name}", f"model.path={MODEL}", "model.dtype=float32",
        "run.num_steps=null", "run.num_epochs=1", f"run.batch_size={BATCH}", f"data.train.0.args.num={NUM_EXAMPLES}",
        "data.eval.args.num=16", "learner.optimizer.lr=1e-3", "learner.optimizer.schedule=constant",
        "evaluation.every=5", "checkpoint.every=2", "cluster.backend=in_process", "telemetry.wandb=disabled", *more,
    ]  # fmt: skip


def run(folder: Path, *more: str, name: str = "run") -> Path:
    """One run in a process of its own: DeepSpeed does not survive the end of its process group."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.cli", *arguments(folder, *more, name=name)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / name


def rows_of(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(read_rows(folder / file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    exported = AutoModelForCausalLM.from_pretrained(folder / "export" / f"step-{NUM_STEPS:06d}", dtype=torch.float32)
    return dict(exported.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("sft"), name="whole")


def test_a_run_learns_records_and_exports(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[5]["eval/loss"] < rows[0]["eval/loss"] - 0.1
    assert rows[5]["epoch"] == 1 and rows[1]["epoch"] == BATCH / NUM_EXAMPLES
    assert rows[5]["num_tokens"] > rows[4]["num_tokens"] > 0
    events = rows_of(whole, "events.jsonl")
    assert events[-1]["kind"] == "finished"
    (data,) = [e for e in events if e["kind"] == "data"]
    assert data["num_examples"] == {"reviews": NUM_EXAMPLES} and data["num_held_out"] == 16
    before = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32).state_dict()
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(whole).items())
    assert AutoTokenizer.from_pretrained(whole / "export" / f"step-{NUM_STEPS:06d}").chat_template


def test_the_losses_a_run_reports_are_transformers_own(whole: Path) -> None:
    train, held_out = (ExampleFile(str(whole / "data" / f"{name}.arrow")) for name in ("train.reviews", "eval"))
    rows = rows_of(whole)
    loss, _ = reference(MODEL, [held_out[i] for i in range(len(held_out))])
    assert rows[0]["eval/loss"] == pytest.approx(loss, rel=1e-5)
    batch = [train[i] for _, i in MixtureStream((len(train),), None, seed=0).take(BATCH, 0.0)]
    loss, gradient = reference(MODEL, batch)
    assert rows[1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[1]["grad_norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradient.values())), rel=1e-4)
    assert rows[1]["num_tokens"] == sum(e.input_ids.shape[0] for e in batch)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_cut(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, "run.num_epochs=0.4")
    resumed = run(tmp_path, "--resume")
    assert [row["step"] for row in rows_of(resumed)] == [0, 1, 2, 3, 4, 5]
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_S)
def test_two_ranks_with_zero_2_under_ray_train_as_one_rank_does(whole: Path, tmp_path: Path) -> None:
    two = run(
        tmp_path, "cluster.backend=ray", "learner.num_workers=2", "learner.zero_stage=2", "learner.token_budget=256",
        "telemetry.wandb=offline",
    )  # fmt: skip
    for ours, theirs in zip(rows_of(two), rows_of(whole), strict=True):
        assert {k for k in ours if "checkpoint" not in k} == {k for k in theirs if "checkpoint" not in k}
        for name in {"loss", "grad_norm", "eval/loss", "num_tokens"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    expected = weights(whole)
    assert all(torch.allclose(t, expected[name], atol=1e-4) for name, t in weights(two).items())
    (ready,) = [e for e in rows_of(two, "events.jsonl") if e["kind"] == "ready"]
    assert [row["role"] for row in ready["layout"]] == ["learner", "learner"]
    assert list((two / "wandb").glob("offline-run-*"))


# --- faults: the driver with a rank that only counts ------------------------------------------------


class Counting:
    """A rank whose weights are the examples it was trained on."""

    fault: Callable[[int], None] = staticmethod(lambda step: None)
    fault_of_disk: Callable[[int], None] = staticmethod(lambda num_trained: None)

    def __init__(self, **_: Any) -> None:
        self.trained: list[int] = []

    def update(self, drawn: Any, step: int) -> dict[str, float]:
        self.fault(step)
        self.trained += [index for _, index in drawn]
        return {"loss": 0.0, "num_tokens": 1.0}

    def evaluate(self) -> dict[str, float]:
        return {"loss": 0.0}

    def begin_save(self, directory: str) -> SaveBegun:
        self.saving, self.saved = Path(directory), list(self.trained)
        return SaveBegun(0.0, 0)

    def save_outcome(self) -> SaveOutcome | None:
        try:
            self.fault_of_disk(len(self.saved))
            self.saving.mkdir()
            (self.saving / "trained.json").write_text(json.dumps(self.saved))
        except OSError as error:
            return SaveOutcome({}, 0.0, str(error))
        return SaveOutcome({}, 0.0)

    def load(self, directory: str) -> None:
        self.trained = json.loads((Path(directory) / "trained.json").read_text())

    def export(self, directory: str) -> None:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "trained.json").write_text(json.dumps(self.trained))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(SFTTask, "rank_class", Counting)
    for name in ("fault", "fault_of_disk"):
        monkeypatch.setattr(Counting, name, staticmethod(lambda _: None))
    return Counting


def power_cut(step: int) -> None:
    if step == 3:
        raise ConnectionError("power cut")


def test_a_run_that_dies_and_resumes_trains_each_example_once(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(tmp_path, name="whole")) == 0
    monkeypatch.setattr(counting, "fault", staticmethod(power_cut))
    with pytest.raises(ConnectionError):
        main(arguments(tmp_path))
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert newest is not None and newest.step == 2
    assert list(read_rows(tmp_path / "run" / "events.jsonl"))[-1]["kind"] == "failed"
    monkeypatch.setattr(counting, "fault", staticmethod(lambda step: None))
    assert main([*arguments(tmp_path), "--resume"]) == 0
    trained, expected = (
        json.loads((tmp_path / name / "export" / f"step-{NUM_STEPS:06d}" / "trained.json").read_text())
        for name in ("run", "whole")
    )
    assert trained == expected and sorted(trained) == list(range(NUM_EXAMPLES))
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert [row["num_tokens"] for row in rows_of(tmp_path / "run")[1:]] == [1, 2, 3, 4, 5]


def test_sigterm_stops_with_a_checkpoint_of_the_step_that_was_finished(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(counting, "fault", staticmethod(interrupted))
    assert main(arguments(tmp_path, "checkpoint.every=0", "evaluation.every=0")) == 0
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert newest is not None and newest.metadata["stream"]["drawn"] == [newest.step * BATCH]
    assert newest.step == 3
    kinds = [e["kind"] for e in read_rows(tmp_path / "run" / "events.jsonl")]
    assert "stopping" in kinds and kinds[-1] == "stopped"
    assert not (tmp_path / "run" / "export").exists()


def test_the_checkpoint_of_the_best_evaluation_stays_besides_the_newest(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "evaluate", lambda rank: {"loss": abs(len(rank.trained) / BATCH - 2.0)})
    best = ("checkpoint.keep=1", "checkpoint.keep_best=1", "checkpoint.best_metric=eval/loss", "checkpoint.best=lowest")
    assert main(arguments(tmp_path, "evaluation.every=1", "checkpoint.every=1", *best)) == 0
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.steps() == [2, 5] and store.load(2).score == 0.0


def test_a_full_disk_costs_one_checkpoint_and_the_run_says_so_and_goes_on(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(num_trained: int) -> None:
        if num_trained == 4 * BATCH:
            older = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
            assert older is not None and older.step == 2, "the old one is there while the disk is full"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    monkeypatch.setattr(counting, "fault_of_disk", staticmethod(full))
    assert main(arguments(tmp_path)) == 0
    events = rows_of(tmp_path / "run", "events.jsonl")
    (failed,) = [e for e in events if e["kind"] == "checkpoint_failed"]
    assert failed["step"] == 4 and failed["intact"] == "step 2" and "No space left on device" in failed["reason"]
    assert [e["step"] for e in events if e["kind"] == "checkpoint"] == [2, 5]
    assert events[-1]["kind"] == "finished"
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert "checkpoint_failed: reason=learner[0]: [Errno 28] No space left" in capfd.readouterr().out
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert newest is not None and newest.step == 5
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main(list(words)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("burnish: ") and "; " in lines[0], lines
    return lines[0]


def test_other_data_than_the_checkpoints_is_refused(
    tmp_path: Path, counting: type[Counting], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "evaluation.every=0")) == 0
    line = refusal(capfd, *arguments(tmp_path, "data.train.0.args.seed=9"), "--resume")
    assert "data.train" in line and "not those the checkpoint was made with" in line


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "answer": "b"}, "has none of: prompt and completion"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing to learn"),
    ],
)
def test_a_bad_row_is_refused_in_one_line_that_names_it(
    kind: str, bad: dict[str, Any], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = {"messages": TALK} if "messages" in bad else {"prompt": "a", "completion": "b"}
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    else:
        columns = {name: [good.get(name), bad.get(name)] for name in {**good, **bad}}
        pq.write_table(pa.table(columns), file)
    line = refusal(capfd, *arguments(tmp_path / "runs", "data.train=[{path: " + str(file) + "}]"))
    assert reason in line and (f"{file}:2" if kind == "jsonl" else f"{file} row 2") in line
    assert not (tmp_path / "runs").exists()


def test_rows_that_are_too_long_are_left_out_and_counted_and_none_left_is_refused(
    tmp_path: Path, counting: type[Counting], capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "short"}] * 8 + [{"text": "long " * 100}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data.train=[{path: " + str(file) + "}]", "evaluation.every=0", "model.max_length=64")
    assert main(arguments(tmp_path, *own)) == 0
    assert "3 left out: train-0 3 too_long" in capfd.readouterr().out
    (data,) = [e for e in read_rows(tmp_path / "run" / "events.jsonl") if e["kind"] == "data"]
    assert data["num_examples"] == {"train-0": 8} and data["left_out"] == {"train-0": {"too_long": 3}}
    line = refusal(capfd, *arguments(tmp_path, *own[:2], "model.max_length=4", name="none"))
    assert "none is left to learn from (11 too_long)" in line


def test_a_misspelt_key_of_an_algorithm_is_refused_with_the_nearest_one(capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, "train", "cpu-sft", "algorithm.trunkate=true")
    assert "algorithm.trunkate = 'true': there is no such key; the nearest one is algorithm.truncate" in line
    line = refusal(capfd, "train", "cpu-sft", "algorithm.name=stf")
    assert "algorithm.name = 'stf'" in line and "grpo" in line and "sft" in line and "reward" in line
