"""Which unit of which dataset comes next, when several datasets are mixed by weights that change over a run.

Datasets take turns by credit: a draw adds its weight to every dataset's credit, the richest one is drawn and pays 1.
Shares therefore follow the weights with an error of a few units at any time, not only on average, and a run that
mixes by size sees every unit once in an epoch.  Inside a dataset the order is a new shuffle every epoch.
A stream is a pure function of its arguments and of the draws made so far.  May import: numpy, trainers.errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.errors import InputError

Knots = Sequence[tuple[float, float]]  # (progress in 0..1, weight), progress ascending


def weight_at(knots: Knots, progress: float) -> float:
    """The weight at ``progress``: linear between knots, constant outside them."""
    return float(np.interp(progress, [p for p, _ in knots], [w for _, w in knots]))


def check_knots(names: Sequence[str], weights: Sequence[Knots]) -> None:
    """ValueError (``field=value: reason; remedy``) for knots that give no mixture at some point of the run."""
    for i, knots in enumerate(weights):
        at = [p for p, _ in knots]
        shown = f"train.{i}.weights={[list(k) for k in knots]}"
        if not knots or at != sorted(set(at)) or not all(0 <= p <= 1 for p in at):
            raise ValueError(f"{shown}: progress must ascend within 0 to 1; give [[0, 1.0], [1, 0.5]], say")
        if not all(w >= 0 and np.isfinite(w) for _, w in knots):
            raise ValueError(f"{shown}: a weight is negative or infinite; give weights of 0 or more")
    for progress in sorted({0.0, 1.0, *(p for knots in weights for p, _ in knots)}):
        if not sum(weight_at(knots, progress) for knots in weights) > 0:
            raise ValueError(
                f"train.0.weights={[list(k) for k in weights[0]]}: all of {', '.join(names)} have weight 0 at progress "
                f"{progress:g}; give one of them a weight there"
            )


class MixtureStream:
    """Draws of (dataset, index).

    Args:
        sizes: units in each dataset, each at least 1.
        weights: knots of each dataset, or None: by size, so that an epoch of the mixture is one of each dataset.
        seed: of the shuffles.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Knots] | None, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes {list(sizes)}: every dataset needs at least one unit")
        self._sizes, self._seed = tuple(sizes), seed
        self._weights = [[(0.0, float(size))] for size in sizes] if weights is None else [list(k) for k in weights]
        if len(self._weights) != len(sizes):
            raise ValueError(f"{len(self._weights)} weights for {len(sizes)} datasets")
        self._drawn = [0] * len(sizes)
        self._credit = [0.0] * len(sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # dataset -> (epoch, its order)

    @property
    def num_drawn(self) -> tuple[int, ...]:
        """Units drawn of each dataset since the beginning."""
        return tuple(self._drawn)

    def shares(self, progress: float) -> np.ndarray:
        """float64 [datasets], summing to 1: the shares that are aimed at."""
        weights = np.array([weight_at(knots, progress) for knots in self._weights])
        return np.asarray(weights / weights.sum())

    def take(self, n: int, progress: float) -> list[tuple[int, int]]:
        """The next ``n`` units under the weights at ``progress``."""
        shares = self.shares(progress)
        taken = []
        for _ in range(n):
            credit = np.array(self._credit) + shares
            # A dataset of weight 0 is not drawn, whatever it was owed when its weight fell.
            dataset = int(np.argmax(np.where(shares > 0, credit, -np.inf)))
            credit[dataset] -= 1
            self._credit = credit.tolist()
            taken.append((dataset, self._index(dataset, self._drawn[dataset])))
            self._drawn[dataset] += 1
        return taken

    def _index(self, dataset: int, position: int) -> int:
        epoch, place = divmod(position, self._sizes[dataset])
        if self._orders.get(dataset, (-1, None))[0] != epoch:
            draw = np.random.default_rng([self._seed, dataset, epoch])
            self._orders[dataset] = (epoch, draw.permutation(self._sizes[dataset]))
        return int(self._orders[dataset][1][place])

    def state_dict(self) -> dict[str, Any]:
        """JSON values: where every dataset stands."""
        drawn, credit = list(self._drawn), list(self._credit)
        return {"sizes": list(self._sizes), "seed": self._seed, "drawn": drawn, "credit": credit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; InputError when it belongs to other datasets or another seed."""
        for field, here, there in (
            ("data.train", list(self._sizes), list(state["sizes"])),
            ("run.seed", self._seed, state["seed"]),
        ):
            if here != there:
                reason = f"the checkpoint was made with {there}"
                raise InputError(field, here, reason, "restore it, or start a new run")
        self._drawn, self._credit = [int(n) for n in state["drawn"]], [float(c) for c in state["credit"]]
