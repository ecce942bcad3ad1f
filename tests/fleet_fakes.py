"""Workers that die, freeze, start and leave as they are told, and a fleet of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.generator_fleet import GeneratorFleet
from actors.membership import Recruiting
from actors.roster import Member
from cluster.errors import DamagedError, DeadlineError, WorkerDiedError
from cluster.layout import WorkerSlot
from cluster.settings import HealthSettings
from trainers.experience import GroupSummary, Prompt, WeightVersion
from trainers.protocols import GeneratedGroup, GroupRequest

LIMIT_S = 20.0  # for a whole law; the waits in it are for events
SOON_S = 0.05


class FakeGroup:
    """Stands for a WorkerGroup.  ``doing`` decides what a call does; killed and frozen workers are as in Ray."""

    in_process = False
    placement = None
    start_deadline_s = 30.0

    def __init__(self, name: str, num_workers: int, doing: Callable[..., Any]) -> None:
        self.name, self.doing = name, doing
        self.alive: dict[int, asyncio.Event] = {}  # set when the worker has died
        self.frozen: set[int] = set()
        self.bad_starts = 0  # starts that will fail
        self.next_index = 0
        self.ended: list[int] = []
        self.calls: list[tuple[int, str, Any]] = []
        for _ in range(num_workers):
            self.add()

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(sorted(self.alive))

    def add(self) -> int:
        self.next_index += 1
        self.alive[self.next_index - 1] = asyncio.Event()
        return self.next_index - 1

    def slot(self, index: int) -> WorkerSlot:
        return WorkerSlot(self.name, index, 0, 0.0, 1.0, 1, ())

    def source(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def is_lost(self, index: int, error: BaseException) -> bool:
        silent = isinstance(error, DeadlineError) and error.source == self.source(index)
        return isinstance(error, WorkerDiedError) or silent

    def kill(self, index: int) -> None:
        self.alive[index].set()

    def end(self, index: int) -> None:
        if self.alive.pop(index, None) is not None:
            self.ended.append(index)

    async def retire(self, index: int) -> None:
        self.end(index)

    async def restart(self, index: int, slot: WorkerSlot) -> None:
        self.end(index)
        self.alive[index] = asyncio.Event()
        await self.ready_at(index)

    async def ready_at(self, index: int) -> None:
        if self.bad_starts:
            self.bad_starts -= 1
            raise MemoryError("no room on the device")

    async def ping(self, index: int, deadline_s: float) -> None:
        await self.call(index, "ping", deadline_s=deadline_s)

    async def call_split(self, index: int, method: str, *args: Any, deadline_s: float, num_payloads: int = 1) -> Any:
        return await self.call(index, method, *args, deadline_s=deadline_s)

    async def call(self, index: int, method: str, *args: Any, deadline_s: float) -> Any:
        self.calls.append((index, method, args))
        if index not in self.alive:
            raise WorkerDiedError(f"{self.source(index)} has ended")
        died = self.alive[index]
        answer = asyncio.ensure_future(self._answer(index, method, args))
        dying = asyncio.ensure_future(died.wait())
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.wait((answer, dying), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise DeadlineError(method, self.source(index), deadline_s) from None
        finally:
            dying.cancel()
            if not answer.done():
                answer.cancel()
        if died.is_set():
            raise WorkerDiedError(f"{self.source(index)} died in {method}")
        return answer.result()

    async def _answer(self, index: int, method: str, args: tuple[Any, ...]) -> Any:
        if index in self.frozen:
            await asyncio.Event().wait()
        return None if method == "ping" else await self.doing(index, method, *args)


def request(number: int, prompt: str | None = None, num_samples: int = 2) -> GroupRequest:
    ids = np.array([1, 2, 3], np.int32)
    seeds = tuple(1000 * number + i for i in range(num_samples))
    return GroupRequest(str(number), Prompt(prompt or f"p{number}", ids, "text"), num_samples, seeds, 1.0, 8)


def summary(group: GroupRequest, worker: int) -> GroupSummary:
    now, lengths = WeightVersion(0, 0), (4,) * group.num_samples
    reasons: tuple[Any, ...] = ("stop",) * group.num_samples
    name = f"generator-{worker}"
    return GroupSummary(group.group_id, group.prompt.prompt_id, 3, lengths, reasons, now, now, name, 0.1)


def run(law: Callable[[], Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(LIMIT_S):
            return await law()

    return asyncio.run(bounded())


class World:
    """One fleet, the engines behind it, and everything that was told of it."""

    def __init__(self, num_workers: int, num_seats: int | None = None, **health: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.told = asyncio.Condition()
        self.gate = asyncio.Event()  # generation waits for it
        self.gate.set()
        self.sampled: list[tuple[int, GroupRequest]] = []  # (worker, request) as they reach an engine
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.bad_catch_ups = 0
        self.vacated: list[int] = []
        self.group = FakeGroup("generator", num_workers, self.generate)
        settings = HealthSettings(**{"detect_s": 60.0, "retry_s": SOON_S} | health)
        self.fleet = GeneratorFleet(self.group, LIMIT_S, settings, self.event, num_seats)  # type: ignore[arg-type]

    def open(self) -> None:
        self.fleet.open(Recruiting(self.hire, self.catch_up, self.quiet.wait, self.vacated.append))  # type: ignore[arg-type]

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self.told:
                self.told.notify_all()

        self.notifying = asyncio.ensure_future(notify())

    async def until(self, true: Callable[[], Any]) -> None:
        async with self.told:
            await self.told.wait_for(true)

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    async def hire(self) -> int:
        self._notify()
        return self.group.add()

    async def catch_up(self, member: Member) -> str:
        if self.bad_catch_ups:
            self.bad_catch_ups -= 1
            raise DamagedError("weights.safetensors: q_proj has another fingerprint")
        self.fleet.roster.admit(member)
        self._notify()
        return "0.7"

    async def generate(self, index: int, method: str, asked: GroupRequest) -> Any:
        self.sampled.append((index, asked))
        self._notify()
        await self.gate.wait()
        return summary(asked, index), f"payload {asked.group_id}"

    def ask(self, number: int, **fields: Any) -> asyncio.Task[GeneratedGroup]:
        return asyncio.create_task(self.fleet.generate(request(number, **fields)))
