"""The metric dictionary: complete, exact about names, and equal to its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.metrics import METRICS, check, markdown

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_definition_a_unit_a_mask_and_a_reducer(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    for text in (metric.definition, metric.unit, metric.mask, metric.reducer):
        assert text.strip() == text and text


def test_the_page_is_the_generated_text() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m trainers.metrics"


def test_every_metric_is_one_row_of_the_page() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("reward", "reward"),
        ("rewards/exact/mean", "rewards/<name>/mean"),
        ("rewards/my reward.v2/std", "rewards/<name>/std"),
        ("eval/exact/mean", "eval/<name>/mean"),
        ("eval/mean_length", "eval/mean_length"),
    ],
)
def test_a_known_name_leads_to_its_line(name: str, line: str) -> None:
    assert check(name) is METRICS[line]


@pytest.mark.parametrize(
    "name", ["rewrd", "", "step", "rewards/exact", "rewards//mean", "rewards/a/b/mean", "xrewards/a/mean",
             "rewards/<name>/mean", "reward\n"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not in trainers/metrics.py"):
        check(name)


def test_names_follow_trl_where_it_has_one() -> None:
    trl = {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/max_length",
           "completions/min_length", "completions/clipped_ratio", "completions/mean_terminated_length", "kl", "entropy",
           "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "num_tokens", "grad_norm",
           "learning_rate", "loss", "epoch", "sampling/sampling_logp_difference/mean",
           "sampling/sampling_logp_difference/max", "rewards/<name>/mean", "rewards/<name>/std",
           "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    assert trl <= METRICS.keys()


def test_seconds_and_bytes_are_named_by_their_unit() -> None:
    for metric in METRICS.values():
        assert metric.name.endswith("_s") == (metric.unit in ("s", "tokens/s", "samples/s")), metric.name
        assert metric.name.endswith("bytes") == (metric.unit == "bytes"), metric.name
