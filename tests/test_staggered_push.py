"""Which generators pause at the same time during a push; tests/test_weight_channel.py tests the transfers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.publisher import Publisher, Transport
from actors.roster import Member, Roster
from cluster.errors import DamagedError
from trainers.experience import WeightVersion

MANIFEST = {"version": "0.1", "tensors": [], "fingerprints": {}}


class Learners:
    def __len__(self) -> int:
        return 3  # a serving rank for each generator: those of one rank take turns anyway

    async def call_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [MANIFEST]

    async def call(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return ("127.0.0.1", 1) if method == "meeting_point" else []


class Generators:
    """Notes how many of three load at the same time."""

    def __init__(self) -> None:
        self.loading, self.together, self.loaded = 0, 0, []

    def __len__(self) -> int:
        return 3

    async def call(self, engine: int, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if method == "load_weights":
            self.loading += 1
            self.together = max(self.together, self.loading)
            await asyncio.sleep(0)
            self.loading -= 1
            self.loaded.append(engine)
        return {"pause_s": 0.1 * (engine + 1), "num_after_load": 5 - engine, "num_at_arrival": 5}


def publisher_of(
    num_members: int, generators: Generators, transport: Transport, staggered: bool, folder: Path
) -> Publisher:
    roster = Roster()
    for i in range(num_members):
        roster.admit(Member(i, f"generator-{i}"))
    return Publisher(
        Learners(), generators, roster, transport, folder, "float32", 8, 1, 10.0, staggered  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("transport", ["file", "ipc", "group"])
@pytest.mark.parametrize(("num", "staggered", "together"), [(3, True, 1), (3, False, 3), (9, True, 3), (9, False, 9)])
def test_while_groups_run_a_quarter_of_the_generators_pauses_at_a_time(
    tmp_path: Path, transport: Transport, num: int, staggered: bool, together: int
) -> None:
    generators = Generators()
    if transport == "group":  # those of one serving rank take turns
        together = min(together, len(Learners()))
    publisher = publisher_of(num, generators, transport, staggered, tmp_path)
    report = asyncio.run(publisher.push(WeightVersion(0, 1)))
    assert sorted(generators.loaded) == list(range(num)) and generators.together == together
    assert report.pause_s == pytest.approx(0.1 * num), "the longest pause of one generator, not the sum"
    assert report.num_verified == 6 - num


def test_a_generator_that_failed_is_out_before_the_next_ones_are_served(tmp_path: Path) -> None:
    class Failing(Generators):
        async def call(self, engine: int, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            if method == "load_weights" and engine == 0:
                raise DamagedError("q_proj")
            present.append([member.index for member in publisher.roster.members])
            return await super().call(engine, method, *args, **kwargs)

    present: list[list[int]] = []
    publisher = publisher_of(3, Failing(), "file", True, tmp_path)
    asyncio.run(publisher.push(WeightVersion(0, 1)))
    assert present == [[1, 2], [1, 2]]
