"""Payloads by reference: what a reference is here and how it becomes a value.

A payload is either a Ray object reference or, in process, already the value; whoever holds one need
not know which.  References inside dataclasses and lists are left alone by Ray, so a record may carry
its payload through any number of actors without the bytes following it.

Ownership: an object belongs to the process that called ``put`` or, for a return value, to the process
that called the method, and is gone when its owner is.  So workers hand results back as return values
(``WorkerGroup.call_split``), never as references that they put themselves.

May import: ray and the errors of this room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from cluster.errors import DeadlineError, WorkerError


def fetch(payload: Any, deadline_s: float) -> Any:
    """The value of one payload.  DeadlineError when it does not come, WorkerError when it is lost."""
    return fetch_all([payload], deadline_s)[0]


def fetch_all(payloads: Sequence[Any], deadline_s: float) -> list[Any]:
    """Values in the order of ``payloads``, fetched together within one deadline."""
    references = [payload for payload in payloads if isinstance(payload, ray.ObjectRef)]
    if not references:
        return list(payloads)
    try:
        values = iter(ray.get(references, timeout=deadline_s))
    except GetTimeoutError:
        missing = len(references) - len(ray.wait(references, num_returns=len(references), timeout=0)[0])
        awaited = f"{missing} of {len(references)} payloads"
        raise DeadlineError(awaited, "the object store", deadline_s) from None
    except RayTaskError as error:
        if isinstance(error.cause, BaseException):
            raise error.cause from error
        raise
    except ObjectLostError as error:
        raise WorkerError(f"a payload is lost: {' '.join(str(error).split())}") from error
    except RayError as error:
        raise WorkerError(f"a payload never came to be: {' '.join(str(error).split())}") from error
    return [next(values) if isinstance(payload, ray.ObjectRef) else payload for payload in payloads]


async def settle(payload: Any, deadline_s: float) -> None:
    """Return when a copy of the payload is on this node: a worker's node may then be lost without it.

    Raises:
        DeadlineError: it did not come.
        WorkerError: it is lost.
    """
    if not isinstance(payload, ray.ObjectRef):
        return
    try:
        async with asyncio.timeout(deadline_s):
            await payload  # the bytes stay in the store and are only mapped here
    except TimeoutError:
        raise DeadlineError("a payload", "the object store", deadline_s) from None
    except RayError as error:
        raise WorkerError(f"a payload is lost: {' '.join(str(error).split())}") from error


def put(value: Any) -> Any:
    """A payload of ``value``, owned by this process: a reference where Ray runs, else the value itself."""
    return ray.put(value) if ray.is_initialized() else value
