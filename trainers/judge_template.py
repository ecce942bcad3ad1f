"""What a judge of two answers is asked unless a configuration says it otherwise.

May import: nothing.
"""

from __future__ import annotations

JUDGED = "Judge what is said, not its length or its place."
JUDGE_TEMPLATE = """Which of two answers to a prompt is better?

[Prompt]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Judge what is said, not its length or its place. Say [[A]] if answer A is better, [[B]] if answer B is better, and \
[[C]] if they are equally good."""
