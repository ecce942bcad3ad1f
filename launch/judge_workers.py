"""The workers of judges that are rewards: how many, on what, and what they are made with.

May import: actors.{judge_settings, model_folders}, cluster.layout, launch.{judging, model_facts}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.judge_settings import JudgeRewardSettings
from actors.model_folders import resolve_model
from cluster.layout import RoleDemand
from launch.judging import REPLIES, longest, reply_folder
from launch.model_facts import check_model_folder


def judge_demand(
    settings: JudgeRewardSettings, index: int, on_gpu: bool, own_cores: bool, colocate: bool
) -> RoleDemand:
    """What a judge asks for: engines as its generator says; in front of an endpoint one process that only waits."""
    if settings.endpoint is not None:
        return RoleDemand(f"judges.{index}", 1, 0.0)
    engines = settings.generator
    gpus = engines.gpus(colocate) if settings.gpus_per_worker is None else settings.gpus_per_worker
    return RoleDemand(f"judges.{index}", engines.num_workers, gpus if on_gpu else 0.0, own_cores)


def judge_kwargs(
    settings: JudgeRewardSettings, index: int, run_folder: Path, dtype: str, device: str, seed: int
) -> list[dict[str, Any]]:
    """Arguments of each ``JudgeWorker``."""
    field = f"judges.{index}"
    if settings.endpoint is not None:
        # One process: rate limits and budget are of the endpoint, not of whoever asks it.
        cache, account = reply_folder(settings.endpoint, run_folder), (run_folder / REPLIES).absolute()
        return [{"settings": settings, "field": field, "cache": str(cache), "account": str(account)}]
    assert settings.path is not None  # JudgeRewardSettings checks it
    path = resolve_model(settings.path)
    max_length = longest(settings.max_length, check_model_folder(path, f"{field}.path"), f"{field}.max_length")
    engine = {
        "model_path": path, "settings": settings.generator, "dtype": dtype, "device": device,
        "max_length": max_length, "seed": seed,
    }  # fmt: skip
    return [
        {"settings": settings, "field": field, "engine": {"name": f"judge-{index}-{i}", **engine}}
        for i in range(settings.generator.num_workers)
    ]
