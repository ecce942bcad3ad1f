"""The runs of ``make chaos``: a tiny random model on two CPU cores, and how each is started.

    async     staleness 1: generators, learner ranks, reference, reward worker
    ppo       staleness 0, a critic and a reward model besides
    beside    staleness 1, vLLM's engine in a process of its own
    small     staleness 1, one learner rank and no reference: what starts soonest
    hosts     staleness 1, generators on two hosts, one of which is cut off or killed and adopted when it is back
May import: torch (inside a function), actors.{model_folders, modeling, scalar_model}, scripts.faults.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.faults import KINDS

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "cpu-two-by-two"
EPOCH = 64  # prompts of the recipe
EPOCH_STEPS = 16  # of four groups each
SAVE_EVERY = 4

# Deadlines of a run in which something is always failing.  A frozen generator is found by the push that it does not
# answer, or between two pushes by its heartbeat; a frozen rank by its update.
PUSH_DEADLINE_S, DETECT_S, UPDATE_DEADLINE_S = 15.0, 20.0, 45.0

COMMON = (
    "evaluation.every=0", f"checkpoint.every={SAVE_EVERY}", "checkpoint.export=false", "telemetry.wandb=disabled",
    "model.dtype=float32", "learner.optimizer.lr=1e-3", f"push.deadline_s={PUSH_DEADLINE_S:g}",
    f"health.detect_s={DETECT_S:g}", "health.max_attempts=20", "health.retry_s=1",
    f"learner.update_deadline_s={UPDATE_DEADLINE_S:g}", "checkpoint.grace_s=60",
)  # fmt: skip
SMALL = ("learner.num_workers=1", "learner.zero_stage=0")
SPECIAL = {
    "ppo": ("kill_critic", "kill_reward_model"), "beside": ("kill_engine",), "hosts": ("cut_network", "kill_node"),
}  # fmt: skip
# Two nodes at the start, one generator on each; the one that is lost is replaced on the other, and a node that comes
# for the lost one gets a third.  A reward that takes its time keeps the run going while a host is away; completions of
# some length make it likely that one is lost in mid-rollout.
PAUSE_S = 3.0  # of a reward; a step takes half of it, because two steps are under way at once
HOSTS = (
    *SMALL, "run.max_staleness=1", "cluster.num_nodes=2", "health.adopt_up_to=3", "generator.sampling.max_tokens=64",
    "model.max_length=256",
    f'rewards=[{{"function": "scripts.paced:letters", "args": {{"pause_s": {PAUSE_S:g}}}}}]',
)  # fmt: skip
_EVERY_RUN = tuple(kind for kind in KINDS if not any(kind in kinds for kinds in SPECIAL.values()))


@dataclass(frozen=True)
class Family:
    """Runs of one make.  ``kinds``: what they can suffer."""

    overrides: tuple[str, ...]
    kinds: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "async": Family(("run.max_staleness=1", "learner.zero_stage=2", "algorithm.measure_kl=true"), _EVERY_RUN),
    "ppo": Family(
        (
            *SMALL, "algorithm.name=ppo", "algorithm.kl_coef=0.001", "algorithm.kl_placement=reward",
            "algorithm.kl_estimator=k1", "critic.optimizer.lr=1e-3", "critic.zero_stage=0", "critic.token_budget=1024",
            f"critic.update_deadline_s={UPDATE_DEADLINE_S:g}",
        ),
        (*_EVERY_RUN, *SPECIAL["ppo"]),
    ),
    "beside": Family((*SMALL, "run.max_staleness=1", "generator.engine=beside"), SPECIAL["beside"]),
    "small": Family((*SMALL, "run.max_staleness=1"), ("kill_generator", "kill_reward_worker")),
    "hosts": Family(HOSTS, SPECIAL["hosts"]),
}  # fmt: skip


def commands(
    family: str, name: str, directory: Path, seed: int, reward_model: Path | None, overrides: Sequence[str] = ()
) -> Callable[[int, bool], Sequence[str]]:
    """``command(num_steps, resume)`` of one run.  ``overrides``: of the place where it is."""
    fixed = [
        *COMMON, *FAMILIES[family].overrides, *overrides, f"run.name={name}", f"run.directory={directory}",
        f"run.seed={seed}",
    ]  # fmt: skip
    if reward_model is not None and family == "ppo":
        # Weight 0: it is measured; what the policy learns from can be reached.
        fixed.append(f'reward_models=[{{"name": "learned", "path": "{reward_model}", "weight": 0}}]')

    def command(num_steps: int, resume: bool) -> Sequence[str]:
        words = [sys.executable, "-m", "launch.cli", "train", RECIPE, *fixed, f"run.num_steps={num_steps}"]
        return [*words, "--resume"] if resume else words

    return command


def environment() -> dict[str, str]:
    """Of a run: no cluster to join, no GPU."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join(part for part in (str(REPOSITORY), kept.get("PYTHONPATH", "")) if part)
    return kept | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}


def make_reward_model(folder: Path) -> Path:
    """A reward model that knows nothing: the recipe's backbone with a random head."""
    import torch

    from actors.model_folders import resolve_model
    from actors.modeling import load_tokenizer
    from actors.scalar_model import load_scalar

    base = resolve_model("builtin:tiny-llama")
    model: Any = load_scalar(base, "reward_models.0.path").hf_model
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder
