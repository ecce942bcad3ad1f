"""A stand-in for an OpenAI-compatible endpoint on loopback: it answers, or fails in the way a test asks for.

It runs in a thread with a loop of its own, so code under test may start loops as it likes.  Not a test file.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

from aiohttp import web

from actors.endpoint import SIMPLE

Says = Callable[[str], str]  # the user's turn -> what the model says
Fault = Callable[[int, dict[str, Any]], Awaitable[web.Response | None]]  # (number of the request, body); None: answer


def reply(text: str, finish: str = "stop") -> dict[str, Any]:
    """A chat completion."""
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }


class StandIn(AbstractContextManager["StandIn"]):
    """``url`` is its base_url while the block lasts; ``bodies`` and ``headers`` are what it was sent."""

    def __init__(self, says: Says = lambda text: "OK", fault: Fault | None = None) -> None:
        self.says, self.fault = says, fault
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        assert self._ready.wait(20), "the stand-in did not come up"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)

    @property
    def questions(self) -> list[str]:
        """Users' turns, in the order of arrival."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.fault is not None and (response := await self.fault(len(self.bodies), body)) is not None:
            return response
        asked = body["messages"][-1]["content"]
        return web.json_response(reply("OK" if asked == SIMPLE.text else self.says(asked)))


def between(text: str, start: str, end: str) -> str:
    """What stands in ``text`` between two marks."""
    return text.split(start, 1)[1].split(end, 1)[0]
