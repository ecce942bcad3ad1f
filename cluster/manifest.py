"""The manifest of a checkpoint: sizes and digests of its files, and a seal over everything it says.

Written last, so that what it names was on the disk before; read first, so that a damaged file is refused by name.
May import: cluster.errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DamagedError

# 2: learner state no longer depends on the number of ranks that wrote it.
FORMAT_VERSION = 2
MANIFEST = "MANIFEST.json"
HASH_THREADS = 8  # blake2b releases the interpreter lock, so files are hashed side by side
DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file that is on the disk: its size in bytes and its blake2b digest, hexadecimal."""

    size: int
    blake2b: str


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """Digest of the manifest itself, so that damaged metadata is noticed as well."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "seal"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def write_manifest(
    folder: Path,
    step: int,
    metadata: Mapping[str, Any],
    score: float | None,
    described: Mapping[str, FileEntry],
) -> None:
    """Describe and sync every file below ``folder``, then write its manifest; all of it is on the disk on return.

    Args:
        metadata: JSON values.
        score: of the step, for retention.
        described: files, by their path in ``folder``, that their writer has synced and hashed: only their size is
            looked at again.

    Raises:
        DamagedError: a described file is missing or has another size.
        OSError: the disk refuses.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.name != MANIFEST]
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    for name in described:
        if name not in files:
            raise DamagedError(f"{folder / name}: is missing, and its writer had finished it")

    def describe(name: str) -> FileEntry:
        path, entry = files[name], described.get(name)
        if entry is None:
            sync(path)
            return FileEntry(path.stat().st_size, digest_of(path))
        if (size := path.stat().st_size) != entry.size:
            raise DamagedError(f"{path}: has {size} bytes, its writer wrote {entry.size}")
        return entry

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries = list(pool.map(describe, files))
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "score": score,
        "metadata": dict(metadata),
        "files": {n: {"size": e.size, "blake2b": e.blake2b} for n, e in zip(files, entries, strict=True)},
    }
    manifest["seal"] = _seal(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for inner in [path for path in found if path.is_dir()] + [folder]:
        sync(inner)


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of the checkpoint of ``step``; no other file is looked at.

    Raises:
        DamagedError: it is missing, cannot be read, does not match its seal, or is of another format or step.
    """
    source = folder / MANIFEST
    try:
        manifest = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(f"{source}: is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedError(f"{source}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest):
        raise DamagedError(f"{source}: its content does not match its seal")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        age = "newer" if isinstance(version, int) and version > FORMAT_VERSION else "older"
        raise DamagedError(f"{source}: format_version {version} is {age} than {FORMAT_VERSION}, the one read here")
    if manifest["step"] != step:
        raise DamagedError(f"{source}: is of step {manifest['step']}, the folder's name says {step}")
    return manifest


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: names the first file that is not what was written, and says how many more there are.
    """

    def problem(item: tuple[str, Mapping[str, Any]]) -> str | None:
        name, entry = item
        file = folder / name
        try:
            size = file.stat().st_size
            if size != entry["size"]:
                return f"{file}: has {size} bytes, the manifest says {entry['size']}"
            if digest_of(file) != entry["blake2b"]:
                return f"{file}: its digest differs from the manifest's"
        except FileNotFoundError:
            return f"{file}: is missing"
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = [found for found in pool.map(problem, manifest["files"].items()) if found]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamagedError(problems[0] + more)
