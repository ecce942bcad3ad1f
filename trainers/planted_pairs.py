"""Preference rows of the planted task (trainers/planted.py): two reviews of one thing, and what the human preferred.

May import: numpy, trainers.planted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainers.planted import gold, label_pair, prompts, write_review


def preference_rows(num: int, seed: int, noise: float = 1.0, held_out: bool = False) -> list[dict[str, Any]]:
    """``num`` rows of TRL's ``prompt, chosen, rejected`` with the gold of both; more rows of one seed only append.

    Args:
        noise: how the human errs, see :func:`trainers.planted.win_probability`.
        held_out: of held-out prompts instead of train prompts.
    """
    rng = np.random.default_rng(seed)
    asked = prompts()[1 if held_out else 0]
    rows = []
    for _ in range(num):
        prompt = asked[int(rng.integers(len(asked)))]
        first = second = " " + write_review(prompt, rng)
        while second == first:
            second = " " + write_review(prompt, rng)
        chosen, rejected = (first, second) if label_pair(gold(first), gold(second), rng, noise) else (second, first)
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected,
             "gold_chosen": gold(chosen), "gold_rejected": gold(rejected)}
        )  # fmt: skip
    return rows


def labelled_rows(num: int, seed: int, noise: float = 1.0, held_out: bool = False) -> list[dict[str, Any]]:
    """``num`` rows of TRL's ``prompt, completion, label``: both reviews of each pair, judged apart.

    The human finds a review good with probability sigmoid(gold / noise), so a review as good as bad is a coin flip.
    Arguments as in :func:`preference_rows`.
    """
    rng = np.random.default_rng([seed, 1])
    rows = []
    for pair in preference_rows((num + 1) // 2, seed, noise, held_out):
        for name in ("chosen", "rejected"):
            points = pair[f"gold_{name}"]
            label = label_pair(points, 0.0, rng, noise)
            rows.append({"prompt": pair["prompt"], "completion": pair[name], "label": bool(label), "gold": points})
    return rows[:num]
