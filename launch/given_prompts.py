"""Prompts that were given on the command line, as a dataset.  May import: the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rows(prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """A row a prompt, text or messages."""
    return [{"prompt": prompt} for prompt in prompts]
