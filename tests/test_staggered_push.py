"""Which generators pause at the same time during a push; tests/test_weight_channel.py tests the transfers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.publisher import Publisher, Transport
from actors.roster import Member, Roster
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


@pytest.mark.parametrize("transport", ["file", "ipc", "group"])
@pytest.mark.parametrize(("staggered", "together"), [(True, 1), (False, 3)])
def test_while_groups_run_one_generator_pauses_at_a_time(
    tmp_path: Path, transport: Transport, staggered: bool, together: int
) -> None:
    generators = Generators()
    roster = Roster()
    for i in range(3):
        roster.admit(Member(i, f"generator-{i}"))
    publisher = Publisher(
        Learners(), generators, roster, transport, tmp_path, "float32", 8, 1, 10.0, staggered  # type: ignore[arg-type]
    )
    report = asyncio.run(publisher.push(WeightVersion(0, 1)))
    assert generators.loaded == [0, 1, 2] and generators.together == together
    assert report.pause_s == pytest.approx(0.3), "the longest pause of one generator, not the sum"
    assert report.num_verified == 3
