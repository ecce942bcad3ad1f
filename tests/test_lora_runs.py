"""Adapters in the real engines: DeepSpeed at ZeRO 0 to 2, and whole runs whose generators get the adapter alone."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_kit import OVERRIDES
from preference_kit import run as run_preferences
from rank_processes import run_ranks
from test_algorithms_run import MORE
from test_end_to_end import REPOSITORY, RUN_S, SMALL, Start, start, trajectories
from test_gradient_invariance import (
    ALGORITHMS,
    DEADLINE_S,
    MAX_TOKENS,
    TEMPERATURE,
    TOLERANCE,
    configure,
    largest_error,
    recorded_batch,
    save,
    settings,
)
from test_sft import run as run_sft
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.adapter_export import AdapterCopy
from actors.lora_settings import LoRAPlan, LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.settings import SamplingSettings
from cluster.checkpoints import CheckpointStore
from cluster.rendezvous import Rendezvous, free_port
from cluster.weight_channel import bit_sum

__all__ = ["start"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_S + 300)]

MODEL = "builtin:tiny-llama"
LORA = LoRASettings(rank=4, alpha=8.0)
PACKINGS = ((4096, True), (30, False))
WITH_LORA = (*SMALL, "model.lora.rank=4", "model.lora.alpha=8", "model.dtype=float32", "algorithm.kl_coef=0.05",
             "learner.optimizer.lr=0.01")  # fmt: skip
STEPS = 3
# Nats.  The learner that merges sums in another order than the generator; training passes the difference on.
SERVED = 1e-4


# --- DeepSpeed ------------------------------------------------------------------------------------


def lora_rank(rank: int, ranks: int, zero_stage: int, port: int, folder: str) -> None:
    """One rank; rank 0 leaves what it found in ``folder``."""
    torch.set_num_threads(1)
    from actors.learner import DeepSpeedLearner

    learner = DeepSpeedLearner(
        rank, Rendezvous("127.0.0.1", port, ranks), resolve_model(MODEL), settings(ranks, zero_stage),
        ALGORITHMS["kl-entropy"], SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS),
        "float32", "cpu", num_steps=10, seed=5, lora=LoRAPlan(LORA, start=f"{folder}/start"),
    )  # fmt: skip
    adapter, groups = learner.adapter, recorded_batch()
    assert adapter is not None
    found: dict[str, Any] = {"base before": {name: bit_sum(t) for name, t in adapter.base()}}

    def matrices() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in adapter.matrices()}

    for token_budget, share in PACKINGS:
        configure(learner, ALGORITHMS["kl-entropy"], token_budget, share)
        found[f"gradient/{token_budget}/{share}"] = learner.gradients(groups)
    found["one update"] = learner.update(groups, 0).metrics, matrices()
    save(learner, f"{folder}/state")
    found["next update"] = learner.update(groups, 1).metrics, matrices()
    learner.load(f"{folder}/state")
    found["next update again"] = learner.update(groups, 1).metrics, matrices()
    found["base after"] = {name: bit_sum(t) for name, t in adapter.base()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    learner.close()


@functools.cache
def found_by(ranks: int, zero_stage: int) -> dict[str, Any]:
    resolve_model(MODEL)
    folder = tempfile.mkdtemp(prefix=f"burnish-lora-{ranks}x{zero_stage}-")
    AdapterCopy(started_policy().adapter)(Path(folder) / "start")
    wrong = run_ranks(lora_rank, ranks, ranks, zero_stage, free_port(), folder, deadline_s=DEADLINE_S)
    assert wrong is None, f"{ranks} ranks, ZeRO {zero_stage}: {wrong}"
    return torch.load(Path(folder) / "found.pt", weights_only=False) | {"folder": folder}


def started_policy() -> Any:
    """An adapter whose update is not 0, so that every matrix has a gradient."""
    torch.manual_seed(0)
    policy = load_policy(resolve_model(MODEL), 16, lora=LoRAPlan(LORA))
    with torch.no_grad():
        for name, parameter in policy.adapter.matrices():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return policy


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)])
def test_an_adapters_gradient_and_steps_do_not_depend_on_packing_ranks_or_zero_stage(
    ranks: int, zero_stage: int
) -> None:
    found, expected = found_by(ranks, zero_stage), found_by(1, 0)
    for token_budget, share in PACKINGS:
        ours, theirs = found[f"gradient/{token_budget}/{share}"], expected["gradient/4096/True"]
        assert all(".lora_" in name for name in theirs) and len(theirs) == 28
        assert largest_error(ours, theirs) <= TOLERANCE
    for name in ("one update", "next update"):
        assert largest_error(found[name][1], expected[name][1]) <= 1e-4


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 1), (2, 2)])
def test_deepspeed_leaves_every_bit_of_the_base_and_a_checkpoint_holds_the_adapter_alone(
    ranks: int, zero_stage: int
) -> None:
    from peft import PeftModel

    found = found_by(ranks, zero_stage)
    assert found["base before"] == found["base after"]
    for name, tensor in found["next update again"][1].items():
        torch.testing.assert_close(found["next update"][1][name], tensor, rtol=0, atol=1e-6)
    state = Path(found["folder"]) / "state"
    saved = sum(file.stat().st_size for file in state.glob("rank-*.safetensors"))
    assert saved < 3 * 4 * 2 * sum(t.numel() for t in found["one update"][1].values())
    base = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32)
    theirs = dict(PeftModel.from_pretrained(base, str(state)).named_parameters())
    for name, tensor in found["one update"][1].items():
        assert torch.equal(theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"], tensor)


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_that_pushes_the_adapter_samples_what_one_that_pushes_the_merged_model_samples(start: Start) -> None:
    arguments = (*WITH_LORA, f"run.num_steps={STEPS}", "cluster.backend=in_process")
    by = {push: start(push, *arguments, f"push.lora={push}") for push in ("adapter", "merged")}
    for run in by.values():
        assert run.end() == 0, run.tail()
    rows = {push: run.rows("metrics.jsonl") for push, run in by.items()}
    for a, m in zip(rows["adapter"], rows["merged"], strict=True):
        assert a["push/num_bytes"] < m["push/num_bytes"] / 4
        assert a["reward"] == m["reward"] and a["learner/reference_s"] > 0
        assert a["loss"] == pytest.approx(m["loss"], rel=1e-3, abs=1e-6)
    first, last = (rows["adapter"][i]["kl"] for i in (0, -1))
    assert first == pytest.approx(0, abs=1e-6) and last > 1e-6
    for step in range(1, STEPS + 1):
        a, m = (trajectories(run.folder, step) for run in by.values())
        assert [row["completion_ids"] for row in a] == [row["completion_ids"] for row in m]
        for ours, theirs in zip(a, m, strict=True):  # what was served is the same model, and not only as likely to say
            np.testing.assert_allclose(ours["behavior_logprobs"], theirs["behavior_logprobs"], atol=SERVED)
    for run in by.values():
        ready = next(e for e in run.rows("events.jsonl") if e["kind"] == "ready")
        assert ready["num_verified"] > 0 and ready["probe_mean_difference"] < 1e-3
        assert "reference" not in json.dumps(ready["layout"])


@pytest.mark.parametrize("transport", ["file", "nccl"])
def test_a_run_with_an_adapter_is_killed_goes_on_and_exports_the_merged_model(start: Start, transport: str) -> None:
    arguments = (
        *WITH_LORA, "generator.num_workers=2", "learner.num_workers=2", "learner.zero_stage=2", "checkpoint.every=1",
        f"push.backend={transport}",
    )  # fmt: skip
    killed = start("run", *arguments, "run.num_steps=5000")
    killed.until("events.jsonl", lambda e: e["kind"] == "checkpoint" and e["step"] >= 2)
    killed.kill()
    checkpoint = CheckpointStore(killed.folder / "checkpoints").latest()
    assert checkpoint is not None
    assert (checkpoint.path / "learner" / "adapter_model.safetensors").is_file()
    end = checkpoint.step + 2
    resumed = start("run", *arguments, f"run.num_steps={end}", "--resume")
    assert resumed.end() == 0, resumed.tail()
    assert resumed.rows("metrics.jsonl")[-1]["step"] == end
    exported = resumed.folder / "export" / f"step-{end:06d}"
    merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("_proj." in name for name in changed)
    # And on from the adapter that was exported, which then is its own reference: KL 0 at the start.
    further = start(
        "further", *WITH_LORA, f"model.path={exported / 'adapter'}", "run.num_steps=1", "cluster.backend=in_process"
    )
    assert further.end() == 0, further.tail()
    assert further.rows("metrics.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_preference_learning_with_an_adapter_starts_no_reference_and_resumes(tmp_path: Path) -> None:
    more = ("model.lora.rank=4", "learner.optimizer.lr=1e-2")
    whole = run_preferences(tmp_path, "sigmoid", *more, name="whole")
    run_preferences(tmp_path, "sigmoid", *more, "run.num_steps=4", name="cut")
    resumed = run_preferences(tmp_path, "sigmoid", *more, "--resume", name="cut")
    found = [list(map(json.loads, (f / "metrics.jsonl").read_text().splitlines())) for f in (whole, resumed)]
    assert found[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5) and found[0][-1]["loss"] < 0.69
    for ours, theirs in zip(*found, strict=True):
        assert ours["step"] == theirs["step"] and ours.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-5)
    kinds = {json.loads(line)["kind"] for line in (whole / "events.jsonl").read_text().splitlines()}
    assert "reference" not in kinds


def only_layers_changed(exported: Path, auto: Any = AutoModelForCausalLM) -> None:
    """An adapter changes linear layers: of the model that was exported, everything else is the base's."""
    merged = auto.from_pretrained(exported, dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32).state_dict()
    changed = {name for name in base.keys() & merged.keys() if not torch.equal(base[name], merged[name])}
    assert len(changed) == 14 and all("_proj." in name for name in changed)


@pytest.mark.parametrize("name", ["ppo", "rloo", "remax", "online_dpo"])
def test_every_way_to_learn_from_samples_trains_an_adapter_to_the_end(start: Start, name: str) -> None:
    critic = ("critic.lora.rank=4",) if name == "ppo" else ("cluster.backend=in_process",)  # PPO's through Ray
    steps = 5 if name == "ppo" else STEPS
    run = start(
        name, *WITH_LORA, f"algorithm.name={name}", f"run.num_steps={steps}", *critic, *MORE.get(name, ()),
        "checkpoint.every=0",
    )  # fmt: skip
    assert run.end() == 0, run.tail()
    rows = run.rows("metrics.jsonl")
    assert len(rows) == steps
    for row in rows:
        assert math.isfinite(row["loss"]) and row["ratio/first_minibatch_max_deviation"] < 1e-3
        assert ("critic/loss" in row) == (name == "ppo") and row["learner/reference_s"] > 0
    assert any(row.get("grad_norm", 0.0) > 0 for row in rows)
    only_layers_changed(run.folder / "export" / f"step-{steps:06d}")
    ready = next(e for e in run.rows("events.jsonl") if e["kind"] == "ready")
    assert ready["num_verified"] > 0 and "reference" not in json.dumps(ready["layout"])


@pytest.mark.parametrize("loss", [loss for loss in OVERRIDES if loss not in ("sigmoid", "robust")])
def test_every_way_to_learn_from_preferences_trains_an_adapter_to_the_end(tmp_path: Path, loss: str) -> None:
    same = "data.train.0.args.num=8"  # in every step: what is new to a tiny model it may get worse at
    folder = run_preferences(tmp_path, loss, "model.lora.rank=4", "learner.optimizer.lr=3e-3", same)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert rows[-1]["loss"] < rows[1]["loss"] and rows[-1]["rewards/margins"] > rows[1]["rewards/margins"]
    (exported,) = (folder / "export").glob("step-*")
    only_layers_changed(exported)


def run_reward(folder: Path, *more: str) -> Path:
    """One run of `cpu-reward`, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "launch.cli", "train", "cpu-reward", f"run.directory={folder}", "run.name=reward",
        f"model.path={MODEL}", "model.dtype=float32", "run.batch_size=8", "data.train.0.args.num=48",
        "data.eval.args.num=16", "learner.optimizer.schedule=constant", "learner.optimizer.warmup_steps=0",
        "evaluation.every=0", "cluster.backend=in_process", "telemetry.wandb=disabled", *more,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "reward"


def test_sft_and_reward_training_of_an_adapter_run_to_the_end(tmp_path: Path) -> None:
    more = ("model.lora.rank=4", "learner.optimizer.lr=1e-2")
    folder = run_sft(tmp_path, *more, name="sft")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.05
    (exported,) = (folder / "export").glob("step-*")
    only_layers_changed(exported)
    folder = run_reward(tmp_path, *more, "run.num_steps=6", "data.train.0.args.num=8")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["loss"] < math.log(2)
    (exported,) = (folder / "export").glob("step-*")
    only_layers_changed(exported, AutoModelForSequenceClassification)
