"""Prompts that were given on the command line, as a dataset.  May import: the standard library."""

from __future__ import annotations

from collections.abc import Sequence


def rows(prompts: Sequence[str]) -> list[dict[str, str]]:
    """A row a prompt."""
    return [{"prompt": prompt} for prompt in prompts]
