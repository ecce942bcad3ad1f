"""What every package is asked about, and the file that its answers go to.

Numbers are few, fixed and short; nothing here belongs to a package or to this project, so that each script of this
folder runs in the environment of its package alone.  Each JSON file holds these inputs too: tests read nothing else.

Tokens are laid end to end, sample by sample.  May import: numpy, torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

DIGITS = 12  # significant ones of what is written


def _batch() -> dict[str, Any]:
    """Three prompts of four samples; the last prompt's samples have one reward, the others' lengths go with theirs."""
    draw = np.random.default_rng(7)
    lengths = [5, 1, 3, 2, 2, 4, 6, 1, 3, 1, 5, 2]
    count = sum(lengths)
    proximal = np.round(draw.uniform(-4.0, -0.1, count), 4)
    moved = {  # nats a token away from the policy before the update
        "policy": 0.35, "reference": 0.5, "behavior": 0.25,
    }  # fmt: skip
    found: dict[str, Any] = {
        "group_size": 4,
        "max_tokens": 8,
        "rewards": [1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.25, 0.7, 0.7, 0.7, 0.7],
        "greedy_rewards": [0.5, 1.0, 0.7],
        "lengths": lengths,
        "proximal": proximal.tolist(),
    }
    for name, spread in moved.items():
        found[name] = np.round(np.minimum(proximal + draw.normal(0.0, spread, count), -0.01), 4).tolist()
    found["proximal_values"] = np.round(draw.normal(0.3, 0.4, count), 4).tolist()
    found["values"] = np.round(np.array(found["proximal_values"]) + draw.normal(0.0, 0.3, count), 4).tolist()
    return found


def _answers() -> dict[str, Any]:
    """Five pairs of answers, the last one a tie; log-probs are sums over an answer's tokens."""
    return {
        "chosen": [-12.5, -3.2, -20.1, -7.75, -6.0],
        "rejected": [-14.0, -2.9, -31.5, -4.5, -6.0],
        "reference_chosen": [-13.1, -3.0, -26.4, -7.5, -6.5],
        "reference_rejected": [-12.2, -3.6, -30.0, -6.25, -6.5],
        "num_chosen": [7, 2, 12, 5, 4],
        "num_rejected": [9, 3, 11, 4, 4],
        "prompt": [-8.0, -3.5, -11.2, -2.4, -5.0],  # of the prompt's own tokens, the first of them left out
        "num_prompt": [4, 2, 6, 1, 3],
        # Rows of their own for losses without pairs: the five chosen answers, then the five rejected ones.
        "label": [True, False, True, True, False, False, True, False, False, True],
        "mismatched": [-30.0, -41.5, -22.0, -18.75, -35.0, -12.5, -27.0, -19.0, -44.0, -25.5],
        "reference_mismatched": [-31.0, -41.0, -24.5, -19.5, -34.0, -13.0, -29.25, -19.5, -43.0, -27.0],
    }


def inputs() -> dict[str, Any]:
    """All of them, by name.  ``answers_below`` are answers whose mismatched ones became less likely."""
    answers = _answers()
    turned = {"mismatched": answers["reference_mismatched"], "reference_mismatched": answers["mismatched"]}
    return {"batch": _batch(), "answers": answers, "answers_below": answers | turned}


# --- shapes -------------------------------------------------------------------------------------


def padded(flat: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[samples, longest], 0 where a sample has no token; differentiable in ``flat`` [tokens]."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(flat, list(lengths))), batch_first=True)


def mask(lengths: Sequence[int]) -> torch.Tensor:
    """int64 [samples, longest]: 1 where there is a token."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def laid_out(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[tokens]: the inverse of :func:`padded`."""
    return rows[mask(lengths).bool()]


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(values: Any) -> torch.Tensor:
    return double(values).requires_grad_()


# --- the file -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """As JSON has it, numbers to ``DIGITS`` significant digits."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write(package: str, used: Sequence[str], cases: dict[str, dict[str, Any]]) -> None:
    """``<package>.json`` beside this file: package, version, the inputs that ``used`` names, one line a case."""
    lines = [f"  {json.dumps(name)}: {json.dumps(plain(case))}" for name, case in cases.items()]
    given = [f"  {json.dumps(name)}: {json.dumps(inputs()[name])}" for name in used]
    functions = sorted({case["function"] for case in cases.values()})
    head = {
        "package": package, "version": importlib.metadata.version(package), "torch": torch.__version__.split("+")[0],
        "made_by": f"tests/golden/make_{package}.py", "functions": functions,
    }  # fmt: skip
    text = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    text += ' "inputs": {\n' + ",\n".join(given) + '\n },\n "cases": {\n' + ",\n".join(lines) + "\n }\n"
    Path(__file__).with_name(f"{package}.json").write_text("{\n" + text + "}\n")
