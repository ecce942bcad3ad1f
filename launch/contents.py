"""Digests of what stands behind a path: the same path may hold something else another day.

May import: the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

# Weights have gigabytes: of a large file so many blocks are taken, closer together than most of its tensors are long.
NUM_BLOCKS, BLOCK_BYTES = 512, 2**13


def model_digest(folder: Path) -> str:
    """16 hexadecimal digits of a model folder: its files, small ones whole, large ones by their size and blocks."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return digest(*(part for file in files for part in (file.name.encode(), _sampled(file))))


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of ``parts``, in their order."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()


def _sampled(file: Path) -> bytes:
    """All of a small file; of a large one its size and blocks spread evenly from its first byte to its last."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            return opened.read()
        parts = [str(size).encode()]
        for block in range(NUM_BLOCKS):
            opened.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
            parts.append(opened.read(BLOCK_BYTES))
    return b"".join(parts)
