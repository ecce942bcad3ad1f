"""The checks of `make gpu`, one function each; ``python -m benchmarks.gpu_tasks NAME`` runs one and writes JSON.

Each returns (passed, detail).  An exception is a failure too: the caller shows its last line.
May import: torch, transformers, actors.*, benchmarks.*, launch.*, trainers.*.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import Job, learner_groups, random_groups
from benchmarks.plain import PlainTrainer, pad_groups, synchronize, token_logprobs
from benchmarks.process import median, write_output
from trainers.experience import TrajectoryGroup

Outcome = tuple[bool, str]
# Dense bfloat16 operations a second, from the vendors' data sheets; the first name that fits counts.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12),
    ("L40S", 362e12), ("L4", 121e12),
)  # fmt: skip
MIN_GENERATION_RATIO = 0.9
NOISE = 2.0  # how much worse than padded SDPA in the same dtype the packed kernel may be
FLOOR = 2e-4  # differences below this are rounding in any dtype
PROBE_TOLERANCE = 0.05  # nats a token, mean
RANDOM_VOCABULARY = 32768


def build(device: str, model: str) -> Outcome:
    """A random Llama of about 1.1B parameters with the tiny byte tokenizer, in the model cache."""
    from transformers import LlamaConfig

    return True, str(_random_llama(
        "random-1b",
        LlamaConfig(
            vocab_size=RANDOM_VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        device,
    ))  # fmt: skip


def _random_llama(name: str, config: Any, device: str) -> Path:
    """Save a randomly initialised model of ``config`` once; returns its folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from actors.model_folders import cache_folder, resolve_model

    folder = cache_folder() / "models" / name
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(20)
        with torch.device(device):
            model = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(resolve_model("builtin:tiny-llama")).save_pretrained(folder)  # last: the mark
    return folder


def attention(device: str, model: str) -> Outcome:
    """Errors of packed bfloat16 against float32, beside those of padded SDPA in bfloat16."""
    from transformers import LlamaConfig

    folder = str(_random_llama(
        "random-small",
        LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
                    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        device,
    ))  # fmt: skip
    # Emulated bfloat16 is slow: a rehearsal makes do with little.
    size = (4, 4, 96, [200, 61, 128, 7], 4096) if device == "cuda" else (2, 2, 8, [9, 5], 99)
    groups = random_groups(*size)
    truth = _padded(folder, groups, device, "float32")
    padded = _padded(folder, groups, device, "bfloat16")
    packed = _packed(folder, groups, device, "bfloat16")
    used = device == "cpu" or "torch.nn.attention.varlen" in sys.modules
    errors = {name: _errors(found, truth) for name, found in (("SDPA", padded), ("packed", packed))}
    passed = used and all(errors["packed"][i] <= NOISE * errors["SDPA"][i] + FLOOR for i in range(2))
    said = "; ".join(f"{n}: log-probs {e[0]:.1e}, gradient {e[1]:.1e}" for n, e in errors.items())
    kernel = "" if used else "; the variable-length kernel was NOT used (torch.nn.attention.varlen is not imported)"
    return passed, f"largest difference from float32, relative for gradients: {said}{kernel}"


Scored = tuple[torch.Tensor, dict[str, torch.Tensor]]  # (log-probs [tokens], gradients by name)


def _padded(folder: str, groups: list[TrajectoryGroup], device: str, dtype: str) -> Scored:
    trainer = PlainTrainer(folder, dtype, device, 0.0, 0.0)
    batch = pad_groups(learner_groups(groups), 0, device)
    logprobs = token_logprobs(trainer.model, batch, 1.0, trainer.dtype)[batch.completion_mask > 0]
    logprobs.mean().backward()
    return logprobs.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def _packed(folder: str, groups: list[TrajectoryGroup], device: str, dtype: str) -> Scored:
    from actors.modeling import load_policy

    policy = load_policy(folder, 512).to(device).train()
    packs = make_packs(groups, 1024, device)
    total = sum(sum(pack.lengths) for pack in packs)
    rows: dict[int, torch.Tensor] = {}
    for pack in packs:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logprobs, _ = policy(pack, 1.0)
        (logprobs.sum() / total).backward()
        rows |= dict(zip(pack.members, logprobs.detach().split(pack.lengths), strict=True))
    gradients = {n.removeprefix("hf_model."): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return torch.cat([rows[i] for i in range(len(rows))]), gradients


def make_packs(groups: Sequence[TrajectoryGroup], budget: int, device: str, share_prompts: bool = False) -> list[Any]:
    """The packs that a single learner rank would make of ``groups``."""
    from actors.packing import build_pack
    from trainers.batching import SampleShape, plan_microbatches

    samples = [(g.prompt.token_ids, t.completion_ids, i, t.sample_index)
               for i, g in enumerate(groups) for t in g.trajectories]  # fmt: skip
    shapes = [SampleShape(group, sample, p.size, c.size) for p, c, group, sample in samples]
    plan = plan_microbatches(shapes, 1, budget, share_prompts)[0]
    return [build_pack(m, [s[0] for s in samples], [s[1] for s in samples], device) for m in plan]


def _errors(found: Scored, truth: Scored) -> tuple[float, float]:
    """(largest log-prob difference, gradient difference over gradient norm)."""
    difference = sum(float((found[1][n].float() - g).square().sum()) for n, g in truth[1].items())
    norm = sum(float(g.square().sum()) for g in truth[1].values())
    return float((found[0] - truth[0]).abs().max()), float((difference / norm) ** 0.5)


def logprobs(device: str, model: str) -> Outcome:
    """Chunked log-probs of bfloat16 hidden states against whole float32 logits of the same states."""
    from actors.logprobs import chunked_logprobs

    rows, hidden_size, vocabulary = (4096, 2048, RANDOM_VOCABULARY) if device == "cuda" else (256, 64, 512)
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device=device).to(torch.bfloat16)
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    whole = torch.log_softmax(hidden.float() @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)
    whole.mean().backward()
    expected, weight.grad = weight.grad, None
    found, _ = chunked_logprobs(hidden, weight, targets, 1.0, rows // 8 + 3)
    found.mean().backward()
    assert expected is not None
    assert weight.grad is not None
    error = float((found - whole).detach().abs().max())
    gradient = float((weight.grad - expected).norm() / expected.norm())
    return error < 0.05 and gradient < 0.02, f"log-probs {error:.1e}, gradient {gradient:.1e} (relative)"


def mfu(device: str, model: str) -> Outcome:
    """tokens/s x 6 x parameters / peak, of whole updates; attention's own operations are not counted."""
    from benchmarks.learner import make_learner
    from launch.model_facts import check_model_folder

    job = Job(model=model, device=device, max_tokens=384)
    facts = check_model_folder(job.model_path)
    size = (16, 8, 128, [384]) if device == "cuda" else (2, 2, 8, [16])
    groups = learner_groups(random_groups(*size, facts.vocab))
    tokens = size[0] * size[1] * (size[2] + size[3][0])
    learner = make_learner(job, False, None, token_budget=16384)
    learner.update(groups, 0)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        learner.update(groups, 0)
        synchronize(job.torch_device)
        seconds.append(time.perf_counter() - started)
    rate = tokens / median(seconds)
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    peak = next((flops for known, flops in PEAK_FLOPS if known in name), None)
    share = "peak rate of this device unknown" if peak is None else f"MFU {6 * facts.num_params * rate / peak:.1%}"
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
    size_text = f"{facts.num_params / 1e9:.2f}B parameters"
    return rate > 0, f"{share}, {rate:,.0f} tokens/s (prompts included), {size_text}{memory}"


def generation(device: str, model: str) -> Outcome:
    """Ratio of our generator to raw vLLM, both compiled."""
    from benchmarks import generation as benchmark

    job = Job(model=model, device=device, num_prompts=16 if device == "cuda" else 2,
              num_samples=16 if device == "cuda" else 2, max_tokens=256 if device == "cuda" else 8)  # fmt: skip
    benchmark.DEADLINE_S = 600.0  # the engine compiles itself and captures graphs
    found = benchmark.compare(job, 1, False, None)
    rates = found["tokens_per_s"]
    detail = (
        f"ratio {found['ratio']:.2f} (at least {MIN_GENERATION_RATIO}): "
        f"{rates['ours']:,.0f} of {rates['raw']:,.0f} tokens/s"
    )
    return found["ratio"] >= MIN_GENERATION_RATIO or device == "cpu", detail


# --- the whole system -----------------------------------------------------------------------------


def probe(device: str, model: str) -> Outcome:
    """The start-up probe of a run; weights went by file."""
    ready, last = _system(device, model, "file", colocate=device == "cuda")
    difference = float(ready["probe_mean_difference"])
    return difference <= PROBE_TOLERANCE, f"mean difference {difference:.4f} nats a token; {_push_text(ready, last)}"


def ipc(device: str, model: str) -> Outcome:
    """Learner and generator are two processes on GPU 0."""
    ready, last = _system(device, model, "ipc", colocate=True)
    return _all_verified(ready), _push_text(ready, last)


def nccl(device: str, model: str) -> Outcome:
    """Learner and generator have a GPU each."""
    ready, last = _system(device, model, "nccl", colocate=False)
    return _all_verified(ready), _push_text(ready, last)


def _system(device: str, model: str, backend: str, colocate: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps of `burnish train`; (its "ready" event, its last row of metrics)."""
    from rich.console import Console

    from launch.journal import read_rows
    from launch.overrides import load_config
    from launch.train import train

    with tempfile.TemporaryDirectory(prefix="burnish-gpu-check-") as folder:
        overrides = [
            "run.name=check", f"run.directory={folder}", "run.num_steps=2", "run.groups_per_step=4",
            "run.samples_per_prompt=4", f"model.path={model}", f"cluster.device={device}",
            f"cluster.colocate={str(colocate).lower()}", f"push.backend={backend}",
            "generator.gpu_memory_utilization=0.3", "generator.sampling.max_tokens=32",
            f"push.probe_tolerance={10 * PROBE_TOLERANCE}", "evaluation.every=0", "checkpoint.every=0",
            "checkpoint.export=false", "telemetry.wandb=disabled", "telemetry.progress=false",
        ]  # fmt: skip
        run_folder = train(load_config("cpu-demo", overrides), False, Console(stderr=True))
        ready = next(e for e in read_rows(run_folder / "events.jsonl") if e["kind"] == "ready")
        *_, last = read_rows(run_folder / "metrics.jsonl")
    return ready, last


def _all_verified(ready: dict[str, Any]) -> bool:
    return int(ready["num_verified"]) > 0 and int(ready["num_arrival_verified"]) == 0


def _push_text(ready: dict[str, Any], last: dict[str, Any]) -> str:
    return (
        f"{ready['num_verified']} parameters compared after load, {ready['num_arrival_verified']} at arrival only; "
        f"a push of {last['push/num_bytes'] / 2**20:,.0f} MiB took {last['time/push_s']:.2f} s"
    )


TASKS: dict[str, Callable[[str, str], Outcome]] = {
    f.__name__: f for f in (build, attention, logprobs, mfu, generation, probe, ipc, nccl)
}


def main() -> None:
    """Run one task and write {"passed", "detail"}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    passed, detail = TASKS[arguments.task](arguments.device, arguments.model)
    write_output(arguments.output, {"passed": passed, "detail": detail})


if __name__ == "__main__":
    main()
