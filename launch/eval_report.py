"""From what two models said to every number of an evaluation, each with its interval and its n.  Pure.

Axes: prompts [N], G samples of each; rows [N * G] hold the samples of a prompt side by side.
May import: numpy, trainers.*, launch.{eval_best_of_n, eval_config, eval_prepare, journal, judge_agreement,
judge_marks}.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.eval_best_of_n import best_of_n_report
from launch.eval_config import JUDGE, TOTAL, EvalConfig
from launch.eval_prepare import PreparedEval, Suite
from launch.journal import strict
from launch.judge_agreement import agreement_report
from launch.judge_marks import marks_report
from trainers.calibration import Estimate, mean_estimate, policy_calibration, score_summary, unless_certain
from trainers.comparisons import Comparison as Preference
from trainers.diversity import diversity_report, sampled_entropy, truncation_share
from trainers.experience import GroupRewards, Trajectory, TrajectoryGroup
from trainers.kl_from_base import sequence_kl
from trainers.length_bias import length_bias
from trainers.reward_report import judge
from trainers.suites import suite_report
from trainers.verdicts import Judgement, judge_report
from trainers.win_rate import Comparison, compare

POLICY, BASE = "policy", "base"
POOL = "best_of_n"  # samples of the policy to choose from


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model said."""

    groups: list[TrajectoryGroup]  # [N]
    suites: Mapping[str, list[str]]  # of each suite, an answer an item
    rewards: list[GroupRewards] = dataclasses.field(default_factory=list)  # [N]; none without rewards

    @property
    def samples(self) -> list[Trajectory]:
        """[N * G]"""
        return [t for group in self.groups for t in group.trajectories]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N * G], tokens"""
        return np.array([t.num_tokens for t in self.samples], dtype=np.int64)

    def scores(self, part: str) -> np.ndarray:
        """float64 [N * G], NaN where the part (or the total) has no value"""
        rows = [r.totals if part == TOTAL else r.parts[part] for r in self.rewards]
        return np.concatenate(rows) if rows else np.zeros(0)


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that the models were asked."""

    policy: Answers
    base: Answers | None = None
    logprobs: tuple[list[np.ndarray], list[np.ndarray]] | None = None  # of the policy's samples, by policy and by base
    pair_scores: Mapping[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)  # reward model -> [C] of [K]
    judgements: Sequence[Judgement] = ()  # [N * G], with a judge
    pool: Answers | None = None  # with eval.best_of_n
    of_people: Sequence[Judgement] = ()  # of the pairs that people labelled, with a judge and eval.preferences
    marked: Mapping[str, Sequence[GroupRewards]] = dataclasses.field(default_factory=dict)  # judges.N -> the same pairs


def build_report(config: EvalConfig, prepared: PreparedEval, measured: Measured) -> dict[str, Any]:
    """Nested mappings with Estimates in them; :func:`plain` makes JSON values of it."""
    sides = {POLICY: measured.policy} | ({} if measured.base is None else {BASE: measured.base})
    report: dict[str, Any] = {
        "prompts": {"stream": prepared.stream, "num": len(prepared.prompts), "num_samples": config.eval.num_samples},
        "models": {who: _model(config, prepared.suites, answers) for who, answers in sides.items()},
        "gold": config.eval.gold,
    }
    if measured.base is not None:
        report["win_by"] = config.win_by
        report["win_rate"] = {
            name: compare(_comparisons(measured, measured.base, name), seed=config.run.seed)
            for name in sorted(config.winners, key=lambda name: _rank(config, name))
        }
    if measured.judgements:
        prompts = [g.prompt.prompt_id for g in measured.policy.groups for _ in g.trajectories]
        report["judge"] = judge_report(measured.judgements, prompts, config.run.seed)
    if measured.of_people:
        report["agreement"] = agreement_report(prepared.labelled, measured.of_people, config.run.seed)
    if measured.marked:
        judges = {f"judges.{i}": judge for i, judge in enumerate(config.judges)}
        names = Counter(judge.name for judge in config.judges)
        report["marks_agreement"] = {
            judges[role].name if names[judges[role].name] == 1 else role: marks_report(
                judges[role], prepared.labelled, rewards, config.run.seed
            )
            for role, rewards in measured.marked.items()
        }
    if measured.logprobs is not None:
        report["kl_from_base"] = _kl(measured, config.generator.sampling.temperature)
    if measured.pool is not None:
        against = (measured.policy, POLICY) if measured.base is None else (measured.base, BASE)
        report["best_of_n"] = best_of_n_report(config, measured.pool, *against)
    report["reward_models"] = {
        name: _reward_model(prepared.pairs[name], scores) for name, scores in measured.pair_scores.items()
    }
    return report


def plain(value: Any) -> Any:
    """``value`` as strict JSON: records become mappings, NaN and infinite numbers null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return strict(value)


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of a report by path, an Estimate as value, ``_low`` and ``_high``; for W&B's summary."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Estimate):
            found = {prefix: value.value, f"{prefix}_low": value.low, f"{prefix}_high": value.high}
            return {name: number for name, number in found.items() if math.isfinite(number)}
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: v for n, item in value.items() for k, v in flat(item, f"{prefix}/{n}" if prefix else str(n)).items()}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return {prefix: float(value)}
    return {}


def _parts(config: EvalConfig) -> list[str]:
    """Every reward, the deciding one first."""
    names = [*config.reward_names, TOTAL] if config.reward_names else []
    return sorted(names, key=lambda name: _rank(config, name))


def _rank(config: EvalConfig, name: str) -> tuple[bool, bool]:
    return name != config.win_by, name != config.eval.gold


# --- one model ----------------------------------------------------------------------------------


def _model(config: EvalConfig, suites: Sequence[Suite], answers: Answers) -> dict[str, Any]:
    samples, texts = answers.samples, [t.text for t in answers.samples]
    size = len(samples) // len(answers.groups)
    prompts = [group.prompt.prompt_id for group in answers.groups for _ in group.trajectories]
    report: dict[str, Any] = {
        "num_samples": len(samples),
        "rewards": {
            name: {
                "mean": _mean(config, name, answers.scores(name), size),
                "scores": score_summary(answers.scores(name)),
                "length_bias": length_bias(answers.scores(name), answers.lengths, prompts, seed=config.run.seed),
            }
            for name in _parts(config)
        },
        # Of an ensemble each member may have failed about one sample, which lacks one reward all the same.
        "failures": dict(Counter(
            f"{reward}: {kind}"
            for r in answers.rewards for _, reward, kind in {(i, f.reward, f.kind) for i, f in r.failures}
        )),
        "mean_length": _clustered(answers.lengths.astype(np.float64), size),
        "truncated": truncation_share([t.finish_reason for t in samples], prompts),
        "diversity": diversity_report(texts, seed=config.run.seed),
        # Nats a token, as it was sampled; the rows of a prompt as one, so that prompts are independent, not samples.
        "entropy": sampled_entropy(_by_prompt([t.behavior_logprobs for t in samples], size)),
        "suites": {suite.name: suite_report(suite.items, answers.suites[suite.name]) for suite in suites},
    }
    if config.eval.correct is not None:
        report["calibration"] = _calibration(samples, answers.scores(config.eval.correct))
    return report


def _clustered(rows: np.ndarray, size: int) -> Estimate:
    """Mean over rows that have a value; the prompts, ``size`` rows each, are the independent observations."""
    grid = rows.reshape(-1, size)
    there = np.isfinite(grid)
    totals, counts = np.where(there, grid, 0.0).sum(axis=1), there.sum(axis=1)
    return mean_estimate(totals[counts > 0], counts[counts > 0])


def _mean(config: EvalConfig, name: str, scores: np.ndarray, size: int) -> Estimate:
    """Of a reward.  One that says whether an answer is right has an interval with a width where all are, or none is."""
    found = _clustered(scores, size)
    return unless_certain(found, found.n) if config.says_right(name) else found


def _by_prompt(rows: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The rows of each prompt's ``size`` samples in one."""
    return [np.concatenate(rows[i : i + size]) for i in range(0, len(rows), size)]


def _divided(estimate: Estimate, size: int) -> Estimate:
    """The mean of one sample from that of a prompt's ``size`` samples together."""
    return Estimate(estimate.value / size, estimate.low / size, estimate.high / size, estimate.n)


def _calibration(samples: Sequence[Trajectory], correct: np.ndarray) -> dict[str, Any]:
    """Probability of the whole completion, as it was sampled, against its correctness.

    A completion that was cut off has no probability of its own: it stands for all that begin like it.
    """
    kept = [
        (math.exp(min(0.0, float(t.behavior_logprobs.sum(dtype=np.float64)))), float(right))
        for t, right in zip(samples, correct, strict=True)
        if t.finish_reason == "stop" and 0.0 <= right <= 1.0  # NaN is not
    ]
    found = policy_calibration([p for p, _ in kept], [right for _, right in kept])
    return {
        "expected_calibration_error": found.error, "overconfidence": found.overconfidence, "n": len(kept),
        "num_left_out": len(samples) - len(kept), "reliability": found.bins,
    }  # fmt: skip


# --- two models ---------------------------------------------------------------------------------


def _comparisons(measured: Measured, base: Answers, winner: str) -> list[Comparison]:
    """Sample i of the policy against sample i of the base: they were drawn under one seed."""
    policy = measured.policy
    prompts = [group.prompt.prompt_id for group in policy.groups for _ in group.trajectories]
    pairs = list(zip(prompts, policy.lengths.tolist(), base.lengths.tolist(), strict=True))
    if winner == JUDGE:
        return [Comparison(*pair, verdicts=j.verdicts) for pair, j in zip(pairs, measured.judgements, strict=True)]
    scores = zip(policy.scores(winner).tolist(), base.scores(winner).tolist(), strict=True)
    return [Comparison(*pair, scores=both) for pair, both in zip(pairs, scores, strict=True)]


def _kl(measured: Measured, temperature: float) -> dict[str, Any]:
    """Both log-probs by one implementation: where two engines round differently, that is no distance of policies.

    ``engine_mismatch`` says how much it would have been: mean |sampling engine - scoring engine|, nats a token.
    """
    assert measured.logprobs is not None
    ours, theirs = measured.logprobs
    size = len(ours) // len(measured.policy.groups)
    kl = sequence_kl(_by_prompt(ours, size), _by_prompt(theirs, size))  # a prompt's samples share its difficulty
    sampled = [t.behavior_logprobs for t in measured.policy.samples]
    gaps = np.concatenate([np.abs(a - b) for a, b in zip(sampled, ours, strict=True)])
    return {
        "sequence": _divided(kl.sequence, size), "sequence_k3": _divided(kl.sequence_k3, size), "token": kl.token,
        "temperature": temperature,
        "engine_mismatch": float(gaps.mean()) if gaps.size else math.nan,
    }  # fmt: skip


def _reward_model(pairs: Sequence[Preference], scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """Judged on the comparisons all of whose answers have a score; the others are counted."""
    kept = [(c, s) for c, s in zip(pairs, scores, strict=True) if np.isfinite(s).all()]
    found: dict[str, Any] = {"num_left_out": len(pairs) - len(kept)}
    if kept:
        found["report"] = judge([c for c, _ in kept], [s for _, s in kept])
    return found
