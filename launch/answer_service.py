"""One request of ``burnish serve``: n candidates, who scores, the best one; and what becomes of it when that fails.

May import: cluster.errors, trainers.errors, launch.*.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from cluster.errors import DeadlineError, WorkerError
from launch.candidates import Samples, sample_candidates
from launch.label_records import record_of
from launch.label_sources import Labeller
from launch.prompts import build_prompts
from launch.select_config import SelectConfig
from launch.select_records import Selection, answer_rows
from launch.serve_protocol import ApiError, Ask, answer_json, no_answer, read_request
from trainers.errors import EndpointError, GroupFailedError, InputError, NoGeneratorError

MAX_FAILED_IN_A_ROW = 8  # requests: then it is not they that are to blame


class Backend(Protocol):
    """What samples and scores: a :class:`launch.label_fleet.LabelFleet`."""

    @property
    def generator(self) -> Samples: ...

    @property
    def labeller(self) -> Labeller: ...


class Service:
    """Answers requests; ``failed`` is done when it will never answer again, and raises why.

    Who asked may go, or be too late; what was begun for him goes on and keeps its place until its workers are done.  So
    they never have more to do than ``serve.max_requests`` answers, and one that hangs meets the deadline of its group.
    """

    def __init__(
        self, config: SelectConfig, model: str, max_length: int, tokenizer: Any, backend: Backend,
        told: Callable[[str], None], clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.config, self.model, self._max_length, self._tokenizer = config, model, max_length, tokenizer
        self._backend, self._told, self.clock = backend, told, clock
        self._numbers, self._first_turn = itertools.count(), secrets.randbits(40)
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._num_failed = 0  # in a row
        self._tokenizing = asyncio.Lock()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def complete(self, body: Any) -> dict[str, Any]:
        """The chat completion that ``body`` asks for.

        Raises:
            ApiError: there is none, and why.
        """
        settings = self.config.serve
        ask = read_request(body, self.model, self.config.sampling, 2 if self.config.compares else 1)
        if len(self._running) >= settings.max_requests:
            raise ApiError(429, "overloaded", f"{settings.max_requests} requests are being answered; come again")
        work = asyncio.create_task(self._answer(ask, next(self._numbers)))
        self._running.add(work)
        work.add_done_callback(self._done)
        done, _ = await asyncio.wait({work}, timeout=settings.deadline_s)
        if not done:
            raise ApiError(504, "timeout", f"no answer within {settings.deadline_s:g} s")
        return work.result()

    async def finish(self) -> None:
        """Give up what nobody waits for any more."""
        for work in self._running:
            work.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _done(self, work: asyncio.Task[dict[str, Any]]) -> None:
        self._running.discard(work)
        error = None if work.cancelled() else work.exception()
        if error is not None and not isinstance(error, ApiError):
            self._told(f"a request failed: {type(error).__name__}: {error}")  # whoever asked may have gone

    async def _answer(self, ask: Ask, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            answered = await self._best(ask, number)
        except EndpointError as error:
            self._told(f"request {number}: {error}")
            raise ApiError(502, "scorer", f"who scores cannot be asked: {type(error).__name__}") from error
        except (WorkerError, GroupFailedError, DeadlineError) as error:
            self._told(f"request {number}: {error}")
            self._num_failed += 1
            is_over = isinstance(error, NoGeneratorError) or self._num_failed >= MAX_FAILED_IN_A_ROW
            if is_over and not self.failed.done():
                self.failed.set_exception(error)
            raise ApiError(503, "worker", "a worker behind this server has failed") from error
        self._num_failed = 0
        best, usage = answered["best_of_n"], answered["usage"]
        score = "all agree" if best["score"] is None else f"score {best['score']:.4g}"
        self._told(
            f"request {number}: best of {len(best['scores'])}, {score}, {usage['completion_tokens']} tokens, "
            f"{time.perf_counter() - started:.1f} s"
        )
        return answered

    async def _best(self, ask: Ask, number: int) -> dict[str, Any]:
        try:
            room, rows = self._max_length - ask.sampling.max_tokens, [{"prompt": ask.messages}]
            # In a thread: a long text takes its time, and everybody else would wait.  One at a time: a tokenizer is not
            # made for several threads.
            async with self._tokenizing:
                (prompt,) = await asyncio.to_thread(
                    build_prompts, rows, self.config.prompts, self._tokenizer, room, "messages"
                )
        except InputError as error:  # its value is the whole prompt, with the system message that is ours
            raise ApiError(400, "invalid_request_error", f"messages: {error.reason}", "messages") from error
        # Without a seed the same question is sampled anew each time it comes.
        seed, turn = (self.config.run.seed, self._first_turn + number) if ask.seed is None else (ask.seed, 0)
        group, temperatures = await sample_candidates(
            self._backend.generator, prompt, ask.sampling, seed, turn, f"request-{number}"
        )
        labels, notes = await self._backend.labeller.label(group, turn)
        selection, record = Selection(), record_of(number, turn, group, temperatures, labels, notes)
        (row,) = answer_rows([record], self.config.select, selection, self.config.compares)
        if row["completion"] is None:
            raise no_answer(selection.dropped)
        num_sampled = sum(t.num_tokens for t in group.trajectories)
        created, num_prompt = int(self.clock()), len(prompt.token_ids)
        return answer_json(row, uuid.uuid4().hex, self.model, created, num_prompt, num_sampled)
