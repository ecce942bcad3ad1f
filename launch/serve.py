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
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from rich.console import Console

from actors.endpoint import read_key
from actors.modeling import load_tokenizer
from launch.answer_service import Service
from launch.label_fleet import start_fleet
from launch.label_prepare import PreparedLabel, prepare_label
from launch.select import ANSWERS, of_one_prompt
from launch.select_config import SelectConfig
from launch.serve_config import ServeSettings, is_loopback
from launch.serve_protocol import ApiError
from launch.signals import stop_on_signals
from trainers.errors import InputError

GREETING = [{"role": "user", "content": "Hello."}]  # stands for the requests while they are not there
MAX_BODY_BYTES = 2**20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(service: Service, key: str | None) -> web.Application:
    """The routes.  Refusals are JSON as answers are; with ``key``, requests bring it as a bearer token."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if key is not None and request.path != "/health" and not _brings(request, key):
                raise ApiError(401, "invalid_request_error", "the key is missing or wrong; send it as a bearer token")
            if key is None and not is_loopback(request.url.host or ""):
                # A page on the web whose name was made to lead here would be of our own origin.
                raise ApiError(403, "invalid_request_error", "without a key only localhost is answered")
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
        except (ValueError, LookupError, RecursionError) as error:  # no JSON, no text, no such charset
            raise ApiError(400, "invalid_request_error", f"the body is no JSON: {error}") from error
        return web.json_response(await service.complete(body))

    began = int(service.clock())
    card = {"id": service.model, "object": "model", "created": began, "owned_by": "burnish"}

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [card]})

    async def one_model(request: web.Request) -> web.Response:
        if request.match_info["name"] != service.model:
            raise ApiError(404, "invalid_request_error", f"there is no such model here; ask for {service.model!r}")
        return web.json_response(card)

    async def health(_: web.Request) -> web.Response:
        is_well = not service.failed.done()
        return web.json_response({"status": "ok" if is_well else "failed"}, status=200 if is_well else 503)

    app = web.Application(middlewares=[guarded], client_max_size=MAX_BODY_BYTES)
    app.add_routes([
        web.post("/v1/chat/completions", complete), web.get("/v1/models", models),
        web.get("/v1/models/{name:.+}", one_model), web.get("/health", health),
    ])  # fmt: skip
    return app


def _brings(request: web.Request, key: str) -> bool:
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    return hmac.compare_digest(given, f"Bearer {key}".encode())


def serve(config: SelectConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM: requests that are being answered are, new ones are not taken.

    Raises:
        InputError: something in the configuration, the model or the scorer cannot be used, or the port is taken.
        NoGeneratorError, WorkerError, DeadlineError: no generator is left, or one request after the other fails.
    """
    if config.select.top_k != 1:
        raise InputError("select.top_k", config.select.top_k, "burnish serve gives every request one answer, the best",
                         "set select.top_k=1")  # fmt: skip
    if config.prompts.template != "{prompt}" or not config.prompts.chat:
        what = "template" if config.prompts.chat else "chat"
        why = "requests bring whole conversations, which are shown by the chat template alone"
        remedy = "leave it out, and have clients send what they mean"
        raise InputError(f"prompts.{what}", getattr(config.prompts, what), why, remedy)
    key = read_key(config.serve.api_key_env, "serve.api_key_env", "export it where the server starts")
    with contextlib.closing(bound(config.serve)) as sock, tempfile.TemporaryDirectory(prefix="burnish-") as scratch:
        own = of_one_prompt(config, GREETING, scratch)
        prepared = prepare_label(own.labelling(ANSWERS))
        asyncio.run(_serve(own, prepared, key, sock, console))


def bound(settings: ServeSettings) -> socket.socket:
    """The socket, before anything is allocated.  Nobody else can have the port; who comes early waits."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError("serve.host", settings.host, f"is no address ({error})", "use one of this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
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
        over = asyncio.Event()
        service.failed.add_done_callback(lambda _: over.set())
        async with listening(service, key, sock) as url, stop_on_signals(over.set, None, None):
            told(f"{model}, best of {config.sampling.num_candidates}: {url}")
            await over.wait()
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
        await service.finish()
