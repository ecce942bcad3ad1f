"""The frozen reference policy.  Started only when a KL term asks for it.

May import: torch, actors.*, trainers.experience, cluster.transport.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from actors.group_batch import GroupBatch
from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.packing import Pack
from actors.scoring import score_samples
from actors.settings import ReferenceSettings
from cluster.transport import fetch
from trainers.experience import decode_group, encode_logprobs


class ReferenceModel:
    """Scores the completions of groups."""

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
        path = model_path if settings.path is None else resolve_model(settings.path)
        self._model = load_policy(path, chunk, getattr(torch, dtype)).to(self.device).eval()

    def logprobs(self, payloads: list[Any], deadline_s: float) -> tuple[Any, ...]:
        """({"score_s"}, log-probs of the completions of each group in ``payloads``, an Arrow buffer a group)."""
        started = time.perf_counter()
        batch = GroupBatch([decode_group(fetch(payload, deadline_s)) for payload in payloads])
        rows = score_samples(
            self._score, batch.prompts, batch.completions, batch.groups, self.settings.token_budget,
            self.device.type != "cuda", self.device,
        )  # fmt: skip
        buffers = [encode_logprobs(part) for part in batch.by_group([rows[i] for i in range(len(rows))])]
        return {"score_s": time.perf_counter() - started}, *buffers

    def _score(self, pack: Pack) -> torch.Tensor:
        logprobs: torch.Tensor = self._model(pack, self.temperature, with_entropy=False)[0]
        return logprobs
