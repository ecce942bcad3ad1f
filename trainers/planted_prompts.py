"""The prompts of the planted review task as rows of a dataset.  May import: trainers.planted."""

from __future__ import annotations

from trainers.planted import prompts


def prompt_rows(held_out: bool = False) -> list[dict[str, str]]:
    """{"prompt"} of every train prompt, or of every held-out one; always in the same order."""
    return [{"prompt": prompt} for prompt in prompts()[held_out]]
