"""A group that is asked for twice of one engine: its requests must not be taken for each other."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np

from actors.generator import VLLMGenerator
from actors.vllm_engine import Completion, SampleRequest
from trainers.experience import Prompt
from trainers.protocols import GroupRequest


class Engine:
    version = "0.0"

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    async def sample(self, request: SampleRequest) -> Completion:
        self.asked.append(request)
        await asyncio.sleep(0)
        return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", (("0.0", 1),))


def test_a_group_that_comes_back_while_its_first_try_runs_has_new_request_ids_and_the_same_seeds() -> None:
    generator, engine = object.__new__(VLLMGenerator), Engine()
    generator.name, generator.settings = "generator-0", SimpleNamespace(sampling=SimpleNamespace(stop=()))  # type: ignore[assignment]
    generator._engine, generator._numbers = engine, itertools.count()  # type: ignore[assignment]
    generator._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
    prompt = Prompt("p", np.zeros(3, np.int32), "?", "1")
    request = GroupRequest("7", prompt, num_samples=2, seeds=(5, 6), temperature=1.0, max_tokens=4)

    async def twice() -> None:
        await asyncio.gather(generator.generate(request), generator.generate(request))

    asyncio.run(twice())
    assert len({r.request_id for r in engine.asked}) == 4
    assert [r.seed for r in engine.asked] == [5, 6, 5, 6]
