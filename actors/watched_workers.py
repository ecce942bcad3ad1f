"""A worker group whose calls are accounted for: every call of every worker opens and closes in a time ledger.

Calls, results and errors pass through unchanged.  Workers join the ledger when their group is watched; a call of one
that is not there, because it has left the ledger, is not accounted for.
May import: cluster.worker_group, trainers.{accounting, experience, protocols, time_ledger}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from cluster.worker_group import WorkerGroup
from trainers.accounting import Cause, is_evaluating
from trainers.experience import GroupSummary
from trainers.protocols import GroupRequest
from trainers.time_ledger import Call, TimeLedger
from trainers.waiting import LEARNER

# What a call of each method of a worker is.  Every public method that the controller calls stands here or below;
# tests/test_watching.py looks for those that do not.
CAUSES: Mapping[str, Cause] = {
    "generate": Cause.GENERATE,
    "score": Cause.SCORE,
    "logprobs": Cause.REFERENCE,
    "values": Cause.VALUES,
    "prepare": Cause.LEARN,
    "update": Cause.LEARN,
    "load_weights": Cause.PUSH,
    "init_transfer": Cause.PUSH,
    "stage_weights": Cause.PUSH,
    "weights_call": Cause.PUSH,
    "begin_save": Cause.CHECKPOINT,  # the copy; what is written beside the training is no call
    "export": Cause.CHECKPOINT,
    "load": Cause.START,
    "probe": Cause.START,
}
# A look at a worker, or its end, or for parts of a worker alone: no work of its own.
UNCOUNTED = frozenset(
    {"abort", "close", "evaluating", "meeting_point", "peak_memory_bytes", "ping", "save_outcome", "weight_version"}
)
_SAMPLES = frozenset({Cause.GENERATE, Cause.SCORE, Cause.REFERENCE, Cause.VALUES})


class WatchedWorkers(WorkerGroup):
    """A worker group; call :meth:`watch` before anything else."""

    _ledger: TimeLedger | None = None

    def watch(self, ledger: TimeLedger) -> None:
        """From now on every worker is starting, until the group is ready."""
        self._ledger = ledger
        self._starting: dict[int, Call] = {index: self._joined(ledger, index) for index in self.indices}

    def track(self, index: int) -> str:
        """The worker's name in the ledger."""
        return f"{self.name}-{index}"

    async def ready_at(self, index: int) -> None:
        ledger = self._ledger
        starting = None if ledger is None else self._starting.pop(index, None) or self._joined(ledger, index)
        await super().ready_at(index)
        if ledger is not None and starting is not None:
            ledger.closed(starting)

    def end(self, index: int) -> None:
        """See :meth:`WorkerGroup.end`; a worker that starts again or is added joins with its ``ready_at``."""
        super().end(index)
        if self._ledger is not None:
            self._ledger.leave(self.track(index))

    def _joined(self, ledger: TimeLedger, index: int) -> Call:
        ledger.join(self.track(index), self.name)
        return ledger.opened(self.track(index), Cause.START)

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        with self._accounted(index, method, args) as call:
            result = await super().call(index, method, *args, deadline_s=deadline_s, **kwargs)
            if call is not None and method == "load_weights":
                call.starts_with(Cause.PAUSE, round(1e9 * result["pause_s"]))
            return result

    async def call_split(
        self, index: int, method: str, *args: Any, deadline_s: float, num_payloads: int = 1
    ) -> tuple[Any, ...]:
        with self._accounted(index, method, args) as call:
            parts = await super().call_split(index, method, *args, deadline_s=deadline_s, num_payloads=num_payloads)
            if call is not None and isinstance(parts[0], GroupSummary):
                versions = (str(parts[0].oldest_version), str(parts[0].newest_version))
                call.attributes["version"] = " to ".join(dict.fromkeys(versions))
            return parts

    @contextmanager
    def _accounted(self, index: int, method: str, args: tuple[Any, ...]) -> Iterator[Call | None]:
        ledger, cause, track = self._ledger, self._cause(method), self.track(index)
        if ledger is None or cause is None or not ledger.is_present(track):
            yield None
            return
        call = ledger.opened(track, cause, is_decided=method != "load_weights", **described(method, args))
        counted = ledger.in_flight("sampling") if cause == Cause.GENERATE else nullcontext()
        is_whole = False
        try:
            with counted:
                yield call
            is_whole = True
        finally:
            ledger.closed(call, lost=not is_whole)
            if is_whole and method == "load_weights":
                ledger.count("version", "step", int(str(call.attributes["version"]).rpartition(".")[2]))

    def _cause(self, method: str) -> Cause | None:
        cause = CAUSES.get(method)
        if self.name == LEARNER and cause == Cause.SCORE:
            return Cause.START  # the probe's other half
        return Cause.EVALUATE if cause in _SAMPLES and is_evaluating() else cause


def described(method: str, args: tuple[Any, ...]) -> dict[str, str | int]:
    """Attributes of a call for the trace: what it is about, as far as its arguments say."""
    if method == "generate" and isinstance(args[0], GroupRequest):
        return {"group": args[0].group_id}
    if method == "update":
        return {"step": int(args[1])}
    if method == "load_weights":
        return {"version": str(args[1]["version"])}
    return {}
