"""What the tests of reward models share: a tiny one, planted comparisons, its learner, sampled groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.settings import LearnerSettings, OptimizerSettings
from cluster.rendezvous import Rendezvous, free_port
from trainers.comparisons import Comparison
from trainers.experience import Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion
from trainers.preferences import read_comparison
from trainers.prompt_format import PromptFormat
from trainers.reward_training import RewardTrainingSettings

TINY = "builtin:tiny-llama"
PLAIN = PromptFormat(chat=False)
CPU = torch.device("cpu")
DEADLINE_S = 240.0


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
