"""The held-out evaluations of a run: its samples, its metrics, and the start that later ones are compared with.

May import: actors and cluster.transport, trainers.*, launch.{assemble, config, live_instruments, prepare, telemetry}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.transport import fetch
from launch.assemble import Fleet
from launch.config import RunConfig
from launch.journal import strict
from launch.live_instruments import FirstEvaluation, live_metrics
from launch.telemetry import Telemetry
from trainers.accounting import evaluating
from trainers.evaluation import EvaluationReport, evaluate
from trainers.experience import Prompt, TrajectoryGroup, WeightVersion, decode_group

PAYLOAD_DEADLINE_S = 120.0


class HeldOut:
    """Evaluates the policy, at step 0 to have a start and then as often as the loop asks.

    ``saved`` is :meth:`state_dict` of the checkpoint that the run goes on from.  It is passed over when it is of other
    prompts: there is then nothing to win against.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        fleet: Fleet,
        telemetry: Telemetry,
        folder: Path,
        saved: Mapping[str, Any] | None,
    ) -> None:
        self._config, self._prompts, self._fleet = config, prompts, fleet
        self._telemetry, self._folder = telemetry, folder
        self._num_samples = config.evaluation.num_samples
        names = [*(prompt.prompt_id for prompt in prompts), str(self._num_samples)]
        self._digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
        self.first: FirstEvaluation | None = None
        if saved is not None and saved["digest"] == self._digest:
            rewards = tuple(float("nan") if r is None else float(r) for r in saved["rewards"])
            self.first = FirstEvaluation(rewards, self._num_samples)

    def state_dict(self) -> dict[str, Any] | None:
        """JSON values: the rewards of step 0 (null: none), and what they are rewards of; None before it."""
        return None if self.first is None else {"rewards": strict(self.first.rewards), "digest": self._digest}

    async def evaluate(self, step: int, version: WeightVersion, last: bool) -> dict[str, float]:
        """Metrics of one evaluation under ``version``; the first and the last are kept as samples-*.jsonl."""
        settings = self._config.evaluation
        with evaluating():
            report = await evaluate(
                self._prompts, self._fleet.generator, self._fleet.scorer, version=version, step=step,
                num_samples=self._num_samples, temperature=settings.temperature,
                max_tokens=self._config.generator.sampling.max_tokens,
                reward=settings.reward or self._config.reward_names[0], seed=self._config.run.seed,
                progress=lambda done, total: self._telemetry.phase("evaluate", done, total),
            )  # fmt: skip
        groups = [decode_group(fetch(g.payload, PAYLOAD_DEADLINE_S)) for g in report.groups]
        if step == 0:
            self._write("samples-before.jsonl", groups, report)
        if last:
            self._write("samples-after.jsonl", groups, report)
        return report.metrics | self._instruments(step, groups, report)

    def _instruments(self, step: int, groups: Sequence[TrajectoryGroup], report: EvaluationReport) -> dict[str, float]:
        samples = [t for group in groups for t in group.trajectories]
        rewards = np.concatenate([r.totals for r in report.rewards])
        first = None if step == 0 else self.first
        metrics = live_metrics(
            [t.text for t in samples], [t.num_tokens for t in samples],
            [t.finish_reason == "length" for t in samples], rewards, first,
        )  # fmt: skip
        if step == 0:
            self.first = FirstEvaluation(tuple(rewards.tolist()), self._num_samples)
        return metrics

    def _write(self, name: str, groups: Sequence[TrajectoryGroup], report: EvaluationReport) -> None:
        rows: list[dict[str, Any]] = []
        for group, rewards in zip(groups, report.rewards, strict=True):
            source = group.prompt.source
            rows += [
                {
                    "prompt": source if isinstance(source, str) else source[-1]["content"],
                    "completion": t.text,
                    "reward": strict(float(rewards.totals[t.sample_index])),
                    "answer": group.prompt.columns.get("answer"),
                }
                for t in group.trajectories
            ]
        (self._folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
