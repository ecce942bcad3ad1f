"""Stages of a longer experiment in one folder: each one a ``burnish`` command, skipped when its result is there.

    stages.json    of each stage: seconds, whether it ended, its arguments, and a digest of all that it was made from
    NAME/          its run folder

A stage that ended is not run again, unless its folder was removed.  With other arguments, another text of its own
recipe, or after a stage that it took something from was run again with others, it is refused.  One that was cut off
goes on where it left checkpoints (train) or records (label), and starts afresh where it left none.
May import: rich, launch.{compare_stage, recipe_files, run_folder, run_identity}, trainers.errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.compare_stage import LateError, StageError, cleared, has_checkpoint, run_burnish
from launch.recipe_files import parse_yaml
from launch.run_folder import held
from launch.run_identity import deciding
from trainers.errors import InputError

DEADLINE_S = 3600.0  # for one stage of the pipeline, which takes minutes
LABEL_MANIFEST = "label.json"  # a labelling run's folder has it as long as it can go on
HERE = "<directory>"  # stands for the folder in what is noted: it may be moved
MAX_SHOWN = 160
NOTING_S = 30.0
Run = Callable[[Sequence[str], Path | None, float], float]  # arguments of burnish, log, deadline -> s; or StageError


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage is made from.

    ``recipe``: digest of its recipe, where that is the user's own file.  ``inputs``: digests of the stages whose
    folders its arguments name; None of one that was run before digests were kept.
    """

    arguments: tuple[str, ...]
    recipe: str | None = None
    inputs: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all of it: 32 hexadecimal digits."""
        return _digest([self.arguments, self.recipe, self.inputs])


@dataclass(frozen=True, slots=True)
class Noted:
    """A stage in stages.json; ``made`` is None for one that was run before digests were kept."""

    seconds: float
    has_ended: bool
    made: Made | None


def difference(before: Made, now: Made) -> tuple[str, object, object] | None:
    """(what, old, new) of the first thing that differs; None where a result of the one is one of the other.

    Among keys that are given twice the last one holds, so their order counts for nothing else.
    """
    old, new = _by_key(before.arguments), _by_key(now.arguments)
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    if before.recipe != now.recipe:
        return "recipe", "another text of it", now.arguments[1]
    for name in [*now.inputs, *(name for name in before.inputs if name not in now.inputs)]:
        if before.inputs.get(name) != now.inputs.get(name):
            return "input", "what another run of it left", name
    return None


class Stages:
    """Runs ``burnish`` commands one after the other and remembers what each was made from and how long it took.

    Args:
        deadline_s: for one stage.
        keep_checkpoints: else those of a training run that has ended are removed.
    """

    def __init__(
        self, directory: Path, console: Console, deadline_s: float = DEADLINE_S, *, keep_checkpoints: bool = False,
        run: Run = run_burnish,
    ) -> None:  # fmt: skip
        self.directory, self.console = directory, console
        self._deadline_s, self._keeps, self._run = deadline_s, keep_checkpoints, run
        self._log = directory / "stages.json"
        self._noted = _read(self._log)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage that has ended."""
        return {name: noted.seconds for name, noted in self._noted.items() if noted.has_ended}

    def run(self, name: str, arguments: Sequence[str], result: str) -> Path:
        """The last path that matches ``result`` (a glob below the directory) once ``burnish *arguments`` has ended.

        Args:
            result: begins with the stage's run folder.

        Raises:
            InputError: it was run with other arguments, its folder is there and no stage's, or another process works
                on it.
            StageError: the command failed, took too long, or left no such path.
        """
        self.directory.mkdir(parents=True, exist_ok=True)

        def refused(who: str) -> InputError:
            return InputError(f"stage {name}", str(self.directory), f"{who} works on it",
                              "wait until it has ended, or end it; or give another --directory")  # fmt: skip

        with held(self.directory / f".stage-{name}.lock", refused):
            return self._run_alone(name, arguments, result)

    def _run_alone(self, name: str, arguments: Sequence[str], result: str) -> Path:
        self._noted = _read(self._log)  # others may write it, too
        made, folder = self._made(arguments), self.directory / Path(result).parts[0]
        before = self._noted.get(name)
        if before is not None and before.has_ended and folder.is_dir():
            self._check(name, folder, before, made)
            return self._left(name, folder, result)
        goes_on = self._goes_on(name, folder, made)
        spent = before.seconds if before is not None and goes_on else 0.0
        self.console.rule(f"{name}: burnish {' '.join(arguments[:2])}{', from where it was' if goes_on else ''}")
        self._note(name, Noted(spent, False, made))  # what holds when this process is killed
        started = time.perf_counter()
        try:
            took = self._run([*arguments, *(["--resume"] if goes_on else [])], None, self._deadline_s)
        except (StageError, KeyboardInterrupt) as error:
            self._note(name, Noted(spent + time.perf_counter() - started, False, made))
            if isinstance(error, KeyboardInterrupt):
                raise
            remedy = "; --deadline-s gives it longer, and what it saved is kept" if isinstance(error, LateError) else ""
            raise StageError(f"{name}: {error}: burnish {' '.join(arguments)}{remedy}") from error
        found = self._left(name, folder, result)
        self._note(name, Noted(spent + took, True, made))
        if not self._keeps:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes that nobody resumes
        return found

    def refuse_strange(self, name: str, folder: Path | None = None) -> None:
        """InputError where the run folder of a stage is there and was not made by it: nothing in it is touched."""
        folder = folder or self.directory / name
        if name not in self._noted and folder.exists():
            reason = f"is there and {self._log} knows of no stage that made it"
            raise InputError(f"stage {name}", str(folder), reason, "remove it, or give another --directory")

    # --- what was made from what ----------------------------------------------------------------

    def _made(self, arguments: Sequence[str]) -> Made:
        shown = str(self.directory)
        inside = {shown, json.dumps(shown)[1:-1]}  # as it stands in a list of JSON, too
        own = []
        for argument in arguments:
            for text in inside:
                argument = argument.replace(text, HERE)
            own.append(argument)
        recipe = Path(arguments[1]).expanduser() if len(arguments) > 1 else None
        read = recipe.read_text(encoding="utf-8") if recipe is not None and recipe.is_file() else None
        inputs = {
            name: None if noted.made is None else noted.made.digest
            for name, noted in self._noted.items() if any(f"{HERE}/{name}/" in argument for argument in own)
        }  # fmt: skip
        return Made(tuple(own), None if read is None else _digest(deciding(parse_yaml(read))), inputs)

    def _check(self, name: str, folder: Path, before: Noted, now: Made) -> None:
        found = None if before.made is None else difference(before.made, now)
        if found is not None:
            what, old, new = found
            raise InputError(
                f"stage {name}: {what}", self._shown(new), f"it was run with {self._shown(old)}",
                f"restore it, give another --directory, or remove {folder} to run the stage again",
            )  # fmt: skip

    def _shown(self, value: object) -> object:
        """Of a value that was noted."""
        if not isinstance(value, str):
            return value
        text = value.replace(HERE, str(self.directory))
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."

    # --- folders --------------------------------------------------------------------------------

    def _goes_on(self, name: str, folder: Path, made: Made) -> bool:
        """Whether it can go on in its folder; one in which it cannot is removed."""
        if not folder.exists():
            return False
        self.refuse_strange(name, folder)
        before, command = self._noted[name], made.arguments[0]
        if has_checkpoint(folder) if command == "train" else command == "label" and (folder / LABEL_MANIFEST).exists():
            self._check(name, folder, before, made)
            return True
        self.console.print(f"{name} did not finish the last time: removing what is in {folder}", markup=False)
        cleared(folder)
        return False

    def _left(self, name: str, folder: Path, result: str) -> Path:
        found = sorted(self.directory.glob(result))
        if not found:
            raise StageError(f"{name} left no {self.directory / result}; remove {folder} to run it again")
        return found[-1]

    def _note(self, name: str, noted: Noted) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

        def refused(who: str) -> StageError:
            return StageError(f"{who} has had {self._log} for {NOTING_S:g} s, which takes none; end it")

        with held(self.directory / ".stages.lock", refused, NOTING_S):  # others may note another stage
            self._noted = _read(self._log) | {name: noted}
            rows = {stage: _row(known) for stage, known in self._noted.items()}
            fresh = self._log.with_name(f".{self._log.name}.tmp")
            fresh.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, self._log)


def only(directory: Path, pattern: str) -> Path:
    """The last match.  StageError where ``make pipeline`` left none."""
    found = sorted(directory.glob(pattern))
    if not found:
        raise StageError(f"there is no {directory / pattern}; run `make pipeline` first")
    return found[-1]


def _by_key(arguments: Sequence[str]) -> dict[str, str]:
    command, recipe, *rest = (*arguments, "", "")[: max(len(arguments), 2)]
    return {"command": command, "recipe": recipe} | {k: v for k, _, v in (part.partition("=") for part in rest)}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _row(noted: Noted) -> Any:
    if noted.made is None:
        return noted.seconds  # as it was found
    return {"seconds": noted.seconds, "has_ended": noted.has_ended, "digest": noted.made.digest, **asdict(noted.made)}


def _read(path: Path) -> dict[str, Noted]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {name: _noted(row) for name, row in rows.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError("--directory", str(path), f"is damaged ({error})", "remove it and start anew") from error


def _noted(row: Any) -> Noted:
    if not isinstance(row, dict):
        return Noted(float(row), True, None)
    return Noted(row["seconds"], row["has_ended"], Made(tuple(row["arguments"]), row["recipe"], row["inputs"]))
