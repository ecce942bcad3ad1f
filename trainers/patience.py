"""When to ask an endpoint again, when to give a question up, and when to give the endpoint up.  Pure.

A question whose retries are spent is given up if others were answered since it failed first.  If nobody was, the
endpoint is checked with a question that it can always answer.  Where that is answered the question has one more try;
else it is the endpoint's fault, and everybody waits until the patience is over: until nobody was answered for so long
while this question was asked.  A question that is refused is checked in the same way, unless something was answered
since the last refusal.  The caller passes the clock in.
May import: nothing.
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0  # between tries, where the endpoint does not say
MAX_IN_A_ROW = 32  # questions refused, none between them answered
MAX_BUSY = 20  # tries of one question that is told to come later while others are answered: a quarter of an hour

# down: no connection; slow: no answer in time; busy: 429; broken: 5xx and their like; nonsense: 200 without a reply;
# refused: this question is not taken; rejected: no question will be.
Trouble = Literal["down", "slow", "busy", "broken", "nonsense", "refused", "rejected"]
Advice = Literal["again", "check_endpoint", "give_up_question", "give_up_endpoint"]


def trouble_of(status: int) -> Trouble | None:
    """What an HTTP status says; None: the body has to be read."""
    if status == 200:
        return None
    if status in (401, 402, 403, 404, 405, 407, 410) or 300 <= status < 400:  # 402: no credit is left
        return "rejected"
    if status == 429:
        return "busy"
    if status >= 500 or status in (408, 409, 425):
        return "broken"
    return "refused" if status >= 400 else "nonsense"


def retry_after_s(headers: Mapping[str, str], wall_s: float) -> float | None:
    """Seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3: seconds or a date); None where it says nothing.

    Args:
        wall_s: now, seconds since 1970.
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - wall_s)
    except ValueError:
        return None


def delay_s(attempt: int, asked_s: float | None, draw: float) -> float:
    """Seconds before try ``attempt`` + 1 (from 0): at least what the endpoint asks for, else doubling.

    Args:
        draw: in [0, 1), spreads the tries of many questions; no try comes earlier than the endpoint allows.
    """
    if asked_s is not None:
        return asked_s + draw
    return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 10)) * (0.5 + 0.5 * draw))


@dataclass
class Patience:
    """What is known of an endpoint; ``patience_s``: how long nobody may be answered."""

    patience_s: float
    num_retries: int
    _answered_s: float | None = None  # when it last answered somebody
    _waiting_since_s: float | None = None  # first failure since then
    _trusted: bool = False  # something was answered since the last refusal
    _in_a_row: int = 0

    def answered(self, now: float, is_check: bool = False) -> None:
        """Some question got a reply; ``is_check``: the one that can always be answered."""
        self._answered_s, self._waiting_since_s, self._trusted = now, None, True
        if not is_check:
            self._in_a_row = 0

    def failed(
        self, trouble: Trouble, attempt: int, begun_s: float, failed_s: float, now: float, asked_s: float | None = None
    ) -> Advice:
        """What to do about try ``attempt`` (from 0) of a question.

        Args:
            begun_s: when it was first asked.
            failed_s: when it failed first.
            asked_s: how long the endpoint wants to be left alone.
        """
        if self._waiting_since_s is None:
            self._waiting_since_s = now
        if trouble == "rejected":
            return "give_up_endpoint"
        if trouble == "refused":
            trusted, self._trusted = self._trusted, False
            if not trusted:
                return "check_endpoint"
            self._in_a_row += 1
            return "give_up_endpoint" if self._in_a_row >= MAX_IN_A_ROW else "give_up_question"
        is_over = self._is_over(begun_s, now, asked_s)
        if trouble == "busy":  # nobody's fault but ours: a question waits its turn as long as the patience lasts
            if is_over:
                return "give_up_endpoint"
            return "give_up_question" if attempt >= MAX_BUSY else "again"
        if attempt < self.num_retries and not is_over:
            return "again"
        alone = self._answered_s is not None and self._answered_s > failed_s
        return "give_up_question" if alone else "check_endpoint"

    def unchecked(self, trouble: Trouble, begun_s: float, now: float, asked_s: float | None = None) -> Advice:
        """What to do when the endpoint could not answer the question that it can always answer."""
        hopeless = trouble in ("rejected", "refused", "nonsense")
        return "give_up_endpoint" if hopeless or self._is_over(begun_s, now, asked_s) else "again"

    def _is_over(self, begun_s: float, now: float, asked_s: float | None) -> bool:
        """Whether nobody was answered for too long.  A pause in which nothing was asked is none of it."""
        since = now if self._waiting_since_s is None else max(self._waiting_since_s, begun_s)
        return now - since + (asked_s or 0.0) > self.patience_s
