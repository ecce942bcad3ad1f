"""Checkpoints: versioned folders that appear by one rename and prove their bytes by a manifest.

    begin(10)    .step-000010.partial/     written by everyone who has state to save
    commit(10)   files synced and hashed -> MANIFEST.json -> sync -> rename to step-000010/ -> sync the parent

A crash before the rename leaves the older checkpoints as they were; after it the new one is complete.  A folder
that is replaced or removed is renamed out of the way first, so a half-deleted one is never mistaken for whole.
One process at a time may write to a store.  Several hosts may write into a partial folder on a shared disk; each
must have closed its files before ``commit``.
May import: cluster.errors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, DamagedError

log = logging.getLogger("burnish.cluster")

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
HASH_THREADS = 8  # blake2b releases the interpreter lock, so files are hashed side by side
_NAME = re.compile(r"step-(\d{6,})")
_ASIDE = re.compile(r"\.step-(\d{6,})\.(partial|replaced|removing)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its folder, its step, and what ``commit`` was given."""

    path: Path
    step: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """Digest of the manifest itself, so that damaged metadata is noticed as well."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "seal"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


class CheckpointStore:
    """The checkpoints of one run; the newest ``keep`` complete ones stay."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = Path(directory), max(1, keep)

    # ---- writing

    def begin(self, step: int) -> Path:
        """An empty folder to write the state of ``step`` into; what an interrupted attempt left is removed."""
        partial = self.directory / f".{_name(step)}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, metadata: Mapping[str, Any]) -> Checkpoint:
        """Make what was written since ``begin(step)`` the newest checkpoint.  ``metadata``: JSON values.

        Later steps that exist already belong to a lineage that was left by resuming from an earlier
        checkpoint; they are removed, because "newest" would otherwise mean them.

        Raises ClusterError without ``begin``; OSError when the disk refuses (older checkpoints are intact).
        """
        partial, final = self.directory / f".{_name(step)}.partial", self.directory / _name(step)
        if not partial.is_dir():
            raise ClusterError(f"checkpoint of step {step}: commit without begin; there is no {partial}")
        found = [path for path in sorted(partial.rglob("*")) if path.name != MANIFEST]
        files = [path for path in found if path.is_file()]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            entries = list(pool.map(self._sync_and_describe, files))
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "metadata": dict(metadata),
            "files": {path.relative_to(partial).as_posix(): entry for path, entry in zip(files, entries, strict=True)},
        }
        manifest["seal"] = _seal(manifest)
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for folder in [path for path in found if path.is_dir()] + [partial]:
            _sync(folder)
        if final.exists():  # still found under its aside name until the new one is in place
            os.rename(final, self.directory / f".{_name(step)}.replaced")
        os.rename(partial, final)
        _sync(self.directory)
        self._retain(step)
        return Checkpoint(final, step, dict(metadata))

    @staticmethod
    def _sync_and_describe(path: Path) -> dict[str, Any]:
        _sync(path)
        return {"size": path.stat().st_size, "blake2b": _digest(path)}

    def _retain(self, newest: int) -> None:
        """Remove leftovers, later steps of an abandoned lineage, and all but the newest ``keep``."""
        complete = self._complete()
        kept = sorted((step for step in complete if step <= newest), reverse=True)[: self.keep]
        for step, path in complete.items():
            if step not in kept:
                if step > newest:
                    log.warning("removing %s: the run was resumed before it and has committed step %d", path, newest)
                if path.name == _name(step):
                    os.rename(path, self.directory / f".{_name(step)}.removing")
        kept_paths = {complete[step] for step in kept}
        for path in list(self.directory.iterdir()):
            if _ASIDE.fullmatch(path.name) and path not in kept_paths:
                shutil.rmtree(path)

    # ---- reading

    def _complete(self) -> dict[int, Path]:
        """Committed folders by step.  A replaced one counts until its replacement is in place."""
        found: dict[int, Path] = {}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            name, aside = _NAME.fullmatch(path.name), _ASIDE.fullmatch(path.name)
            if name and path.is_dir():
                found[int(name[1])] = path
            elif aside and aside[2] == "replaced":
                found.setdefault(int(aside[1]), path)
        return dict(sorted(found.items()))

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first.  Their bytes are not looked at."""
        return list(self._complete())

    def latest(self, verify: bool = True) -> Checkpoint | None:
        """The newest checkpoint, or None when there is none.

        A damaged newest one is refused, not skipped: going back silently would lose training that the
        user may want to rescue.  ``verify=False`` reads the manifest but no other file.
        """
        steps = self.steps()
        return self.load(steps[-1], verify) if steps else None

    def load(self, step: int, verify: bool = True) -> Checkpoint:
        """The checkpoint of ``step``, its sizes and digests compared with its manifest.

        Raises DamagedError that names the file, what is wrong, and the newest older checkpoint that is intact.
        """
        complete = self._complete()
        if step not in complete:
            have = ", ".join(str(known) for known in complete) or "none"
            raise ClusterError(f"checkpoint of step {step}: there is none in {self.directory}; there are: {have}")
        try:
            return self._read(complete[step], step, verify)
        except DamagedError as error:
            older = self._newest_intact(complete, step)
            remedy = (
                f"step {older} is intact: move {complete[step].name} away to resume from {_name(older)}"
                if older is not None
                else "no older checkpoint is intact: restore the file from a copy or start a new run"
            )
            raise DamagedError(f"{error}; {remedy}") from error

    def _newest_intact(self, complete: Mapping[int, Path], before: int) -> int | None:
        for step in sorted((known for known in complete if known < before), reverse=True):
            try:
                self._read(complete[step], step, verify=True)
            except DamagedError:
                continue
            return step
        return None

    @staticmethod
    def _read(path: Path, step: int, verify: bool) -> Checkpoint:
        source = path / MANIFEST
        try:
            manifest = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DamagedError(f"{source}: is missing") from error
        except (OSError, ValueError) as error:
            raise DamagedError(f"{source}: cannot be read ({' '.join(str(error).split())})") from error
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DamagedError(f"{source}: format_version {version} is newer than {FORMAT_VERSION}, the one read here")
        if version != FORMAT_VERSION or manifest.get("seal") != _seal(manifest):
            raise DamagedError(f"{source}: its content does not match its seal")
        if manifest["step"] != step:
            raise DamagedError(f"{source}: is of step {manifest['step']}, the folder's name says {step}")

        def check(item: tuple[str, Mapping[str, Any]]) -> str | None:
            name, entry = item
            file = path / name
            try:
                size = file.stat().st_size
                if size != entry["size"]:
                    return f"{file}: has {size} bytes, the manifest says {entry['size']}"
                if _digest(file) != entry["blake2b"]:
                    return f"{file}: its digest differs from the manifest's"
            except FileNotFoundError:
                return f"{file}: is missing"
            except OSError as error:
                return f"{file}: cannot be read ({error.strerror})"
            return None

        if verify:
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                problems = [problem for problem in pool.map(check, manifest["files"].items()) if problem]
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise DamagedError(problems[0] + more)
        return Checkpoint(path, step, manifest["metadata"])
