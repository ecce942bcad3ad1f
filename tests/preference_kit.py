"""What the tests of preference learning share: tiny comparisons, the model that reads them, runs of `cpu-dpo`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
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
from actors.reference_pass import ReferencePass
from actors.settings import LearnerSettings
from launch.journal import read_rows
from trainers.comparisons import Comparison, ComparisonTable
from trainers.labelled_answers import read_preference, with_mismatched
from trainers.planted_pairs import labelled_rows, preference_rows
from trainers.preference_training import LABELLED, LOSSES, PreferenceSettings
from trainers.prompt_format import PromptFormat

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = "builtin:tiny-llama"
PLAIN = PromptFormat(chat=False)
OVERRIDES: dict[str, tuple[str, ...]] = {
    "sigmoid": (),
    "robust": ("algorithm.label_smoothing=0.2",),
    "ipo": (),
    "kto": tuple(f"data.{part}.function=trainers.planted_pairs:labelled_rows" for part in ("train.0", "eval")),
    "orpo": (),
    "simpo": (),
}
RUN_S = 300.0  # one run with Ray; about 20 s on two idle cores


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


def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32, local_files_only=True)


def bare_rank(
    policy: PackedPolicy, algorithm: PreferenceSettings, tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    lr: float = 1e-2,
) -> PreferenceLearner:  # fmt: skip
    """A rank with torch's own AdamW in the place of DeepSpeed, alone in its group; with ``lr`` 0 no step moves it."""
    monkeypatch.setattr(preference_learner.dist, "all_reduce", lambda tensor: None)
    rank = PreferenceLearner.__new__(PreferenceLearner)
    rank.rank, rank.device, rank.share_prompts, rank.num_steps = 0, torch.device("cpu"), True, 10
    rank.settings, rank.algorithm, rank.adapter = LearnerSettings(token_budget=300), algorithm, policy.adapter
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)

    def step(_: float) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if lr > 0:
            optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    rank.engine = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, forward=policy, set_boundary=lambda is_last: None, backward=backward, step=step,
        engine=SimpleNamespace(module=policy),
    )  # fmt: skip
    rank._tables, rank._reference = {name: ComparisonTable(file) for name, file in tables.items()}, {}
    if policy.adapter is not None and policy.adapter.plan.reference:
        rank._own = ReferencePass(rank)
    return rank


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
