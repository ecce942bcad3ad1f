"""All benchmarks, one after the other: a table on the terminal and the results section of docs/benchmarks.md.

    python -m benchmarks.report [--quick] [--skip-trl] [--only NAME ...]

A benchmark that fails is a row that says why; the others go on.  With ``--quick`` everything runs once on
a tiny model, to see that it runs: those numbers mean nothing and are not written.
May import: rich, benchmarks.*, cluster.host.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import generation, learner, ppo, push, step, trl_job
from benchmarks.job import Job
from benchmarks.page import COLUMNS, PAGE, Row, markdown_table, renewed_rows, replace_section, section_of
from benchmarks.process import ROOT, MeasurementError, run
from benchmarks.speed import SPEED, SpeedSections
from cluster.host import host_facts

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
QUICK_JOB = Job(model="builtin:tiny-llama", num_prompts=2, num_samples=4, max_tokens=16)


def step_row(what: str, found: Mapping[str, Any], target: str) -> Row:
    """Of ``benchmarks.step.summary``."""
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in found["ideals"].items())
    phases = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in found["phases"].items())
    ours, ideal = f"{found['step_s']:.2f} ({phases})", f"{found['ideal_s']:.2f} ({parts})"
    return Row(what, ours, ideal, found["ratio"], target)


class Report(SpeedSections):
    """Runs the sections in order; what one records the next ones use."""

    def __init__(self, job: Job, quick: bool, scratch: Path, rounds: int = 3) -> None:
        self.job, self.quick = job, quick
        self.samples = scratch / "samples.parquet"
        self.lengths: dict[str, float] = {}
        self.step_rate: float | None = None  # samples/s
        self.rounds = 1 if quick else rounds

    def generation(self) -> list[Row]:
        found = generation.compare(self.job, self.rounds, not self.quick, self.samples)
        self.lengths, rates = found["lengths"], found["tokens_per_s"]
        compiled = f"; compiled {rates['raw_compiled']:.0f}" if "raw_compiled" in rates else ""
        return [
            Row(
                "generation, tokens/s (vLLM offline)", f"{rates['ours']:.0f}", f"eager {rates['raw']:.0f}{compiled}",
                found["ratio"], "generation", "ours over the faster form",
            )
        ]  # fmt: skip

    def recorded(self) -> Path:
        """The samples that the generation benchmark recorded, sampled now where it did not run."""
        if not self.samples.exists():
            arguments = [*self.job.arguments(), "--side=ours", "--repeats=1", f"--record={self.samples}"]
            run("benchmarks.generation", arguments, generation.DEADLINE_S)
        return self.samples

    def learner(self) -> list[Row]:
        found = learner.compare(self.job, self.recorded(), self.rounds)
        rates = found["tokens_per_s"]
        return [
            Row(
                "update, completion tokens/s (padded transformers)", f"{rates['ours']:.0f}", f"{rates['plain']:.0f}",
                found["ratio"], "learner",
            )
        ]  # fmt: skip

    def memory(self) -> list[Row]:
        found = learner.compare_memory(self.job)
        rows = []
        for name, what in (("default", "no checkpointing"), ("checkpointing", "gradient checkpointing")):
            numbers = found[name]
            title = f"peak memory of 4,096 tokens x {found['vocabulary']:,} vocabulary, {what}"
            ours, plain = (f"{numbers[side] / 2**20:,.0f} MiB" for side in ("ours", "plain"))
            rows.append(Row(title, ours, plain, numbers["ratio"], "memory"))
        return rows

    def push(self) -> list[Row]:
        found = push.compare(self.job, 1 if self.quick else 2, 2 if self.quick else 5)
        ours, plain = (
            f"{found['seconds'][s]:.3f} s, {found['bytes_per_s'][s] / 1e9:.2f} GB/s" for s in ("ours", "plain")
        )
        checksum = found["details"]["plain"]["checksum"]
        memcpy = f"memcpy {found['memcpy_bytes_per_s'] / 1e9:.1f} GB/s; the plain loop's checksum: {checksum}"
        return [Row("weight push", ours, plain, found["ratio"], "push", memcpy)]

    def step(self) -> list[Row]:
        found = step.compare(self.job, 2 if self.quick else 5, not self.quick)
        self.step_rate = found["samples_per_s"]
        return [step_row("whole step, s (sum of its ideals)", found, "step")]

    def scoring(self) -> list[Row]:
        found = ppo.compare_scoring(self.job, self.recorded(), self.rounds)
        rates = found["tokens_per_s"]
        return [
            Row(f"{ours} scoring, tokens/s (transformers forward)", f"{rates[ours]:.0f}", f"{rates[raw]:.0f}",
                found["ratio"][ours], "scoring")
            for ours, raw in ppo.PAIRS.items()
        ]  # fmt: skip

    def ppo(self) -> list[Row]:
        found = ppo.compare_step(self.job, 2 if self.quick else 5, not self.quick)
        return [step_row("whole PPO step, s (sum of its ideals)", found, "ppo")]

    def trl(self) -> list[Row]:
        subprocess.run(["bash", str(ROOT / "benchmarks" / "setup_trl.sh")], check=True, cwd=ROOT)
        rows = []
        for variant in trl_job.VARIANTS:
            title = f"samples/s (TRL 1.16, {variant})"
            ours = "" if self.step_rate is None else f"{self.step_rate:.2f}"
            try:
                # bfloat16 without hardware for it takes minutes a step: one timed step says enough.
                found = trl_job.compare(self.job, variant, 2 if self.quick or variant == "shipped" else 4)
            except MeasurementError as error:
                rows.append(Row(title, ours, "no number", note=str(error)[:200]))
                continue
            ratio = None if self.step_rate is None else self.step_rate / found["samples_per_s"]
            precision = "bf16 autocast" if found["bf16"] else "float32"
            note = f"TRL in {precision}, mean length {found['mean_length']:.1f}"
            target = "trl shipped" if variant == "shipped" else "trl tuned"
            rows.append(Row(title, ours, f"{found['samples_per_s']:.2f}", ratio, target, note))
        return rows


SECTIONS = ("generation", "learner", "memory", "push", "step", "scoring", "ppo", *SPEED, "trl")


def run_all(report: Report, sections: list[str], console: Console) -> dict[str, list[Row]]:
    """Every section's rows; a section that fails becomes one row."""
    rows: dict[str, list[Row]] = {}
    for name in sections:
        section: Callable[[], list[Row]] = getattr(report, name)
        started = time.perf_counter()
        try:
            found = section()
        except (MeasurementError, subprocess.CalledProcessError, OSError) as error:
            found = [Row(name, "no number", "", target=name, note=f"failed: {str(error)[:300]}")]
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
        rows[name] = found
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Burnish against its baselines", show_lines=True)
    for title in COLUMNS:
        table.add_column(title, justify="right" if title == "ratio" else "left")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)


# --- the page -----------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, features, memory and versions, in two lines."""
    facts = host_facts()
    text = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    features = set((fields.get("flags") or fields.get("Features") or "").split())
    shown = ", ".join(f for f in CPU_FEATURES if f in features) or "none of note"
    native = "native" if facts["native_bfloat16"] else "no native"
    gpus = ", ".join(g["name"] for g in facts["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    return (
        f"{fields.get('model name', platform.machine())}, {facts['num_cpus']} cores, "
        f"features {shown} ({native} bfloat16), {facts['memory_bytes'] / 2**30:.0f} GiB, {gpus}.\n{versions}."
    )


def section_text(rows: list[Row], report: Report, command: str, took_s: float) -> str:
    """The results section in Markdown."""
    job, lengths = report.job, report.lengths
    lines = [
        f"Measured on {datetime.date.today().isoformat()} with `{command}` ({took_s / 60:.0f} minutes).", "", machine(),
        "", f"{job.num_prompts} prompts x {job.num_samples} samples, up to {job.max_tokens} new tokens, "
        f"compute dtype {job.dtype}.",
    ]  # fmt: skip
    if lengths:
        lines.append(
            f"Completions were {lengths['mean']:g} tokens long on average (median {lengths['median']:g}, "
            f"{lengths['min']:g} to {lengths['max']:g}), prompts {lengths['prompt_mean']:g}."
        )
    return "\n".join([*lines, "", markdown_table(COLUMNS, (row.cells() for row in rows))])


def renewed_page(page: str, rows: Mapping[str, list[Row]], report: Report, command: str, took_s: float) -> str:
    """The page with what was measured: the results as a whole, of asynchronous runs each row for itself."""
    results = [row for name, found in rows.items() if name not in SPEED for row in found]
    renewed = [row for name, found in rows.items() if name in SPEED for row in found if row.ours != "no number"]
    if results:
        page = replace_section(page, section_text(results, report, command, took_s))
    if renewed:
        page = replace_section(page, renewed_rows(section_of(page, "asynchrony"), renewed), "asynchrony")
    if report.bubbles:
        page = replace_section(page, report.bubbles, "bubbles")
    return page


def main() -> int:
    """Run, print, write.  Exit code 1 when a benchmark gave no number."""
    parser = argparse.ArgumentParser(prog="benchmarks.report")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: does everything run?")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each timed side; the median counts")
    parser.add_argument("--skip-trl", action="store_true", help="without the comparison with TRL (4 GB, half an hour)")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=None, help="these alone")
    arguments = parser.parse_args()
    console = Console()
    job = QUICK_JOB if arguments.quick else Job()
    sections = [s for s in arguments.only or SECTIONS if not (arguments.skip_trl and s == "trl")]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="burnish-bench-report-") as scratch:
        report = Report(job, arguments.quick, Path(scratch), arguments.rounds)
        found = run_all(report, sections, console)
    rows = [row for section_rows in found.values() for row in section_rows]
    show(rows, console)
    if not arguments.quick:
        command = " ".join(["python -m benchmarks.report", *sys.argv[1:]])
        PAGE.write_text(renewed_page(PAGE.read_text(), found, report, command, time.perf_counter() - started))
        console.print(f"written: {PAGE.relative_to(ROOT)}")
    return int(any(row.ours == "no number" or row.baseline == "no number" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
