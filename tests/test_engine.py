"""The DeepSpeed adapter, in a process of its own: what it must never do to a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK_0 = {"RANK": "0", "WORLD_SIZE": "1"}  # no LOCAL_RANK: a vLLM engine that made the group sets none
ENGINE = """
import torch
from actors.engine import TrainingEngine
from actors.settings import LearnerSettings
from cluster.rendezvous import free_port

torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
model = torch.nn.Linear(4, 4)
engine = TrainingEngine(model, LearnerSettings(zero_stage=1), torch.float32, torch.device("cpu"))
engine.set_boundary(True)
engine.backward(engine.forward(torch.ones(2, 4)).sum())
print("norm", engine.step(1e-3))
"""


def test_a_build_lock_that_a_killed_process_left_does_not_hang_the_engine(tmp_path: Path) -> None:
    extension = tmp_path / "deepspeed_shm_comm"
    extension.mkdir()
    (extension / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], env=os.environ | RANK_0 | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "norm" in done.stdout
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deepspeed_shm_comm", "lock"], "something was compiled"
