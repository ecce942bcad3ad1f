"""Rows of a dataset that a function makes.  May import: trainers.{errors, reward_calls, rewards}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.errors import InputError
from trainers.reward_calls import UserCodeError, user_code
from trainers.rewards import find_function


def made_rows(name: str, args: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """What ``package.module:function`` or ``path/to/file.py:function`` returns for the keyword arguments ``args``.

    Raises InputError when it is no function, does not import, raises, or returns anything but mappings.
    """
    if ":" not in name:
        raise InputError(f"{field}.function", name, "names no function", "write package.module:function")
    function = find_function(name, f"{field}.function")
    try:
        with user_code():
            rows = list(function(**args))
    except UserCodeError as error:
        reason = f"it failed: {error}"
        raise InputError(f"{field}.function", name, reason, f"mend it, or change {field}.args") from error
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            reason = f"item {i} of what it returned is a {type(row).__name__}"
            raise InputError(f"{field}.function", name, reason, "return a list of mappings, one a row")
    return [dict(row) for row in rows]
