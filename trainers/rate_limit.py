"""How fast and how much may be asked of an endpoint: two state machines on a clock that the caller passes in.  Pure.

May import: nothing.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 60.0


class RateLimit:
    """Requests and tokens a minute: no window of 60 s holds more of either than the limits say.

    Starts are given out in the order of :meth:`reserve`, and never earlier than the one before.
    """

    def __init__(self, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> None:
        self._most_requests = math.inf if requests_per_minute is None else requests_per_minute
        self._most_tokens = math.inf if tokens_per_minute is None else tokens_per_minute
        self._starts: deque[list[float]] = deque()  # [start, tokens] of what may share a window with the next start
        self._tokens = 0.0  # of _starts
        self._last = -math.inf  # start that was given out last, or the end of a hold

    def reserve(self, num_tokens: int, now: float) -> float:
        """When the next request may start, at ``now`` or later; it counts from here on.

        A request of more tokens than the limit has a window alone.
        """
        tokens = min(float(num_tokens), self._most_tokens)
        at = max(now, self._last)
        self._forget(at)
        while self._starts and not self._fits(tokens):
            at = max(at, self._starts[0][0] + WINDOW_S)
            self._tokens -= self._starts.popleft()[1]
        if math.isfinite(self._most_requests) or math.isfinite(self._most_tokens):
            self._starts.append([at, tokens])
            self._tokens += tokens
        self._last = at
        return at

    def settle(self, at: float, reserved: int, used: int) -> None:
        """The request that started ``at`` took ``used`` tokens where ``reserved`` were counted."""
        for entry in self._starts:
            if entry[0] == at and entry[1] == min(float(reserved), self._most_tokens):
                tokens = min(float(used), self._most_tokens)
                self._tokens += tokens - entry[1]
                entry[1] = tokens
                return

    def hold(self, until: float) -> None:
        """Nothing starts before ``until``: the endpoint said so."""
        self._last = max(self._last, until)

    def _fits(self, tokens: float) -> bool:
        return len(self._starts) + 1 <= self._most_requests and self._tokens + tokens <= self._most_tokens

    def _forget(self, at: float) -> None:
        while self._starts and self._starts[0][0] + WINDOW_S <= at:
            self._tokens -= self._starts.popleft()[1]


class Budget:
    """Requests and tokens that may be spent in all.

    What is under way counts with its estimate, so the budget is not passed by many requests at once.  A request that
    failed counts as a request; what it spent of tokens the caller knows best.
    """

    def __init__(
        self, num_requests: int | None = None, num_tokens: int | None = None, spent: tuple[int, int] = (0, 0)
    ) -> None:
        self.num_requests, self.num_tokens = num_requests, num_tokens
        self.spent_requests, self.spent_tokens = spent  # by earlier starts of the run
        self._reserved = 0

    def take(self, num_tokens: int) -> str | None:
        """Begin a request that takes about ``num_tokens``; which limit forbids it, else None."""
        if self.num_requests is not None and self.spent_requests + 1 > self.num_requests:
            return "num_requests"
        if self.num_tokens is not None and self.spent_tokens + self._reserved + num_tokens > self.num_tokens:
            return "num_tokens"
        self.spent_requests += 1
        self._reserved += num_tokens
        return None

    def settle(self, reserved: int, used: int) -> None:
        """A request that was begun with ``reserved`` tokens took ``used``."""
        self._reserved -= reserved
        self.spent_tokens += used
