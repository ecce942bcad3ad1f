"""What a learned reward and a critic add: scoring against a raw forward pass, and a PPO step over its ideals.

    python -m benchmarks.ppo --samples FILE        tokens a second of reward model and reference, and of raw forwards
    python -m benchmarks.ppo --step                `burnish train` on cpu-ppo with a reward model, one optimizer step

A raw forward is transformers' own model on the same samples, right-padded, 8 rows at a time: the classifier's
scores, or logits without even taking log-probs of them.  The ideals of a PPO step are those of a GRPO step
(benchmarks/step.py), the proximal forward, the reward's and the critic's, and the critic's update.
May import: torch, transformers, actors.*, benchmarks.*, trainers.*.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import step
from benchmarks.job import Job, describe_lengths, job_parser, learner_groups, load_samples
from benchmarks.learner import CPU_SETTINGS, LR, PAD_ID
from benchmarks.plain import ROWS, PaddedBatch, PlainCritic, pad_groups, synchronize
from benchmarks.process import median, run, write_output
from trainers.experience import TrajectoryGroup, encode_group

PAIRS = {"reward": "raw-reward", "reference": "raw-reference"}
SIDES = (*PAIRS, *PAIRS.values(), "critic")
RECIPE = "cpu-ppo"
DEADLINE_S = 300.0
Batches = list[list[TrajectoryGroup]]


def make_reward_model(job: Job, folder: Path) -> str:
    """A reward model of the job's backbone: its head says nothing, which costs the same."""
    from actors.modeling import load_tokenizer
    from actors.scalar_model import load_scalar, scalar_pad_token_id

    tokenizer = load_tokenizer(job.model_path)
    model: Any = load_scalar(job.model_path, "model.path").hf_model
    model.config.pad_token_id = tokenizer.pad_token_id = scalar_pad_token_id(tokenizer, "model.path", job.model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scorer(job: Job, side: str, reward_model: str) -> Callable[[list[TrajectoryGroup]], Callable[[], Any]]:
    """A function that prepares a batch and returns what is timed."""
    if side == "reward":
        return _our_reward(job, reward_model)
    if side == "reference":
        return _our_reference(job)
    return _raw(job, side, reward_model)


def _our_reward(job: Job, path: str) -> Callable[[list[TrajectoryGroup]], Callable[[], Any]]:
    from actors.reward_model import RewardModel
    from actors.settings import RewardModelSettings

    settings = RewardModelSettings.model_validate({"name": "proxy", "path": path})
    model = RewardModel(settings, job.model_path, job.dtype, job.torch_device)

    def prepare(groups: list[TrajectoryGroup]) -> Callable[[], Any]:
        payloads = [encode_group(g) for g in groups]
        return lambda: model.score(payloads, DEADLINE_S)

    return prepare


def _our_reference(job: Job) -> Callable[[list[TrajectoryGroup]], Callable[[], Any]]:
    from actors.reference import ReferenceModel
    from actors.settings import ReferenceSettings

    chunk = CPU_SETTINGS["logprob_chunk"] if job.torch_device == "cpu" else 1024
    settings = ReferenceSettings.model_validate({})
    model = ReferenceModel(job.model_path, settings, 1.0, chunk, job.dtype, job.torch_device)

    def prepare(groups: list[TrajectoryGroup]) -> Callable[[], Any]:
        payloads = [encode_group(g) for g in groups]
        return lambda: model.logprobs(payloads, DEADLINE_S)

    return prepare


def _raw(job: Job, side: str, reward_model: str) -> Callable[[list[TrajectoryGroup]], Callable[[], Any]]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scalar = side == "raw-reward"
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model: Any = kind.from_pretrained(
        reward_model if scalar else job.model_path, dtype=getattr(torch, job.dtype), attn_implementation="sdpa",
        local_files_only=True,
    ).to(job.torch_device).eval()  # fmt: skip
    pad_id = model.config.pad_token_id if scalar else PAD_ID

    @torch.no_grad()
    def forward(batch: PaddedBatch) -> None:
        for start in range(0, batch.input_ids.shape[0], ROWS):
            part = batch.rows(start, start + ROWS)
            assert model(input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False).logits.ndim

    def prepare(groups: list[TrajectoryGroup]) -> Callable[[], Any]:
        padded = pad_groups(learner_groups(groups), pad_id, job.torch_device)
        return lambda: forward(padded)

    return prepare


def measure_scoring(job: Job, side: str, batches: Batches, reward_model: str, repeats: int) -> dict[str, Any]:
    """Seconds of scoring each batch, after a warm-up on the first, and prompt and completion tokens of each."""
    prepare, seconds = scorer(job, side, reward_model), []
    for i, batch in enumerate(batches):
        work = prepare(batch)
        if i == 0:
            work()
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            synchronize(job.torch_device)
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "num_tokens": [_num_tokens(batch) for batch in batches]}


def _num_tokens(groups: list[TrajectoryGroup]) -> int:
    return sum(g.prompt.token_ids.size + t.num_tokens for g in groups for t in g.trajectories)


def measure_critic(job: Job, batches: Batches, reward_model: str, repeats: int) -> dict[str, Any]:
    """Seconds of the plain critic's forward and backward, and of its optimizer, for each batch."""
    critic = PlainCritic(reward_model, job.dtype, job.torch_device, LR, beta=0.0)
    padded = [pad_groups(learner_groups(b), critic.pad_id, job.torch_device) for b in batches]
    critic.update(padded[0])
    found = [critic.update(batch) for batch in padded for _ in range(repeats)]
    return {"learn_s": [learn_s for learn_s, _ in found], "optimizer_s": [optimizer_s for _, optimizer_s in found]}


# --- comparisons --------------------------------------------------------------------------------


def compare_scoring(job: Job, samples: Path, rounds: int) -> dict[str, Any]:
    """For reward model and reference: tokens a second of both sides, and ``ratio`` of ours over the raw forward."""
    rates: dict[str, list[float]] = {side: [] for side in SIDES if side != "critic"}
    with tempfile.TemporaryDirectory(prefix="burnish-bench-reward-") as folder:
        common = [*job.arguments(), "--repeats=1", f"--samples={samples}",
                  f"--reward-model={make_reward_model(job, Path(folder))}"]  # fmt: skip
        for i in range(rounds):
            for side in rates if i % 2 == 0 else reversed(rates):
                numbers = run("benchmarks.ppo", [*common, f"--side={side}"], DEADLINE_S)
                rates[side] += [numbers["num_tokens"][0] / s for s in numbers["seconds"]]
    medians = {side: median(values) for side, values in rates.items()}
    return {
        "rates": rates,
        "tokens_per_s": medians,
        "ratio": {ours: medians[ours] / medians[raw] for ours, raw in PAIRS.items()},
    }


def overrides(reward_model: str) -> list[str]:
    """On top of benchmarks.step's: the reward is learned, and one batch makes one optimizer step of each model."""
    return [
        "rewards=[]", f"reward_models=[{{name: proxy, path: {reward_model}}}]", "algorithm.num_epochs=1",
        "algorithm.num_minibatches=1", "algorithm.ppo.value_warmup_steps=0", "critic.optimizer.lr=1e-8",
    ]  # fmt: skip


def measure_ideals(job: Job, samples: list[Path], compiled: bool, reward_model: str) -> dict[str, float]:
    """Median seconds a step of each ideal, by name.

    Proximal and reference log-probs are one computation, and so are scores and values: each is measured once.
    """
    common = [*job.arguments(), "--repeats=1", f"--reward-model={reward_model}", "--samples", *map(str, samples)]
    ideals = step.measure_ideals(job, samples, compiled)
    forward_s = median(run("benchmarks.ppo", [*common, "--side=raw-reward"], step.IDEAL_DEADLINE_S)["seconds"])
    critic = run("benchmarks.ppo", [*common, "--side=critic"], step.IDEAL_DEADLINE_S)
    return ideals | {
        "reward": forward_s,
        "values": forward_s,
        "proximal": ideals["reference"],
        "critic_forward_backward": median(critic["learn_s"]),
        "critic_optimizer": median(critic["optimizer_s"]),
    }


def compare_step(job: Job, num_steps: int, compiled: bool) -> dict[str, Any]:
    """Wall time of a PPO step, its ideals, and ``ratio`` of the first to their sum (lower is better)."""
    with tempfile.TemporaryDirectory(prefix="burnish-bench-ppo-") as folder:
        reward_model = make_reward_model(job, Path(folder) / "reward")
        rows, samples = step.run_system(job, Path(folder), num_steps, RECIPE, overrides(reward_model))
        ideals = measure_ideals(job, samples, compiled, reward_model)
        lengths = describe_lengths([g for path in samples for g in load_samples(path)])
    phases = ("generate", "score", "learn_prepare", "learn_policy", "learn_critic", "push")
    return step.summary(job, rows, ideals, phases) | {"lengths": lengths}


def main() -> None:
    """Measure one side, or compare both."""
    parser = job_parser("PPO's models against raw forward passes, a PPO step against its ideals", SIDES)
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="files written by benchmarks.generation")
    parser.add_argument("--reward-model", default="", help="one side: folder of a sequence classifier")
    parser.add_argument("--step", action="store_true", help="a whole PPO step over the sum of its ideals")
    parser.add_argument("--steps", type=int, default=5, help="steps of the run; the first one is not counted")
    parser.add_argument("--compiled", action="store_true", help="compiled raw vLLM too (its start takes minutes)")
    arguments = parser.parse_args()
    job = Job.from_arguments(arguments)
    if arguments.step:
        result = compare_step(job, arguments.steps, arguments.compiled)
    elif not arguments.samples:
        sys.exit("ppo: --samples is needed; `python -m benchmarks.generation --record FILE` writes it")
    elif arguments.side is None:
        result = compare_scoring(job, arguments.samples[0], arguments.repeats)
    else:
        batches = [load_samples(path) for path in arguments.samples]
        if arguments.side == "critic":
            result = measure_critic(job, batches, arguments.reward_model, arguments.repeats)
        else:
            result = measure_scoring(job, arguments.side, batches, arguments.reward_model, arguments.repeats)
    write_output(arguments.output, result)


if __name__ == "__main__":
    main()
