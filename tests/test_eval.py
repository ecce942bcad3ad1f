"""Laws of ``burnish eval``: equal models tie, planted faults are seen, nothing unusable gets as far as an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from actors.model_folders import resolve_model
from launch.eval_config import EvalConfig
from launch.eval_files import write_results
from launch.eval_fleet import EvalCluster
from launch.eval_pairs import judge_reward_models
from launch.eval_prepare import PreparedEval, check_eval_folder, prepare_eval, shipped_suites
from launch.eval_report import BASE, POLICY, Answers, Measured, build_report, flat, plain
from launch.evaluate import evaluate_models
from launch.live_instruments import FirstEvaluation, live_metrics
from launch.overrides import load_config
from trainers.comparisons import Comparison
from trainers.errors import InputError
from trainers.experience import GroupRewards, Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion

TINY = "builtin:tiny-llama"
RAW: dict[str, Any] = {
    "run": {"name": "self", "seed": 3},
    "model": {"path": TINY},
    "base": {"path": TINY},
    "prompts": {"train": {"procedural": "chain_sum", "size": 12}},
    "eval": {"num_samples": 2, "suites": ["capability"], "suite_max_tokens": 6, "win_by": "length"},
    "rewards": [
        {"name": "accuracy", "function": "reasoning_gym", "args": {"dataset": "chain_sum", "extract": "last_number"}},
    ],
    "generator": {"sampling": {"max_tokens": 12}},
    "telemetry": {"wandb": "disabled"},
    "cluster": {"backend": "in_process", "device": "cpu"},
}


def config(tmp_path: Path, **sections: dict[str, Any]) -> EvalConfig:
    raw = {name: dict(value) if isinstance(value, dict) else value for name, value in RAW.items()}
    (tmp_path / "score.py").write_text("def chars(completions):\n    return [float(len(c)) for c in completions]\n")
    raw["rewards"] = [*RAW["rewards"], {"name": "length", "function": f"{tmp_path}/score.py:chars"}]
    raw["run"]["directory"] = str(tmp_path)
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return EvalConfig.model_validate(raw)


# --- the whole of it, with engines --------------------------------------------------------------


class Judged:
    """One evaluation of a model against itself."""

    def __init__(self, folder: Path) -> None:
        self.config = config(
            folder, eval={**RAW["eval"], "correct": "accuracy", "suites": ["capability", "sycophancy"]}
        )
        self.report = evaluate_models(self.config, Console(quiet=True))
        self.json = json.loads(self.report.read_text())


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return Judged(tmp_path_factory.mktemp("eval"))


def test_a_model_against_itself_wins_half_and_has_no_kl(judged: Judged) -> None:
    for name in ("length", "accuracy", "total"):
        raw = judged.json["win_rate"][name]["raw"]
        assert raw["value"] == 0.5 and raw["low"] < 0.5 < raw["high"] and raw["n"] == 12, name
    kl = judged.json["kl_from_base"]
    assert kl["sequence"]["value"] == pytest.approx(0, abs=1e-5) and kl["token"]["value"] == pytest.approx(0, abs=1e-5)
    assert 0 <= kl["engine_mismatch"] < 0.05  # float32 or bfloat16: two implementations of one distribution
    models = judged.json["models"]
    assert models["policy"]["diversity"] == models["base"]["diversity"]
    assert models["policy"]["suites"] == models["base"]["suites"]


def test_the_samples_of_both_models_are_kept_with_their_rewards(judged: Judged) -> None:
    rows = pq.read_table(judged.report.parent / "samples.parquet").to_pylist()
    assert [r["model"] for r in rows] == ["policy"] * 24 + ["base"] * 24
    assert all(r["rewards/length"] == len(r["completion"]) for r in rows)
    ours, theirs = rows[:24], rows[24:]
    assert [r["seed"] for r in ours] == [r["seed"] for r in theirs] and len({r["seed"] for r in ours}) == 24


def test_every_estimate_of_the_report_has_its_interval_and_its_n(judged: Judged) -> None:
    found = 0

    def walk(value: Any) -> None:
        nonlocal found
        if isinstance(value, dict) and {"value", "low", "high"} & value.keys():
            assert value.keys() == {"value", "low", "high", "n"}
            found += 1
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    walk(judged.json)
    assert found > 40
    for who in (POLICY, BASE):
        side = judged.json["models"][who]
        assert side.keys() >= {"rewards", "mean_length", "truncated", "diversity", "entropy", "suites", "calibration"}
        assert side["suites"]["sycophancy"].keys() >= {"sycophancy/pass", "sycophancy/flip"}
    assert judged.json["config"]["run"]["seed"] == 3 and len(judged.json["digests"]["policy"]) == 32


def test_the_page_is_written_and_loads_nothing(judged: Judged) -> None:
    page = (judged.report.parent / "eval.html").read_text(encoding="utf-8")
    for title in ("Summary", "Win rate", "KL from base", "Rewards and length", "Suites", "Calibration", "Samples"):
        assert f">{title}" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(s.startswith(("data:image/svg+xml;base64,", "#")) for s in sources)
    assert "<script" not in page and 'class="before"' in page


def test_another_base_is_sampled_itself_and_the_kl_knows_the_direction(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from actors.modeling import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY))
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)  # far from the policy, whose distribution is nearly flat
    model.save_pretrained(tmp_path / "sharp")
    load_tokenizer(resolve_model(TINY)).save_pretrained(tmp_path / "sharp")
    settings = config(
        tmp_path, base={"path": str(tmp_path / "sharp")},
        eval={"num_samples": 4, "num_prompts": 8, "win_by": "length", "num_page_samples": 2},
    )  # fmt: skip
    found = json.loads(evaluate_models(settings, Console(quiet=True)).read_text())
    kl = found["kl_from_base"]
    # From the policy's own samples both estimators agree in the mean, and the flat policy has the larger entropy.
    assert kl["sequence"]["low"] > 0.5 and kl["sequence"]["n"] == 8
    assert kl["sequence_k3"]["low"] < kl["sequence"]["high"] and kl["sequence"]["low"] < kl["sequence_k3"]["high"]
    assert found["models"]["policy"]["entropy"]["low"] > found["models"]["base"]["entropy"]["high"]
    assert kl["engine_mismatch"] < 0.05  # the policy's samples were scored by the policy, not by the base
    rows = pq.read_table(tmp_path / "self" / "samples.parquet").to_pylist()
    assert [r["completion"] for r in rows[:32]] != [r["completion"] for r in rows[32:]]


def test_a_reward_model_judges_pairs_by_its_bare_score(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from actors.modeling import load_tokenizer

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_pretrained(resolve_model(TINY), num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(tmp_path / "rm")
    load_tokenizer(resolve_model(TINY)).save_pretrained(tmp_path / "rm")
    rows = [{"prompt": f"say {i}", "chosen": "z" * (i + 1), "rejected": "a" * (i + 2)} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found: list[dict[str, Any]] = []
    for shown in ({}, {"clip": 0.001}, {"retokenize": True}):
        settings = config(
            tmp_path, reward_models=[{"name": "rm", "path": str(tmp_path / "rm"), **shown}],
            eval={"win_by": "length", "suites": [], "preferences": str(tmp_path / "pairs.jsonl")},
        )  # fmt: skip
        ready, cluster = prepare_eval(settings), EvalCluster(settings)
        roles = cluster.judged_models(ready.model_path)
        found.append(asyncio.run(judge_reward_models(settings, ready, cluster, roles, Console(quiet=True))))
    plain_scores = np.stack(found[0]["rm"])
    assert plain_scores.shape == (5, 2) and np.ptp(plain_scores) > 0.01
    for other in found[1:]:
        assert np.allclose(np.stack(other["rm"]), plain_scores)


# --- instruments, with made-up answers ----------------------------------------------------------


def prepared(num: int = 12) -> PreparedEval:
    prompts = [Prompt(f"p{i}", np.array([1, 2], np.int32), f"q{i}") for i in range(num)]
    return PreparedEval("policy", None, 64, "prompts.eval", prompts, [], {})


def answers(texts: list[list[str]], rewards: list[list[float]]) -> Answers:
    """Texts and rewards (part length) of each prompt; a token is a character, each with log-prob -1."""
    groups, scored = [], []
    for i, (said, given) in enumerate(zip(texts, rewards, strict=True)):
        prompt = Prompt(f"p{i}", np.array([1, 2], np.int32), f"q{i}")
        trajectories = tuple(
            Trajectory(
                s, s, np.ones(len(t), np.int32), -np.ones(len(t), np.float32), t, "stop",
                (VersionSpan(WeightVersion(0, 0), len(t)),),
            )
            for s, t in enumerate(said)
        )  # fmt: skip
        values = np.array(given)
        groups.append(TrajectoryGroup(f"eval-{i}", prompt, trajectories))
        scored.append(GroupRewards(f"eval-{i}", values, {"accuracy": values * 0, "length": values}))
    return Answers(groups, {}, scored)


def report(tmp_path: Path, policy: Answers, base: Answers, **measured: Any) -> dict[str, Any]:
    settings = config(tmp_path, eval={"num_samples": 2, "suites": [], "win_by": "length"})
    return build_report(settings, prepared(len(policy.groups)), Measured(policy, base, **measured))


def test_the_samples_of_a_prompt_are_no_independent_observations(tmp_path: Path) -> None:
    same = answers([["ab", "ab"]] * 6, [[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 3)
    base = answers([["ab", "ab"]] * 6, [[0.5, 0.5]] * 6)
    found = report(tmp_path, same, base)
    assert found["win_rate"]["length"].raw.n == 6 and found["win_rate"]["length"].raw.value == 0.5
    mean = found["models"][POLICY]["rewards"]["length"]["mean"]
    assert mean.n == 6 and mean.value == 0.5
    assert mean.high - mean.value == pytest.approx(2.5706 * math.sqrt(0.3 / 6), rel=0.01)  # t of 5, variance 0.3


def test_kl_is_that_of_one_sample_with_prompts_as_observations(tmp_path: Path) -> None:
    side = answers([["abc", "abc"]] * 4, [[0.0, 0.0]] * 4)
    ours = [np.full(3, -1.0, np.float32)] * 8
    theirs = [np.full(3, -1.0 - 0.1 * (1 + i // 2), np.float32) for i in range(8)]
    kl = report(tmp_path, side, side, logprobs=(ours, theirs))["kl_from_base"]
    assert kl["token"].value == pytest.approx(0.25, abs=1e-6) and kl["token"].n == 4
    assert kl["sequence"].value == pytest.approx(0.75, abs=1e-6) and kl["sequence"].n == 4
    assert kl["engine_mismatch"] == 0


def test_a_collapsed_policy_and_a_length_hacker_are_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    varied = [["".join(rng.choice(list("ab cd ef"), 9)) for _ in range(2)] for _ in range(30)]
    padded = [[t + "x" * int(rng.integers(0, 20)) for t in group] for group in varied]
    hacker = answers(padded, [[float(len(t)) for t in group] for group in padded])
    honest = answers(varied, [[float(len(t)) for t in group] for group in varied])
    collapsed = answers([["the same again"] * 2] * 30, [[1.0, 1.0]] * 30)
    hacked = report(tmp_path, hacker, honest)
    rate = hacked["win_rate"]["length"]
    assert rate.raw.low > 0.8 and rate.length_controlled.low < 0.6 < rate.raw.value
    assert hacked["models"][POLICY]["rewards"]["length"]["length_bias"].pearson.low > 0.9
    diversity = report(tmp_path, collapsed, honest)["models"]
    assert diversity[POLICY]["diversity"]["unique_fraction"] == pytest.approx(1 / 60)
    assert diversity[POLICY]["diversity"]["self_bleu"] == 1 > diversity[BASE]["diversity"]["self_bleu"]


def test_a_reward_model_is_judged_where_it_has_scores_and_the_rest_is_counted(tmp_path: Path) -> None:
    ids = np.array([1], np.int32)
    pairs = [Comparison(f"p{i}", ids, (np.ones(3, np.int32), np.ones(2, np.int32)), ((0, 1),)) for i in range(40)]
    scores = [np.array([5.0, 0.0]) if i % 2 else np.array([0.0, 5.0]) for i in range(39)] + [np.array([np.nan, 1.0])]
    side = answers([["ab", "cd"]] * 4, [[0.0, 0.0]] * 4)
    settings = config(tmp_path, eval={"num_samples": 2, "suites": [], "win_by": "length"})
    ready = PreparedEval("policy", None, 64, "prompts.eval", prepared(4).prompts, [], {"rm": pairs})
    found = build_report(settings, ready, Measured(side, side, pair_scores={"rm": scores}))["reward_models"]["rm"]
    assert found["num_left_out"] == 1 and found["report"].accuracy.n == 39
    assert found["report"].accuracy.value == pytest.approx(19 / 39)
    assert found["report"].calibration_error > 0.4  # sure of itself and right half of the time


def test_the_report_is_strict_json_and_flat_numbers_are_finite(tmp_path: Path) -> None:
    side = answers([["ab", ""]] * 3, [[math.nan, 1.0]] * 3)
    found = report(tmp_path, side, side)
    json.dumps(plain(found), allow_nan=False)
    numbers = flat(found)
    assert all(math.isfinite(v) for v in numbers.values())
    assert numbers["win_rate/length/raw"] == 0.5 and "win_rate/length/raw_low" in numbers


def test_without_a_base_there_is_a_report_of_the_policy_alone(tmp_path: Path) -> None:
    side = answers([["ab", "cd"]] * 4, [[0.0, 1.0]] * 4)
    settings = config(tmp_path, base={"path": None}, eval={"num_samples": 2, "suites": [], "win_by": "length"})
    ready, measured = prepared(4), Measured(side)
    found = build_report(settings, ready, measured)
    assert "win_rate" not in found and list(found["models"]) == [POLICY]
    model = resolve_model(TINY)
    alone = PreparedEval(model, None, 64, ready.stream, ready.prompts, [], {})
    write_results(tmp_path / "alone", settings, alone, measured, found, Console(quiet=True))
    assert json.loads((tmp_path / "alone" / "eval.json").read_text())["models"].keys() == {POLICY}


def test_a_policy_is_calibrated_by_whole_answers_only(tmp_path: Path) -> None:
    side = answers([["a", "a"]] * 5, [[0.0, 0.0]] * 5)
    certain = [
        dataclasses.replace(t, behavior_logprobs=np.zeros(1, np.float32)) for g in side.groups for t in g.trajectories
    ]
    cut = dataclasses.replace(certain[0], finish_reason="length")
    groups = [dataclasses.replace(g, trajectories=(cut, certain[1])) for g in side.groups]
    settings = config(tmp_path, eval={"num_samples": 2, "suites": [], "win_by": "length", "correct": "accuracy"})
    wrong = Answers(groups, {}, side.rewards)  # accuracy 0, and sure of every answer
    found = build_report(settings, prepared(5), Measured(wrong))["models"][POLICY]["calibration"]
    assert (found["n"], found["num_left_out"]) == (5, 5)
    assert found["expected_calibration_error"] == 1 == found["overconfidence"]


def test_held_out_prompts_are_those_that_training_held_out(tmp_path: Path) -> None:
    from actors.modeling import load_tokenizer
    from launch.prompts import load_prompts

    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = {"procedural": "chain_sum", "args": small, "size": 90}
    settings = config(tmp_path, prompts={"train": data, "eval": data, "template": "Q: {prompt}"})
    ready = prepare_eval(settings)
    tokenizer = load_tokenizer(resolve_model(TINY))
    train, held_out, _ = load_prompts(settings.prompts, tokenizer, 500, settings.run.seed)
    assert ready.stream == "prompts.eval" and [p.prompt_id for p in ready.prompts] == [p.prompt_id for p in held_out]
    assert not {p.prompt_id for p in ready.prompts} & {p.prompt_id for p in train}
    assert "Q: " in ready.prompts[0].text and "Q: " not in ready.suites[0].prompts[0].text


# --- refusals -----------------------------------------------------------------------------------


def test_an_unknown_part_is_refused_with_the_nearest_named(tmp_path: Path) -> None:
    for key in ("win_by", "gold", "correct"):
        with pytest.raises(ValidationError, match=f"eval.{key}='acuracy'.*did you mean accuracy"):
            config(tmp_path, eval={**RAW["eval"], key: "acuracy"})
    with pytest.raises(ValidationError, match="no reward model and no judge"):
        config(tmp_path, eval={"preferences": "pairs.jsonl"})
    with pytest.raises(ValidationError, match="none may be total"):
        config(tmp_path, reward_models=[{"name": "total", "path": "x"}])
    with pytest.raises(ValidationError, match="nothing decides who wins"):
        EvalConfig.model_validate({**RAW, "rewards": [], "eval": {}})


def test_a_broken_or_unknown_suite_is_refused_with_its_line(tmp_path: Path) -> None:
    good = shipped_suites()["capability"].read_text().splitlines()[0]
    broken = tmp_path / "mine.jsonl"
    broken.write_text(good + '\n{"suite": "capability", "id": "x", "prompt": "?"}\n')
    with pytest.raises(InputError, match=r"mine\.jsonl:2.*expect"):
        prepare_eval(config(tmp_path, eval={"suites": [str(broken)]}))
    with pytest.raises(InputError, match="did you mean sycophancy"):
        prepare_eval(config(tmp_path, eval={"suites": ["sycophant"]}))
    clash = tmp_path / "capability.jsonl"
    clash.write_text(good + "\n")
    with pytest.raises(InputError, match="same name"):
        prepare_eval(config(tmp_path, eval={"suites": ["capability", str(clash)], "suite_max_tokens": 6}))


def test_a_base_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(resolve_model(TINY)).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {("changed" if t == "A" else t): i for t, i in words["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"base\.path.*tokenizer is not that of model\.path"):
        prepare_eval(config(tmp_path, base={"path": str(other)}))


def test_a_run_folder_in_use_and_too_few_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "eval.json").write_text("{}")
    with pytest.raises(InputError, match="exists already"):
        evaluate_models(config(tmp_path), Console(quiet=True))
    (tmp_path / "self" / "eval.json").unlink()
    (tmp_path / "self" / "replies").mkdir()
    assert check_eval_folder(config(tmp_path)) == tmp_path / "self", "of an evaluation that broke off"
    with pytest.raises(InputError, match=r"eval\.num_prompts = 99.*12 distinct"):
        prepare_eval(config(tmp_path, eval={"num_prompts": 99}))


def test_a_recipe_with_a_section_eval_is_an_evaluation() -> None:
    found = load_config("cpu-eval", ["eval.win_by=total", "run.seed=5"]).config
    assert isinstance(found, EvalConfig) and found.eval.win_by == "total" and found.run.seed == 5
    assert set(found.eval.suites) == set(shipped_suites())
    with pytest.raises(InputError, match=r"eval\.win_buy.*win_by"):
        load_config("cpu-eval", ["eval.win_buy=total"])


# --- during training ----------------------------------------------------------------------------


def test_live_win_rate_is_against_the_runs_own_start_and_clustered() -> None:
    texts, lengths, cut = ["a b", "a b", "c d", "e"], [3, 3, 4, 1], [True, False, False, False]
    first = FirstEvaluation((0.0, 1.0, math.nan, 1.0), num_samples=2)
    found = live_metrics(texts, lengths, cut, [1.0, 1.0, 5.0, 0.0], first)
    assert found["eval/win_rate"] == pytest.approx((1 + 0.5 + 0) / 3)  # the failed pair is left out
    assert found["eval/win_rate_low"] <= found["eval/win_rate"] <= found["eval/win_rate_high"]
    assert found["eval/unique"] == 0.75 and found["eval/clipped_ratio"] == 0.25
    assert found["eval/distinct_2"] == pytest.approx(2 / 3)
    at_start = live_metrics(texts, lengths, cut, [1.0, 1.0, 5.0, 0.0], None)
    assert not {"eval/win_rate", "eval/win_rate_low"} & at_start.keys()
    assert at_start["eval/reward_length_correlation"] == found["eval/reward_length_correlation"] > 0
    with pytest.raises(ValueError, match="not the same samples"):
        live_metrics(texts, lengths, cut, [1.0] * 4, FirstEvaluation((0.0,)))


def test_live_metrics_of_an_unchanged_policy_say_half() -> None:
    rewards = list(np.random.default_rng(0).normal(size=20))
    found = live_metrics(["x"] * 20, [1] * 20, [False] * 20, rewards, FirstEvaluation(tuple(rewards)))
    assert found["eval/win_rate"] == 0.5 and found["eval/win_rate_low"] < 0.5 < found["eval/win_rate_high"]
