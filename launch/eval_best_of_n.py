"""Best-of-n of the policy, from one pool of samples of each prompt: how much better, and how far away at most.

May import: trainers.*, launch.{eval_config, eval_page, eval_plots}; launch.eval_report for its types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.eval_config import TOTAL, EvalConfig
from launch.eval_page import Cell, Section, Table
from launch.eval_plots import best_of_n_plot
from trainers.best_of_n import best_of_n, win_shares
from trainers.calibration import mean_estimate, unless_certain
from trainers.kl_from_base import best_of_n_kl
from trainers.win_rate import win_rate

if TYPE_CHECKING:
    from launch.eval_report import Answers


def best_of_n_report(config: EvalConfig, pool: Answers, opponents: Answers, against: str) -> dict[str, Any]:
    """For each n: every reward of the sample that the scorer chooses, and how often it beats one sample of ``against``.

    Prompts are the independent observations.  A prompt with fewer than n samples that have the score and the value is
    left out of that number, and the estimate's n says how many were left in.

    Args:
        pool: the policy's samples to choose from; no sample of them is one of ``opponents``.
        opponents: samples of the base, or of the policy itself; the same prompts.
    """
    settings = config.eval.best_of_n
    assert settings is not None
    names, scorer = [*config.reward_names, TOTAL], config.best_of_n_scorer
    num_prompts = len(pool.groups)
    rows = {name: pool.scores(name).reshape(num_prompts, -1) for name in names}
    others = {name: opponents.scores(name).reshape(num_prompts, -1) for name in names}
    shares = {name: [win_shares(*pair) for pair in zip(rows[name], others[name], strict=True)] for name in names}
    prompts = [group.prompt.prompt_id for group in pool.groups]
    sizes: dict[str, Any] = {}
    for n in sorted(settings.n):
        means, rates = {}, {}
        for name in names:
            worth = np.array([best_of_n(s, v, n) for s, v in zip(rows[scorer], rows[name], strict=True)])
            there = worth[np.isfinite(worth)]
            found = mean_estimate(there)
            means[name] = unless_certain(found, len(there)) if config.says_right(name) else found
            won = [best_of_n(s, v, n) for s, v in zip(rows[scorer], shares[name], strict=True)]
            rates[name] = win_rate([None if math.isnan(w) else w for w in won], prompts, seed=config.run.seed)
        sizes[str(n)] = {"kl_bound": best_of_n_kl(n), "rewards": means, "win_rate": rates}
    return {
        "scorer": scorer, "against": against, "num_samples": max(settings.n),
        "mean_length": mean_estimate(pool.lengths.reshape(num_prompts, -1).mean(axis=1)), "sizes": sizes,
    }  # fmt: skip


def summary_rows(found: Mapping[str, Any], gold: str | None) -> list[tuple[str, Cell, Cell]]:
    """Rows for the first table: each n by the reward that decides and by the gold one."""
    rows: list[tuple[str, Cell, Cell]] = []
    for n, size in found["sizes"].items():
        for name in _shown(found, gold):
            mark = " (gold)" if name == gold else ""
            rows.append((f"best of {n} by {found['scorer']}: {name}{mark}, mean", size["rewards"][name], None))
        rows.append((f"best of {n}: KL from the policy, nats, at most", size["kl_bound"], None))
    return rows


def section(found: Mapping[str, Any], gold: str | None) -> Section:
    """A table with a row for each n and reward, and the win rates over the bound on the KL."""
    text = (
        f"Of n samples of the policy the one with the highest {found['scorer']} is taken, estimated without bias from "
        f"all subsets of {found['num_samples']} samples a prompt; win rate: over one sample of the {found['against']} "
        "to the same prompt, ties as half. The KL from the policy that is sampled is at most ln n - (n - 1) / n "
        "(arXiv:2401.01879)."
    )
    sizes, shown = found["sizes"], _shown(found, gold)
    every = list(dict.fromkeys([*shown, *next(iter(sizes.values()))["rewards"]]))
    rows = tuple(
        (n, size["kl_bound"], name, size["rewards"][name], size["win_rate"][name])
        for n, size in sizes.items()
        for name in every
    )
    rates = {name: [size["win_rate"][name] for size in sizes.values()] for name in shown}
    plot = best_of_n_plot([size["kl_bound"] for size in sizes.values()], rates)
    columns = ("n", "KL at most, nats", "reward", "mean", "win rate")
    return Section("Best of n", text, Table(columns, rows), plots=(plot,))


def _shown(found: Mapping[str, Any], gold: str | None) -> list[str]:
    """The scorer, then the gold reward."""
    return list(dict.fromkeys([found["scorer"], *([] if gold is None else [gold])]))
