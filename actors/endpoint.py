"""A language model behind an OpenAI-compatible endpoint: paced, retried, paid for once.

    question -> cache -> place -> budget -> rate limit -> POST -> reply | try again | silence | EndpointError

The decisions are pure (trainers/{rate_limit, patience, chat_protocol}); this file has the clock and the socket.  A key
is read from the environment, sent in one header, and stands nowhere else.
May import: aiohttp (inside functions), actors.judge_settings, trainers.*.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from actors.judge_settings import EndpointSettings
from trainers.asking import Question, Reply, Silence, Usage
from trainers.chat_protocol import estimated_tokens, hidden, read_reply, request_body, shown
from trainers.errors import (
    BudgetSpentError,
    EndpointBrokenError,
    EndpointDownError,
    EndpointError,
    EndpointRejectedError,
    EndpointSlowError,
    InputError,
    NonsenseError,
    RateLimitedError,
)
from trainers.patience import Patience, Trouble, delay_s, retry_after_s, trouble_of
from trainers.rate_limit import Budget, RateLimit
from trainers.reply_cache import Account, ReplyCache, question_key

if TYPE_CHECKING:
    from aiohttp import BasicAuth, ClientSession

SIMPLE = Question("Say OK.", 8)  # what any endpoint can answer
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SILENCES: dict[Trouble, Silence] = {
    "slow": "timeout", "down": "unavailable", "busy": "unavailable", "broken": "unavailable", "nonsense": "nonsense",
    "refused": "refused",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Failure:
    """What came in the place of a reply."""

    trouble: Trouble
    status: str  # HTTP status, or what there was of it
    detail: str
    asked_s: float | None = None  # Retry-After
    was_sent: bool = False  # whole, and nobody said that it was not taken: it may have been paid for


def read_key(
    variable: str | None, field: str, remedy: str = "export it where the run starts, and on every node that has workers"
) -> str | None:
    """The key that the environment has under ``variable``; None without one.

    Raises:
        InputError: it is not set, or no key; ``field`` is where its name was given.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(field, variable, "this variable is not set or empty", remedy)
    if not (key.isascii() and key.isprintable()):
        raise InputError(field, variable, "what is in this variable cannot be a key",
                         "export the key alone, without line breaks")  # fmt: skip
    return key


def proxy_of(url: str) -> tuple[str | None, BasicAuth | None]:
    """(address, name and password) of the proxy that the environment has for ``url``: HTTPS_PROXY, NO_PROXY, ..."""
    from aiohttp import BasicAuth

    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = None if host in LOOPBACK or proxy_bypass(host) else getproxies().get(parts.scheme)
    if proxy is None:
        return None, None
    said = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if said.scheme not in ("http", "https"):  # SOCKS, which aiohttp does not speak
        return None, None
    auth = None if said.username is None else BasicAuth(unquote(said.username), unquote(said.password or ""))
    return urlunsplit((said.scheme, said.netloc.rpartition("@")[2], said.path, "", "")), auth


class EndpointRespondent:
    """Answers questions through an endpoint.

    Args:
        cache: folder of replies.
        account: folder of the run, where it writes down what it spent; default: ``cache``.
        clock, sleep: monotonic seconds, and how to let some pass.
    """

    def __init__(
        self, settings: EndpointSettings, cache: Path, field: str = "endpoint", account: Path | None = None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self.settings, self.usage = settings, Usage()
        self._key = read_key(settings.api_key_env, f"{field}.api_key_env")
        self._clock, self._sleep = clock, sleep
        self._cache, self._account = ReplyCache(cache), Account(account or cache, field)
        self._limit = RateLimit(settings.requests_per_minute, settings.tokens_per_minute)
        self._budget = Budget(settings.num_requests, settings.num_tokens, self._account.spent())
        self._before = self._budget.spent_requests, self._budget.spent_tokens
        self._patience = Patience(settings.patience_s, settings.num_retries)
        self._simple = request_body(settings.model, SIMPLE, settings.parameters)
        self._places = asyncio.Semaphore(settings.num_at_once)
        self._asked: dict[str, asyncio.Future[Reply]] = {}  # equal questions that are under way
        self._draw = random.Random().random  # spreads retries; no result depends on it
        self._session: ClientSession | None = None

    async def ask(self, question: Question) -> Reply:
        """The reply, from the cache where it is there.  EndpointError when nobody is answered any more."""
        self.usage.num_asked += 1
        body = request_body(self.settings.model, question, self.settings.parameters)
        key = question_key(body)
        while (twin := self._asked.get(key)) is not None:
            await asyncio.wait([twin])  # ends: it is another call of this method
        if (known := self._cache.get(key)) is not None:
            self.usage.num_cached += 1
            return known
        self._asked[key] = asyncio.get_running_loop().create_future()
        try:
            async with self._places:
                reply = await self._try(question, body)
        finally:
            self._asked.pop(key).set_result(Reply(""))
        if reply.silence is not None:
            self.usage.silences[reply.silence] += 1
        elif reply.text.strip() or reply.cut_off:  # an empty reply may be the server's failure: the next run asks again
            self._cache.put(key, reply)
        return reply

    async def probe(self) -> None:
        """One question, tried once.  EndpointError says what is wrong before a run starts."""
        try:
            found = await self._post(self._simple)
        finally:
            await self.close()
        if isinstance(found, _Failure):
            raise self._error(found, "it was tried once, before the start")

    async def close(self) -> None:
        """Close the connections; the next question opens them again."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    # --- one question -----------------------------------------------------------------------------

    async def _try(self, question: Question, body: dict[str, Any]) -> Reply:
        attempt, begun, failed = 0, 0.0, 0.0
        while True:
            started, found = await self._paced(body, question.max_tokens)
            if isinstance(found, Reply):
                return found
            now = self._clock()
            if attempt == 0:
                begun, failed = started, now
            advice = self._patience.failed(found.trouble, attempt, begun, failed, now, found.asked_s)
            if advice == "check_endpoint":
                _, checked = await self._paced(self._simple, SIMPLE.max_tokens)
                if isinstance(checked, Reply):
                    advice = "again"  # it may have been down until now: one more try tells whose fault it is
                else:
                    now, found = self._clock(), checked
                    advice = self._patience.unchecked(found.trouble, begun, now, found.asked_s)
            if advice == "give_up_endpoint":
                raise self._error(found, f"given up after {attempt + 1} tries in {now - begun:.0f} s")
            if advice == "give_up_question":
                return Reply("", SILENCES[found.trouble], found.detail)
            pause = delay_s(attempt, found.asked_s, self._draw())
            if found.trouble == "busy" and found.asked_s is not None:
                self._limit.hold(now + found.asked_s)  # it said so to everybody
            await self._sleep(pause)
            attempt += 1
            self.usage.num_retries += 1

    async def _paced(self, body: dict[str, Any], longest: int) -> tuple[float, Reply | _Failure]:
        """(when it was sent, after waiting for our own limits; what came back)."""
        estimate = estimated_tokens(body, longest)
        at = self._begin(estimate)
        if (wait := at - self._clock()) > 0:
            await self._sleep(wait)
        started, found = self._clock(), await self._post(body)
        used = estimate  # also where the server does not count, or was asked and not heard: it may be paid for
        if isinstance(found, Reply):
            self._patience.answered(self._clock(), is_check=body is self._simple)
            self.usage.num_prompt_tokens += found.num_prompt_tokens
            self.usage.num_completion_tokens += found.num_completion_tokens
            used = found.num_prompt_tokens + found.num_completion_tokens or estimate
        self._budget.settle(estimate, used if isinstance(found, Reply) or found.was_sent else 0)
        self._limit.settle(at, estimate, used)
        self._write_account()
        return started, found

    def _begin(self, estimate: int) -> float:
        """When the next request may start."""
        spent = self._budget.take(estimate)
        if spent is not None:
            raise BudgetSpentError(
                self.settings.url, "not asked", f"the budget endpoint.{spent}={getattr(self.settings, spent)} is spent",
                "raise it and go on: what was answered is not asked again",
            )  # fmt: skip
        self.usage.num_requests += 1
        return self._limit.reserve(estimate, self._clock())

    def _write_account(self) -> None:
        """A budget counts what earlier starts of the run spent, also those that had none: each start writes it down."""
        requests, tokens = self._before
        self._account.write(self._budget.spent_requests - requests, self._budget.spent_tokens - tokens)

    async def _post(self, body: dict[str, Any]) -> Reply | _Failure:
        from aiohttp import ClientConnectionError, ClientError, ClientPayloadError, ClientTimeout

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        timeout = ClientTimeout(total=self.settings.deadline_s)
        proxy, proxy_auth = proxy_of(self.settings.base_url)
        try:
            async with self._open().post(
                self.settings.url, json=body, headers=headers, timeout=timeout, allow_redirects=False, proxy=proxy,
                proxy_auth=proxy_auth,
            ) as response:  # fmt: skip
                content = await response.read()
        except TimeoutError:
            return _Failure("slow", "no status", f"no answer in {self.settings.deadline_s:g} s", was_sent=True)
        except ClientPayloadError as error:
            return _Failure("down", "connection lost", self._hide(error), was_sent=True)
        except ClientConnectionError as error:
            return _Failure("down", "no connection", self._hide(error))
        except ClientError as error:
            return _Failure("nonsense", "no HTTP", self._hide(error), was_sent=True)
        trouble = trouble_of(response.status)
        status = f"{response.status} {response.reason or ''}".strip()
        if trouble is not None:
            # A refused key is sometimes quoted in the body, shortened; so that body is not.
            said = "" if response.status in (401, 403) else shown(content, self._key or "")
            return _Failure(trouble, status, said, retry_after_s(response.headers, time.time()))
        reply = read_reply(content, self._key or "")
        return _Failure("nonsense", status, f"its body {reply}", was_sent=True) if isinstance(reply, str) else reply

    def _open(self) -> ClientSession:
        from aiohttp import ClientSession, TCPConnector

        if self._session is None:
            # Not trust_env: that also reads .netrc, and would send what stands there instead of the key.
            self._session = ClientSession(connector=TCPConnector(limit=self.settings.num_at_once))
        return self._session

    def _hide(self, error: Exception) -> str:
        return hidden(f"{type(error).__name__}: {error}", self._key or "")

    def _error(self, found: _Failure, after: str) -> EndpointError:
        kind, reason, remedy = _ENDS[found.trouble]
        name = self.settings.api_key_env or "none"
        said = f": {found.detail}" if found.detail else ""
        return kind(self.settings.url, found.status, f"{reason}, {after}{said}",
                    remedy.format(model=self.settings.model, key=name))  # fmt: skip


_ENDS: dict[Trouble, tuple[type[EndpointError], str, str]] = {
    "down": (EndpointDownError, "nobody takes the connection", "start the server or mend endpoint.base_url"),
    "slow": (EndpointSlowError, "it does not answer in time",
             "raise endpoint.deadline_s or lower endpoint.num_at_once"),
    "busy": (RateLimitedError, "it limits our rate for longer than endpoint.patience_s",
             "lower endpoint.requests_per_minute or endpoint.tokens_per_minute, or go on later"),
    "broken": (EndpointBrokenError, "it answers with errors of its own", "look at the server, then go on"),
    "nonsense": (NonsenseError, "it does not answer as chat completions do",
                 "check that endpoint.base_url ends where /chat/completions begins"),
    "refused": (EndpointRejectedError, "it refuses what we send",
                "check endpoint.parameters, and that questions fit the model {model!r}"),
    "rejected": (EndpointRejectedError, "it takes no question of ours",
                 "check endpoint.base_url, endpoint.model {model!r} and the key in endpoint.api_key_env ({key})"),
}  # fmt: skip
