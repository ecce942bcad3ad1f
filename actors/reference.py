"""The frozen reference policy.  Started only when a KL term asks for it.

May import: torch, actors.*, trainers.experience, cluster.transport.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import torch

from actors.modeling import load_policy
from actors.packing import Pack
from actors.scoring import score_samples
from actors.settings import ReferenceSettings
from cluster.transport import fetch
from trainers.experience import decode_group, encode_logprobs


class ReferenceModel:
    """Scores the completions of a group."""

    def __init__(
        self,
        model_path: str,
        settings: ReferenceSettings,
        temperature: float,
        chunk: int,
        dtype: str,
        device: str,
    ) -> None:
        self.settings, self.temperature = settings, temperature
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._model = load_policy(settings.path or model_path, chunk, getattr(torch, dtype)).to(self.device).eval()

    def logprobs(self, payload: list[Any], deadline_s: float) -> tuple[dict[str, float], pa.Buffer]:
        """({"score_s"}, log-probs of each completion as Arrow) for the one group in ``payload``."""
        started = time.perf_counter()
        group = decode_group(fetch(payload[0], deadline_s))
        rows = score_samples(
            self._score,
            [group.prompt.token_ids] * len(group.trajectories),
            [t.completion_ids for t in group.trajectories],
            [0] * len(group.trajectories),
            self.settings.token_budget,
            self.device.type != "cuda",
            self.device,
        )
        buffer = encode_logprobs([rows[i] for i in range(len(rows))])
        return {"score_s": time.perf_counter() - started}, buffer

    def _score(self, pack: Pack) -> torch.Tensor:
        logprobs: torch.Tensor = self._model(pack, self.temperature, with_entropy=False)[0]
        return logprobs
