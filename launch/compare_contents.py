"""Digests of what stands behind a comparison's paths: the same path may hold something else at the next call.

May import: actors.model_folders, launch.compare_config.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from launch.compare_config import CompareConfig

END_BYTES = 2**20  # of a large file its size, its beginning and its end are taken: weights have gigabytes


def contents_of(config: CompareConfig, train: str, held_out: str) -> dict[str, str]:
    """Configuration key -> digest of what is there.

    Args:
        train, held_out: prompts as they are written down for the runs.
    """
    from actors.model_folders import resolve_model

    found = {"prompts.train": _digest(train.encode()), "prompts.eval": _digest(held_out.encode())}
    model = Path(resolve_model(config.model.path))
    files = sorted(file for file in model.iterdir() if file.is_file())
    found["model.path"] = _digest(*(part for file in files for part in (file.name.encode(), _ends(file))))
    for index, reward in enumerate(config.rewards):
        file = Path(reward.function.rpartition(":")[0])
        if file.suffix == ".py" and file.is_file():
            found[f"rewards.{index}.function"] = _digest(file.read_bytes())
    return found


def _ends(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= 2 * END_BYTES:
            return opened.read()
        head = opened.read(END_BYTES)
        opened.seek(-END_BYTES, 2)
        return str(size).encode() + head + opened.read()


def _digest(*parts: bytes) -> str:
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()
