"""Which checkpoints stay: the newest, and those that scored best.  Pure.

May import: nothing of Burnish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Best = Literal["highest", "lowest"]


def retained(scores: Mapping[int, float | None], newest: int, keep: int, keep_best: int, best: Best) -> set[int]:
    """The steps to keep out of those of ``scores``.

    Args:
        scores: score of each step with a complete checkpoint; None or NaN where none was measured, and such a one
            is never among the best.
        newest: the step that was committed last.  Later ones are of a lineage that was left; none of them stays.
        keep: how many of the newest stay, at least 1.
        keep_best: how many of the best stay besides; among equals the later one does.
    """
    lineage = sorted((step for step in scores if step <= newest), reverse=True)
    sign = 1.0 if best == "highest" else -1.0
    measured = [(sign * score, step) for step in lineage if (score := scores[step]) is not None]
    ranked = sorted((pair for pair in measured if not math.isnan(pair[0])), reverse=True)
    return set(lineage[: max(1, keep)]) | {step for _, step in ranked[:keep_best]}
