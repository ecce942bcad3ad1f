"""The metric dictionary: what every number of a run means, in which unit, over what, and how it is reduced.

A name that is not here is refused by the recorder, so a metric cannot be logged without a definition.
Names follow TRL where it has one.  ``<name>`` in a dictionary name stands for the name of a reward.
``python -m trainers.metrics`` writes ``docs/metrics.md``.
May import: nothing but the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GENERATED = "docs/metrics.md"


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the dictionary."""

    name: str  # as it stands in metrics.jsonl; <name> is the name of a reward
    definition: str
    unit: str
    mask: str  # the tokens, samples or groups it is taken over
    reducer: str  # how these become one number, over samples and over ranks


# Masks, worded once.
TOKENS = "completion tokens of samples with a valid reward, EOS included"
COMPLETIONS = "all completions of the step, masked ones included"
VALID = "samples with a valid reward"
GROUPS = "groups with at least one valid reward"
EVALUATED = "held-out prompts with a valid reward"
RUN = "the whole step"
# Reducers, worded once.
TOKEN_MEAN = "sum over all ranks and minibatches / number of tokens"  # noqa: S105 - a language token
MEAN, MAX, MIN, SUM = "mean", "maximum", "minimum", "sum"
CONTROLLER = "measured once, by the controller"
LAST = "value at the end of the step; equal on all ranks"

_ROWS: tuple[Metric, ...] = (
    # --- reward -------------------------------------------------------------------------------
    Metric("reward", "total reward: the weighted sum of the parts, before any KL penalty", "reward", VALID, MEAN),
    Metric("reward_std", "standard deviation of the total reward inside a group", "reward", GROUPS, "mean over groups"),
    Metric("rewards/<name>/mean", "reward part <name>, unweighted", "reward", "samples where the part has a value",
           MEAN),
    Metric("rewards/<name>/std", "standard deviation of reward part <name> over the batch", "reward",
           "samples where the part has a value", "standard deviation over samples"),
    Metric("frac_reward_zero_std", "share of groups whose valid rewards are all equal: they give no policy gradient",
           "fraction", GROUPS, "mean over groups"),
    Metric("advantages/mean", "advantage of a sample", "advantage", VALID, MEAN),
    Metric("advantages/std", "standard deviation of the advantages", "advantage", VALID,
           "standard deviation over samples"),
    Metric("failures/num_reward", "reward calls without a value: raised, timed out, NaN, wrong count, no number",
           "count", "all calls of all reward parts", SUM),
    Metric("failures/num_samples_masked", "samples left out of the update because they have no valid reward",
           "samples", COMPLETIONS, SUM),
    # --- completions --------------------------------------------------------------------------
    Metric("completions/mean_length", "length of a completion, EOS included", "tokens", COMPLETIONS, MEAN),
    Metric("completions/max_length", "longest completion, EOS included", "tokens", COMPLETIONS, MAX),
    Metric("completions/min_length", "shortest completion, EOS included", "tokens", COMPLETIONS, MIN),
    Metric("completions/clipped_ratio", "share of completions cut at max_tokens (finish_reason length)", "fraction",
           COMPLETIONS, MEAN),
    Metric("completions/mean_terminated_length", "length of the completions that ended by themselves; 0 if none did",
           "tokens", "completions with finish_reason stop", MEAN),
    Metric("num_tokens", "prompt and completion tokens processed since the run began", "tokens",
           "all trained groups; a group's prompt counts once a sample", "cumulative sum"),
    Metric("epoch", "groups trained since the run began / distinct training prompts", "epochs", RUN, CONTROLLER),
    # --- policy update ------------------------------------------------------------------------
    Metric("loss", "value that is minimised: policy term + kl_coef * KL - entropy_coef * entropy", "loss", TOKENS,
           "algorithm.aggregation over samples of all ranks, mean over updates of the step"),
    Metric("kl", "policy against reference, by the configured estimator (algorithm.kl_estimator)", "nats per token",
           TOKENS, TOKEN_MEAN),
    Metric("entropy", "entropy of the policy's next-token distribution at the sampling temperature", "nats per token",
           TOKENS, TOKEN_MEAN),
    Metric("ratio/mean", "exp(policy_ - proximal_ log-prob)", "ratio", TOKENS, TOKEN_MEAN),
    Metric("ratio/max", "largest exp(policy_ - proximal_ log-prob)", "ratio", TOKENS, "maximum over ranks"),
    Metric("ratio/first_minibatch_max_deviation", "largest |ratio - 1| in the first minibatch; 0 up to rounding",
           "ratio", TOKENS + ", first minibatch", "maximum over ranks"),
    Metric("clip_ratio/low_mean", "share of tokens with ratio < 1 - clip_low and a negative advantage", "fraction",
           TOKENS, TOKEN_MEAN),
    Metric("clip_ratio/high_mean", "share of tokens with ratio > 1 + clip_high and a positive advantage", "fraction",
           TOKENS, TOKEN_MEAN),
    Metric("clip_ratio/region_mean", "share of tokens clipped on either side: low_mean + high_mean", "fraction",
           TOKENS, TOKEN_MEAN),
    Metric("sampling/sampling_logp_difference/mean", "|behavior_ - proximal_ log-prob|: what the engines disagree on",
           "nats", TOKENS, TOKEN_MEAN),
    Metric("sampling/sampling_logp_difference/max", "largest |behavior_ - proximal_ log-prob|", "nats", TOKENS,
           "maximum over ranks"),
    Metric("grad_norm", "L2 norm of the whole gradient before clipping", "loss", "all trained parameters",
           "norm over all ranks' shards, mean over updates of the step"),
    Metric("learning_rate", "learning rate of the last update", "1", RUN, LAST),
    # --- versions -----------------------------------------------------------------------------
    Metric("version/incarnation", "restores from a checkpoint so far", "count", RUN, LAST),
    Metric("version/step", "step part of the weight version the generators serve after this step", "steps", RUN, LAST),
    Metric("staleness/mean", "version trained on minus oldest version that sampled a token of the group", "steps",
           "all trained groups", "mean over groups"),
    Metric("staleness/max", "largest such lag", "steps", "all trained groups", "maximum over groups"),
    # --- time and throughput ------------------------------------------------------------------
    Metric("time/step_s", "wall time from the first request to verified new weights; evaluation and checkpoint follow",
           "s", RUN, CONTROLLER),
    Metric("time/generate_s", "from the first request to the last finished group", "s", RUN, CONTROLLER),
    Metric("time/score_s", "from the last sampled group to the last scored one (reference included)", "s", RUN,
           CONTROLLER),
    Metric("time/reference_s", "time in which at least one group was at the reference", "s", RUN, CONTROLLER),
    Metric("time/learn_s", "update: log-probs, forward, backward, optimizer", "s", RUN, "maximum over ranks"),
    Metric("time/push_s", "from the start of a push until every generator is verified", "s", RUN, CONTROLLER),
    Metric("time/push_pause_s", "longest time one generator did not sample because of the push", "s", RUN,
           "maximum over generators"),
    Metric("time/evaluate_s", "held-out evaluation", "s", "steps with an evaluation", CONTROLLER),
    Metric("time/checkpoint_s", "saving and committing the checkpoint before this step", "s",
           "steps after a checkpoint", CONTROLLER),
    Metric("throughput/generate_tokens_per_s", "completion tokens / time/generate_s", "tokens/s", COMPLETIONS,
           "sum over generators / wall time"),
    Metric("throughput/learn_tokens_per_s", "completion tokens trained on / time/learn_s", "tokens/s", TOKENS,
           "sum over ranks / wall time"),
    Metric("throughput/samples_per_s", "samples trained on / time/step_s", "samples/s", VALID, "sum / wall time"),
    Metric("push/num_bytes", "bytes of weights sent to one generator", "bytes", "all pushed parameters", CONTROLLER),
    # --- evaluation ---------------------------------------------------------------------------
    Metric("eval/accuracy", "pass@1 on held-out prompts: share of samples whose accuracy reward is at least 1; "
           "a failed reward counts as wrong",
           "fraction", EVALUATED, "mean over a prompt's samples, then over prompts"),
    Metric("eval/pass_at_k", "share of prompts with at least one correct sample among evaluation.num_samples",
           "fraction", EVALUATED, "mean over prompts"),
    Metric("eval/reward", "total reward on held-out prompts", "reward", EVALUATED, "mean over samples"),
    Metric("eval/<name>/mean", "reward part <name> on held-out prompts", "reward",
           "held-out samples where the part has a value", "mean over samples"),
    Metric("eval/num_prompts", "held-out prompts evaluated", "prompts", "all held-out prompts", SUM),
    Metric("eval/mean_length", "length of held-out completions, EOS included", "tokens", "all held-out completions",
           MEAN),
    # --- learner ------------------------------------------------------------------------------
    Metric("learner/peak_memory_bytes", "peak memory of a rank since it started: allocated on GPU, resident on CPU",
           "bytes", RUN, "maximum over ranks"),
    Metric("learner/num_microbatches", "micro-batches of one rank in one step, zero-weight ones included", "count", RUN,
           "sum over updates; equal on all ranks"),
    Metric("learner/padding_fraction", "share of computed positions that hold no token", "fraction",
           "all positions of all micro-batches", "sum of padding over ranks / sum of positions"),
    Metric("learner/shared_prompt_fraction", "prompt tokens not computed again thanks to sharing / all prompt tokens",
           "fraction", "prompt tokens of all trained samples", "sum over ranks / sum over ranks"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}

_FAMILIES: tuple[tuple[re.Pattern[str], Metric], ...] = tuple(
    (re.compile(re.escape(metric.name).replace("<name>", "[^/<>]+")), metric)
    for metric in _ROWS
    if "<name>" in metric.name
)


def check(name: str) -> Metric:
    """The dictionary's line for ``name``; ValueError when it has none.  O(1) but for reward names."""
    found = METRICS.get(name) if "<" not in name else None
    if found is not None:
        return found
    for pattern, metric in _FAMILIES:
        if pattern.fullmatch(name):
            return metric
    raise ValueError(f"metric {name!r} is not in trainers/metrics.py; add it with definition, unit, mask and reducer")


def markdown() -> str:
    """The text of ``docs/metrics.md``: one table row a metric, in dictionary order."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m trainers.metrics` from `trainers/metrics.py`; do not edit.",
        "",
        "One row a step in `metrics.jsonl`, the same names in W&B. Names follow TRL where it has one; `<name>` is",
        "the name of a reward. A value that cannot be had (NaN, infinite) is `null`, never a number.",
        "",
        "| metric | definition | unit | over | reducer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in METRICS.values():
        cells = (f"`{metric.name}`", metric.definition, metric.unit, metric.mask, metric.reducer)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    target = Path(__file__).parent.parent / GENERATED
    target.parent.mkdir(exist_ok=True)
    target.write_text(markdown(), encoding="utf-8")
    print(f"wrote {GENERATED}: {len(METRICS)} metrics")
