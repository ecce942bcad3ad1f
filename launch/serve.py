"""``burnish serve``: the best of n answers behind an OpenAI-compatible endpoint.

    POST /v1/chat/completions -> n candidates (generators) -> who scores -> the best one
    GET  /v1/models, /health

The fleet, the scorers and the choice are those of ``burnish answer`` (launch/select.py); nothing is written down.
May import: everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web
from rich.console import Console

from actors.endpoint import read_key
from actors.modeling import load_tokenizer
from cluster.errors import DeadlineError, WorkerError
from launch.candidates import Samples, sample_candidates
from launch.label_fleet import start_fleet
from launch.label_prepare import PreparedLabel, prepare_label
from launch.label_records import record_of
from launch.label_sources import Labeller
from launch.prompts import build_prompts
from launch.select import ANSWERS, of_one_prompt
from launch.select_config import SelectConfig
from launch.select_records import Selection, answer_rows
from launch.serve_config import ServeSettings
from launch.serve_protocol import ApiError, Ask, answer_json, no_answer, read_request
from trainers.errors import EndpointError, GroupFailedError, InputError, NoGeneratorError

GREETING = [{"role": "user", "content": "Hello."}]  # stands for the requests while they are not there
MAX_BODY_BYTES = 4 * 2**20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Backend(Protocol):
    """What samples and scores: a :class:`launch.label_fleet.LabelFleet`."""

    @property
    def generator(self) -> Samples: ...

    @property
    def labeller(self) -> Labeller: ...


class Service:
    """Answers requests; ``failed`` is done when it will never answer again, and raises why."""

    def __init__(
        self, config: SelectConfig, model: str, max_length: int, tokenizer: Any, backend: Backend,
        told: Callable[[str], None], clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.config, self.model, self._max_length, self._tokenizer = config, model, max_length, tokenizer
        self._backend, self._told, self._clock = backend, told, clock
        self._numbers = itertools.count()
        self._num_running = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def complete(self, body: Any) -> dict[str, Any]:
        """The chat completion that ``body`` asks for.

        Raises:
            ApiError: there is none, and why.
        """
        started, settings = time.perf_counter(), self.config.serve
        ask = read_request(body, self.model, self.config.sampling, 2 if self.config.compares else 1)
        if self._num_running >= settings.max_requests:
            raise ApiError(429, "overloaded", f"{settings.max_requests} requests are being answered; come again")
        self._num_running += 1
        number = next(self._numbers)
        try:
            async with asyncio.timeout(settings.deadline_s):
                answered = await self._best(ask, number)
        except TimeoutError as error:
            what = error if isinstance(error, DeadlineError) else f"no answer within {settings.deadline_s:g} s"
            self._told(f"request {number}: {what}")
            raise ApiError(504, "timeout", f"no answer within {settings.deadline_s:g} s") from error
        except EndpointError as error:
            self._told(f"request {number}: {error}")
            raise ApiError(502, "scorer", f"who scores cannot be asked: {type(error).__name__}") from error
        except (WorkerError, GroupFailedError) as error:
            self._told(f"request {number}: {error}")
            if isinstance(error, WorkerError | NoGeneratorError) and not self.failed.done():
                self.failed.set_exception(error)
            raise ApiError(503, "worker", "a worker behind this server has failed") from error
        finally:
            self._num_running -= 1
        best, usage = answered["best_of_n"], answered["usage"]
        self._told(
            f"request {number}: best of {len(best['scores'])}, score {best['score']:.4g}, "
            f"{usage['completion_tokens']} tokens, {time.perf_counter() - started:.1f} s"
        )
        return answered

    async def _best(self, ask: Ask, number: int) -> dict[str, Any]:
        try:
            room = self._max_length - ask.sampling.max_tokens
            rows = [{"prompt": ask.messages}]
            (prompt,) = build_prompts(rows, self.config.prompts, self._tokenizer, room, "messages")
        except InputError as error:
            raise ApiError(400, "invalid_request_error", str(error), "messages") from error
        # Without a seed the same question is sampled anew each time it comes.
        seed, turn = (self.config.run.seed, number + 1) if ask.seed is None else (ask.seed, 0)
        group, temperatures = await sample_candidates(
            self._backend.generator, prompt, ask.sampling, seed, turn, f"request-{number}"
        )
        labels, notes = await self._backend.labeller.label(group, turn)
        selection, record = Selection(), record_of(number, turn, group, temperatures, labels, notes)
        (row,) = answer_rows([record], self.config.select, selection)
        if row["completion"] is None:
            raise no_answer(selection.dropped)
        num_sampled = sum(t.num_tokens for t in group.trajectories)
        created, num_prompt = int(self._clock()), len(prompt.token_ids)
        return answer_json(row, uuid.uuid4().hex, self.model, created, num_prompt, num_sampled)


def application(service: Service, key: str | None) -> web.Application:
    """The routes.  Every answer, a refusal too, is JSON; with ``key``, requests bring it as a bearer token."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if key is not None and request.path != "/health" and not _brings(request, key):
                raise ApiError(401, "invalid_request_error", "the key is missing or wrong; send it as a bearer token")
            return await handler(request)
        except ApiError as error:
            more = {"Retry-After": "1"} if error.status == 429 else {}
            return web.json_response(error.to_json(), status=error.status, headers=more)
        except web.HTTPException as error:  # no such route, another method, a body that is too large
            refused = ApiError(error.status, "invalid_request_error", error.reason)
            return web.json_response(refused.to_json(), status=error.status)

    async def complete(request: web.Request) -> web.Response:
        # Only JSON by name: a web page of another origin cannot send that without asking first.
        if request.content_type != "application/json":
            raise ApiError(415, "invalid_request_error", "send the body as application/json")
        try:
            body = await request.json()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, "invalid_request_error", f"the body is no JSON: {error}") from error
        return web.json_response(await service.complete(body))

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": service.model, "object": "model"}]})

    async def health(_: web.Request) -> web.Response:
        is_well = not service.failed.done()
        return web.json_response({"status": "ok" if is_well else "failed"}, status=200 if is_well else 503)

    app = web.Application(middlewares=[guarded], client_max_size=MAX_BODY_BYTES)
    app.add_routes([
        web.post("/v1/chat/completions", complete), web.get("/v1/models", models), web.get("/health", health),
    ])  # fmt: skip
    return app


def _brings(request: web.Request, key: str) -> bool:
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    return hmac.compare_digest(given, f"Bearer {key}".encode())


def serve(config: SelectConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM: requests that are being answered are, new ones are not taken.

    Raises:
        InputError: something in the configuration, the model or the scorer cannot be used, or the port is taken.
        WorkerError, NoGeneratorError: a worker that nobody replaces has ended.
    """
    if config.select.top_k != 1:
        raise InputError("select.top_k", config.select.top_k, "burnish serve gives every request one answer, the best",
                         "set select.top_k=1")  # fmt: skip
    key = read_key(config.serve.api_key_env, "serve.api_key_env", "export it where the server starts")
    with contextlib.closing(bound(config.serve)) as sock, tempfile.TemporaryDirectory(prefix="burnish-") as scratch:
        own = of_one_prompt(config, GREETING, scratch)
        prepared = prepare_label(own.labelling(ANSWERS))
        asyncio.run(_serve(own, prepared, key, sock, console))


def bound(settings: ServeSettings) -> socket.socket:
    """The socket, before anything is allocated; it does not listen yet."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError("serve.host", settings.host, f"is no address ({error})", "use one of this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        where = f"{settings.host}:{settings.port}"
        raise InputError("serve.port", where, f"cannot be listened on ({error.strerror})",
                         "use another serve.port (0: any free one) or serve.host") from error  # fmt: skip
    return sock


async def _serve(
    config: SelectConfig, prepared: PreparedLabel, key: str | None, sock: socket.socket, console: Console
) -> None:
    def told(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    model = config.serve.model_name or prepared.model_path.rstrip("/").rpartition("/")[2]
    fleet = await start_fleet(config.labelling(ANSWERS), prepared)
    try:
        service = Service(config, model, prepared.max_length, load_tokenizer(prepared.model_path), fleet, told)
        async with listening(service, key, sock) as url, _signals() as stopped:
            told(f"{model}, best of {config.sampling.num_candidates}: {url}")
            await asyncio.wait({stopped, service.failed}, return_when=asyncio.FIRST_COMPLETED)
        if service.failed.done():
            service.failed.result()
    finally:
        await fleet.close()


@contextlib.asynccontextmanager
async def listening(service: Service, key: str | None, sock: socket.socket) -> AsyncIterator[str]:
    """The address, up to and with ``/v1``.  At the end those who are being answered are, and nobody else is let in."""
    deadline_s = service.config.serve.deadline_s
    runner = web.AppRunner(application(service, key), access_log=None, shutdown_timeout=deadline_s)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        host, port = sock.getsockname()[:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Future[None]]:
    """Done by the first SIGINT or SIGTERM; the second one ends the process as it always would."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()
    handled = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stopped.set_result(None)
        for number in handled:
            loop.remove_signal_handler(number)

    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stopped
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
