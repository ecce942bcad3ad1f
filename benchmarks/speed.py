"""Rows of docs/benchmarks.md about asynchronous, elastic runs: what stands where another one waits.

Each function runs one comparison and returns its rows; benchmarks.report calls them.
May import: benchmarks.*, cluster.host, launch.accountant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import asynchrony, checkpoint, elastic, pause
from benchmarks.job import Job
from benchmarks.page import Row, markdown_table
from cluster.host import num_cpus
from launch.accountant import BUBBLE_COLUMNS

ASYNC = "asynchronous over synchronous"
LIMIT = "asynchronous over the slower phase of the synchronous run"
OWN = "asynchronous over the slower of its own phases, the pipeline's limit"
SHARED = "asynchronous over synchronous with both cores in every phase"
ROLLOUTS = "rollouts/s of two generators (of one)"
PAUSE = "a push pauses a generator of an asynchronous run (plain load and check)"
CHECKPOINT = "a checkpoint stops the learner (plain host copy)"
LOST = "run time lost with a generator (its successor's own start)"
SURVIVORS = "rollouts/s of the other generators meanwhile (their share of an unhurt run)"
TITLES = {"sync": "Synchronous, a core each", "async 1": "Asynchronous, `run.max_staleness` 1, a core each",
          "async 4": "Asynchronous, `run.max_staleness` 4, a core each",
          "shared": "Synchronous, both cores in every phase"}  # fmt: skip


def asynchrony_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``asynchrony.compare``: of each asynchronous run what it gains, and what is left to gain."""
    paces, rows = found["paces"], []
    for mode, ratios in found["ratio"].items():
        k = mode.removeprefix("async ")
        own, sync = (paces[name]["tokens_per_s"] for name in (mode, "sync"))
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios["rounds"])
        note = f"rounds {each}; {asynchrony.explained(found)}"
        rows.append(Row(named(ASYNC, k), f"{own:.1f}", f"{sync:.1f}", ratios["sync"], "asynchrony", note))
        lag = f"lag {paces[mode]['lag']:.1f} steps, a push takes {paces[mode]['push_s']:.2f} s"
        limits = found["limits"]
        rows.append(Row(named(OWN, k), f"{own:.1f}", f"{limits[mode]:.1f}", ratios["own"], "pipeline", lag))
        slower = (f"{name} {paces[mode][key] / paces['sync'][key]:.2f} times as long a token"
                  for name, key in (("sampling", "generate_s"), ("the update", "learn_s")))  # fmt: skip
        rows.append(Row(named(LIMIT, k), f"{own:.1f}", f"{limits['sync']:.1f}", ratios["limit"], "pipeline",
                        f"beside each other {', '.join(slower)}"))  # fmt: skip
        if "shared" in ratios:
            shared = paces["shared"]["tokens_per_s"]
            rows.append(Row(named(SHARED, k), f"{own:.1f}", f"{shared:.1f}", ratios["shared"]))
    return rows


def named(what: str, max_staleness: int | str) -> str:
    return f"{what}, max_staleness {max_staleness}, tokens/s"


def bubble_tables(tables: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Where the time of each run went, in Markdown."""
    return "\n\n".join(f"{TITLES[mode]}:\n\n{markdown_table(BUBBLE_COLUMNS, rows)}" for mode, rows in tables.items())


def engines(found: Mapping[str, Any], num_generators: int) -> str:
    """With what a comparison of ``elastic`` was made."""
    if found["is_real"]:
        return f"{num_generators} vLLM engines on a core each"
    lacking = f": {num_cpus()} cores, {num_generators + 1} would be needed" if num_cpus() <= num_generators else ""
    return f"paced fakes in place of the engines{lacking}"


def rollouts_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``elastic.compare_rollouts``."""
    two, one = (f"{found['rollouts_per_s'][n]:.1f}" for n in (2, 1))
    return [Row(ROLLOUTS, two, one, found["ratio"], "rollouts", engines(found, 2))]


def scaled_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``elastic.compare_scaled``."""
    rates, note = found["rollouts_per_s"], engines(found, max(elastic.SCALED))
    return [
        Row(scaled(n), f"{rates[n]:.1f}", f"{rates[1]:.1f}", ratio, f"scaled {n}", note)
        for n, ratio in found["ratio"].items()
    ]


def scaled(num_generators: int) -> str:
    return f"rollouts/s of a live run scaled to {num_generators} generators (with one, before)"


def replacement_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``elastic.compare_replacement``."""
    n = found["num_generators"]
    note = f"one of {n} killed, {engines(found, n)}"
    rates = (f"{found['num_samples'] * found[name]:.1f}" for name in ("meanwhile", "share"))
    return [
        Row(LOST, f"{found['lost_s']:.1f} s", f"{found['start_s']:.1f} s", found["ratio"], "replacement", note),
        Row(SURVIVORS, *rates, found["survivors"], "survivors", note),
    ]


def pause_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``pause.compare``."""
    pauses = found["pauses"]
    note = f"{found['num_bytes'] / 1e9:.2f} GB, {len(pauses)} pushes from {min(pauses):.2f} to {max(pauses):.2f} s"
    return [Row(PAUSE, f"{found['pause_s']:.2f} s", f"{found['plain_s']:.2f} s", found["ratio"], "pause", note)]


def checkpoint_rows(found: Mapping[str, Any]) -> list[Row]:
    """Of ``checkpoint.compare``."""
    ours, plain = (f"{found['seconds'][s]:.3f} s" for s in ("ours", "plain"))
    note = f"{found['num_bytes'] / 1e9:.2f} GB, on the disk {found['write_s']:.2f} s later, in a thread"
    return [Row(CHECKPOINT, ours, plain, found["ratio"], "checkpoint", note)]


class SpeedSections:
    """The sections of a report that are about asynchronous runs."""

    job: Job
    quick: bool
    bubbles: str = ""  # tables of where the time went, once the section ``asynchrony`` has run

    def asynchrony(self) -> list[Row]:
        job = asynchrony.quick_job() if self.quick else asynchrony.JOB
        found = asynchrony.compare(job, self.quick)
        self.bubbles = bubble_tables(found["bubbles"])
        return asynchrony_rows(found)

    def rollouts(self) -> list[Row]:
        return rollouts_rows(elastic.compare_rollouts(self.quick))

    def scaled(self) -> list[Row]:
        return scaled_rows(elastic.compare_scaled(self.quick))

    def replacement(self) -> list[Row]:
        return replacement_rows(elastic.compare_replacement(self.quick))

    def pause(self) -> list[Row]:
        return pause_rows(pause.compare(self.job, 2 if self.quick else 4, 2 if self.quick else 5))

    def checkpoint(self) -> list[Row]:
        return checkpoint_rows(checkpoint.compare(self.job, 1 if self.quick else 2, 2 if self.quick else 5))


SPEED = ("asynchrony", "rollouts", "scaled", "pause", "checkpoint", "replacement")
