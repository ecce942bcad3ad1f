"""Every bad input is refused in one line, before a run folder or a Ray exists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from actors.model_folders import resolve_model
from cluster.checkpoints import CheckpointStore
from launch.cli import main

RECIPE = "cpu-two-by-two"
NAME = "refused"
REPOSITORY = Path(__file__).resolve().parent.parent

REWARDS = """
def short(completions):
    return [1.0]

def nan(completions):
    return [float("nan")] * len(completions)

def raises(completions):
    raise KeyError("no such thing")

def needs_grade(completions, grade):
    return [1.0] * len(completions)

not_a_function = 3
"""


@dataclass
class Workshop:
    """Folders in which bad inputs are made."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return self.runs / NAME

    def arguments(self, *overrides: str) -> list[str]:
        return ["train", RECIPE, f"run.name={NAME}", f"run.directory={self.runs}", *overrides]

    def model(self, spoil: Callable[[Path], None]) -> str:
        """model.path of a copy of the tiny model that ``spoil`` has been at."""
        copy = self.folder / "model"
        shutil.copytree(resolve_model("builtin:tiny-llama"), copy)
        spoil(copy)
        return f"model.path={copy}"

    def data(self, *rows: object) -> list[str]:
        """Overrides that train on a JSONL file of these rows; text is written as it is."""
        file = self.folder / "train.jsonl"
        file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return ["prompts.train={path: " + str(file) + "}", "prompts.eval=null", "evaluation.every=0"]

    def reward(self, name: str) -> list[str]:
        file = self.folder / "my_rewards.py"
        file.write_text(REWARDS)
        return [f"rewards.0.function={file}:{name}", "rewards.0.args={}"]

    def checkpoints(self, *steps: int) -> CheckpointStore:
        """A run folder with checkpoints of which nothing but the bytes is real."""
        self.run.mkdir(parents=True)
        (self.run / "config.yaml").write_text("run: {}\n")
        store = CheckpointStore(self.run / "checkpoints", keep=len(steps))
        for step in steps:
            (store.begin(step) / "shard.pt").write_bytes(os.urandom(64))
            store.commit(step, {"incarnation": 0})
        return store


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started for an input that is refused")

    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Workshop(tmp_path)


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; fails when there are more, or the exit code is not 2."""
    capfd.readouterr()
    code = main(arguments)
    lines = capfd.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("burnish: ")
    assert "; " in lines[0], "no remedy"
    assert not ray.is_initialized()
    return lines[0]


Case = tuple[Callable[[Workshop], list[str]], tuple[str, ...]]

CASES: dict[str, Case] = {
    "an unknown key": (
        lambda s: ["learner.token_budgets=100"],
        ("learner.token_budgets = '100'", "no such key", "nearest one is learner.token_budget"),
    ),
    "a wrong type": (
        lambda s: ["run.num_steps=many"],
        ("run.num_steps = 'many'", "valid integer", "give a whole number, at least 1"),
    ),
    "an override without a value": (lambda s: ["run.seed"], ("override = 'run.seed'", "write for instance run.seed=1")),
    "top_k set": (
        lambda s: ["generator.sampling.top_k=5"],
        ("generator.sampling.top_k = 5", "truncated distribution", "use top_k=0"),
    ),
    "top_p below 1": (
        lambda s: ["generator.sampling.top_p=0.9"],
        ("generator.sampling.top_p = 0.9", "truncated distribution", "use top_p=1.0"),
    ),
    "groups that do not divide": (
        lambda s: ["run.groups_per_step=4", "algorithm.num_minibatches=3"],
        ("run.groups_per_step = 4", "not divisible by algorithm.num_minibatches=3"),
    ),
    "a token budget below the longest sample": (
        lambda s: ["model.max_length=1024", "learner.token_budget=512"],
        ("learner.token_budget = 512", "model.max_length=1024"),
    ),
    "an unknown built-in model": (
        lambda s: ["model.path=builtin:tiny-lama"],
        ("model.path = 'builtin:tiny-lama'", "no such builtin model", "tiny-llama"),
    ),
    "a model folder that does not exist": (
        lambda s: ["model.path=/nowhere/model"],
        ("model.path = '/nowhere/model'", "no such folder", "give a Hugging Face folder"),
    ),
    "a model without a tokenizer": (
        lambda s: [s.model(lambda folder: [p.unlink() for p in folder.glob("tokenizer*")])],  # type: ignore[arg-type, func-returns-value]
        ("model.path = ", "/model'", "has no tokenizer", "add tokenizer.json"),
    ),
    "a model without weights": (
        lambda s: [s.model(lambda folder: (folder / "model.safetensors").unlink())],
        ("model.path = ", "has no *.safetensors", "save_pretrained"),
    ),
    "a model with truncated weights": (
        lambda s: [s.model(lambda folder: os.truncate(folder / "model.safetensors", 100_000))],
        ("model.path = ", "model.safetensors", "has 100000 bytes, its header says", "copy the file again"),
    ),
    "a model built for less than is asked": (
        lambda s: ["model.max_length=4096", "learner.token_budget=8192"],
        ("model.max_length = 4096", "1024 tokens", "use at most 1024"),
    ),
    "a dataset without the prompt column": (
        lambda s: s.data({"question": "1 + 1", "answer": "2"}),
        ("prompts.train.prompt_column = 'prompt'", "is no column", "the nearest are answer, question"),
    ),
    "a dataset without rows": (lambda s: s.data(), ("prompts.train.path = ", "train.jsonl'", "has no rows")),
    "a dataset that does not exist": (
        lambda s: [*s.data(), "prompts.train={path: /nowhere/train.parquet}"],
        ("prompts.train.path = '/nowhere/train.parquet'", "does not exist", "check the path"),
    ),
    "a dataset with a broken row": (
        lambda s: s.data({"prompt": "1 + 1"}, '{"prompt": "1 +'),
        ("train.jsonl:2", '{"prompt": "1 +'),
    ),
    "a prompt longer than the model": (
        lambda s: s.data({"prompt": "1 + 1"}, {"prompt": "long " * 400}),
        ("prompts.train row 1", "tokens", "raise model.max_length"),
    ),
    "a reward that does not import": (
        lambda s: ["rewards.0.function=no_such_package.rewards:accuracy", "rewards.0.args={}"],
        ("rewards.has_letter.function = 'no_such_package.rewards:accuracy'", "does not import", "check the name"),
    ),
    "a reward that is no function": (
        lambda s: s.reward("not_a_function"),
        ("rewards.has_letter.function = ", "is a int, not a function"),
    ),
    "a reward with the wrong number of values": (
        lambda s: s.reward("short"),
        ("rewards.has_letter.function = 'short'", "1 value", "return one finite number or None for each completion"),
    ),
    "a reward that is NaN": (
        lambda s: s.reward("nan"),
        ("rewards.has_letter.function = 'nan'", "nan", "return one finite number"),
    ),
    "a reward that raises": (
        lambda s: s.reward("raises"),
        ("rewards.has_letter.function = 'raises'", "KeyError", "no such thing", "return one finite number"),
    ),
    "a reward that needs a column the data lacks": (
        lambda s: s.reward("needs_grade"),
        ("rewards.has_letter.function = 'needs_grade'", "needs grade, which the dataset lacks", "add the column"),
    ),
    "more nodes than there are": (
        lambda s: ["cluster.num_nodes=3"],
        ("cluster.num_nodes = 3", "has 1 nodes (2 short)", "start Ray on the missing nodes"),
    ),
    "GPUs on a machine without one": (
        lambda s: ["cluster.device=cuda"],
        ("cluster.device = 'cuda'", "needs 4 GPUs and the cluster has 0 (4 short)", "set cluster.device=cpu"),
    ),
    "a run directory that is a file": (
        lambda s: [f"run.directory={REPOSITORY / 'setup.cfg'}"],
        ("run.directory = ", "no folder can be made in", "choose a folder you may write to"),
    ),
    "--resume without a run": (
        lambda s: ["--resume"],
        (f"run.name = '{NAME}'", "there is no run to resume", "start it without --resume"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line_with_field_value_and_remedy(
    case: str, shop: Workshop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "GPUs on a machine without one":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    make, expected = CASES[case]
    line = refusal(shop.arguments(*make(shop)), capfd)
    for part in expected:
        assert part in line
    assert not shop.runs.exists()


def test_an_unknown_recipe_is_refused_with_the_nearest_one(shop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(["train", "cpu-two-by-tow"], capfd)
    assert "recipe = 'cpu-two-by-tow'" in line and "did you mean cpu-two-by-two?" in line


def test_more_gpus_than_there_are_are_refused_with_the_shortfall(
    shop: Workshop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    line = refusal(shop.arguments("cluster.device=cuda"), capfd)
    assert "num_workers = 2" in line and "the cluster has 2 GPUs" in line and "add 2 GPUs" in line
    assert not shop.runs.exists()


@pytest.mark.parametrize(
    ("recipe", "asked"),
    [
        ("gpu-1x-grpo", 1),
        ("gpu-8x-grpo", 8),
        ("gpu-8x-ppo", 8),
        ("gpu-8x-sft", 8),
        ("gpu-8x-reward", 8),
        ("gpu-8x-dpo", 8),
        ("gpu-8x-lora-grpo", 8),
        ("gpu-1x-qlora-dpo", 1),
        ("gpu-multinode-grpo", 32),
    ],
)
def test_a_gpu_recipe_on_a_machine_without_gpus_is_refused_by_train_and_is_a_valid_configuration(
    recipe: str, asked: int, shop: Workshop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    line = refusal(["train", recipe, f"run.directory={shop.runs}"], capfd)
    assert f"needs {asked} GPUs and the cluster has 0 ({asked} short)" in line
    assert not shop.runs.exists()
    assert main(["validate", recipe, "--config-only"]) == 0


def test_a_run_folder_that_exists_is_refused_without_resume(
    shop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    shop.run.mkdir(parents=True)
    (shop.run / "config.yaml").write_text("kept")
    line = refusal(shop.arguments(), capfd)
    assert f"run.name = '{NAME}'" in line and "exists already" in line and "add --resume" in line
    assert [p.name for p in shop.run.iterdir()] == ["config.yaml"]


def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_newest_intact_one(
    shop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    shop.checkpoints(10, 20, 30)
    for step in (20, 30):
        file = shop.run / "checkpoints" / f"step-{step:06d}" / "shard.pt"
        file.write_bytes(os.urandom(64))
    line = refusal(shop.arguments("--resume"), capfd)
    assert "step-000030/shard.pt" in line and "digest" in line and "step 10 is intact" in line
    assert len(list((shop.run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("case", ["an unknown key", "a reward that raises", "GPUs on a machine without one"])
def test_the_command_itself_says_one_line_on_stderr(case: str, shop: Workshop) -> None:
    make, expected = CASES[case]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.cli", *shop.arguments(*make(shop))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("burnish: ", *expected):
        assert part in done.stderr
    assert not shop.runs.exists()
