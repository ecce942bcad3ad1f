"""One model whose weights are the mean of several models' weights, as a Hugging Face folder.

Ramé et al. 2024 (WARM, arXiv:2401.12187, section 3): the mean of reward models that were fine-tuned from one base,
under other seeds, orders or rates, scores about as their ensemble does and costs no more than one of them.  It is a
model at all only while the members lie in one valley of the loss, so members that lie far apart are refused.
May import: torch, safetensors, trainers.errors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trainers.errors import InputError

FIELD = "member"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MANIFEST = "average.json"
# ||a - b|| / ||a|| over all matrices: fine-tuning moves them by a few hundredths, two bases lie about sqrt(2) apart.
MAX_DISTANCE = 0.5
OF_THE_SAVING = ("_name_or_path", "transformers_version")  # keys of config.json that say nothing of the model
OWN = ("reward_stats.json", "reward_report.json", "reward_report.svg", MANIFEST)  # true of one member, not of the mean


def average_models(
    members: Sequence[str], out: Path, finish: Callable[[Path], None] | None = None
) -> dict[str, float]:
    """Write the mean of ``members`` (folders) to ``out``; how far each lies from the first, ||a - b|| / ||a||.

    Sums are float64, so equal members come out bit for bit; tensors keep their dtype.  Configuration and tokenizer
    are the first member's.  ``out`` appears by one rename.

    Args:
        finish: called with the whole folder before that; what it raises leaves nothing behind.

    Raises:
        InputError: fewer than two members, different architectures, tensors, tokenizers or bases, or ``out`` exists.
    """
    if len(members) < 2:
        raise InputError(FIELD, list(members), "a mean needs two models or more", "name more folders")
    if out.exists():
        raise InputError("out", str(out), "exists already", "name another folder or remove it")
    folders = [Path(member).expanduser() for member in members]
    files = [_weight_files(folder) for folder in folders]
    for folder, mine in zip(folders[1:], files[1:], strict=True):
        _check_alike(folders[0], files[0], folder, mine)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        scratch.chmod(0o755)
        apart = _write_means(files, scratch)
        found = {str(member): distance for member, distance in zip(members, apart, strict=True)}
        for member, distance in found.items():
            if not distance <= MAX_DISTANCE:
                raise InputError(
                    FIELD, member, f"its weights lie {distance:.2g} times the size of the first member's away from "
                    f"them: they were not fine-tuned from one base", "average models of one base",
                )  # fmt: skip
        for file in folders[0].iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in OWN:
                shutil.copy2(file, scratch / file.name)
        (scratch / MANIFEST).write_text(json.dumps({"members": found}, indent=2) + "\n", encoding="utf-8")
        if finish is not None:
            finish(scratch)
        os.rename(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return found


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(FIELD, str(file.parent), f"{file.name} cannot be read ({error})",
                         "give a folder that save_pretrained wrote") from error  # fmt: skip


def _weight_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor -> the file it is in."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        return {name: folder / file for name, file in _json(folder / INDEX)["weight_map"].items()}
    if not (folder / SINGLE).is_file():
        raise InputError(FIELD, str(folder), f"has no {SINGLE}", "give a folder that save_pretrained wrote")
    with safe_open(str(folder / SINGLE), framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)


def _check_alike(first: Path, its_files: dict[str, Path], other: Path, files: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    configs = (_json(folder / "config.json") for folder in (first, other))
    ours, theirs = ({k: v for k, v in config.items() if k not in OF_THE_SAVING} for config in configs)
    if ours.get("architectures") != theirs.get("architectures"):
        raise InputError(FIELD, str(other), f"its architecture is {theirs.get('architectures')}, the first member's "
                         f"{ours.get('architectures')}", "average models of one architecture")  # fmt: skip
    odd = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if odd or set(files) != set(its_files):
        what = "other tensors"
        if odd:
            what = f"{odd[0]} is {theirs.get(odd[0])!r}, {ours.get(odd[0])!r} in the first member"
        raise InputError(FIELD, str(other), f"is of another architecture: {what}", "average models of one base")
    a, b = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in (first, other))
    if a.get_vocab() != b.get_vocab() or a.eos_token_id != b.eos_token_id:
        raise InputError(FIELD, str(other), "its tokenizer is not the first member's", "average models of one base")


def _write_means(members: Sequence[dict[str, Path]], target: Path) -> list[float]:
    """Write the means in the first member's files; the distance of each member from the first.

    One file of the first member is in memory at a time.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    size, apart = 0.0, [0.0] * len(members)
    for file in sorted(set(members[0].values())):
        means: dict[str, torch.Tensor] = {}
        for name in sorted(name for name, holder in members[0].items() if holder == file):
            tensors = []
            for member in members:
                with safe_open(str(member[name]), framework="pt") as opened:
                    tensors.append(opened.get_tensor(name))
            if len({(tuple(t.shape), t.dtype) for t in tensors}) > 1:
                raise InputError(FIELD, str(file.parent), f"{name} has another shape or dtype in another member",
                                 "average models of one architecture, saved in one dtype")  # fmt: skip
            if not tensors[0].is_floating_point():
                means[name] = tensors[0]
                continue
            wide = [t.double() for t in tensors]
            if min(wide[0].shape, default=0) > 1 and wide[0].ndim > 1:  # not the head, which starts from nothing
                size += float(wide[0].square().sum())
                apart = [d + float((w - wide[0]).square().sum()) for d, w in zip(apart, wide, strict=True)]
            means[name] = torch.stack(wide).mean(dim=0).to(tensors[0].dtype)
        save_file(means, str(target / file.name), metadata={"format": "pt"})
    return [math.sqrt(d / size) if size else 0.0 for d in apart]
