"""A model behind an endpoint: paced, retried, cached, paid for once; and every way in which it fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from pydantic import ValidationError
from stand_in import StandIn

from actors.endpoint import EndpointRespondent
from actors.judge_settings import EndpointSettings, JudgeRewardSettings
from launch.judging import probe_endpoint
from launch.overrides import load_config
from trainers.asking import Question, Reply
from trainers.chat_protocol import read_reply, request_body
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
from trainers.patience import MAX_IN_A_ROW, Patience, delay_s, retry_after_s, trouble_of
from trainers.rate_limit import WINDOW_S, Budget, RateLimit
from trainers.reply_cache import ReplyCache, question_key

KEY = "sk-test-0123456789abcdefghij"
SHORT = {"num_retries": 1, "patience_s": 0.6, "deadline_s": 5.0}


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def settings_of(url: str, **keys: Any) -> EndpointSettings:
    return EndpointSettings.model_validate({"base_url": url, "model": "stand-in", **SHORT, **keys})


def ask_all(settings: EndpointSettings, folder: Path, *texts: str, clock: Clock | None = None) -> list[Reply]:
    async def go() -> list[Reply]:
        kwargs = {} if clock is None else {"clock": clock, "sleep": clock.sleep}
        respondent = EndpointRespondent(settings, folder, **kwargs)  # type: ignore[arg-type]
        try:
            return list(await asyncio.gather(*(respondent.ask(Question(text, 8)) for text in texts)))
        finally:
            await respondent.close()

    return asyncio.run(go())


# --- pacing, pure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "tokens"), [(5, None), (None, 100), (7, 90), (1, 10)])
def test_no_minute_sees_more_requests_or_tokens_than_the_limits_and_none_is_held_back_for_nothing(
    requests: int | None, tokens: int | None
) -> None:
    random, limit, now = np.random.default_rng(0), RateLimit(requests, tokens), 0.0
    given: list[tuple[float, int]] = []
    for _ in range(300):
        now += float(random.exponential(4.0))
        size = int(random.integers(1, 30))
        given.append((limit.reserve(size, now), size))
        assert given[-1][0] >= now
    starts = [at for at, _ in given]
    assert starts == sorted(starts)
    most = tokens or 10**9
    for first in range(len(given)):
        window = [min(size, most) for at, size in given[first:] if at < starts[first] + WINDOW_S]
        assert len(window) <= (requests or 10**9)
        assert sum(window) <= most
    assert RateLimit().reserve(10**6, 3.0) == 3.0


def test_a_request_starts_at_once_where_the_minute_before_is_empty() -> None:
    limit = RateLimit(2, None)
    assert [limit.reserve(1, t) for t in (0.0, 1.0, 2.0, 200.0)] == [0.0, 1.0, 60.0, 200.0]


def test_tokens_that_were_not_used_are_given_back_and_a_hold_stops_everybody() -> None:
    limit = RateLimit(None, 100)
    at = limit.reserve(100, 0.0)
    limit.settle(at, 100, 10)
    assert limit.reserve(90, 1.0) == 1.0
    assert limit.reserve(1, 2.0) == 60.0
    limit.hold(500.0)
    assert limit.reserve(1, 3.0) == 500.0


def test_a_budget_is_never_passed_by_what_is_under_way_and_a_failed_request_spends_no_tokens() -> None:
    budget = Budget(num_requests=4, num_tokens=100, spent=(1, 20))
    assert [budget.take(40), budget.take(40), budget.take(1)] == [None, None, "num_tokens"]
    budget.settle(40, 0)
    assert budget.take(40) is None and budget.take(0) == "num_requests"
    budget.settle(40, 10)
    budget.settle(40, 10)
    assert (budget.spent_requests, budget.spent_tokens) == (4, 40)


# --- patience, pure -------------------------------------------------------------------------------


def test_a_question_is_given_up_where_others_are_answered_and_else_the_endpoint_is_checked() -> None:
    patience = Patience(patience_s=100.0, num_retries=2)
    patience.answered(5.0)
    assert [patience.failed("slow", attempt, 0.0, 10.0, 10.0 + attempt) for attempt in (0, 1)] == ["again"] * 2
    assert patience.failed("slow", 2, 0.0, 10.0, 12.0) == "check_endpoint", "nobody was answered since it failed"
    assert patience.unchecked("slow", 100.0) == "again"
    assert patience.unchecked("slow", 100.0, asked_s=30.0) == "give_up_endpoint"
    assert patience.unchecked("down", 111.0) == "give_up_endpoint"
    assert patience.unchecked("nonsense", 20.0) == patience.unchecked("rejected", 20.0) == "give_up_endpoint"
    patience.answered(50.0)
    assert patience.failed("slow", 2, 0.0, 10.0, 60.0) == "give_up_question", "another one was answered at 50"
    assert patience.unchecked("slow", 150.0) == "again", "the patience begins anew with each answer"
    assert Patience(10.0, 99).failed("down", 1, 0.0, 0.0, 11.0) == "check_endpoint", "whatever retries are left"


def test_a_rate_limit_is_waited_for_as_long_as_the_patience_lasts() -> None:
    patience = Patience(patience_s=100.0, num_retries=0)
    assert patience.failed("busy", 5, 0.0, 1.0, 90.0) == "again"
    assert patience.failed("busy", 5, 0.0, 1.0, 90.0, asked_s=20.0) == "give_up_endpoint"


def test_questions_that_are_refused_one_after_another_are_the_endpoint_s_fault() -> None:
    patience = Patience(100.0, 0)
    advice = [patience.failed("refused", 0, 0.0, 0.0, 0.0) for _ in range(MAX_IN_A_ROW)]
    assert advice == ["give_up_question"] * (MAX_IN_A_ROW - 1) + ["give_up_endpoint"]
    patience.answered(1.0)
    assert patience.failed("refused", 0, 0.0, 2.0, 2.0) == "give_up_question"


def test_every_status_is_a_trouble_of_one_kind() -> None:
    expected = {200: None, 401: "rejected", 403: "rejected", 404: "rejected", 302: "rejected", 429: "busy",
                408: "broken", 500: "broken", 503: "broken", 529: "broken", 400: "refused", 422: "refused",
                204: "nonsense"}  # fmt: skip
    assert {status: trouble_of(status) for status in expected} == expected


def test_retry_after_is_read_in_both_forms_and_no_try_comes_before_it() -> None:
    wall = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT
    assert retry_after_s({"Retry-After": "7"}, wall) == 7.0
    assert retry_after_s({"Retry-After": "Sun, 09 Sep 2001 01:47:00 GMT"}, wall) == 20.0
    assert retry_after_s({"Retry-After": "Sun, 09 Sep 2001 01:46:00 GMT"}, wall) == 0.0
    assert retry_after_s({}, wall) is None and retry_after_s({"Retry-After": "soon"}, wall) is None
    for attempt, draw in itertools.product(range(40), (0.0, 0.5, 0.999)):
        assert delay_s(attempt, 7.0, draw) >= 7.0
        assert 0.5 <= delay_s(attempt, None, draw) <= 60.0


# --- protocol and cache, pure ---------------------------------------------------------------------


def test_what_shapes_a_reply_is_in_the_key_and_nothing_else() -> None:
    base = {"text": "Q", "max_tokens": 8, "system": "S", "temperature": 0.5, "seed": 1}
    changed: list[dict[str, Any]] = [{**base, **change} for change in (
        {"text": "R"}, {"max_tokens": 9}, {"system": None}, {"temperature": 0.6}, {"seed": 2},
    )]  # fmt: skip
    keys = {question_key(request_body("m", Question(**q), {})) for q in [base, *changed]}
    keys |= {question_key(request_body("n", Question(**base), {}))}
    keys |= {question_key(request_body("m", Question(**base), {"top_p": 0.9}))}
    assert len(keys) == 8
    assert question_key({"a": 1, "b": 2}) == question_key({"b": 2, "a": 1})


def test_a_parameter_that_is_null_is_left_out_of_the_request() -> None:
    body = request_body("m", Question("Q", 8, "S"), {"seed": None, "max_tokens": None, "max_completion_tokens": 9})
    assert body == {
        "model": "m", "temperature": 0.0, "max_completion_tokens": 9,
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
    }  # fmt: skip


def test_a_reply_is_kept_whole_and_a_torn_file_is_none(tmp_path: Path) -> None:
    cache, said = ReplyCache(tmp_path), Reply("Grüße\n", cut_off=True, num_prompt_tokens=3, num_completion_tokens=2)
    key = question_key({"q": 1})
    assert cache.get(key) is None
    cache.put(key, said)
    assert cache.get(key) == said
    file = next(tmp_path.rglob(f"{key}.json"))
    file.write_text(file.read_text()[:9])
    assert cache.get(key) is None
    cache.put(key, said)
    assert cache.get(key) == said and [f.name for f in tmp_path.rglob("*") if f.is_file()] == [f"{key}.json"]
    with pytest.raises(ValueError, match="silence"):
        cache.put(key, Reply("", "timeout"))


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b"[]", b'{"choices": [{"message": {"content": 3}}]}', b"\xff"]
)
def test_a_body_that_is_no_chat_completion_is_not_taken_for_one(body: bytes) -> None:
    assert isinstance(read_reply(body), str)


def test_a_reply_without_text_or_usage_is_empty_and_free() -> None:
    body = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}).encode()
    assert read_reply(body) == Reply("", cut_off=True)


# --- over HTTP ------------------------------------------------------------------------------------


def test_an_endpoint_answers_with_its_key_in_one_header_and_equal_questions_are_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with StandIn(lambda text: text.upper()) as server:
        settings = settings_of(server.url, api_key_env="JUDGE_KEY", parameters={"top_p": 0.5})
        found = ask_all(settings, tmp_path, "a", "b", "a", "a")
        assert [r.text for r in found] == ["A", "B", "A", "A"] and found[0].num_prompt_tokens == 10
        assert sorted(server.questions) == ["a", "b"]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}" and server.bodies[0]["top_p"] == 0.5
        assert [r.text for r in ask_all(settings, tmp_path, "b", "c")] == ["B", "C"]
        assert sorted(server.questions) == ["a", "b", "c"], "a resumed run asks nothing twice"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY in f.read_text()]


def test_many_writers_share_one_cache(tmp_path: Path) -> None:
    with StandIn(lambda text: text * 2) as server:
        settings, texts = settings_of(server.url), [str(i) for i in range(20)]

        async def go() -> list[list[str]]:
            writers = [EndpointRespondent(settings, tmp_path) for _ in range(4)]

            async def every(respondent: EndpointRespondent) -> list[str]:
                return [r.text for r in await asyncio.gather(*(respondent.ask(Question(t, 8)) for t in texts))]

            found = await asyncio.gather(*map(every, writers))
            for writer in writers:
                await writer.close()
            return list(found)

        assert asyncio.run(go()) == [[t * 2 for t in texts]] * 4
    assert len(list(tmp_path.rglob("*.json"))) == 20 and not list(tmp_path.rglob(".*"))


def fail_first(num: int, status: int, headers: dict[str, str] | None = None) -> Any:
    async def fault(number: int, body: dict[str, Any]) -> web.Response | None:
        if number > num:
            return None
        return web.json_response({"error": {"message": "later"}}, status=status, headers=headers)

    return fault


@pytest.mark.parametrize(("status", "headers"), [(503, {}), (429, {"Retry-After": "7"}), (500, {}), (429, {})])
def test_a_passing_trouble_is_waited_out(tmp_path: Path, status: int, headers: dict[str, str]) -> None:
    clock = Clock()
    with StandIn(fault=fail_first(3, status, headers)) as server:
        found = ask_all(settings_of(server.url, patience_s=300.0), tmp_path, "a", clock=clock)
        assert found[0].text == "OK" and len(server.bodies) == 4
    if headers:
        assert clock.now >= 3 * 7.0, "Retry-After is honoured"


async def nonsense(number: int, body: dict[str, Any]) -> web.Response | None:
    return web.Response(text="<html>Welcome to nginx!</html>", content_type="text/html")


async def slow(number: int, body: dict[str, Any]) -> web.Response | None:
    await asyncio.sleep(30.0)
    return None


FAULTS: list[tuple[Any, dict[str, Any], type[EndpointError], str, str]] = [
    (nonsense, {}, NonsenseError, "200 OK", "base_url"),
    (slow, {"deadline_s": 0.2, "patience_s": 0.01}, EndpointSlowError, "no status", "deadline_s"),
    (fail_first(99, 429, {"Retry-After": "3600"}), {}, RateLimitedError, "429", "requests_per_minute"),
    (fail_first(99, 503), {}, EndpointBrokenError, "503", "server"),
    (fail_first(99, 401), {}, EndpointRejectedError, "401", "api_key_env"),
    (fail_first(99, 404), {}, EndpointRejectedError, "404", "endpoint.model"),
]


@pytest.mark.parametrize(("fault", "keys", "kind", "status", "remedy"), FAULTS, ids=[row[2].__name__ for row in FAULTS])
def test_an_endpoint_that_cannot_be_asked_ends_the_run_in_one_line_with_url_status_and_remedy(
    tmp_path: Path, fault: Any, keys: dict[str, Any], kind: type[EndpointError], status: str, remedy: str
) -> None:
    with StandIn(fault=fault) as server:
        settings = settings_of(server.url, **keys)
        with pytest.raises(kind) as ended:
            ask_all(settings, tmp_path, "a", clock=None if fault is slow else Clock())
        with pytest.raises(InputError) as refused:
            probe_endpoint(settings, "label.judge.endpoint")
    for line in (str(ended.value), str(refused.value)):
        assert server.url in line and status in line and remedy in line and "\n" not in line
    assert refused.value.field == "label.judge.endpoint.base_url"


def test_an_endpoint_that_is_down_ends_the_run_when_the_patience_is_over(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        settings, clock = settings_of(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", patience_s=120.0), Clock()
        with pytest.raises(EndpointDownError, match="start the server"):
            ask_all(settings, tmp_path, "a", clock=clock)
        assert 100.0 < clock.now < 300.0
        with pytest.raises(InputError, match="nobody takes the connection"):
            probe_endpoint(settings, "judges.0.endpoint")


def test_an_outage_in_the_middle_of_many_questions_masks_none_of_them(tmp_path: Path) -> None:
    async def outage(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({}, status=503) if 10 < number <= 60 else None

    with StandIn(fault=outage) as server:
        settings = settings_of(server.url, num_retries=0, patience_s=10_000.0)
        found = ask_all(settings, tmp_path, *map(str, range(40)), clock=Clock())
    assert [reply.text for reply in found] == ["OK"] * 40


def test_one_bad_question_is_a_silence_of_its_own_and_is_asked_again_next_time(tmp_path: Path) -> None:
    async def picky(number: int, body: dict[str, Any]) -> web.Response | None:
        said = body["messages"][-1]["content"]
        if said == "long":
            return web.json_response({"error": {"message": "context too long"}}, status=400)
        return web.Response(text="{", status=200) if said == "odd" else None

    with StandIn(fault=picky) as server:
        settings, clock = settings_of(server.url, patience_s=100.0), Clock()

        async def go() -> list[Reply]:
            respondent = EndpointRespondent(settings, tmp_path, clock=clock, sleep=clock.sleep)
            try:
                return [await respondent.ask(Question(t, 8)) for t in ("ok", "long", "odd", "fine")]
            finally:
                await respondent.close()

        found = asyncio.run(go())
        assert [r.silence for r in found] == [None, "refused", "nonsense", None]
        assert found[1].detail == "context too long"
        assert ask_all(settings, tmp_path, "ok", "long")[1].silence == "refused"
        assert server.questions.count("long") == 2 and server.questions.count("ok") == 1


def test_a_budget_that_is_spent_ends_the_run_and_stays_spent_after_a_restart(tmp_path: Path) -> None:
    with StandIn() as server:
        settings = settings_of(server.url, num_requests=2)
        ask_all(settings, tmp_path, "a", "b")
        with pytest.raises(BudgetSpentError, match="num_requests=2 is spent; raise it and resume"):
            ask_all(settings, tmp_path, "a", "c")
        assert sorted(server.questions) == ["a", "b"]
        more = settings_of(server.url, num_requests=3)
        assert ask_all(more, tmp_path, "a", "b", "c")[2].text == "OK" and len(server.questions) == 3
        with pytest.raises(BudgetSpentError, match="num_tokens"):
            ask_all(settings_of(server.url, num_tokens=40), tmp_path, "d")


def test_a_budget_is_the_run_s_where_runs_share_replies(tmp_path: Path) -> None:
    async def go(run: str, *texts: str) -> None:
        respondent = EndpointRespondent(settings, tmp_path / "shared", "judges.0.endpoint", tmp_path / run)
        try:
            for text in texts:
                await respondent.ask(Question(text, 8))
        finally:
            await respondent.close()

    with StandIn() as server:
        settings = settings_of(server.url, num_requests=2)
        asyncio.run(go("one", "a", "b"))
        asyncio.run(go("two", "a", "b", "c", "d"))
        with pytest.raises(BudgetSpentError):
            asyncio.run(go("two", "e"))
        assert server.questions == ["a", "b", "c", "d"]


def test_a_rate_limit_of_our_own_spreads_requests(tmp_path: Path) -> None:
    clock = Clock()
    with StandIn() as server:
        ask_all(settings_of(server.url, requests_per_minute=2, num_at_once=1), tmp_path, *"abcde", clock=clock)
        assert len(server.bodies) == 5
    assert clock.now == pytest.approx(120.0)


# --- keys and addresses ---------------------------------------------------------------------------


def test_a_key_never_stands_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    async def quotes(number: int, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({"error": {"message": f"the key {KEY} is unknown"}}, status=statuses.pop())

    for status in (401, 503, 400):
        statuses = [status] * 99
        with StandIn(fault=quotes) as server, pytest.raises(InputError) as refused:
            probe_endpoint(settings_of(server.url, api_key_env="JUDGE_KEY"), "judges.0.endpoint")
        assert KEY not in str(refused.value) and KEY not in repr(refused.value.__cause__)
    monkeypatch.setenv("JUDGE_KEY", "")
    with pytest.raises(InputError, match="JUDGE_KEY.*not set"):
        probe_endpoint(settings_of("http://localhost/v1", api_key_env="JUDGE_KEY"), "judges.0.endpoint")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"base_url": "localhost:8000/v1"}, "no address"), ({"base_url": "ftp://host/v1"}, "no address"),
        ({"base_url": "https://me:secret@host/v1"}, "api_key_env"), ({"base_url": "https://host/v1?key=1"}, "without"),
        ({"base_url": "https://host/v1/chat/completions"}, "before /chat"), ({"api_key_env": KEY}, "pattern"),
        ({"parameters": {"temperature": 1}}, "temperature is set"),
    ],
)  # fmt: skip
def test_an_address_or_key_that_cannot_be_used_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EndpointSettings.model_validate({"base_url": "http://localhost/v1", "model": "m", **keys})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "give path or endpoint"),
        ({"path": "x", "endpoint": {"base_url": "http://h/v1", "model": "m"}}, "keep one"),
        ({"chat": False, "endpoint": {"base_url": "http://h/v1", "model": "m"}}, "server's affair"),
        ({"deadline_s": 10, "endpoint": {"base_url": "http://h/v1", "model": "m"}}, "patience_s"),
    ],
)
def test_a_judge_is_in_one_place(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JudgeRewardSettings.model_validate(keys)


@pytest.mark.parametrize("key", [KEY, "AIza-of-another-form"])
def test_a_key_in_the_place_of_its_variable_is_not_shown(tmp_path: Path, key: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(LABEL.format(key=key))
    with pytest.raises(InputError) as refused:
        load_config(str(recipe))
    assert key not in str(refused.value) and "api_key_env" in refused.value.field


LABEL = """
run: {{name: mine}}
model: {{path: builtin:tiny-llama}}
prompts: {{train: {{procedural: chain_sum, size: 4}}}}
label:
  source: judge
  judge: {{endpoint: {{base_url: "https://host/v1", model: m, api_key_env: {key}}}}}
"""
