"""A reward for speed and stability studies: how much of an answer is one of eleven letters.

Graded, so groups have a spread from the first step on, and learnable by a tiny random model within a minute.
May import: the standard library.
"""

from __future__ import annotations

from typing import Any

LETTERS = frozenset("abcdefghijk")


def share(completions: list[str], **columns: Any) -> list[float]:
    """Of the characters of each completion; 0 for an empty one."""
    return [sum(character in LETTERS for character in text) / max(1, len(text)) for text in completions]
