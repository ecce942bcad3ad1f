"""Digests of what stands behind a path: the same path may hold something else another day.

May import: the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

END_BYTES = 2**20  # of a large file its size, its beginning and its end are taken: weights have gigabytes


def model_digest(folder: Path) -> str:
    """16 hexadecimal digits of a model folder: files, sizes, and contents but for the middle of weights."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return digest(*(part for file in files for part in (file.name.encode(), _ends(file))))


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of ``parts``, in their order."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()


def _ends(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= 2 * END_BYTES:
            return opened.read()
        head = opened.read(END_BYTES)
        opened.seek(-END_BYTES, 2)
        return str(size).encode() + head + opened.read()
