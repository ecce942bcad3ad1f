"""The benchmarks of asynchronous and elastic runs: their arithmetic, their fakes, their lines in the page."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_async_loop import in_virtual_time

from actors.generator import VLLMGenerator
from actors.learner import DeepSpeedLearner
from actors.settings import GeneratorSettings
from benchmarks import asynchrony, elastic, paced, page, report, speed, staleness_curves
from benchmarks.job import Job
from benchmarks.live import live_run, worker_of
from benchmarks.process import MeasurementError
from launch.demands import role_demands
from launch.journal import read_rows
from launch.overrides import load_config
from trainers.experience import Prompt, WeightVersion, decode_group
from trainers.protocols import GroupRequest

SAMPLES = 4


def row(step: int, at: float, **values: float) -> dict[str, Any]:
    """A row of metrics.jsonl: 2 groups of 10 tokens a sample, an update of 3 s and a push of 1 s before ``at``."""
    found = {
        "step": step, "time_unix": at, "groups/num_trained": 2.0, "groups/num_generated": 2.0,
        "completions/mean_length": 10.0, "time/learn_s": 3.0, "time/push_s": 1.0, "staleness/mean": 0.5,
    }  # fmt: skip
    return found | {name.replace("__", "/"): value for name, value in values.items()}


def busy(step: int, at: float, **values: float) -> dict[str, Any]:
    """Of an asynchronous run, which has no phase of sampling: its generator works all the time."""
    return row(step, at, **{"accounting__generator__generate_fraction": 1.0} | values)


# --- arithmetic -----------------------------------------------------------------------------------


def test_a_pace_counts_tokens_between_two_rows_and_phases_by_the_token() -> None:
    rows = [row(0, 0.0), *(row(s, 10.0 * s, time__generate_s=5.0) for s in (1, 2, 3))]
    found = asynchrony.pace(rows, 1, 3, SAMPLES)
    assert found.tokens_per_s == pytest.approx(160 / 20)
    assert found.generate_s == pytest.approx(10 / 160) and found.learn_s == pytest.approx(6 / 160)
    assert found.limit == pytest.approx(16), "80 tokens every 5 s: the slower phase alone"
    assert found.balance == pytest.approx(5 / 3) and found.lag == 0.5 and found.push_s == 1.0


def test_what_is_trained_on_out_of_a_store_is_not_a_pace() -> None:
    rows = [row(1, 0.0), busy(2, 10.0, groups__num_generated=0.0), busy(3, 20.0, groups__num_generated=1.0)]
    assert asynchrony.pace(rows, 1, 3, SAMPLES).tokens_per_s == pytest.approx(8 / 4)
    eager = [row(1, 0.0), busy(2, 10.0, groups__num_generated=9.0)]
    assert asynchrony.pace(eager, 1, 2, SAMPLES).tokens_per_s == pytest.approx(8), "nor is what nobody trains on"


def test_an_overlap_without_loss_is_twice_the_synchronous_pace_and_all_of_the_limit() -> None:
    sync = asynchrony.pace([row(s, 8.0 * s, time__generate_s=4.0, time__learn_s=4.0) for s in (1, 2)], 1, 2, SAMPLES)
    stale = asynchrony.pace([busy(s, 4.0 * s, time__learn_s=4.0) for s in (1, 2)], 1, 2, SAMPLES)
    assert asynchrony.ratios(sync, stale, None) == pytest.approx({"sync": 2.0, "limit": 1.0, "own": 1.0})
    assert asynchrony.ratios(sync, stale, stale)["shared"] == pytest.approx(1.0)


def test_on_a_machine_that_has_become_slower_the_own_limit_is_still_reached_and_the_other_is_not() -> None:
    sync = asynchrony.pace([row(s, 8.0 * s, time__generate_s=4.0, time__learn_s=4.0) for s in (1, 2)], 1, 2, SAMPLES)
    stale = asynchrony.pace([busy(s, 5.0 * s, time__learn_s=5.0) for s in (1, 2)], 1, 2, SAMPLES)
    assert asynchrony.ratios(sync, stale, None) == pytest.approx({"sync": 1.6, "limit": 0.8, "own": 1.0})
    idle = [busy(s, 8.0 * s, time__learn_s=4.0, accounting__generator__generate_fraction=0.5) for s in (1, 2)]
    waiting = asynchrony.pace(idle, 1, 2, SAMPLES)
    assert asynchrony.ratios(sync, waiting, None)["own"] == pytest.approx(0.5), "who waits is below its own limit"


def test_rounds_are_compared_one_by_one_and_their_median_counts() -> None:
    paces = [asynchrony.Pace(rate, 1 / 20, 1 / 20, 0.0, 0.0) for rate in (10.0, 16.0, 18.0, 5.0, 9.0)]
    rounds = [{"sync": paces[0], "async 1": paces[n]} for n in (1, 2)] + [{"sync": paces[3], "async 1": paces[4]}]
    found = asynchrony.over_rounds(rounds, "async 1", None)
    assert found["rounds"] == pytest.approx([1.6, 1.8, 1.8]) and found["sync"] == pytest.approx(1.8)
    assert "shared" not in found and found["own"] == pytest.approx(0.8)
    assert asynchrony.middle(paces).tokens_per_s == 10.0


def test_seats_are_doubled_while_sampling_is_slow_and_halved_while_it_is_fast() -> None:
    assert asynchrony.balanced_seats(1.1, 8) == asynchrony.balanced_seats(0.8, 8) == 8
    assert asynchrony.balanced_seats(2.0, 8) == 16 and asynchrony.balanced_seats(0.5, 8) == 4
    assert asynchrony.balanced_seats(9.0, 64) == 64 and asynchrony.balanced_seats(0.1, 1) == 1


def test_the_best_balance_that_was_tried_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = {4: 2.0, 8: 1.4, 16: 0.6}  # no number of seats is balanced: it would go back and forth

    def measured(job: Job, mode: asynchrony.Mode, seats: int) -> Any:
        return asynchrony.Pace(1.0, sampling[seats], 1.0, 0.0, 0.0), []

    monkeypatch.setattr(asynchrony, "measure", measured)
    seats, sync, _ = asynchrony.balanced_sync(asynchrony.JOB, 4, 5)
    assert seats == 8 and sync.balance == 1.4


def test_rates_count_from_batch_to_batch_and_within_a_step_evenly() -> None:
    rows = [row(s, 4.0 + 10.0 * s, groups__num_generated=5.0 * s) for s in (1, 2, 3)]  # batches at 10, 20, 30 s
    assert elastic.rate(rows, 1, 3) == pytest.approx(25 / 20)
    assert elastic.rate_between(rows, 12.0, 18.0) == pytest.approx(1.0)
    assert elastic.rate_between(rows, 15.0, 25.0) == pytest.approx((5 + 7.5) / 10)
    with pytest.raises(ValueError, match="not within"):
        elastic.rate_between(rows, 25.0, 31.0)


def test_a_loss_is_the_time_by_which_the_hurt_run_is_later_over_its_successors_start() -> None:
    """Three generators sample 6 groups in 10 s; without one of them, for 30 s, a step takes 15 s."""
    calm = [row(s, 10.0 * s, groups__num_generated=6.0) for s in range(1, 7)]
    at = (10, 25, 40, 50, 60, 70)
    hurt = [row(s, float(t), groups__num_generated=6.0) for s, t in enumerate(at, 1)]
    events = [
        {"kind": "worker_died", "time_unix": 6.0, "silent_s": 0.1},
        {"kind": "generator_joined", "time_unix": 36.0, "start_s": 19.0, "catch_up_s": 1.0},
    ]
    found = elastic.loss(calm, hurt, events, 6, 3)
    assert found["lost_s"] == pytest.approx(10) and found["ratio"] == pytest.approx(0.5)
    assert found["survivors"] == pytest.approx(1.0) and found["share"] == pytest.approx(0.4)


def test_intervals_over_seeds_are_students() -> None:
    assert staleness_curves.interval([0.5, 0.5, 0.5]) == (0.5, 0.0)
    mean, half = staleness_curves.interval([0.0, 1.0])
    assert mean == 0.5 and half == pytest.approx(12.71 * 0.5, rel=1e-3)
    assert math.isnan(staleness_curves.interval([0.3])[1])


# --- curves ---------------------------------------------------------------------------------------


def curves() -> dict[staleness_curves.Variant, list[staleness_curves.Curve]]:
    rows = [{"step": 0, "eval/reward": 0.1}] + [
        {"step": s, "reward": s / 10, "staleness/mean": 1.0, "eval/reward": 0.4 if s == 20 else None}
        for s in range(1, 21)
    ]
    curve = staleness_curves.read_curve(rows)
    return {variant: [curve, curve] for variant in staleness_curves.variants(staleness_curves.STALENESS)}


def test_every_staleness_has_a_curve_and_only_stale_ones_have_one_without_correction() -> None:
    names = [v.name for v in staleness_curves.variants((0, 1, 16))]
    assert names == ["k0", "k1", "k1-uncorrected", "k16", "k16-uncorrected"]
    tried = staleness_curves.variants(staleness_curves.STALENESS)
    for study, variant in itertools.product(staleness_curves.STUDIES.values(), tried):
        config = load_config(study.recipe, [*study.overrides, *variant.overrides()]).config
        assert config.run.max_staleness == variant.max_staleness
        assert config.cluster.own_cores == (variant.max_staleness > 0)
        assert config.algorithm.correction.kind == ("auto" if variant.is_corrected else "none")


def test_the_table_of_curves_has_the_last_steps_and_the_last_evaluation() -> None:
    rows = staleness_curves.table_rows(curves())
    assert [r[0] for r in rows] == ["0", "1", "1", "4", "4", "16", "16"]
    assert [r[1] for r in rows[:3]] == ["none needed", "token_truncate", "none"]
    assert rows[0][2:] == ("2", "1.0", "0.400", "1.250", "1.250 to 1.250")
    for name in staleness_curves.STUDIES:
        section = staleness_curves.text_of(name, staleness_curves.COLUMNS, rows, 8)
        assert "| 16 | none | 2 |" in page.replace_section(page.PAGE.read_text(), section, f"staleness-{name}")
    assert staleness_curves.without(rows[0]) == (*rows[0][:4], *rows[0][5:])


def test_the_figure_of_curves_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        staleness_curves.draw(curves(), tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_text()
    assert first.startswith("<?xml") and first == (tmp_path / "b.svg").read_text()


# --- the page -------------------------------------------------------------------------------------


def every_row() -> list[page.Row]:
    pace = vars(asynchrony.Pace(1.0, 1.0, 1.0, 1.0, 1.0))
    ratio = {"sync": 1.7, "limit": 0.85, "own": 0.95, "shared": 1.1, "rounds": [1.7, 1.7]}
    found = {
        "paces": dict.fromkeys(("sync", "async 1", "async 4", "shared"), pace), "balance": 1.0,
        "limits": dict.fromkeys(("sync", "async 1", "async 4", "shared"), 1.0), "seats": 8,
        "ratio": {"async 1": ratio, "async 4": ratio},
    }  # fmt: skip
    lost = {"num_generators": 3, "num_samples": 8, "lost_s": 4.0, "start_s": 10.0, "ratio": 0.4, "survivors": 1.0,
            "meanwhile": 1.0, "share": 1.0, "is_real": False}  # fmt: skip
    return [
        *speed.asynchrony_rows(found),
        *speed.rollouts_rows({"rollouts_per_s": {1: 10.0, 2: 19.0}, "ratio": 1.9, "is_real": False}),
        *speed.scaled_rows({"rollouts_per_s": {1: 10.0, 3: 29.0, 2: 19.0}, "ratio": {3: 2.9, 2: 1.9},
                            "is_real": False}),
        *speed.pause_rows({"pauses": [1.0], "pause_s": 1.0, "plain_s": 0.8, "ratio": 1.25, "num_bytes": 10**9}),
        *speed.checkpoint_rows({"seconds": {"ours": 1.0, "plain": 1.0}, "ratio": 1.0, "num_bytes": 1, "write_s": 1.0}),
        *speed.replacement_rows(lost),
    ]


def test_every_row_has_its_line_in_the_page_with_its_target_and_renews_it_alone() -> None:
    before = page.section_of(page.PAGE.read_text(), "asynchrony")
    assert page.renewed_rows(before, []) == before
    rows = every_row()
    after = page.renewed_rows(before, rows)
    assert len(after.splitlines()) == len(before.splitlines()), "no line was added: each has its own already"
    assert "not yet measured" not in after
    for new in rows:
        old = next(line for line in before.splitlines() if line.startswith(f"| {new.what} | "))
        assert new.cells()[4] in old
    once = page.renewed_rows(before, rows[:1])
    assert sum(a != b for a, b in zip(before.splitlines(), once.splitlines(), strict=True)) <= 1


def test_one_section_measured_alone_leaves_the_rest_of_the_page_as_it_was(tmp_path: Path) -> None:
    made = report.Report(Job(), False, tmp_path)
    before = page.PAGE.read_text()
    failed = [page.Row("pause", "no number", "", target="pause", note="failed: why")]
    assert report.renewed_page(before, {"pause": failed}, made, "", 0.0) == before, "a failure replaces no number"
    rows = [row for row in every_row() if row.what == speed.ROLLOUTS]
    after = report.renewed_page(before, {"rollouts": rows, "pause": failed}, made, "", 0.0)
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert changed == [page.markdown_line(rows[0].cells())]
    made.bubbles = speed.bubble_tables({"sync": [("learner", "1", "9 s", "47%", "wait for generator 50%", "more")]})
    assert "| learner | 1 | 9 s | 47% |" in page.section_of(report.renewed_page(before, {}, made, "", 0.0), "bubbles")


def test_a_row_of_fakes_says_so() -> None:
    fakes = [r for r in every_row() if "paced fakes" in r.note]
    assert [r.what for r in fakes] == [
        speed.ROLLOUTS, speed.scaled(3), speed.scaled(2), speed.LOST, speed.SURVIVORS
    ]  # fmt: skip
    real = speed.rollouts_rows({"rollouts_per_s": {1: 10.0, 2: 19.0}, "ratio": 1.9, "is_real": True})
    assert "fakes" not in real[0].note


# --- the runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [asynchrony.SYNC, asynchrony.SHARED, *asynchrony.STALE], ids=lambda mode: mode.name)
def test_each_mode_is_a_valid_run_without_a_reference(mode: asynchrony.Mode) -> None:
    config = load_config(asynchrony.RECIPE, asynchrony.run_overrides(asynchrony.JOB, mode, 8)).config
    assert config.run.max_staleness == mode.max_staleness and config.cluster.own_cores == mode.own_cores
    assert not config.algorithm.needs_reference, "it would need a core"
    assert config.generator.max_num_seqs == 8


@pytest.mark.parametrize("world", [elastic.REAL, elastic.PACED, elastic.QUICK], ids=["real", "paced", "quick"])
def test_each_number_of_generators_is_a_valid_run(world: elastic.World) -> None:
    for num_generators in (1, 2, world.num_generators):
        config = load_config(elastic.RECIPE, world.overrides(num_generators)).config
        assert config.generator.num_workers == num_generators
        assert world.is_real or {"token_s", "load_s", "start_s"} <= config.generator.engine_args.keys()
        assert world.is_real or "update_s" in config.learner.deepspeed


def test_a_run_that_ends_before_it_was_seen_is_named_with_its_error() -> None:
    with (
        live_run("no-such-recipe", []) as run,
        pytest.raises(MeasurementError, match="ended with 2 before step 1: .*no-such-recipe"),
    ):
        run.step(1, 60.0)


def test_a_worker_is_found_by_the_title_of_its_process_idle_or_at_work() -> None:
    assert worker_of(["ray::burnish-generator-1", "", ""]) == "generator-1"
    assert worker_of(["ray::burnish-generator-10.generate"]) == "generator-10"
    assert worker_of(["/usr/bin/python", "-m", "launch.cli"]) is None and worker_of([]) is None


# --- the fakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "real"), [(paced.PacedGenerator, VLLMGenerator), (paced.PacedLearner, DeepSpeedLearner)]
)
def test_a_fake_takes_what_the_engine_takes(fake: type, real: type) -> None:
    for name, method in inspect.getmembers(fake, inspect.isfunction):
        wanted = list(inspect.signature(getattr(real, name)).parameters) if hasattr(real, name) else []
        taken = inspect.signature(method).parameters
        if not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in taken.values()) and name != "weights_call":
            assert list(taken)[: len(wanted)] == wanted, name
        assert name.startswith("_") or wanted, f"the engine has no {name}"


def generator(num_seats: int, load_s: float = 0.0) -> paced.PacedGenerator:
    pace = {"token_s": 0.5, "load_s": load_s, "start_s": 0.0}
    settings = GeneratorSettings.model_validate({"max_num_seqs": num_seats, "engine_args": pace})
    return paced.PacedGenerator("generator-0", "", settings, "float32", "cpu", 64, 0)


def request(group_id: str, seeds: tuple[int, ...]) -> GroupRequest:
    return GroupRequest(group_id, Prompt("p", np.array([1, 2], np.int32), "p"), len(seeds), seeds, 1.0, 8)


def test_a_paced_generator_has_so_many_seats_and_takes_its_time_for_each_token() -> None:
    async def law() -> tuple[float, list[int]]:
        loop = asyncio.get_running_loop()
        summary, payload = await generator(2).generate(request("3", (0, 7, 14, 21)))
        assert decode_group(payload).trajectories[1].num_tokens == summary.num_completion_tokens[1]
        return loop.time(), list(summary.num_completion_tokens)

    took, lengths = in_virtual_time(law())
    assert lengths == [paced.sample_length(seed, 8) for seed in (0, 7, 14, 21)] == [2, 2, 2, 2]
    assert took == pytest.approx(4 * 2 * 0.5 / 2)


def test_while_a_paced_generator_loads_its_samples_stand_still() -> None:
    async def law() -> float:
        engine = generator(8, load_s=5.0)
        sampling = asyncio.create_task(engine.generate(request("3", (0, 0))))
        await asyncio.sleep(0.5)
        assert (await engine.load_weights({}, {"version": "0.4"}))["pause_s"] == 5.0
        summary, _ = await sampling
        assert summary.newest_version == WeightVersion(0, 0) and await engine.ping() == "0.4"
        assert (await engine.generate(request("4", (0, 0))))[0].oldest_version == WeightVersion(0, 4)
        return asyncio.get_running_loop().time()

    assert in_virtual_time(law()) == pytest.approx(5.5 + 1.0)


def test_paced_samples_have_every_length_from_a_quarter_on() -> None:
    lengths = {paced.sample_length(seed, 64) for seed in range(1000)}
    assert lengths == set(range(16, 65))


def test_models_have_cores_of_their_own_where_a_run_asks_for_it_and_reward_functions_share() -> None:
    for own_cores in (False, True):
        config = load_config("cpu-ppo", [f"cluster.own_cores={str(own_cores).lower()}"]).config
        apart = {demand.name: demand.own_cores for demand in role_demands(config, False)}
        assert apart.pop("reward_workers", False) is False
        assert {"generator", "learner", "critic", "reference"} <= apart.keys() and set(apart.values()) == {own_cores}


def test_a_run_of_fakes_goes_through_everything_that_a_run_has_and_keeps_its_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = elastic.paced(token_s=0.002, start_s=0.0, num_steps=2)
    one_process = ["run.max_staleness=0", "cluster.backend=in_process", "run.num_steps=2", f"run.directory={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["burnish", "train", elastic.RECIPE, *world.overrides(1), *one_process])
    assert paced.main() == 0
    rows = list(read_rows(tmp_path / "step" / "metrics.jsonl"))
    assert [r["step"] for r in rows] == [1, 2]
    assert elastic.rate(rows, 1, 2) == pytest.approx(9 / (elastic.taken_at(rows[1]) - elastic.taken_at(rows[0])))
    # 72 samples of 16 to 64 tokens at 8 seats: as long as the tokens take, and no sampling without its time.
    least_s = 0.002 * 72 * rows[1]["completions/mean_length"] / 8
    assert rows[1]["time/generate_s"] >= least_s and rows[1]["time/learn_s"] >= 0.2
    kinds = [event["kind"] for event in read_rows(tmp_path / "step" / "events.jsonl")]
    assert {"ready", "checkpoint", "finished"} <= set(kinds)
