"""Best-of-n: the estimator against all subsets, and what an evaluation makes of a pool of samples."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console
from test_eval import TINY, answers, config, prepared

from actors.model_folders import resolve_model
from launch.eval_files import samples_table, write_results
from launch.eval_report import Measured, build_report
from launch.evaluate import evaluate_models
from trainers.best_of_n import best_of_n, by_rank, subset_weights, top_indices, win_shares
from trainers.kl_from_base import best_of_n_kl, best_of_n_kl_of, exact_kl

NAN = float("nan")


# --- the estimator --------------------------------------------------------------------------------


def by_subsets(scores: list[float], values: list[float], n: int) -> float:
    """Mean over all subsets, ties shared."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return float(np.mean(found))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    """Without ties in every subset; with them only where the values of equal scores are equal within a subset."""
    draw = np.random.default_rng(n)
    scores, values = draw.permutation(6).astype(float).tolist(), draw.normal(size=6).tolist()
    assert best_of_n(scores, values, n) == pytest.approx(by_subsets(scores, values, n), rel=1e-12)


def test_equal_scores_are_chosen_equally_often() -> None:
    assert best_of_n([1.0, 1.0, 1.0], [0.0, 3.0, 6.0], 2) == pytest.approx(3.0)
    np.testing.assert_allclose(by_rank(np.array([2.0, 1.0, 2.0]), np.array([5.0, 1.0, 7.0])), [1.0, 6.0, 6.0])


def test_the_weights_of_a_size_sum_to_one_and_the_best_of_all_is_the_top() -> None:
    for num in (1, 4, 64, 300):
        for n in {1, num // 2 or 1, num}:
            assert subset_weights(num, n).sum() == pytest.approx(1.0)
        assert subset_weights(num, num)[-1] == 1.0
        np.testing.assert_allclose(subset_weights(num, 1), 1 / num)
    with pytest.raises(ValueError, match="is nothing"):
        subset_weights(3, 4)


def test_by_its_own_score_more_samples_are_never_worse() -> None:
    scores = np.random.default_rng(0).normal(size=40).tolist()
    found = [best_of_n(scores, scores, n) for n in range(1, 41)]
    assert found == sorted(found) and found[-1] == max(scores)


def test_what_has_no_score_or_no_value_is_no_candidate_and_too_few_have_no_best() -> None:
    assert best_of_n([1.0, NAN, 3.0], [1.0, 9.0, 2.0], 2) == 2.0
    assert best_of_n([1.0, 5.0, 3.0], [1.0, math.inf, 2.0], 2) == 2.0
    assert math.isnan(best_of_n([1.0, NAN], [1.0, 2.0], 2))
    with pytest.raises(ValueError, match=r"must both be \[N\]"):
        best_of_n([1.0], [1.0, 2.0], 1)


@pytest.mark.parametrize(("n", "nats"), [(4, 0.636), (16, 1.835), (64, 3.175)])
def test_the_bound_has_its_closed_form_and_bounds_the_exact_kl_of_an_enumerable_policy(n: int, nats: float) -> None:
    """arXiv:2401.01879: with few different answers the best of n stays nearer than ln n - (n - 1) / n."""
    assert best_of_n_kl(n) == pytest.approx(nats, abs=1e-3)
    for probabilities in ([0.6, 0.4], [0.5, 0.3, 0.2], [0.01] * 100):
        below = np.cumsum([0.0, *probabilities])  # in ascending order of the reward
        best = below[1:] ** n - below[:-1] ** n
        assert 0 < exact_kl(best, probabilities) <= best_of_n_kl(n)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_kl_by_rewards_is_exact_where_all_tie_in_values_and_the_bound_where_none_do(n: int) -> None:
    for counts in ([6, 4], [5, 3, 2], [10]):
        probabilities = np.array(counts) / sum(counts)
        below = np.cumsum([0.0, *probabilities])
        rewards = np.repeat(np.arange(len(counts), dtype=float), counts)
        exact = exact_kl(below[1:] ** n - below[:-1] ** n, probabilities)
        assert best_of_n_kl_of(np.random.default_rng(0).permutation(rewards), n) == pytest.approx(exact, abs=1e-12)
    untied = np.random.default_rng(1).normal(size=34)
    assert best_of_n_kl_of(untied, n) == pytest.approx(best_of_n_kl(n), abs=1e-12)
    mixed = best_of_n_kl_of([*untied, 9.0, 9.0], n)
    assert 0.7 * best_of_n_kl(n) - 1e-12 <= mixed <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl_of([NAN, NAN, 1.0, 1.0], n) == best_of_n_kl_of([0.0, 0.0, 1.0, 1.0], n)
    with pytest.raises(ValueError, match="rewards of one prompt"):
        best_of_n_kl_of([], n)


def test_a_value_beats_its_share_of_the_opponents_and_ties_count_half() -> None:
    np.testing.assert_allclose(win_shares([2.0, 1.0, NAN], [1.0, 3.0, NAN, 1.0]), [2 / 3, 1 / 3, NAN])
    assert np.isnan(win_shares([1.0], [NAN])).all()


def test_the_top_k_are_the_highest_and_the_first_of_equal_ones() -> None:
    assert top_indices([1.0, None, 3.0, 3.0, -2.0], 3) == [2, 3, 0]
    assert top_indices([None, None], 1) == [] and top_indices([0.0, -1.0, None], 9) == [0, 1]


# --- in an evaluation -----------------------------------------------------------------------------


def of_pool(tmp_path: Path, with_base: bool, **keys: Any) -> Any:
    """Twelve prompts, four samples each: reward length 0, 1, 2, 3; the base's samples have 1.5."""
    asked = {"n": [1, 2, 4], "scorer": "length", **keys}
    base = {} if with_base else {"base": {"path": None}}
    chosen = {"num_samples": 2, "suites": [], "win_by": "length", "gold": "accuracy", "best_of_n": asked}
    settings = config(tmp_path, eval=chosen, **base)
    texts, rewards = [["a", "b", "c", "d"]] * 12, [[2.0, 0.0, 3.0, 1.0]] * 12
    pool, policy = answers(texts, rewards), answers([["x", "y"]] * 12, [[1.0, 2.0]] * 12)
    other = answers([["x", "y"]] * 12, [[1.5, 1.5]] * 12) if with_base else None
    measured = Measured(policy, other, pool=pool)
    return settings, measured, build_report(settings, prepared(), measured)


def test_each_size_has_its_bound_its_rewards_and_its_win_rates(tmp_path: Path) -> None:
    _, _, report = of_pool(tmp_path, with_base=True)
    found = report["best_of_n"]
    assert (found["scorer"], found["against"], found["num_samples"]) == ("length", "base", 4)
    assert list(found["sizes"]) == ["1", "2", "4"]
    assert [round(size["kl_bound"], 3) for size in found["sizes"].values()] == [0.0, 0.193, 0.636]
    means = [size["rewards"]["length"] for size in found["sizes"].values()]
    assert [m.value for m in means] == pytest.approx([1.5, 2 * 1 / 3 + 1 / 6 + 3 / 2, 3.0])
    assert all(m.n == 12 for m in means)
    rates = [size["win_rate"]["length"].value for size in found["sizes"].values()]
    assert rates == pytest.approx([0.5, 1 - 1 / 6, 1.0])
    assert all(size["rewards"]["accuracy"].value == 0.0 for size in found["sizes"].values())
    assert all(size["win_rate"]["accuracy"].value == 0.5 for size in found["sizes"].values())


def test_without_a_base_the_opponents_are_single_samples_of_the_policy(tmp_path: Path) -> None:
    _, _, report = of_pool(tmp_path, with_base=False)
    found = report["best_of_n"]
    assert found["against"] == "policy" and "win_rate" not in report
    assert found["sizes"]["4"]["win_rate"]["length"].value == 1.0
    assert found["sizes"]["1"]["win_rate"]["length"].value == pytest.approx(0.5)


def test_a_prompt_with_too_few_scored_samples_is_left_out_of_that_size(tmp_path: Path) -> None:
    settings, measured, _ = of_pool(tmp_path, with_base=True)
    assert measured.pool is not None
    measured.pool.rewards[0].parts["length"][:2] = NAN
    found = build_report(settings, prepared(), measured)["best_of_n"]["sizes"]
    assert [size["rewards"]["length"].n for size in found.values()] == [12, 12, 11]
    assert found["4"]["win_rate"]["length"].n == 11


def test_the_page_the_table_and_the_samples_show_it(tmp_path: Path) -> None:
    settings, measured, report = of_pool(tmp_path, with_base=True)
    ready = dataclasses.replace(prepared(), model_path=resolve_model(TINY))
    write_results(tmp_path / "out", settings, ready, measured, report, Console(quiet=True))
    page = (tmp_path / "out" / "eval.html").read_text(encoding="utf-8")
    assert ">Best of n" in page and "best of 4 by length: accuracy (gold), mean" in page
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written["best_of_n"]["sizes"]["4"]["rewards"]["length"]["value"] == 3.0
    models = samples_table(measured)["model"].to_pylist()
    assert models.count("best_of_n") == 48 and models.count("policy") == models.count("base") == 24


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": [1, 0]}, "greater than or equal to 1"),
        ({"n": []}, "at least 1 item"),
        ({"n": [2, 2]}, "each size once"),
        ({"n": [2], "scorer": "lenght"}, "did you mean length"),
    ],
)
def test_sizes_and_scorers_that_are_none_are_refused(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        of_pool(tmp_path, with_base=True, **{"scorer": "length", **asked})


def test_without_rewards_nothing_says_which_is_best(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="nothing says which sample is best"):
        config(tmp_path, rewards=(), base={"path": None}, eval={"win_by": None, "best_of_n": {"n": [2]}})


def test_the_scorer_is_by_default_what_decides_who_wins(tmp_path: Path) -> None:
    asked = {"suites": [], "best_of_n": {"n": [2]}}
    assert config(tmp_path, eval={**asked, "win_by": "length"}).best_of_n_scorer == "length"
    assert config(tmp_path, eval={**asked, "win_by": None}).best_of_n_scorer == "total"


# --- with engines ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pool_is_sampled_apart_from_the_opponents(tmp_path: Path) -> None:
    settings = config(
        tmp_path, base={"path": None},
        eval={"num_samples": 2, "suites": [], "win_by": "length", "gold": "accuracy",
              "best_of_n": {"n": [1, 2, 8], "scorer": "length"}},
    )  # fmt: skip
    report = json.loads(evaluate_models(settings, Console(quiet=True)).read_text())
    rows = pq.read_table(tmp_path / "self" / "samples.parquet").to_pylist()
    pool = [row for row in rows if row["model"] == "best_of_n"]
    assert len(pool) == 12 * 8 and len({row["seed"] for row in rows}) == len(rows) == 12 * 10
    sizes = report["best_of_n"]["sizes"]
    assert sizes["1"]["rewards"]["length"]["value"] < sizes["8"]["rewards"]["length"]["value"]
    tops: dict[str, float] = {}
    for row in pool:
        tops[row["group_id"]] = max(tops.get(row["group_id"], 0.0), row["rewards/length"])
    assert sizes["8"]["rewards"]["length"]["value"] == pytest.approx(np.mean(list(tops.values())))
    assert sizes["8"]["win_rate"]["length"]["value"] > 0.5
