"""The folder of a comparison: whose it is, its prompts and labels, and what became of each stage.

    comparison.json    what is compared; another comparison is refused        recipes/*.yaml   a recipe a method
    stages.json        how each stage ended, in how many seconds              data/            prompts, labelled answers
    logs/NAME.log      what a stage printed                                   NAME/            its run folder

A stage that ended is not run again.  One that was stopped goes on from its newest checkpoint, if it has one, and so
does one that failed and had got to a checkpoint since it began; else it starts afresh.
May import: yaml, launch.{compare_config, compare_contents, compare_plan, compare_recipes, compare_stage,
run_identity},
trainers.{errors, experience}.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.compare_config import CompareConfig, flat
from launch.compare_contents import contents_of
from launch.compare_plan import Plan, Stage
from launch.compare_recipes import HELD_OUT, TRAIN, Raw
from launch.compare_stage import StageError, cleared, newest_checkpoint, run_burnish
from launch.run_identity import deciding
from trainers.errors import InputError
from trainers.experience import Prompt

IDENTITY, STAGES = "comparison.json", "stages.json"
# What may change between two calls: who is compared under which seeds, where and how it runs, and what is said of it.
FREE = ("run.", "compare.algorithms", "compare.seeds", "compare.keep_models", "compare.deadline_s", "compare.overrides",
        "compare.note", "telemetry.", "cluster.", "reward_workers.", "push.")  # fmt: skip
# Of scorers what says how they run.
RUNNING = {
    "reward_models": ("token_budget", "num_workers", "gpus_per_worker", "deadline_s"),
    "judges": ("generator", "gpus_per_worker", "deadline_s"),
}
DONE, FAILED, STOPPED, SKIPPED = "done", "failed", "stopped", "skipped"
Run = Callable[[Sequence[str], Path, float], float]  # arguments of burnish, log, deadline -> s; raises StageError


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stage ended."""

    status: str
    seconds: float = 0.0
    why: str = ""
    began_from: str = ""  # the checkpoint, of one that was stopped or failed
    since: float = 0.0  # when the command was started, in seconds since 1970; 0: what it took is in ``seconds``


class Folder:
    """The folder of the comparison ``config``; made, or continued.

    Raises:
        InputError: it holds another comparison, or something else.
    """

    def __init__(self, path: Path, config: CompareConfig, run: Run = run_burnish) -> None:
        self.path, self._config, self._run = path, config, run
        self.ended = {name: Ended(**row) for name, row in _read(path / STAGES).items()}
        self._check()

    # --- whose it is ----------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        values = flat(self._config.model_dump(mode="json"))
        task = {key: value for key, value in values.items() if not key.startswith(FREE)}
        task["run.seed"] = self._config.run.seed
        compare = self._config.compare
        own = {f"compare.overrides.{name}": compare.own(name) for name in ("label", "eval")}
        methods = {m.name: compare.of(m) for m in self._config.methods if m.kind != "search"}
        for section, running in RUNNING.items():
            scorers = deciding(task[section])
            task[section] = [{k: v for k, v in scorer.items() if k not in running} for scorer in scorers]
        return {"task": task | own, "methods": methods}

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError("--directory", str(self.path), "is a file", "choose another one")
        there = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError("--directory", str(self.path), f"no folder can be made in {there}",
                             "choose one that you may write to")  # fmt: skip
        before, now = _read(self.path / IDENTITY), self._identity()
        if not before:
            if self.path.exists() and any(self.path.iterdir()):
                raise InputError("--directory", str(self.path), "is there already and holds no comparison",
                                 "choose another one")  # fmt: skip
            return
        held = f"{self.path} holds a comparison with"
        for key in sorted(before["task"].keys() | now["task"].keys()):
            old, new = before["task"].get(key), now["task"].get(key)
            is_new = key not in before["task"] and not new  # a key that there was not yet, and that says nothing
            if old != new and not is_new:
                raise InputError(key, new, f"{held} {old}", "restore it, or choose another --directory")
        for name in before["methods"].keys() & now["methods"].keys():
            old, new = before["methods"][name], now["methods"][name]
            if old != new and any(stage.startswith(f"{name}-seed-") for stage in self.ended):
                raise InputError(f"compare.overrides.{name}", new, f"{held} runs of {name} with {old}",
                                 "restore them, or choose another --directory")  # fmt: skip

    def open(self, plan: Plan, train: Iterable[Prompt], held_out: Iterable[Prompt]) -> None:
        """Write what the stages read.

        Raises:
            InputError: prompts, model or a reward's file are others than those of the runs that are there.
        """
        for name in ("recipes", "logs", "data"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        written = {
            file: "".join(json.dumps({**p.columns, "prompt": p.source}) + "\n" for p in prompts)
            for file, prompts in ((TRAIN, train), (HELD_OUT, held_out))
        }
        before, identity = _read(self.path / IDENTITY), self._identity()
        contents = contents_of(self._config, written[TRAIN], written[HELD_OUT])
        for key, old in before.get("contents", {}).items():
            if key in contents and contents[key] != old:
                remedy = "restore it, or choose another --directory"
                raise InputError(key, contents[key], f"{self.path} has runs with another content of it ({old})", remedy)
        identity["methods"] = {**before.get("methods", {}), **identity["methods"]}
        _write(self.path / IDENTITY, identity | {"contents": contents})
        for file, text in written.items():
            (self.path / file).write_text(text, encoding="utf-8")
        for name, raw in plan.recipes.items():
            (self.path / "recipes" / f"{name}.yaml").write_text(_recipe(name, raw), encoding="utf-8")

    # --- stages ---------------------------------------------------------------------------------

    def is_done(self, name: str) -> bool:
        """Whether it ended well and its run folder is still there: who removes it wants it again."""
        return name in self.ended and self.ended[name].status == DONE and (self.path / name).is_dir()

    def result(self, stage: Stage) -> Path:
        """What it left.  StageError where that is gone."""
        found = sorted(self.path.glob(stage.result))
        if not found:
            raise StageError(f"{stage.name} left no {self.path / stage.result}")
        return found[-1]

    def run(self, stage: Stage, more: Sequence[str]) -> Ended:
        """Run it to its end, whatever that is, and remember how it ended.  KeyboardInterrupt passes through."""
        place, log = self.path / stage.name, self.path / "logs" / f"{stage.name}.log"
        newest, before = newest_checkpoint(place), self.ended.get(stage.name, Ended(SKIPPED))
        goes_on = newest != "" and (
            before.status == STOPPED or (before.status == FAILED and newest != before.began_from)
        )
        if place.exists() and not goes_on:
            cleared(place)
        spent = before.seconds if goes_on else 0.0
        if goes_on and before.since:  # this process was killed: the command went on until it last said something
            spent += max(0.0, log.stat().st_mtime - before.since) if log.exists() else 0.0
        arguments = [stage.command, str(self.path / "recipes" / f"{stage.recipe}.yaml"), *stage.overrides, *more]
        began_from = newest if goes_on else ""
        self._note(stage.name, Ended(STOPPED, spent, "", began_from, time.time()))  # what holds when this one is killed
        started = time.perf_counter()
        try:
            took = self._run([*arguments, *(["--resume"] if goes_on else [])], log, self._config.compare.deadline_s)
            self.result(stage)
            ended = Ended(DONE, spent + took)
        except StageError as error:
            took = time.perf_counter() - started
            ended = Ended(FAILED, spent + took, f"{error} (log: {log})", began_from)
        except KeyboardInterrupt:
            self._note(stage.name, Ended(STOPPED, spent + time.perf_counter() - started))
            raise
        self._note(stage.name, ended)
        if ended.status == DONE and stage.command == "train":
            shutil.rmtree(place / "checkpoints", ignore_errors=True)  # gigabytes that nobody resumes
        return ended

    def skip(self, stage: Stage, why: str) -> None:
        """It cannot run."""
        self._note(stage.name, Ended(SKIPPED, 0.0, why))

    def drop_model(self, stage: Stage) -> None:
        """Remove the model that a training stage left."""
        shutil.rmtree(self.path / stage.name / "export", ignore_errors=True)

    def _note(self, name: str, ended: Ended) -> None:
        self.ended[name] = ended
        _write(self.path / STAGES, {stage: asdict(how) for stage, how in self.ended.items()})


def _recipe(name: str, raw: Raw) -> str:
    what = {"eval": "Evaluates", "label": "Labels"}.get(name, "Trains")
    head = f"# {what} in a comparison; run.name, run.seed and paths of runs are given on the command line.\n"
    return head + yaml.safe_dump(raw, sort_keys=False, width=120)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError("--directory", str(path), f"is damaged ({error})", "remove it and start anew") from error
    return dict(found)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)
