"""Checkpoints: versioned folders that appear by one rename and prove their bytes by a manifest.

    begin(10)    .step-000010.<attempt>.partial/     written by everyone who has state to save
    commit(10)   files synced and hashed -> MANIFEST.json -> sync -> rename to step-000010/ -> sync the parent

A crash before the rename leaves the older checkpoints as they were; after it the new one is complete.  A folder
that is replaced or removed is renamed out of the way first, so a half-deleted one is never mistaken for whole.
Every attempt writes into a folder of its own: a process that outlived its run cannot write into a later one's.
One process at a time may write to a store.  Several hosts may write into a partial folder on a shared disk; each
must have closed its files before ``commit``.
May import: cluster.{errors, manifest, retention}.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, DamagedError
from cluster.manifest import MANIFEST, FileEntry, read_manifest, sync, verify_files, write_manifest
from cluster.retention import Best, retained

__all__ = ["MANIFEST", "Checkpoint", "CheckpointStore", "FileEntry"]

log = logging.getLogger("burnish.cluster")

_NAME = re.compile(r"step-(\d{6,})")
_ASIDE = re.compile(r"\.step-(\d{6,})\.(?:[0-9a-f]+\.)?(partial|replaced|removing)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its folder, its step, and what ``commit`` was given."""

    path: Path
    step: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _remove(path: Path) -> None:
    """Remove a folder that is no checkpoint.

    What cannot be removed now is left for the next commit or start: a process that outlived its run may still write
    there.
    """
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s cannot be removed now: %s", path, error)


class CheckpointStore:
    """The checkpoints of one run; the newest ``keep`` complete ones stay, and the ``keep_best`` of the best score."""

    def __init__(self, directory: Path, keep: int = 2, keep_best: int = 0, best: Best = "highest") -> None:
        self.directory, self.keep, self.keep_best, self.best = Path(directory), max(1, keep), keep_best, best
        self._begun: dict[int, Path] = {}

    # ---- writing

    def remove_leftovers(self) -> list[str]:
        """Remove what a killed process left half written or half removed; returns the folders' names.

        To be called by the one process that will write, before it does.
        """
        whole = set(self._complete().values())
        aside = [p for p in self._contents() if _ASIDE.fullmatch(p.name) and p not in whole]
        for path in aside:
            _remove(path)
        return sorted(path.name for path in aside)

    def begin(self, step: int) -> Path:
        """An empty folder to write the state of ``step`` into; what an interrupted attempt left is removed."""
        for path in self._contents():
            aside = _ASIDE.fullmatch(path.name)
            if aside and aside[2] == "partial" and int(aside[1]) == step:
                _remove(path)
        partial = self.directory / f".{_name(step)}.{secrets.token_hex(4)}.partial"
        partial.mkdir(parents=True)
        self._begun[step] = partial
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written since ``begin(step)``; the others stay as they are."""
        if (partial := self._begun.pop(step, None)) is not None:
            _remove(partial)

    def commit(
        self,
        step: int,
        metadata: Mapping[str, Any],
        described: Mapping[str, FileEntry] | None = None,
        score: float | None = None,
    ) -> Checkpoint:
        """Make what was written since ``begin(step)`` the newest checkpoint.  ``metadata``: JSON values.

        Later steps that exist already belong to a lineage that was left by resuming from an earlier
        checkpoint; they are removed, because "newest" would otherwise mean them.

        Args:
            described: files that their writers have synced and hashed, by their path in the folder.
            score: what ``keep_best`` compares.

        Raises ClusterError without ``begin``; DamagedError when a described file is not as described; OSError when
        the disk refuses (older checkpoints are intact).
        """
        partial, final = self._begun.get(step), self.directory / _name(step)
        if partial is None or not partial.is_dir():
            raise ClusterError(f"checkpoint of step {step}: commit without begin; there is no folder of it")
        write_manifest(partial, step, metadata, score, described or {})
        if final.exists():  # still found under its aside name until the new one is in place
            os.rename(final, self.directory / f".{_name(step)}.replaced")
        os.rename(partial, final)
        sync(self.directory)
        del self._begun[step]
        self._retain(step)
        return Checkpoint(final, step, dict(metadata), score)

    def _retain(self, newest: int) -> None:
        """Remove leftovers, later steps of an abandoned lineage, and what retention does not keep."""
        complete = self._complete()
        scores = {step: self._score(path, step) for step, path in complete.items()}
        kept = retained(scores, newest, self.keep, self.keep_best, self.best)
        for step, path in complete.items():
            if step not in kept:
                if step > newest:
                    log.warning("removing %s: the run was resumed before it and has committed step %d", path, newest)
                if path.name == _name(step):
                    os.rename(path, self.directory / f".{_name(step)}.removing")
        kept_paths = {complete[step] for step in kept}
        for path in self._contents():
            if _ASIDE.fullmatch(path.name) and path not in kept_paths:
                _remove(path)

    def _score(self, path: Path, step: int) -> float | None:
        if not self.keep_best:
            return None
        try:
            score: float | None = read_manifest(path, step)["score"]
        except DamagedError:  # none of the best; whether it is loadable is for ``load`` to say
            return None
        return score

    # ---- reading

    def _contents(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _complete(self) -> dict[int, Path]:
        """Committed folders by step.  A replaced one counts until its replacement is in place."""
        found: dict[int, Path] = {}
        for path in self._contents():
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
        manifest = read_manifest(path, step)
        if verify:
            verify_files(path, manifest)
        return Checkpoint(path, step, manifest["metadata"], manifest["score"])
