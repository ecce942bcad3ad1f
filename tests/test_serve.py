"""``burnish serve``: what comes back, who is let in, and what happens when nobody answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import ClientConnectorError, ClientSession
from aiohttp.test_utils import TestClient, TestServer
from pydantic import ValidationError
from rich.console import Console
from test_select import TINY, config, raw_config
from test_serve_protocol import ASKED

from actors.endpoint import EndpointRespondent
from actors.judge_settings import EndpointSettings
from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from cluster.errors import DeadlineError, WorkerDiedError
from cluster.transport import put
from launch.answer_service import MAX_FAILED_IN_A_ROW, Service
from launch.overrides import expect_command
from launch.select_config import SelectConfig
from launch.serve import application, bound, listening, serve
from launch.serve_config import ServeSettings
from trainers.asking import Question
from trainers.errors import EndpointDownError, InputError, NoGeneratorError
from trainers.experience import Trajectory, TrajectoryGroup, VersionSpan, WeightVersion, encode_group, summarize
from trainers.labellers import Labels, from_outcomes, from_scores
from trainers.protocols import GeneratedGroup, GroupRequest

LETTERS = """def letters(completions):
    return [float(sum(c.isalpha() for c in messages[0]["content"])) for messages in completions]
"""
Serving = Callable[[TestClient[Any, Any]], Awaitable[None]]


def test_strangers_need_a_key_and_this_machine_does_not() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert ServeSettings(host=host).api_key_env is None
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.org"):
        with pytest.raises(ValidationError, match="set api_key_env"):
            ServeSettings(host=host)
        assert ServeSettings(host=host, api_key_env="KEY").host == host


def test_a_recipe_of_select_is_one_of_serve_and_no_other_is(tmp_path: Path) -> None:
    expect_command(config(tmp_path), "serve", "recipe")
    with pytest.raises(InputError, match="use `burnish train`"):
        expect_command({"run": {}}, "serve", "recipe")


def test_what_cannot_be_served_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(InputError, match="one answer, the best"):
        serve(config(tmp_path, select={"top_k": 2}), quiet)
    for prompts in ({"template": "Q: {prompt}"}, {"chat": False}):
        with pytest.raises(InputError, match="have clients send"):
            serve(config(tmp_path, prompts={**raw_config(tmp_path)["prompts"], **prompts}), quiet)
    monkeypatch.delenv("SERVE_KEY", raising=False)
    with pytest.raises(InputError, match=r"serve.api_key_env = 'SERVE_KEY': this variable is not set"):
        serve(config(tmp_path, serve={"api_key_env": "SERVE_KEY"}), quiet)
    with bound(ServeSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match="cannot be listened on") as caught:
            serve(config(tmp_path, serve={"port": port}), quiet)
        assert caught.value.field == "serve.port"
    with pytest.raises(InputError, match="is no address"):
        bound(ServeSettings(host="no.such.host.invalid", api_key_env="KEY"))
    verifier = {"source": "function", "rewards": [{"function": "reasoning_gym", "args": {"dataset": "chain_sum"}}]}
    with pytest.raises(InputError, match="entry"):
        serve(config(tmp_path, label=verifier, serve={"port": 0}), quiet)


# --- over HTTP, with workers that are made up --------------------------------------------------------


class Workers:
    """Candidate i of a prompt says ``texts[i]``; its score is its length."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.requests = texts, list[GroupRequest]()
        self.generator, self.labeller = self, self
        self.held: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.error: Exception | None = None

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        self.requests.append(request)
        self.asked.set()
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error
        spans = (VersionSpan(WeightVersion(0, 0), 2),)
        ids, logprobs = np.array([5, 6], np.int32), np.array([-1.0, -1.0], np.float32)
        samples = tuple(
            Trajectory(i, request.seeds[i], ids, logprobs, self.texts[i], "stop", spans)
            for i in range(request.num_samples)
        )
        group = TrajectoryGroup(request.group_id, request.prompt, samples)
        return GeneratedGroup(summarize(group, "made-up", 0.0), put(encode_group(group)))

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, dict[str, Any]]:
        scores = [float(len(t.text)) for t in group.trajectories]
        return from_scores(scores, [None] * len(scores), [], {}), {}


def serving(workers: Workers, body: Serving, tmp_path: Path, key: str | None = None, **sections: Any) -> list[str]:
    """Run ``body`` against a service with these workers; what it told its operator."""
    settings, told = config(tmp_path, **sections), list[str]()
    tokenizer = load_tokenizer(resolve_model(TINY))

    async def go() -> None:
        service = Service(settings, "tiny", 64, tokenizer, workers, told.append, clock=lambda: 1.7e9)
        async with TestClient(TestServer(application(service, key))) as client:
            await body(client)
        if service.failed.done():
            service.failed.exception()

    asyncio.run(go())
    return told


async def post(client: TestClient[Any, Any], body: Any = None, **kwargs: Any) -> tuple[int, dict[str, Any]]:
    async with client.post("/v1/chat/completions", json={**ASKED, **(body or {})}, **kwargs) as response:
        return response.status, await response.json()


def test_the_best_candidate_comes_back_as_a_chat_completion(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any]) -> None:
        status, found = await post(client)
        assert status == 200 and found["object"] == "chat.completion" and found["created"] == 1_700_000_000
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": "longest"} and choice["finish_reason"] == "stop"
        assert found["best_of_n"]["candidate"] == 2 and found["best_of_n"]["scores"] == [1.0, 3.0, 7.0, 2.0]
        assert found["best_of_n"]["kl_bound"] == pytest.approx(0.636, abs=1e-3)  # ln 4 - 3/4
        assert found["usage"]["completion_tokens"] == 8, "of all candidates"
        async with client.get("/v1/models") as response:
            (card,) = (await response.json())["data"]
            assert card["id"] == "tiny" and card["created"] == 1_700_000_000 and card["owned_by"]
        for name, status in (("tiny", 200), ("other", 404)):
            async with client.get(f"/v1/models/{name}") as response:
                assert response.status == status

    told = serving(Workers("a", "bbb", "longest", "dd"), body, tmp_path)
    assert len(told) == 1 and "best of 4, score 7" in told[0]


def test_a_seed_names_its_samples_and_without_one_they_are_new_every_time(tmp_path: Path) -> None:
    workers = Workers("a", "b", "c", "d")

    async def body(client: TestClient[Any, Any]) -> None:
        for more in ({"seed": 3}, {"seed": 3}, {"seed": 4}, {}, {}):
            assert (await post(client, more))[0] == 200

    serving(workers, body, tmp_path)
    seeds = [request.seeds for request in workers.requests]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 4
    assert len({request.group_id for request in workers.requests}) == 5


def test_refusals_are_json_and_name_the_parameter(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any]) -> None:
        status, found = await post(client, {"top_p": 0.5})
        assert (status, found["error"]["param"]) == (400, "top_p")
        status, found = await post(client, {"messages": [{"role": "user", "content": "long " * 200}]})
        assert status == 400 and "tokens" in found["error"]["message"] and "long" not in found["error"]["message"]
        path, headers = "/v1/chat/completions", {"Content-Type": "application/json"}
        for data, more, status in (
            ("{", headers, 400), ("[" * 10**5, headers, 400), ('{"seed": ' + "1" * 5000 + "}", headers, 400),
            ("{}", {"Content-Type": "application/json; charset=none"}, 400),
            (json.dumps(ASKED), {"Content-Type": "text/plain"}, 415), (" " * 2**23, headers, 413),
        ):  # fmt: skip
            async with client.post(path, data=data, headers=more) as response:
                assert response.status == status and (await response.json())["error"]["message"]
        async with client.get(path) as response:
            assert response.status == 405 and "error" in await response.json()
        async with client.get("/v2") as response:
            assert response.status == 404 and "error" in await response.json()

    serving(Workers("a", "b", "c", "d"), body, tmp_path)


def test_nobody_is_answered_without_the_key_and_health_needs_none(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any]) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert (await post(client, headers=headers))[0] == 401
            async with client.get("/v1/models", headers=headers) as response:
                assert response.status == 401
        assert (await post(client, headers={"Authorization": "Bearer secret"}))[0] == 200
        async with client.get("/health") as response:
            assert response.status == 200

    workers = Workers("a", "b", "c", "d")
    serving(workers, body, tmp_path, key="secret")
    assert len(workers.requests) == 1


def test_where_no_candidate_may_be_kept_the_reasons_are_told(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any]) -> None:
        status, found = await post(client)
        assert status == 422 and "4 below_threshold" in found["error"]["message"]
        assert "select.threshold" in found["error"]["message"]

    serving(Workers("a", "b", "c", "d"), body, tmp_path, select={"threshold": 5.0})


def test_who_comes_when_all_places_are_taken_is_told_to_come_again(tmp_path: Path) -> None:
    workers = Workers("a", "b", "c", "d")

    async def body(client: TestClient[Any, Any]) -> None:
        workers.held = asyncio.Event()
        first = asyncio.ensure_future(post(client))
        await asyncio.wait_for(workers.asked.wait(), 20)
        async with client.post("/v1/chat/completions", json=ASKED) as response:
            assert response.status == 429 and response.headers["Retry-After"] == "1"
        workers.held.set()
        assert (await first)[0] == 200
        assert (await post(client))[0] == 200, "the place is free again"

    serving(workers, body, tmp_path, serve={"max_requests": 1})


def test_an_answer_that_does_not_come_in_time_is_a_504_and_its_place_is_free_once_its_workers_are(
    tmp_path: Path,
) -> None:
    workers = Workers("a", "b", "c", "d")

    async def body(client: TestClient[Any, Any]) -> None:
        held = workers.held = asyncio.Event()
        assert (await post(client))[0] == 504
        assert (await post(client))[0] == 429, "they still work for the one that gave up"
        workers.held = None
        held.set()
        async with asyncio.timeout(20):
            while (await post(client))[0] == 429:
                pass
        assert (await post(client))[0] == 200

    told = serving(workers, body, tmp_path, serve={"deadline_s": 1.0, "max_requests": 1})
    assert told[0].startswith("request 0: best of 4"), "it was answered, to nobody"


def test_where_all_candidates_that_are_compared_say_the_same_that_is_the_answer(tmp_path: Path) -> None:
    workers = Workers("yes", "yes", "yes", "yes")

    async def label(group: TrajectoryGroup, turn: int) -> tuple[Labels, dict[str, Any]]:
        return from_outcomes(4, [], {"identical": 6}), {}

    workers.label = label  # type: ignore[method-assign]

    async def body(client: TestClient[Any, Any]) -> None:
        status, found = await post(client, {"temperature": 0})
        assert status == 200 and found["choices"][0]["message"]["content"] == "yes"
        assert found["best_of_n"]["score"] is None and found["best_of_n"]["scores"] == [None] * 4

    compares = {"source": "judge", "judge": {}}
    assert "all agree" in serving(workers, body, tmp_path, label=compares)[0]

    async def scored(client: TestClient[Any, Any]) -> None:
        assert (await post(client))[0] == 422, "who scores one by one has failed, and agrees with nobody"

    serving(workers, scored, tmp_path)


def test_without_a_key_a_page_whose_name_leads_here_is_not_answered(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any]) -> None:
        assert (await post(client, headers={"Host": "evil.example:8000"}))[0] == 403
        assert (await post(client, headers={"Host": "localhost:8000"}))[0] == 200

    serving(Workers("a", "b", "c", "d"), body, tmp_path)


def test_who_is_being_answered_when_the_server_stops_is_answered_and_nobody_else_is(tmp_path: Path) -> None:
    workers, settings = Workers("a", "bb", "c", "d"), config(tmp_path, serve={"port": 0})
    tokenizer = load_tokenizer(resolve_model(TINY))

    async def go() -> None:
        service = Service(settings, "tiny", 64, tokenizer, workers, lambda _: None)
        workers.held = asyncio.Event()
        stack = contextlib.AsyncExitStack()
        url = await stack.enter_async_context(listening(service, None, bound(settings.serve)))
        async with ClientSession() as session:
            first = asyncio.ensure_future(session.post(f"{url}/chat/completions", json=ASKED))
            await asyncio.wait_for(workers.asked.wait(), 20)
            closing = asyncio.ensure_future(stack.aclose())
            async with asyncio.timeout(20):
                with pytest.raises(ClientConnectorError):
                    while True:  # until the socket is closed, which is the first thing that happens
                        (await session.get(url.replace("/v1", "/health"))).release()
            workers.held.set()
            async with await first as response:
                assert (await response.json())["choices"][0]["message"]["content"] == "bb"
            await asyncio.wait_for(closing, 20)

    asyncio.run(go())


def test_a_fleet_without_generators_ends_the_server_and_nothing_less_does(tmp_path: Path) -> None:
    workers = Workers("a", "b", "c", "d")

    async def body(client: TestClient[Any, Any]) -> None:
        workers.error = EndpointDownError("https://judge", "no connection", "nobody takes it", "start it")
        status, found = await post(client)
        assert status == 502 and "https://judge" not in json.dumps(found)
        async with client.get("/health") as response:
            assert response.status == 200
        for i in range(MAX_FAILED_IN_A_ROW - 1):  # whatever they asked may be to blame
            workers.error = WorkerDiedError(f"reward worker {i}")
            assert (await post(client))[0] == 503
        async with client.get("/health") as response:
            assert response.status == 200
        workers.error = None
        assert (await post(client))[0] == 200
        workers.error = NoGeneratorError("request-9", ("generator-0: it died",))
        assert (await post(client))[0] == 503
        async with client.get("/health") as response:
            assert response.status == 503

    told = serving(workers, body, tmp_path)
    assert "https://judge" in told[0] and "reward worker 0" in told[1] and "generator-0: it died" in told[-1]


def test_workers_that_fail_one_request_after_the_other_end_the_server(tmp_path: Path) -> None:
    workers = Workers("a", "b", "c", "d")

    async def body(client: TestClient[Any, Any]) -> None:
        workers.error = DeadlineError("generate", "generator-0", 1800.0)
        for i in range(MAX_FAILED_IN_A_ROW):
            async with client.get("/health") as response:
                assert response.status == 200, i
            assert (await post(client))[0] == 503
        async with client.get("/health") as response:
            assert response.status == 503

    serving(workers, body, tmp_path)


def test_the_reply_that_the_documentation_shows_has_what_a_reply_has(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "online.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(\{.*?)```", page, re.DOTALL)
    (shown,) = (json.loads(block) for block in blocks if "best_of_n" in block)

    async def body(client: TestClient[Any, Any]) -> None:
        _, found = await post(client)
        for mine, theirs in ((found, shown), (found["choices"][0], shown["choices"][0])):
            assert theirs.keys() <= mine.keys()
        assert all(found[name].keys() == shown[name].keys() for name in ("usage", "best_of_n"))

    serving(Workers("a", "b", "c", "d"), body, tmp_path)


# --- with an engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["in_process", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_server_answers_a_judges_client_and_stops_when_it_is_told_to(backend: str, tmp_path: Path) -> None:
    """The whole command: a real engine, and a client of our own, as any other."""
    (tmp_path / "score.py").write_text(LETTERS)
    rewards = {"source": "function", "rewards": [{"function": f"{tmp_path}/score.py:letters"}]}
    raw = raw_config(
        tmp_path, label=rewards, select={"drop_truncated": False}, serve={"port": 0, "model_name": "tiny"},
        cluster={"backend": backend, "device": "cpu"},
    )  # fmt: skip
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(raw))
    SelectConfig.model_validate(raw)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "launch.cli", "serve", str(tmp_path / "serve.yaml")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            lines = list[str]()
            for line in server.stdout:  # ends with the server, which has deadlines of its own
                lines.append(line)
                if "http://127.0.0.1:" in line:
                    break
            assert "http://127.0.0.1:" in lines[-1], "".join(lines)[-4000:]
            url = "http://127.0.0.1:" + lines[-1].strip().rpartition(":")[2]

            async def ask() -> tuple[str, dict[str, Any]]:
                respondent = EndpointRespondent(EndpointSettings(base_url=url, model="tiny"), tmp_path / "replies")
                try:
                    said = await respondent.ask(Question("Write a word.", 8))
                finally:
                    await respondent.close()
                body = {**ASKED, "seed": 5, "best_of": 3}
                async with ClientSession() as session:
                    async with session.post(f"{url}/chat/completions", json=body) as response:
                        first = await response.json()
                    async with session.post(f"{url}/chat/completions", json=body) as response:
                        assert (await response.json())["choices"] == first["choices"]
                return said.text, first

            said, found = asyncio.run(asyncio.wait_for(ask(), 120))
            assert said
            best = found["best_of_n"]
            assert len(best["scores"]) == 3 and best["score"] == max(s for s in best["scores"] if s is not None)
            assert best["score"] == sum(c.isalpha() for c in found["choices"][0]["message"]["content"])
            server.send_signal(signal.SIGTERM)
            assert server.wait(120) == 0
        finally:
            server.kill()
    assert not [p for p in tmp_path.iterdir() if p.name not in ("score.py", "serve.yaml", "replies", "__pycache__")]
