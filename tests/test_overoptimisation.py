"""Laws of over-optimisation: the fits, the best-of-n estimator, the picture and the table."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from launch.study_plot import StudyPoint, fit_table, study_plot
from trainers.errors import InputError
from trainers.overoptimisation import BEST_OF_N, RL, bon_estimate, fit

KL = np.array([0.0, 0.04, 0.3, 1.0, 4.0, 20.0])


def law(method: str, kl: np.ndarray, alpha: float, beta: float, start: float) -> np.ndarray:
    d = np.sqrt(kl)
    with np.errstate(divide="ignore", invalid="ignore"):
        curve = d * d if method == BEST_OF_N else np.where(d > 0, d * np.log(d), 0.0)
    return start + alpha * d - beta * curve


@pytest.mark.parametrize("method", [BEST_OF_N, RL])
def test_a_fit_recovers_planted_coefficients_exactly(method: str) -> None:
    gold = law(method, KL, alpha=1.3, beta=0.4, start=-0.7)
    found = fit(method, KL, gold)
    assert (found.alpha, found.beta, found.start) == pytest.approx((1.3, 0.4, -0.7), abs=1e-12)
    assert found.r_squared == pytest.approx(1) and found.num_points == 5
    np.testing.assert_allclose(found.predict(KL), gold, atol=1e-12)


def test_a_wrong_law_explains_less() -> None:
    gold = law(RL, KL, alpha=1.3, beta=0.9, start=0.0)
    assert fit(BEST_OF_N, KL, gold).r_squared < 0.98 < fit(RL, KL, gold).r_squared


def test_the_fit_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    gold = law(RL, KL, 1.0, 0.5, 0.0) + rng.normal(size=KL.size) * 0.2
    found = fit(RL, KL, gold, start=0.0)

    def loss(alpha: float, beta: float) -> float:
        return float(np.square(gold[1:] - law(RL, KL[1:], alpha, beta, 0.0)).sum())

    best = loss(found.alpha, found.beta)
    spread = float(np.square(gold[1:] - gold[1:].mean()).sum())
    assert found.r_squared == pytest.approx(1 - best / spread)
    assert all(loss(found.alpha + a, found.beta + b) > best for a, b in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)))


def test_points_at_distance_zero_or_just_below_fix_the_start_and_nothing_else() -> None:
    gold = law(RL, KL, 1.0, 0.5, 2.0)
    more = fit(RL, [*KL, -1e-4, 0.0], [*gold, 2.3, 1.7])
    assert (more.alpha, more.beta, more.start) == pytest.approx((1.0, 0.5, 2.0))
    given = fit(RL, KL[1:], gold[1:], start=2.0)
    assert (given.alpha, given.beta) == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize("method", [BEST_OF_N, RL])
def test_the_peak_is_where_the_law_is_highest(method: str) -> None:
    found = fit(method, KL, law(method, KL, 1.3, 0.4, 0.5))
    assert found.peak is not None
    around = found.predict(np.square(found.peak * np.array([0.98, 1.0, 1.02])))
    assert around.argmax() == 1
    rising = fit(method, KL, law(method, KL, 1.3, -0.1, 0.5))
    assert rising.peak is None and fit_table({(method, None): rising})[0]["peak_gold"] is None


@pytest.mark.parametrize(
    ("kl", "gold", "start", "reason"),
    [
        ([1.0, 2.0], [1.0], None, "shape"),
        ([0.0, 1.0, math.nan], [0.0, 1.0, 2.0], None, "NaN"),
        ([1.0, 2.0], [1.0, 2.0], None, "no point has KL 0"),
        ([0.0, 1.0, 1.0], [0.0, 1.0, 1.1], None, "two different KL"),
    ],
)
def test_points_that_fix_no_law_are_refused(kl: list[float], gold: list[float], start: None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        fit(RL, kl, gold, start)


def test_best_of_n_equals_brute_force_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    scores, gold = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    chosen = [
        max(subset, key=lambda i: scores[row, i]) for row in range(4) for subset in itertools.combinations(range(6), 3)
    ]
    rows = np.repeat(np.arange(4), math.comb(6, 3))
    (found,) = bon_estimate(scores, gold, [3])
    assert found.proxy == pytest.approx(scores[rows, chosen].mean())
    assert found.gold == pytest.approx(gold[rows, chosen].mean())
    assert found.kl == pytest.approx(math.log(3) - 2 / 3)


def test_equal_scores_are_chosen_equally_often_in_any_order() -> None:
    scores, gold = np.array([2.0, 1.0, 2.0, 0.0]), np.array([5.0, 0.0, 1.0, 9.0])
    expected = np.mean([
        np.mean([gold[i] for i in subset if scores[i] == max(scores[j] for j in subset)])
        for subset in itertools.combinations(range(4), 2)
    ])  # fmt: skip
    for order in itertools.permutations(range(4)):
        (found,) = bon_estimate(scores[None, list(order)], gold[None, list(order)], [2])
        assert found.gold == pytest.approx(expected)


def test_best_of_one_is_the_plain_mean_and_best_of_all_the_top() -> None:
    rng = np.random.default_rng(2)
    scores, gold = rng.normal(size=(5, 64)), rng.normal(size=(5, 64))
    one, all_ = bon_estimate(scores, gold, [1, 64])
    assert (one.kl, one.proxy, one.gold) == pytest.approx((0.0, scores.mean(), gold.mean()))
    assert all_.proxy == pytest.approx(scores.max(axis=1).mean())
    assert all_.gold == pytest.approx(gold[np.arange(5), scores.argmax(axis=1)].mean())


def test_best_of_more_than_was_sampled_is_refused() -> None:
    scores = np.zeros((2, 4))
    for ns in ([5], [0]):
        with pytest.raises(InputError, match="ns = "):
            bon_estimate(scores, scores, ns)
    with pytest.raises(InputError, match=r"give both as \[prompts, N\]"):
        bon_estimate(scores, scores[:, :3], [1])
    with pytest.raises(InputError, match="NaN"):
        bon_estimate(scores, np.full((2, 4), np.nan), [1])


def test_the_study_is_drawn_as_svg_and_png_with_every_beta_named(tmp_path: Path) -> None:
    points = [StudyPoint(BEST_OF_N, kl, kl, kl / 2) for kl in (0.0, 0.2, 0.6)]
    points += [StudyPoint(RL, kl, 2 * kl, 1 - kl, coef) for coef in (0.5, 0.0, 0.02) for kl in (0.0, 0.5, 2.0)]
    fits = {
        (method, coef): fit(method, [p.kl for p in some], [p.gold for p in some])
        for method, coef in ((BEST_OF_N, None), (RL, 0.0), (RL, None))
        if (some := [p for p in points if p.method == method and coef in (None, p.kl_coef)])
    }
    svg, png = study_plot(points, fits, tmp_path / "new" / "study.png", "points")
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = svg.read_text()
    assert all(f"<!-- {word} -->" in text for word in ("beta 0", "beta 0.02", "beta 0.5", "points", "best-of-n", "RL"))
    again, _ = study_plot(points, fits, tmp_path / "again", "points")
    assert again.read_text() == text
    with pytest.raises(ValueError, match="no points"):
        study_plot([], {}, tmp_path / "none")


def test_the_table_has_one_row_a_fit_and_the_peak_of_gold() -> None:
    found = fit(RL, KL, law(RL, KL, 1.0, 0.5, 3.0))
    rows = fit_table({(RL, 0.1): found, (RL, None): found, (BEST_OF_N, None): fit(BEST_OF_N, KL, KL)})
    assert [(r["method"], r["kl_coef"]) for r in rows] == [(RL, 0.1), (RL, "all"), (BEST_OF_N, None)]
    assert rows[0]["alpha"] == pytest.approx(1.0) and rows[0]["num_points"] == 5
    top = math.exp(1.0)  # exp(alpha / beta - 1)
    assert rows[0]["peak_sqrt_kl"] == pytest.approx(top)
    assert rows[0]["peak_gold"] == pytest.approx(3.0 + 0.5 * top)
