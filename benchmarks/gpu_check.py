"""What cannot be checked without a GPU: `make gpu` on a CUDA machine prints one table.

    python -m benchmarks.gpu_check [--model FOLDER] [--only NAME ...]
    python -m benchmarks.gpu_check --rehearse        the same code on this CPU with a tiny model, to try the script

Each check runs in a process of its own with a deadline (benchmarks/gpu_tasks.py); one that fails says why and
the others go on.  Exit code 1 if any failed; without a GPU "no GPU here" and 0.
May import: torch, rich, benchmarks.*.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.process import MeasurementError, run

BUILD_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str  # a function of benchmarks/gpu_tasks.py
    what: str
    deadline_s: float
    num_gpus: int = 1
    on_cpu: bool = True  # may be rehearsed without a GPU


CHECKS = (
    Check("attention", "packed attention (varlen flash) against padded SDPA: log-probs and gradients", 300),
    Check("logprobs", "chunked log-probs in bfloat16 against whole float32 logits", 300),
    Check("mfu", "learner: share of the device's peak rate", 600),
    Check("generation", "VLLMGenerator against raw offline vLLM, tokens/s", 1800),
    Check("probe", "step 0: log-probs of generator and learner on the same weights (file push)", 1200),
    Check("ipc", "CUDA IPC push, generator and learner on one GPU, every fingerprint after load", 1200, on_cpu=False),
    Check("nccl", "NCCL push between two GPUs, every fingerprint after load", 1200, num_gpus=2, on_cpu=False),
)


def run_check(check: Check, device: str, model: str, num_gpus: int) -> tuple[str, str, float]:
    """(PASS | FAIL | SKIP, detail, seconds)."""
    if device == "cpu" and not check.on_cpu:
        return "SKIP", "needs a GPU", 0.0
    if device == "cuda" and num_gpus < check.num_gpus:
        return "SKIP", f"needs {check.num_gpus} GPUs", 0.0
    started = time.perf_counter()
    try:
        found = run("benchmarks.gpu_tasks", [check.name, f"--device={device}", f"--model={model}"], check.deadline_s)
    except MeasurementError as error:
        return "FAIL", str(error)[:600], time.perf_counter() - started
    return "PASS" if found["passed"] else "FAIL", str(found["detail"]), time.perf_counter() - started


def main() -> int:
    """Run the checks and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check")
    parser.add_argument("--model", default=None, help="a Hugging Face folder; default: a random Llama of about 1B")
    parser.add_argument("--only", nargs="*", choices=[c.name for c in CHECKS], default=None)
    parser.add_argument("--rehearse", action="store_true", help="on this CPU, with a tiny model")
    arguments = parser.parse_args()
    console = Console()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0 and not arguments.rehearse:
        console.print("no GPU here")
        return 0
    device = "cpu" if arguments.rehearse else "cuda"
    model = arguments.model or ("builtin:tiny-llama" if arguments.rehearse else None)
    if model is None:
        model = str(run("benchmarks.gpu_tasks", ["build", "--device=cuda"], BUILD_DEADLINE_S)["detail"])
    names = [torch.cuda.get_device_name(i) for i in range(num_gpus)] or ["CPU rehearsal"]
    table = Table(title=f"{', '.join(names)}; torch {torch.__version__}; {model}", show_lines=True)
    for title in ("check", "result", "s", "detail"):
        table.add_column(title, justify="right" if title == "s" else "left")
    failed = 0
    for check in CHECKS:
        if arguments.only is not None and check.name not in arguments.only:
            continue
        result, detail, seconds = run_check(check, device, model, num_gpus)
        console.print(f"{check.name}: {result} ({seconds:.0f} s)")
        failed += result == "FAIL"
        colour = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}[result]
        table.add_row(check.what, f"[{colour}]{result}[/{colour}]", f"{seconds:.0f}", detail)
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
