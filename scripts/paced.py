"""A reward that takes its time: the steps of a tiny model then last long enough for a host to come back meanwhile.

May import: the standard library.
"""

from __future__ import annotations

import asyncio


async def letters(completions: list[str], pause_s: float) -> list[float]:
    """1 for a completion with one of eleven letters; random bytes have one about half of the time."""
    await asyncio.sleep(pause_s)
    return [float(any(letter in "abcdefghijk" for letter in text)) for text in completions]
