"""The pure parts of the benchmarks: the baseline computes what Burnish computes, and the harness is fair."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.model_folders import resolve_model
from actors.modeling import load_policy
from actors.objective import TokenTerms, pack_loss
from actors.scalar_model import load_scalar
from benchmarks import checkpoint, gpu_check, learner, page, ppo, process, push, step
from benchmarks.gpu_tasks import make_packs
from benchmarks.job import (
    Job,
    describe_lengths,
    job_parser,
    learner_groups,
    load_samples,
    random_groups,
    save_samples,
)
from benchmarks.plain import PlainCritic, PlainTrainer, pad_groups, token_logprobs
from launch.overrides import load_config
from launch.trajectory_files import trajectory_table
from trainers.advantages import group_relative
from trainers.algorithms import AlgorithmSettings
from trainers.experience import decode_group, decode_logprobs
from trainers.value_loss import clipped_value_loss

BETA = 0.04
LENGTHS = [9, 1, 5, 14]


@pytest.fixture(scope="module")
def tiny() -> str:
    return resolve_model("builtin:tiny-llama")


def test_padding_equals_packing(tiny: str) -> None:
    """Log-probs and the gradient of the whole loss agree between the baseline and the learner's own parts."""
    groups = random_groups(2, 4, 7, LENGTHS, 300)
    batch = learner_groups(groups)
    trainer = PlainTrainer(tiny, "float32", "cpu", 1e-8, BETA)
    padded = pad_groups(batch, 0)
    expected = token_logprobs(trainer.model, padded, 1.0, torch.float32)[padded.completion_mask > 0].detach()
    trainer.backward(padded, rows=3)

    policy = load_policy(tiny, chunk=8)
    algorithm = AlgorithmSettings.model_validate({"kl_coef": BETA})
    samples = [t for g in groups for t in g.trajectories]
    advantages = np.concatenate([group_relative(g.rewards.totals, g.rewards.valid) for g in batch])
    references = [r for g in batch for r in decode_logprobs(g.reference_payload)]
    found: dict[int, torch.Tensor] = {}
    for pack in make_packs(groups, 48, "cpu", share_prompts=True):
        logprobs, entropy = policy(pack, 1.0)
        lengths = np.array(pack.lengths)
        members = list(pack.members)
        terms = TokenTerms(
            weights=torch.from_numpy(np.repeat(1.0 / (len(samples) * lengths), lengths).astype(np.float32)),
            advantages=torch.from_numpy(np.repeat(advantages[members], lengths).astype(np.float32)),
            behavior_logprobs=torch.from_numpy(np.concatenate([samples[m].behavior_logprobs for m in members])),
            proximal_logprobs=None,
            reference_logprobs=torch.from_numpy(np.concatenate([references[m] for m in members])),
            lengths=pack.lengths,
        )
        pack_loss(logprobs, entropy, terms, algorithm).loss.backward()
        found |= dict(zip(members, logprobs.detach().split(pack.lengths), strict=True))

    torch.testing.assert_close(torch.cat([found[i] for i in range(len(samples))]), expected, rtol=0, atol=2e-5)
    packed = {n.removeprefix("hf_model."): p.grad for n, p in policy.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_plain_critic_computes_what_the_critic_computes(tmp_path: Path) -> None:
    """Values and the gradient of the whole loss."""
    folder = ppo.make_reward_model(Job(model="builtin:tiny-llama"), tmp_path)
    groups = random_groups(2, 4, 7, LENGTHS, 300)
    batch = learner_groups(groups)
    plain, packed = PlainCritic(folder, "float32", "cpu", 1e-8, 0.0), load_scalar(folder, "critic.path")
    head: Any = packed.hf_model.score
    torch.nn.init.normal_(plain.model.score.weight, std=0.1)
    head.weight.data.copy_(plain.model.score.weight)
    padded = pad_groups(batch, plain.pad_id)
    expected = plain.values(padded)[padded.completion_mask > 0].detach()
    plain.backward(padded, rows=3)

    lengths = torch.tensor([t.num_tokens for g in groups for t in g.trajectories])
    found: dict[int, torch.Tensor] = {}
    for pack in make_packs(groups, 48, "cpu", share_prompts=True):
        values, members = packed(pack), list(pack.members)
        goal = padded.advantages[members].repeat_interleave(lengths[members])
        (clipped_value_loss(values, torch.zeros_like(values), goal, 0.2).loss.sum() / lengths.sum()).backward()
        found |= dict(zip(members, values.detach().split(pack.lengths), strict=True))
    torch.testing.assert_close(torch.cat([found[i] for i in range(len(found))]), expected, rtol=0, atol=2e-5)
    gradients = {n.removeprefix("hf_model."): p.grad for n, p in packed.named_parameters()}
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_every_side_of_the_scoring_benchmark_scores_every_sample(tiny: str, tmp_path: Path) -> None:
    job = Job(model="builtin:tiny-llama")
    folder = ppo.make_reward_model(job, tmp_path)
    batches = [random_groups(2, 4, 7, LENGTHS, 300)]
    for side in (*ppo.PAIRS, *ppo.PAIRS.values()):
        found = ppo.measure_scoring(job, side, batches, folder, 1)
        assert found["num_tokens"] == [2 * (4 * 7 + sum(LENGTHS))] and len(found["seconds"]) == 1
    rewards = ppo.scorer(job, "reward", folder)(batches[0])()
    assert [r.parts["proxy"].tolist() for r in rewards] == [[0.0] * 4] * 2, "a head of zeros, and no failure"


def test_the_baselines_gradient_does_not_depend_on_its_micro_batches(tiny: str) -> None:
    batch = pad_groups(learner_groups(random_groups(2, 4, 5, LENGTHS, 300)), 0)
    gradients = []
    for rows in (1, 8):
        trainer = PlainTrainer(tiny, "float32", "cpu", 1e-8, BETA)
        trainer.backward(batch, rows)
        gradients.append([p.grad for p in trainer.model.parameters()])
    for one, eight in zip(*gradients, strict=True):
        torch.testing.assert_close(one, eight, rtol=1e-4, atol=1e-6)


def test_recorded_samples_come_back_as_they_were(tmp_path: Path) -> None:
    groups = random_groups(2, 4, 5, LENGTHS, 300)
    save_samples(tmp_path / "samples.parquet", groups)
    again = load_samples(tmp_path / "samples.parquet")
    assert describe_lengths(again) == describe_lengths(groups)
    for a, b in zip(groups, again, strict=True):
        np.testing.assert_array_equal(a.prompt.token_ids, b.prompt.token_ids)
        for x, y in zip(a.trajectories, b.trajectories, strict=True):
            np.testing.assert_array_equal(x.completion_ids, y.completion_ids)
            np.testing.assert_array_equal(x.behavior_logprobs, y.behavior_logprobs)


def test_a_runs_trajectories_are_samples_too(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    groups = random_groups(3, 4, 5, LENGTHS, 300)
    batch = learner_groups(groups)
    pq.write_table(trajectory_table(groups, [g.rewards for g in batch], {}), tmp_path / "step-000002.parquet")
    again = load_samples(tmp_path / "step-000002.parquet")
    assert describe_lengths(again) == describe_lengths(groups)
    assert [g.group_id for g in again] == [g.group_id for g in groups]
    # A loaded group can be trained on: it encodes and decodes like a sampled one.
    assert decode_group(learner_groups(again)[0].payload).trajectories[3].num_tokens == LENGTHS[3]


def test_a_job_survives_the_command_line() -> None:
    job = Job(model="builtin:tiny-llama", num_prompts=3, beta=0.5, device="cpu")
    assert Job.from_arguments(job_parser("", ()).parse_args(job.arguments())) == job


def test_the_memory_benchmark_is_about_4096_tokens() -> None:
    padded = pad_groups(learner.memory_batch(49152), 0)
    assert padded.input_ids.numel() == 4096
    assert int(padded.attention_mask.sum()) == 4096


def test_peak_memory_sees_what_was_held_in_between() -> None:
    peak = learner.PeakMemory("cpu")
    peak.start()
    held = np.ones(200 * 2**20, dtype=np.uint8)
    del held
    assert 150 * 2**20 < peak.above() < 400 * 2**20


def test_both_sides_of_a_comparison_have_the_workers_environment() -> None:
    wanted = process.worker_environment(process.num_cpus(), None)
    measured = process.environment()
    assert {k: measured[k] for k in wanted} == wanted
    assert "LD_PRELOAD" not in process.environment(preload=False)


def test_a_measurement_past_its_deadline_is_ended_and_named() -> None:
    started = time.monotonic()
    with pytest.raises(process.MeasurementError, match=r"timeit was not done in 1 s"):
        process.run("timeit", ["-n1", "-r1", "import time; time.sleep(120)"], 1.0, wants_output=False)
    assert time.monotonic() - started < 30


def test_a_failing_measurement_says_why() -> None:
    with pytest.raises(process.MeasurementError, match="ended with 1: .*ZeroDivisionError"):
        process.run("timeit", ["-n1", "-r1", "1/0"], 60.0, wants_output=False)


def test_checksums_see_the_tensors_own_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert bytes(push.as_bytes(tensor)) == tensor.view(torch.uint8).numpy().tobytes()
    assert push.fastest_checksum() in push.CHECKSUMS


def test_the_step_benchmark_is_a_valid_run_with_a_reference(tmp_path: Path) -> None:
    config = load_config(step.RECIPE, step.overrides(Job(), tmp_path, 5)).config
    assert config.algorithm.needs_reference
    assert config.algorithm.kl_estimator == "k3"
    assert config.run.groups_per_step * config.run.samples_per_prompt == 64
    assert config.evaluation.every == 0


def test_the_ppo_benchmark_is_a_valid_run_that_updates_once_a_batch_by_a_learned_reward(tmp_path: Path) -> None:
    config = load_config(ppo.RECIPE, [*step.overrides(Job(), tmp_path, 5), *ppo.overrides("folder")]).config
    assert config.algorithm.needs_critic and config.algorithm.needs_reference
    assert config.algorithm.num_updates == 1, "an ideal is one forward and backward pass"
    assert config.reward_names == ["proxy"] and config.reward_models[0].path == "folder"
    assert config.learner.optimizer.lr == config.critic.optimizer.lr == 1e-8
    assert config.algorithm.ppo.value_warmup_steps == config.evaluation.every == 0


def test_the_plain_side_of_the_checkpoint_benchmark_copies_weights_and_both_moments(tiny: str) -> None:
    found = checkpoint.measure_plain(Job(model="builtin:tiny-llama"), 2)
    assert found["num_bytes"] == 3 * sum(p.nbytes for p in load_policy(tiny, chunk=8).parameters())
    assert len(found["seconds"]) == 2


def test_a_missed_target_is_called_missed() -> None:
    assert page.Row("push", "", "", 1.49, "push").cells()[-1] == "met"
    assert page.Row("push", "", "", 1.51, "push").cells()[-1] == "not met"
    assert page.Row("push", "no number", "", None, "push", "failed: why").cells()[-1] == "not measured, failed: why"
    assert page.Row("a scorer", "", "", 0.89, "scoring").cells()[-1] == "not met"
    assert page.Row("learner", "", "", 2.0).cells()[-2:] == ("", "")


def test_only_the_results_section_of_the_page_is_rewritten() -> None:
    whole = page.PAGE.read_text()
    once = page.replace_section(whole, "numbers")
    assert once.partition(page.BEGIN)[0] == whole.partition(page.BEGIN)[0]
    assert once.partition(page.END)[2] == whole.partition(page.END)[2]
    assert page.replace_section(once, "numbers") == once
    with pytest.raises(ValueError, match="has no"):
        page.replace_section("a page without markers", "numbers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gpu_checks_say_so_and_pass() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], cwd=process.ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(process.ROOT)},
    )  # fmt: skip
    assert (found.returncode, found.stdout.strip()) == (0, "no GPU here")


def test_every_gpu_check_has_its_task() -> None:
    from benchmarks.gpu_tasks import TASKS

    assert {c.name for c in gpu_check.CHECKS} | {"build"} == set(TASKS)
