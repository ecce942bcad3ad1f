"""The alarms of a run: what goes wrong without an error, when to say so, what it means and what to try.

Every alarm turns a row of metrics into one number and compares it with one threshold.  Its state machine:

    quiet --(number beyond the threshold on for_steps rows in a row: the alarm)--> raised
      ^                                                                              |
      `-----------(number back by the margin: hysteresis)----------------------------'

A raised alarm is silent until it has cleared.  A row in which the number cannot be had (a metric is absent,
null or NaN) leaves the state as it is: such a row neither fires, nor clears, nor interrupts a count.  So
an alarm on held-out metrics counts evaluations, and one on a metric that this run never records stays quiet.
An infinite metric is a measurement: it is compared as it stands, but never remembered as a baseline or in a trend.
``python -m trainers.alarms`` writes ``docs/alarms.md``.
May import: pydantic, trainers.metrics, trainers.settings.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers.metrics import check
from trainers.settings import Settings

GENERATED = "docs/alarms.md"
ROWS_OF_A_READING = 10  # training rows averaged where a run has no evaluation: each is of other pairs
READINGS = 4  # in the trend of falling_likelihood
WIN_GAIN = 0.02  # a held-out score counts as grown from here on; less is noise of a few hundred prompts

Action = Literal["record", "stop", "roll_back"]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Row = Mapping[str, float | None]


class AlarmSettings(Settings):
    """Thresholds of the alarms (null: off) and what to do when one goes off."""

    action: Action = Field("record", description="stop: with a checkpoint; roll_back: to the last good checkpoint")
    actions: dict[str, Action] = Field(default_factory=dict, description="alarm name -> its own action")
    kl_budget: Above | None = Field(50.0, description="nats from the reference")
    kl_per: Literal["sequence", "token"] = Field("sequence", description="what kl_budget is counted over")
    entropy_collapse: Share | None = Field(0.05, description="entropy / entropy of the first step")
    clip_fraction: Share | None = Field(0.3, description="share of clipped tokens")
    first_minibatch_ratio: Above | None = Field(0.01, description="largest |ratio - 1| of the first minibatch")
    logprob_mismatch: Above | None = Field(
        0.1, description="mean |behavior_ - proximal_ log-prob|, nats, of batches without lag (staleness/max 0)"
    )
    truncation: Share | None = Field(0.8, description="share of completions cut at max_tokens")
    length_without_wins: float | None = Field(
        1.5, gt=1, allow_inf_nan=False, description="length / length at the last gain in the held-out score"
    )
    dead_groups: Share | None = Field(0.95, description="share of groups whose rewards are all equal; of "
                                     "algorithms that compare the samples of a group")
    explained_variance: float | None = Field(0.0, lt=1, description="of the returns, by the critic")
    no_gradient: float | None = Field(0.0, ge=0, description="gradient norm, and share of parameters that changed")
    # With a window of 8 and two readings in a row, gold that is flat but for noise gives a false alarm in 3 % of
    # runs of 30 evaluations; gold that falls by 0.7 of its noise an evaluation is caught 7 evaluations later.
    proxy_up_gold_down: Share | None = Field(
        0.7, description="rank correlation with time (Kendall's tau): of the proxy up and of the gold down"
    )
    # With a window of 16 and two steps in a row, disagreement that is flat but for noise gives a false alarm in 2 % of
    # runs of 200 steps; one that rises by 0.2 of its noise a step is caught 20 steps later.
    proxy_up_disagreement_up: Share | None = Field(
        0.6, description="rank correlation with time (Kendall's tau): of the proxy and of the disagreement of an "
        "ensemble of reward models on the samples it rewards most"
    )  # fmt: skip
    failed_rewards: Share | None = Field(0.1, description="share of samples without a valid reward")
    proxy_metric: str = Field("reward", description="what training raises, for the alarms that compare with it")
    # With four readings: at most one of their six pairs out of order, in each of the three trends.
    falling_likelihood: Share | None = Field(
        0.6, description="rank correlation with time (Kendall's tau): of both likelihoods down and of the margin up"
    )
    gold_metric: str = Field("eval/gold/mean", description="held-out truth, for proxy_up_gold_down")
    trend_window: int = Field(8, ge=4, description="readings of the gold metric in a trend")
    disagreement_window: int = Field(16, ge=4, description="steps in a trend of the disagreement")

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for name in self.actions:
            if name not in ALARMS:
                nearest = max(ALARMS, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
                raise ValueError(f"actions={name}: there is no alarm of that name; the nearest is {nearest}")
        for key in ("proxy_metric", "gold_metric"):
            try:
                check(getattr(self, key))
            except ValueError as error:
                raise ValueError(f"{key}={getattr(self, key)}: is no metric; docs/metrics.md lists them") from error
        return self

    def threshold(self, name: str) -> float | None:
        """Of alarm ``name``; None: it is off."""
        value: float | None = getattr(self, name)
        return value

    def action_of(self, name: str) -> Action:
        return self.actions.get(name, self.action)


# The number that an alarm compares; None: cannot be had from this row.  The dictionary is the alarm's own memory
# between rows (plain JSON values); the function may write to it.
Measure = Callable[[Row, dict[str, Any], AlarmSettings], float | None]


@dataclass(frozen=True, slots=True)
class AlarmRule:
    """One alarm of the list."""

    name: str  # also the key of its threshold
    reads: tuple[str, ...]  # metrics
    measure: Measure
    fires: Literal["above", "below"]  # the threshold, or at it
    unit: str
    for_steps: int  # rows in a row, of those that carry the number
    meaning: str
    remedy: str
    margin: float = 0.1  # hysteresis, as a share of the threshold
    least_margin: float = 0.0  # and at least this, in the unit, for thresholds near 0
    after_step: int = 0  # rows up to this step are not looked at
    of_critic: bool = False  # after_step counts from the end of the value warm-up


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that went off at ``step``, the last of the violating rows; ``since`` is the first of them."""

    name: str
    step: int
    since: int  # a checkpoint of an earlier step is from before the trouble was seen
    value: float
    threshold: float
    meaning: str
    remedy: str
    action: Action


# --- what the alarms measure ------------------------------------------------------------------


def _get(row: Row, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or math.isnan(value) else value


def _finite(row: Row, name: str) -> float | None:
    value = _get(row, name)
    return None if value is None or math.isinf(value) else value


def _metric(name: str) -> Measure:
    return lambda row, memory, settings: _get(row, name)


def _kl(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    per_token, length = _get(row, "kl"), _get(row, "completions/mean_length")
    if per_token is None or settings.kl_per == "token":
        return per_token
    return None if length is None else per_token * length


def _fresh_mismatch(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    """The mismatch of a batch that has no lag; what lag does to it looks the same as a fault."""
    return None if _get(row, "staleness/max") else _get(row, _MISMATCH)


def _of_first_entropy(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    entropy = _finite(row, "entropy")
    if entropy is None or ("first" not in memory and entropy <= 0):
        return None  # nothing can be a share of 0: the next row is the first
    return entropy / float(memory.setdefault("first", entropy))


def _least_movement(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    norm, changed = (_get(row, name) for name in ("grad_norm", "learner/parameters_changed_fraction"))
    if changed is not None:  # measured once a start; until the next time it holds
        memory["changed"] = changed
    if norm is None:
        return changed
    return min(norm, float(memory.get("changed", norm)))


def _growth_since_win(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    """Held-out length / its value when the held-out score last grew by WIN_GAIN; 1 at a gain."""
    length = _finite(row, "eval/mean_length")
    scores = {name: _finite(row, name) for name in ("eval/win_rate", "eval/accuracy")}
    source, score = next(((n, s) for n, s in scores.items() if s is not None), ("", 0.0))
    if not length or not source or (memory.get("source") == "eval/win_rate" != source):
        return None  # once there is a win rate, accuracy no longer stands for it
    if memory.get("source") != source or score >= memory["score"] + WIN_GAIN:
        memory.update(source=source, score=score, length=length)
    return length / float(memory["length"])


def _parting_trends(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    """min(tau of the proxy, -tau of the gold) over the window; the proxy is averaged between gold readings."""
    proxy, gold = _finite(row, settings.proxy_metric), _finite(row, settings.gold_metric)
    since, points = memory.setdefault("since", []), memory.setdefault("points", [])
    if proxy is not None:
        since.append(proxy)
    if gold is None or not since:
        return None
    points.append([sum(since) / len(since), gold])
    since.clear()
    del points[: -settings.trend_window]
    if len(points) < settings.trend_window:
        return None
    return min(_tau([p for p, _ in points]), -_tau([g for _, g in points]))


def _rising_together(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    """The lower of the trends of the proxy and of the disagreement over the window of steps that have both."""
    proxy, disagreement = _finite(row, settings.proxy_metric), _finite(row, _DISAGREEMENT)
    if proxy is None or disagreement is None:
        return None
    points = memory.setdefault("points", [])
    points.append([proxy, disagreement])
    del points[: -settings.disagreement_window]
    if len(points) < settings.disagreement_window:
        return None
    return min(_tau([p for p, _ in points]), _tau([d for _, d in points]))


def _falling_likelihood(row: Row, memory: dict[str, Any], settings: AlarmSettings) -> float | None:
    """min(-tau of the chosen, -tau of the rejected, tau of the margin) over the last READINGS.

    A reading is an evaluation, whose pairs are always the same: there a reward is beta times the log-prob, less a
    constant.  In a run without evaluations it is the mean of some training rows.
    """
    found = [_finite(row, f"eval/{name}") for name in _REWARDS_OF_PAIRS]
    if any(value is None for value in found):
        if memory.get("evaluated"):
            return None
        since = memory.setdefault("since", [])
        since.append([_finite(row, name) for name in _REWARDS_OF_PAIRS])
        if None in since[-1]:
            since.pop()
        if len(since) < ROWS_OF_A_READING:
            return None
        found = [sum(column) / len(since) for column in zip(*since, strict=True)]
        since.clear()
    elif not memory.get("evaluated"):
        memory.update(evaluated=True, readings=[], since=[])
    readings = memory.setdefault("readings", [])
    readings.append(found)
    del readings[:-READINGS]
    if len(readings) < READINGS:
        return None
    chosen, rejected, margin = ([reading[i] for reading in readings] for i in range(3))
    return min(-_tau(chosen), -_tau(rejected), _tau(margin))


def _tau(values: list[float]) -> float:
    """Kendall's rank correlation of ``values`` with their order, in [-1, 1]; ties count 0 (tau a)."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum((b > a) - (b < a) for a, b in pairs) / len(pairs)


# --- the list ---------------------------------------------------------------------------------

_DISAGREEMENT = "disagreement/top_quartile"
_REWARDS_OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
_MISMATCH = "sampling/sampling_logp_difference/mean"
_RULES: tuple[AlarmRule, ...] = (
    AlarmRule("kl_budget", ("kl", "completions/mean_length"), _kl, "above", "nats", 3,
              "the policy has left the neighbourhood of the reference, where the reward can be trusted",
              "raise algorithm.kl_coef, lower learner.optimizer.lr, or keep an earlier checkpoint"),
    AlarmRule("entropy_collapse", ("entropy",), _of_first_entropy, "below", "of the first step's", 3,
              "the policy hardly varies any more: its samples repeat, and there is nothing left to choose from",
              "raise algorithm.entropy_coef, algorithm.clip_high or algorithm.kl_coef; lower learner.optimizer.lr"),
    AlarmRule("clip_fraction", ("clip_ratio/region_mean",), _metric("clip_ratio/region_mean"), "above", "of tokens", 3,
              "updates reach far outside the trust region, and most of the later ones are thrown away",
              "lower learner.optimizer.lr, algorithm.num_epochs or algorithm.num_minibatches"),
    AlarmRule("first_minibatch_ratio", ("ratio/first_minibatch_max_deviation",),
              _metric("ratio/first_minibatch_max_deviation"), "above", "from 1", 1,
              "before any update the policy disagrees with itself: proximal log-probs come from other weights, "
              "other masks or dropout",
              "a fault, no setting: look for dropout, stale weights or changed batches; do not trust the run"),
    AlarmRule("logprob_mismatch", (_MISMATCH, "staleness/max"), _fresh_mismatch, "above", "nats", 3,
              "generators sample from another distribution than the learner trains: stale weights, another "
              "precision, or sampling settings that are not scored",
              "compare the dtypes of generator and learner, and look for failed pushes in events.jsonl"),
    AlarmRule("truncation", ("completions/clipped_ratio",), _metric("completions/clipped_ratio"), "above",
              "of completions", 5,
              "most completions are cut before they end, so their rewards judge fragments",
              "raise generator.sampling.max_tokens, reward ending, or set algorithm.mask_truncated"),
    AlarmRule("length_without_wins", ("eval/mean_length", "eval/win_rate", "eval/accuracy"), _growth_since_win,
              "above", "times the length", 2,
              "answers grow and do not get better: the reward pays for length",
              "look at the correlation of reward with length; penalise length or balance the reward model's pairs"),
    AlarmRule("dead_groups", ("frac_reward_zero_std",), _metric("frac_reward_zero_std"), "above", "of groups", 5,
              "nearly all groups have equal rewards: prompts are all solved or all hopeless, and nothing is learned",
              "choose prompts of medium difficulty, raise run.samples_per_prompt or the sampling temperature"),
    AlarmRule("explained_variance", ("critic/explained_variance",), _metric("critic/explained_variance"), "below",
              "of variance", 5,
              "the critic predicts returns no better than a constant, so its advantages are noise",
              "give the critic more warm-up or a higher learning rate, or start it from the reward model",
              least_margin=0.05, after_step=20, of_critic=True),
    AlarmRule("no_gradient", ("grad_norm", "learner/parameters_changed_fraction"), _least_movement, "below",
              "in norm, or of parameters", 3,
              "updates leave the model as it is: no gradient, or steps too small for the precision of the weights",
              "look at frac_reward_zero_std and failed rewards; check that parameters are trained, in fp32 masters"),
    AlarmRule("proxy_up_gold_down", ("reward", "eval/gold/mean"), _parting_trends, "above", "Kendall's tau", 2,
              "the reward that is trained on rises while the held-out truth falls: the policy hacks the reward",
              "stop at the best held-out score; raise algorithm.kl_coef, or renew the reward model on fresh samples"),
    AlarmRule("proxy_up_disagreement_up", ("reward", _DISAGREEMENT), _rising_together, "above", "Kendall's tau", 2,
              "the reward rises, and the reward models of the ensemble part over the samples that have most of it: the "
              "policy has left what they were trained on, or hacks one of them",
              "raise algorithm.kl_coef, set the ensemble's combine=worst_case or its mask_quantile, or renew its "
              "members on fresh samples"),
    AlarmRule("failed_rewards", ("failures/masked_fraction",), _metric("failures/masked_fraction"), "above",
              "of samples", 2,
              "many samples have no valid reward; they are masked, so the batch is smaller and no longer a fair draw",
              "read the reasons in events.jsonl; mend the reward, or raise its time limit"),
    AlarmRule("falling_likelihood", (*_REWARDS_OF_PAIRS, *(f"eval/{name}" for name in _REWARDS_OF_PAIRS)),
              _falling_likelihood, "above", "Kendall's tau", 2,
              "the margin between chosen and rejected answers grows while both become less likely: what they lose goes "
              "to answers that nobody judged",
              "lower learner.optimizer.lr or stop earlier; raise algorithm.beta (online_dpo: algorithm.kl_coef); use "
              "algorithm.loss=orpo, which keeps the chosen answers likely, or fine-tune on them first"),
)  # fmt: skip

ALARMS: dict[str, AlarmRule] = {rule.name: rule for rule in _RULES}


# --- the state machines -----------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    count: int = 0  # violating rows in a row
    since: int = 0  # step of the first of them
    raised: bool = False
    memory: dict[str, Any] = field(default_factory=dict)  # of the measure


class AlarmBoard:
    """All alarms that are on, fed one row a step.  ``value_warmup_steps``: steps in which only the critic learns."""

    def __init__(self, settings: AlarmSettings, value_warmup_steps: int = 0) -> None:
        self._settings, self._value_warmup_steps = settings, value_warmup_steps
        self._rules = [rule for rule in _RULES if settings.threshold(rule.name) is not None]
        self._states = {rule.name: _State() for rule in self._rules}
        self._last_step = -1

    def observe(self, step: int, metrics: Row) -> list[Alarm]:
        """The alarms that go off with this row, in the order of the list; steps must grow (ValueError)."""
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}: load the state of the checkpoint first")
        self._last_step = step
        return [alarm for rule in self._rules if (alarm := self._look(rule, step, metrics)) is not None]

    def _look(self, rule: AlarmRule, step: int, row: Row) -> Alarm | None:
        state, threshold = self._states[rule.name], self._settings.threshold(rule.name)
        value = rule.measure(row, state.memory, self._settings)
        grace = rule.after_step + (self._value_warmup_steps if rule.of_critic else 0)
        if value is None or math.isnan(value) or threshold is None or step <= grace:
            return None
        sign = 1.0 if rule.fires == "above" else -1.0
        beyond = sign * (value - threshold)
        if state.raised:
            if beyond < -max(rule.margin * abs(threshold), rule.least_margin):
                state.raised = False
            return None
        if beyond < 0:
            state.count = 0
            return None
        state.count += 1
        state.since = step if state.count == 1 else state.since
        if state.count < rule.for_steps:
            return None
        state.raised, state.count = True, 0
        action = self._settings.action_of(rule.name)
        return Alarm(rule.name, step, state.since, value, threshold, rule.meaning, rule.remedy, action)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the checkpoint's metadata."""
        alarms = {
            name: {"count": s.count, "since": s.since, "raised": s.raised, "memory": copy.deepcopy(s.memory)}
            for name, s in self._states.items()
        }
        return {"last_step": self._last_step, "alarms": alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, or back to it.  An alarm that was off then starts afresh."""
        self._last_step = int(state["last_step"])
        saved = state["alarms"]
        self._states = {
            rule.name: _State(**copy.deepcopy(saved[rule.name])) if rule.name in saved else _State()
            for rule in self._rules
        }


# --- the page ---------------------------------------------------------------------------------


def markdown() -> str:
    """The text of ``docs/alarms.md``: one table row an alarm, in the order of the list."""
    lines = [
        "# Alarms",
        "",
        "Generated by `python -m trainers.alarms` from `trainers/alarms.py`; do not edit.",
        "",
        "Each alarm goes to the terminal, to `events.jsonl` (kind `alarm`) and to W&B as an alert. `alarms.NAME` is",
        "its threshold, `null` turns it off; `alarms.action` says what happens besides: `record` (nothing more),",
        "`stop` (with a checkpoint) or `roll_back` (to the last checkpoint from before the trouble), and",
        "`alarms.actions` sets that for single alarms. A roll-back restarts the run from that checkpoint with a new",
        "incarnation; what was recorded after it is set aside. An alarm rolls a run back once: the second time, or",
        "where no checkpoint is old enough, it stops the run.",
        "",
        "An alarm goes off after so many rows in a row beyond its threshold, once; it can go off again when the number",
        "has been well on the good side. Rows in which the number is absent or `null` are passed over: they neither",
        "fire, nor clear, nor interrupt. So alarms on held-out metrics count evaluations.",
        "",
        "| alarm | reads | default threshold | rows | meaning | what to try |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    defaults = AlarmSettings()
    for rule in _RULES:
        sign = "at least" if rule.fires == "above" else "at most"
        unit = f"{rule.unit} per {defaults.kl_per}" if rule.name == "kl_budget" else rule.unit
        rows = f"{rule.for_steps}, after step {rule.after_step}" if rule.after_step else str(rule.for_steps)
        rows += " from the end of `algorithm.ppo.value_warmup_steps` on" if rule.of_critic else ""
        cells = (f"`{rule.name}`", ", ".join(f"`{name}`" for name in rule.reads),
                 f"{sign} {defaults.threshold(rule.name):g} {unit}", rows, rule.meaning, rule.remedy)  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    target = Path(__file__).parent.parent / GENERATED
    target.write_text(markdown(), encoding="utf-8")
    print(f"wrote {GENERATED}: {len(ALARMS)} alarms")  # noqa: T201 - the command's answer
