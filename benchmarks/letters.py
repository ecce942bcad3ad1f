"""A reward for studies of stability: half of an answer's characters are to be one of eleven letters, no more.

Graded, so groups have a spread from the first step on; learnable by a tiny random model within a minute; and it can
be overshot, so samples of an older policy push past it.
May import: the standard library.
"""

from __future__ import annotations

from typing import Any

LETTERS = frozenset("abcdefghijk")


def half(completions: list[str], **columns: Any) -> list[float]:
    """1 for exactly half, 0 for none or all; an empty completion has none."""
    shares = [sum(character in LETTERS for character in text) / max(1, len(text)) for text in completions]
    return [1 - abs(2 * share - 1) for share in shares]
