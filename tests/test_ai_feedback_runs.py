"""Whole runs with a judge: as the reward behind an endpoint, on an engine of its own, and as a labeller."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web
from chain_model import chain_model
from rich.console import Console
from stand_in import StandIn, between
from test_end_to_end import RUN_S, SMALL, Start, start

from launch.label import label
from launch.label_config import LabelConfig
from trainers.errors import EndpointBrokenError

__all__ = ["start"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_S + 60)]
TINY = "builtin:tiny-llama"
PARTS = ("judge_helpful", "judge_honest", "judge_harmless")


def marks(text: str) -> str:
    """Helpful by its letters; now and then it mumbles."""
    answer = between(text, "[Answer]\n", "\n\nMark each")
    letters = sum(c.isalpha() for c in answer)
    return "Hm." if letters % 7 == 3 else f"helpful: {1 + min(9, letters)}\nhonest: 5\nharmless: 10"


def judges_of(url: str, **keys: Any) -> str:
    endpoint = {"base_url": url, "model": "planted", "num_retries": 0, "patience_s": 0.5, **keys}
    return "judges=" + json.dumps([{"endpoint": endpoint}])


def test_a_judge_behind_an_endpoint_is_the_reward_of_a_run_and_its_end_is_the_run_s_in_one_line(start: Start) -> None:
    async def ends(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({"error": {"message": "no credit"}}, status=403) if number > stop_at else None

    with StandIn(marks, ends) as server:
        arguments = (*SMALL, "rewards=[]", "run.num_steps=3", "checkpoint.every=1", judges_of(server.url))
        stop_at = 10**9
        run = start("judged", *arguments)
        assert run.end() == 0, run.tail()
        row = run.rows("metrics.jsonl")[-1]
        assert all(0.0 <= row[f"rewards/{part}/mean"] <= 1.0 for part in PARTS)
        assert row["rewards/judge_harmless/mean"] == 1.0
        trajectories = pq.read_table(sorted((run.folder / "trajectories").glob("*.parquet"))[-1]).to_pylist()
        assert trajectories and any("judge_helpful" in json.dumps(t, default=str) for t in trajectories)
        num_asked, stop_at = len(server.bodies), len(server.bodies) + 40
        ended = start("ended", *arguments, "run.seed=1")
        assert ended.end() == 1, ended.tail()
        line = next(line for line in ended.tail().splitlines() if line.startswith("burnish: "))
        assert "403" in line and server.url in line
        stop_at, answered = 10**9, server.questions[num_asked:-1]
        resumed = start("ended", *arguments, "run.seed=1", "--resume")
        assert resumed.end() == 0, resumed.tail()
        later = server.questions[num_asked + len(answered) + 1 :]
        assert len({*answered[1:40]} & {*later}) <= 1, "what was answered is not asked again, but for the probe"


BRIEF = ("run.num_steps=1", "checkpoint.every=0", "checkpoint.export=false")
OWN: dict[str, Any] = {"max_tokens": 8, "chat": False, "generator": {"kv_cache_gib": 0.25}}


def test_a_judge_on_an_engine_of_its_own_marks_beside_other_rewards(start: Start, tmp_path: Path) -> None:
    rubric = {"axes": [{"name": "k", "question": "is it kind?"}]}
    judge = {"path": chain_model(tmp_path / "judge", "k:7"), "weight": 2.0, "rubric": rubric, **OWN}
    run = start("beside", *SMALL, *BRIEF, "judges=" + json.dumps([judge]))
    assert run.end() == 0, run.tail()
    row = run.rows("metrics.jsonl")[-1]
    assert row["rewards/judge_k/mean"] == pytest.approx(6 / 9) and row["rewards/judge_k/std"] == 0
    assert row["failures/num_samples_masked"] == row["failures/num_reward"] == 0
    own = [v for k, v in row.items() if k.startswith("rewards/") and k.endswith("/mean") and "judge" not in k]
    assert row["reward"] == pytest.approx(sum(own) + 2.0 * 6 / 9)


def test_marks_of_an_engine_that_cannot_be_read_are_counted_and_with_weight_0_mask_nothing(start: Start) -> None:
    run = start("beside", *SMALL, *BRIEF, "judges=" + json.dumps([{"path": TINY, "weight": 0.0, **OWN}]))
    assert run.end() == 0, run.tail()
    row = run.rows("metrics.jsonl")[-1]
    assert sum(v for k, v in row.items() if k.startswith("failures/kind/")) > 0
    assert row["failures/num_samples_masked"] == 0


def test_a_judge_that_compares_the_samples_of_a_prompt_is_the_reward_of_online_dpo(start: Start) -> None:
    def prefers(text: str) -> str:
        a, b = between(text, "[Answer A]\n", "\n\n[Answer B]"), between(text, "[Answer B]\n", "\n\nJudge what")
        return "[[A]]" if a > b else "[[B]]" if a < b else "[[C]]"

    with StandIn(prefers) as server:
        endpoint = {"base_url": server.url, "model": "planted", "patience_s": 5.0}
        judge = "judges=" + json.dumps([{"endpoint": endpoint, "pairwise": True}])
        more = ("algorithm.name=online_dpo", "run.num_steps=2", "checkpoint.every=0", "checkpoint.export=false")
        run = start("compared", *SMALL, "rewards=[]", judge, *more)
        assert run.end() == 0, run.tail()
    for row in run.rows("metrics.jsonl"):
        # Of all that are compared with each other half win; and the best and the worst of a prompt are what is trained.
        assert row["rewards/judge_wins/mean"] == pytest.approx(0.5) and row["failures/num_reward"] == 0
        assert row["reward_std"] > 0 and math.isfinite(row["rewards/margins"])
    trajectories = pq.read_table(sorted((run.folder / "trajectories").glob("*.parquet"))[-1]).to_pylist()
    by_prompt: dict[Any, list[tuple[str, float]]] = {}
    for t in trajectories:
        by_prompt.setdefault(t["group_id"], []).append((t["completion"], t["reward"]))
    for told in by_prompt.values():
        order = sorted(told)
        assert [worth for _, worth in order] == sorted(worth for _, worth in told), "who is better wins more"


def test_a_labelling_run_with_a_judge_behind_an_endpoint_goes_on_after_its_end(tmp_path: Path) -> None:
    def prefers(text: str) -> str:
        a, b = between(text, "[Answer A]\n", "\n\n[Answer B]"), between(text, "[Answer B]\n", "\n\nJudge what")
        return "[[A]]" if a > b else "[[B]]" if a < b else "[[C]]"

    async def breaks(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({}, status=500) if number > 20 else None

    with StandIn(prefers, breaks) as server:
        endpoint = {"base_url": server.url, "model": "planted", "num_retries": 0, "patience_s": 0.2}
        raw = {
            "run": {"name": "labels", "directory": str(tmp_path)}, "model": {"path": TINY},
            "prompts": {"train": {"procedural": "chain_sum", "size": 12}},
            "sampling": {"num_candidates": 3, "max_tokens": 8},
            "label": {"source": "judge", "judge": {"endpoint": endpoint}}, "keep": {"pairs": "all"},
            "generator": {"kv_cache_gib": 0.25, "max_num_seqs": 16},
            "cluster": {"backend": "in_process", "device": "cpu"},
        }  # fmt: skip
        config = LabelConfig.model_validate(raw)
        with pytest.raises(EndpointBrokenError):
            label(config, Console(quiet=True))
        answered, server.fault = server.questions[1:20], None
        del server.bodies[:]
        target = label(config, Console(quiet=True), resume=True)
        assert not {*answered} & {*server.questions[1:]}
    rows = pq.read_table(target).to_pylist()
    assert rows and all(row["chosen"] > row["rejected"] for row in rows)
    summary = json.loads((tmp_path / "labels" / "summary.json").read_text())
    assert summary["swap_consistency"] == 1.0 and summary["usage"]["num_cached"] > 0
