"""Whole asynchronous runs on real engines: two generators, pushes that land in running groups, a kill and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import RUN_S, Start, start, trajectories  # noqa: F401 - the fixture

from cluster.checkpoints import CheckpointStore
from launch.journal import read_rows
from launch.overrides import load_config
from launch.prepare import prepare
from launch.prompts import PromptStream
from launch.spool import UNTRAINED, read_spool

pytestmark = pytest.mark.timeout(2 * RUN_S + 300)

MAX_STALENESS = 2
LONG = (  # completions of very different lengths, slow against an update of the tiny model
    f"run.max_staleness={MAX_STALENESS}", "generator.sampling.max_tokens=128", "learner.num_workers=1",
    "learner.zero_stage=0", "model.dtype=float32", "model.max_length=256", "learner.optimizer.lr=1e-6",
)  # fmt: skip


def check_lineage(folder: Path, num_steps: int) -> list[list[dict[str, Any]]]:
    """Each position once in steps 1..num_steps, every token at most MAX_STALENESS old; the version spans of it all."""
    config = load_config(str(folder / "config.yaml")).config
    prepared = prepare(config)
    stream = PromptStream(prepared.train, config.run.seed, config.prompts.shuffle)
    trained: list[int] = []
    spans: list[list[dict[str, Any]]] = []
    for step in range(1, num_steps + 1):
        rows = trajectories(folder, step)
        groups = sorted({int(row["group_id"]) for row in rows})
        assert len(groups) == config.run.groups_per_step
        assert [int(row["group_id"]) for row in rows] == [p for p in groups for _ in range(len(rows) // len(groups))]
        trained += groups
        for row in rows:
            assert row["prompt_ids"] == stream.at(int(row["group_id"])).token_ids.tolist()
            assert sum(span["num_tokens"] for span in row["version_spans"]) == len(row["completion_ids"])
            steps = [span["step"] for span in row["version_spans"]]
            assert steps == sorted(steps) and step - 1 - MAX_STALENESS <= steps[0] and steps[-1] <= step - 1
            spans.append(row["version_spans"])
    assert len(set(trained)) == len(trained), "trained twice along the surviving lineage"
    assert set(range(config.run.groups_per_step * (num_steps - MAX_STALENESS))) <= set(trained), "skipped for too long"
    return spans


@pytest.mark.slow
def test_an_asynchronous_run_that_is_killed_goes_on_with_what_was_finished_and_trains_every_prompt_once(
    start: Start,  # noqa: F811
) -> None:
    killed = start("async", *LONG, "run.num_steps=5000", "evaluation.every=4", "checkpoint.every=3")
    killed.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 6)
    killed.kill()
    checkpoint = CheckpointStore(killed.folder / "checkpoints").latest()
    assert checkpoint is not None
    spool = checkpoint.path / UNTRAINED  # none when the learner was waiting for every group there was
    spooled = [int(g.summary.group_id) for g in read_spool(spool)] if spool.exists() else []
    under_way = {row["position"]: row["state"] for row in checkpoint.metadata["ledger"]["entries"]}
    assert [p for p, state in under_way.items() if state == "finished"] == spooled
    end = checkpoint.step + 6

    resumed = start("async", *LONG, f"run.num_steps={end}", "evaluation.every=4", "checkpoint.every=3", "--resume")
    assert resumed.end() == 0, resumed.tail()
    spans = check_lineage(resumed.folder, end)
    assert any(len({(s["incarnation"], s["step"]) for s in sample}) > 1 for sample in spans), "no push landed in flight"
    (ledger,) = [e for e in resumed.rows("events.jsonl") if e["kind"] == "ledger"]
    assert ledger["num_untrained"] == len(spooled)
    assert ledger["num_reissued"] == sum(state in ("in_flight", "pending") for state in under_way.values())
    last = CheckpointStore(resumed.folder / "checkpoints").latest()
    assert last is not None and last.metadata["ledger"]["entries"] == [], "at the end nothing is left over"
    assert last.metadata["ledger"]["counts"] == {"trained": 4 * end, "dropped": 0, "failed": 0}
    rows = {row["step"]: row for row in read_rows(resumed.folder / "metrics.jsonl")}
    assert sorted(rows) == list(range(end + 1))
    assert max(row["staleness/max"] for step, row in rows.items() if step) <= MAX_STALENESS
    assert max(row["staleness/mean"] for step, row in rows.items() if step) > 0
    assert {"eval/accuracy"} <= rows[4].keys(), "an evaluation of one version while groups ran beside it"
    # Every token's log-prob is that of the weights its span names: at this learning rate they hardly move.
    # A step whose groups have no spread computes none.
    name = "sampling/sampling_logp_difference/mean"
    differences = [row[name] for row in rows.values() if name in row]
    assert differences and max(differences) < 0.01
