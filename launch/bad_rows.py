"""Rows that cannot be learned from: all of a dataset are told at once, or a few of them are dropped and counted.

A dataset of another kind is refused whatever is asked for: none of its rows was meant.
May import: trainers.errors, launch.{datasets, row_settings}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from launch.datasets import Row
from launch.row_settings import OnBadRow
from trainers.errors import InputError, RowKindError

Read = TypeVar("Read")
DROP_THEM = "set data.on_bad_row=drop"
NUM_TOLD = 5  # bad rows that are told with line and reason
LARGEST_SHARE = 0.5  # of a dataset's rows that may be dropped


@dataclass(frozen=True, slots=True)
class BadRows:
    """Rows of a dataset that were dropped."""

    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def num(self) -> int:
        return self.reasons.total()


def read_rows(
    rows: Sequence[tuple[str, Row]], read: Callable[[str, Row], Read], name: str, on_bad_row: OnBadRow = "refuse",
    remedy: str = "",
) -> tuple[list[Read], BadRows]:  # fmt: skip
    """(what ``read`` made of the good rows, in their order, and the bad ones that were dropped).

    Args:
        rows: (where, row), as of :func:`launch.tuning_data.load_located_rows`.
        name: of the dataset, in errors.
        remedy: what else helps where rows are bad, for instance ``DROP_THEM``.

    Raises:
        InputError: with ``refuse`` a row is bad, with ``drop`` more than half of them are; or one of another kind.
    """
    found: list[Read] = []
    bad, first = BadRows(), list[InputError]()
    for where, row in rows:
        try:
            found.append(read(where, row))
        except RowKindError:
            raise
        except InputError as error:
            bad.reasons[error.reason] += 1
            if len(first) < NUM_TOLD:
                first.append(error)
    too_many = bad.num > LARGEST_SHARE * len(rows)
    if bad.num == 0 or (on_bad_row == "drop" and not too_many):
        return found, bad
    helps = [first[0].remedy, *([remedy] if remedy and not too_many else [])]
    if bad.num == 1:
        raise InputError(first[0].field, first[0].value, first[0].reason, "; or ".join(helps)) from first[0]
    told = ", ".join(f"{error.field}: {error.reason}" for error in first)
    more = f", and {bad.num - len(first)} more" if bad.num > len(first) else ""
    much = " (more than half, so none is dropped)" if on_bad_row == "drop" else ""
    reason = f"cannot be learned from{much}: {told}{more}"
    raise InputError(name, f"{bad.num} of {len(rows)} rows", reason, "; or ".join(helps))


def dropped_rows(bad: Mapping[str, BadRows]) -> str:
    """What a summary says of the bad rows of each dataset; "" where there are none."""
    total: Counter[str] = sum((rows.reasons for rows in bad.values()), Counter())
    if not total:
        return ""
    return f"; {total.total()} bad rows dropped: " + ", ".join(f"{why} ({n})" for why, n in total.most_common(NUM_TOLD))
