"""A model behind an endpoint: paced, retried, cached, paid for once; and every way in which it fails."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import BasicAuth, web
from pydantic import ValidationError
from stand_in import StandIn

from actors.endpoint import SIMPLE, EndpointRespondent, proxy_of
from actors.judge_settings import EndpointSettings, JudgeRewardSettings
from launch.judging import probe_endpoint
from launch.overrides import load_config
from trainers.asking import Question, Reply
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
    assert len(list(tmp_path.glob("*/*.json"))) == 20 and not list(tmp_path.rglob(".*"))


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
        assert server.questions.count("ok") == 1
        # Anew nothing was answered before it: whose fault it is told another question.
        assert server.questions.count("long") == 3 and server.questions[-2] == SIMPLE.text


def test_a_budget_that_is_spent_ends_the_run_and_stays_spent_after_a_restart(tmp_path: Path) -> None:
    with StandIn() as server:
        settings = settings_of(server.url, num_requests=2)
        ask_all(settings, tmp_path, "a", "b")
        with pytest.raises(BudgetSpentError, match="num_requests=2 is spent; raise it and go on"):
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


def test_tokens_that_nobody_counted_are_spent_as_they_were_estimated(tmp_path: Path) -> None:
    async def uncounted(number: int, body: dict[str, Any]) -> web.Response | None:
        if number == 1:  # it may be at work on it still
            await asyncio.sleep(1.0)
        return web.json_response({"choices": [{"message": {"content": "OK"}, "finish_reason": "stop"}]})

    with StandIn(fault=uncounted) as server:
        settings = settings_of(server.url, num_tokens=40, deadline_s=0.3, patience_s=50.0)  # a request is taken for 16
        assert ask_all(settings, tmp_path, "a")[0].text == "OK"
        with pytest.raises(BudgetSpentError, match="num_tokens=40"):
            ask_all(settings, tmp_path, "b")
        assert len(server.bodies) == 2


def test_what_was_spent_before_a_budget_was_set_counts(tmp_path: Path) -> None:
    with StandIn() as server:
        ask_all(settings_of(server.url), tmp_path, "a", "b")
        with pytest.raises(BudgetSpentError, match="num_requests=2 is spent"):
            ask_all(settings_of(server.url, num_requests=2), tmp_path, "c")


def test_an_answer_that_breaks_off_is_a_lost_connection_and_is_waited_out(tmp_path: Path) -> None:
    async def torn(number: int, body: dict[str, Any]) -> web.Response | None:
        return Torn() if number <= 8 else None

    class Torn(web.Response):
        async def write_eof(self, data: bytes = b"") -> None:
            await super().write_eof(data)

        async def prepare(self, request: Any) -> Any:
            self.content_length = 1000
            writer = await super().prepare(request)
            await writer.write(b'{"choices": [')
            request.transport.close()
            return writer

    with StandIn(fault=torn) as server:
        found = ask_all(settings_of(server.url, num_retries=1, patience_s=1000.0), tmp_path, "a", clock=Clock())
    assert found[0].text == "OK"


def test_as_many_questions_are_under_way_as_num_at_once_says(tmp_path: Path) -> None:
    arrived = list[asyncio.Event]()

    async def together(number: int, body: dict[str, Any]) -> web.Response | None:
        """Answers when all of them are there."""
        if not arrived:
            arrived.append(asyncio.Event())
        if number == 120:
            arrived[0].set()
        await arrived[0].wait()
        return None

    with StandIn(fault=together) as server:
        settings = settings_of(server.url, num_at_once=120, deadline_s=30.0, num_retries=0)
        assert {r.text for r in ask_all(settings, tmp_path, *map(str, range(120)))} == {"OK"}


def test_a_rate_limit_of_our_own_spreads_requests(tmp_path: Path) -> None:
    clock = Clock()
    with StandIn() as server:
        ask_all(settings_of(server.url, requests_per_minute=2, num_at_once=1), tmp_path, *"abcde", clock=clock)
        assert len(server.bodies) == 5
    assert clock.now == pytest.approx(120.0)


# --- keys and addresses ---------------------------------------------------------------------------


def test_the_key_is_sent_whatever_stands_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with StandIn() as server:
        elsewhere = server.url.replace("127.0.0.1", "[::ffff:127.0.0.1]")  # loopback by a name that is not known as it
        ask_all(settings_of(elsewhere, api_key_env="JUDGE_KEY"), tmp_path, "a")
        ask_all(settings_of(elsewhere), tmp_path, "b")
        assert [h.get("Authorization") for h in server.headers] == [f"Bearer {KEY}", None]


def test_a_proxy_is_taken_from_the_environment_with_its_password_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert proxy_of("https://host/v1") == ("http://proxy.example:3128", BasicAuth("me", "p@ss"))
    for url in ("http://host/v1", "https://inside.example/v1", "https://localhost/v1"):
        assert proxy_of(url) == (None, None)


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
        ({"endpoint": {"base_url": "http://h/v1", "model": "m", "requests_per_minute": 2}}, "over 960 s"),
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
