"""Before anything is sampled for training: do generators and learner mean the same by the same weights?

May import: numpy, actors.publisher, trainers.errors.
"""

from __future__ import annotations

import asyncio

import numpy as np

from actors.publisher import Publisher
from trainers.errors import VerificationError


async def probe(
    publisher: Publisher, prompts: list[np.ndarray], max_tokens: int, seed: int, tolerance: float, deadline_s: float
) -> dict[str, float]:
    """``mean_difference`` of the log-probs of the same tokens, in nats, of the generator where it is largest.

    Every member samples each of ``prompts`` (int32 [P]) once, the learner scores what came.  ``deadline_s``, of a
    member's samples and of their scores, is that of a start: an engine's first work takes as long as the libraries and
    kernels that it needs for the first time take to load, on a machine that has just been started a good while.

    Raises:
        DeadlineError: a generator or the learner did not answer.
        VerificationError: the mean absolute difference of some generator exceeds ``tolerance`` nats, or there is none.
    """
    worst = 0.0
    if not len(publisher.roster):
        raise VerificationError(f"no generator took the first push in; {publisher.roster.last_reason}")
    for member in publisher.roster.members:
        engine = member.index
        samples = await asyncio.gather(
            *(
                publisher.generators.call(engine, "probe", p.tolist(), max_tokens, seed + i, deadline_s=deadline_s)
                for i, p in enumerate(prompts)
            )
        )
        scored = await publisher.learner.call_all("score", prompts, [ids for ids, _ in samples], deadline_s=deadline_s)
        difference = np.concatenate([np.abs(b - p) for (_, b), p in zip(samples, scored[0], strict=True)])
        worst = max(worst, float(difference.mean()))
        if difference.mean() > tolerance:
            raise VerificationError(
                f"push.probe_tolerance = {tolerance:g}: generator-{engine} and the learner differ by "
                f"{difference.mean():.4f} nats a token on the same weights; check model.dtype and the model's "
                "support in vLLM, or raise the tolerance if you know why"
            )
    return {"mean_difference": worst}
