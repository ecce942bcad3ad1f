"""The metric dictionary: what every number of a run means, in which unit, over what, and how it is reduced.

A name that is not here is refused by the recorder, so a metric cannot be logged without a definition.
Names follow TRL where it has one.  ``<name>`` in a dictionary name is that of a reward, a dataset or a role.
``python -m trainers.metrics`` writes ``docs/metrics.md``.
May import: nothing but the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GENERATED = "docs/metrics.md"


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the dictionary."""

    name: str  # as it stands in metrics.jsonl; <name> is the name of a reward, a dataset or a role
    definition: str
    unit: str
    mask: str  # the tokens, samples or groups it is taken over
    reducer: str  # how these become one number, over samples and over ranks


# Masks, worded once.
TOKENS = "completion tokens of samples with a valid reward, EOS included"
TRAINED = (
    "completion tokens of samples with a gradient: with a valid reward and, where neither KL nor entropy is in the "
    "loss and algorithm.measure_kl is off, an advantage other than 0"
)
COMPLETIONS = "all completions of the step, masked ones included"
VALID = "samples with a valid reward"
REWARD_VALUES = "one of each sample and reward part"
GROUPS = "groups with at least one valid reward"
EVALUATED = "held-out prompts with a valid reward"
HELD_OUT = "all held-out prompts; a failed reward counts as wrong"
RUN = "the whole step"
PAIRS = "all pairs of the step"
ROLE = "all workers of role <name>, from where the row before ended to where the learner ended its part of this push"
CHOSEN = "pairs of the step; KTO: answers labelled true"
REJECTED = "pairs of the step; KTO: answers labelled false"
# Reducers, worded once.
HISTOGRAM = "over all tokens at once, from a histogram: within 0.4 % of the log ratio, or 1e-6"
TOKEN_MEAN = "sum over all ranks and minibatches / number of tokens"  # noqa: S105 - a language token
SHARE_OF_TIME = "ns of the role's workers / all ns of the role's workers"
COMPARISON_MEAN = "mean over a comparison's pairs, then over comparisons"
MEAN, MAX, MIN, SUM = "mean", "maximum", "minimum", "sum"
CONTROLLER = "measured once, by the controller"
LAST = "value at the end of the step; equal on all ranks"

# Of preference learning (docs/preferences.md); of held-out pairs with eval/ before the name.
_OF_PAIRS: tuple[Metric, ...] = (
    Metric("rewards/chosen", "implicit reward of the chosen answers: beta * (policy_ - reference_ log-prob); of orpo "
           "and simpo beta * mean policy_ log-prob per token", "reward", CHOSEN, COMPARISON_MEAN),
    Metric("rewards/rejected", "the same of the rejected answers", "reward", REJECTED, COMPARISON_MEAN),
    Metric("rewards/accuracies", "pairs whose chosen answer has the higher implicit reward; ties count half",
           "fraction", PAIRS, COMPARISON_MEAN),
    Metric("rewards/margins", "rewards/chosen - rewards/rejected", "reward", PAIRS, COMPARISON_MEAN),
    Metric("logps/chosen", "policy_ log-prob of the chosen answers, EOS included; of orpo and simpo its mean per token",
           "nats per answer", CHOSEN, COMPARISON_MEAN),
    Metric("logps/rejected", "the same of the rejected answers", "nats per answer", REJECTED, COMPARISON_MEAN),
    Metric("nll_loss", "cross-entropy of the chosen answers, orpo's first term", "nats per token", PAIRS,
           "mean over an answer's tokens, over a comparison's pairs, over comparisons"),
    Metric("log_odds_ratio", "log sigmoid of log_odds_chosen; minus algorithm.beta times it is orpo's second term",
           "nats", PAIRS, COMPARISON_MEAN),
    Metric("log_odds_chosen", "log of the odds of the chosen answer over those of the rejected one; orpo", "nats",
           PAIRS, COMPARISON_MEAN),
)

_ROWS: tuple[Metric, ...] = (
    # --- reward -------------------------------------------------------------------------------
    Metric("reward", "total reward: the weighted sum of the parts, before any KL penalty", "reward", VALID, MEAN),
    Metric("reward_std", "standard deviation of the total reward inside a group", "reward",
           GROUPS + ", dropped ones included", "mean over groups"),
    Metric("rewards/<name>/mean", "reward part <name>, unweighted", "reward", "samples where the part has a value",
           MEAN),
    Metric("rewards/<name>/std", "standard deviation of reward part <name> over the batch", "reward",
           "samples where the part has a value", "standard deviation over samples"),
    Metric("disagreement/mean", "standard deviation over the members of an ensemble of reward models of their scores "
           "of a sample; the largest, where there are several ensembles", "reward", VALID, MEAN),
    Metric("disagreement/top_quartile", "the same, of the samples with the highest total rewards", "reward",
           "the quarter of the step's samples with the highest reward, ties included", MEAN),
    Metric("disagreement/num_samples_masked", "samples left out of the update because an ensemble disagrees on them "
           "(ensemble.mask_above, ensemble.mask_quantile); they have a valid reward", "samples", VALID, SUM),
    Metric("frac_reward_zero_std", "share of groups whose valid rewards are all equal: no policy gradient where "
           "samples are compared inside their group", "fraction",
           GROUPS + ", dropped ones included", "mean over groups"),
    Metric("advantages/mean", "advantage of a sample", "advantage", VALID, MEAN),
    Metric("advantages/std", "standard deviation of the advantages", "advantage", VALID,
           "standard deviation over samples"),
    Metric("baseline/greedy_reward", "total reward of the prompts' greedy completions, which samples are compared with "
           "(algorithm.baseline=greedy)", "reward", "groups whose greedy completion has a reward", "mean over groups"),
    Metric("failures/num_reward", "values that a reward part should have given and did not: raised, timed out, NaN, "
           "wrong count, no number, a judge that cannot be read; not None, by which a function says that it does not "
           "apply", "count", REWARD_VALUES, SUM),
    Metric("failures/kind/<name>", "values that are missing for the reason <name>: raised, timeout, nan, ...; of a "
           "judge what could not be read (missing, contradictory, ...) or why it was silent (docs/ai_feedback.md); "
           "abstained: the function said that it does not apply, which is no failure", "count", REWARD_VALUES, SUM),
    Metric("failures/num_samples_masked", "samples left out of the update because they have no valid reward",
           "samples", COMPLETIONS, SUM),
    Metric("failures/masked_fraction", "share of samples left out of the update because they have no valid reward",
           "fraction", COMPLETIONS, MEAN),
    Metric("groups/num_generated", "groups sampled; asynchronous: between the last batch and this one", "groups",
           RUN, SUM),
    Metric("groups/num_dropped", "groups scored and dropped because they teach nothing (filtering.zero_variance)",
           "groups", RUN, SUM),
    Metric("groups/num_failed", "groups given up after too many attempts", "groups", RUN, SUM),
    Metric("groups/num_trained", "groups in the batch", "groups", RUN, SUM),
    Metric("groups/reward_generated", "total reward of trained and dropped groups: what reward would be unfiltered",
           "reward", VALID + ", dropped ones included", MEAN),
    # --- completions --------------------------------------------------------------------------
    Metric("completions/mean_length", "length of a completion, EOS included", "tokens", COMPLETIONS, MEAN),
    Metric("completions/max_length", "longest completion, EOS included", "tokens", COMPLETIONS, MAX),
    Metric("completions/min_length", "shortest completion, EOS included", "tokens", COMPLETIONS, MIN),
    Metric("completions/clipped_ratio", "share of completions cut at max_tokens (finish_reason length)", "fraction",
           COMPLETIONS, MEAN),
    Metric("completions/mean_terminated_length", "length of the completions that ended by themselves; null if none did",
           "tokens", "completions with finish_reason stop", MEAN),
    Metric("num_tokens", "prompt and completion tokens processed since the run began", "tokens",
           "all trained groups; a group's prompt counts once a sample", "cumulative sum"),
    Metric("epoch", "groups trained since the run began / distinct training prompts", "epochs", RUN, CONTROLLER),
    # --- policy update ------------------------------------------------------------------------
    Metric("loss", "value that is minimised: policy term + kl_coef * KL - entropy_coef * entropy", "loss", TOKENS,
           "algorithm.aggregation over samples of all ranks, mean over updates of the step"),
    Metric("kl", "policy against reference, by the configured estimator (algorithm.kl_estimator); of kto z, its "
           "estimate from mismatched answers, in nats per answer", "nats per token", TRAINED, TOKEN_MEAN),
    Metric("entropy", "entropy of the policy's next-token distribution at the sampling temperature", "nats per token",
           TRAINED, TOKEN_MEAN),
    Metric("ratio/mean", "exp(policy_ - proximal_ log-prob), with algorithm.ratio=sequence the geometric mean over the "
           "token's completion", "ratio", TRAINED, TOKEN_MEAN),
    Metric("ratio/max", "largest such ratio", "ratio", TRAINED, "maximum over ranks"),
    Metric("ratio/first_minibatch_max_deviation", "largest |ratio - 1| in the first minibatch; 0 up to rounding",
           "ratio", TRAINED + ", first minibatch", "maximum over ranks"),
    Metric("clip_ratio/low_mean", "share of tokens with ratio < 1 - clip_low and a negative advantage", "fraction",
           TRAINED, TOKEN_MEAN),
    Metric("clip_ratio/high_mean", "share of tokens with ratio > 1 + clip_high and a positive advantage", "fraction",
           TRAINED, TOKEN_MEAN),
    Metric("clip_ratio/region_mean", "share of tokens clipped on either side: low_mean + high_mean", "fraction",
           TRAINED, TOKEN_MEAN),
    Metric("sampling/sampling_logp_difference/mean", "|behavior_ - proximal_ log-prob|: what the engines disagree on",
           "nats", TRAINED, TOKEN_MEAN),
    Metric("sampling/sampling_logp_difference/max", "largest |behavior_ - proximal_ log-prob|", "nats", TRAINED,
           "maximum over ranks"),
    Metric("sampling/mismatch_kl/k1", "KL(behavior || proximal), by behavior_ - proximal_ log-prob: no bias, noisy",
           "nats per token", TRAINED, TOKEN_MEAN),
    Metric("sampling/mismatch_kl/k3", "the same by ratio - 1 - log ratio, with ratio = exp(proximal_ - behavior_ "
           "log-prob): never negative", "nats per token", TRAINED, TOKEN_MEAN),
    Metric("sampling/importance_sampling_ratio/p01", "1 % of tokens have exp(proximal_ - behavior_ log-prob) up to "
           "this, before any cap or mask", "ratio", TRAINED, HISTOGRAM),
    Metric("sampling/importance_sampling_ratio/p50", "its median", "ratio", TRAINED, HISTOGRAM),
    Metric("sampling/importance_sampling_ratio/p99", "99 % of tokens have one up to this", "ratio", TRAINED, HISTOGRAM),
    Metric("sampling/importance_sampling_ratio/max", "largest such ratio", "ratio", TRAINED, "maximum over ranks"),
    Metric("sampling/effective_sample_size", "(sum w)^2 / (n sum w^2), with w the product of a completion's ratios "
           "before any cap or mask: 1 where all weigh the same, 1 / n where one outweighs all", "fraction",
           "samples trained on", "over all of them at once"),
    Metric("correction/truncated_fraction", "share of tokens whose weight was cut to algorithm.correction.cap",
           "fraction", TRAINED, TOKEN_MEAN),
    Metric("correction/masked_fraction", "share of tokens that algorithm.correction masks: they have no gradient",
           "fraction", TRAINED, TOKEN_MEAN),
    Metric("grad_norm", "L2 norm of the whole gradient before clipping", "loss", "all trained parameters",
           "norm over all ranks' shards, mean over updates of the step"),
    Metric("learning_rate", "learning rate of the last update", "1", RUN, LAST),
    # --- versions -----------------------------------------------------------------------------
    Metric("version/incarnation", "restores from a checkpoint so far", "count", RUN, LAST),
    Metric("version/step", "step part of the weight version the generators serve after this step", "steps", RUN, LAST),
    Metric("staleness/mean", "version trained on minus oldest version that sampled a token of the group", "steps",
           "all trained groups", "mean over groups"),
    Metric("staleness/max", "largest such lag", "steps", "all trained groups", "maximum over groups"),
    *(
        Metric(f"staleness/length_quartile_{i}",
               f"such lag of a sample, in quartile {i} of completion length ({which})", "steps",
               "a quarter of the trained samples, by length", MEAN)
        for i, which in enumerate(("the shortest", "below the median", "above the median", "the longest"), 1)
    ),
    # --- time and throughput ------------------------------------------------------------------
    Metric("time/step_s", "wall time from the first request (asynchronous: the wish for a batch) to verified new "
           "weights; evaluation and checkpoint follow", "s", RUN, CONTROLLER),
    Metric("time/generate_s", "from the first request to the last finished group; synchronous runs only", "s", RUN,
           CONTROLLER),
    Metric("time/score_s", "from the last sampled group to the last scored one (reference included); synchronous runs "
           "only", "s", RUN, CONTROLLER),
    Metric("time/wait_groups_s", "the learner had no whole batch", "s", RUN, CONTROLLER),
    Metric("time/wait_bound_s", "part of time/wait_groups_s in which enough groups had finished and one at its "
           "staleness bound had not", "s", RUN, CONTROLLER),
    Metric("time/reference_s", "time in which at least one group was at the reference", "s", RUN, CONTROLLER),
    Metric("time/learn_s", "update: log-probs, forward, backward, optimizer", "s", RUN, "maximum over ranks"),
    Metric("time/push_s", "from the start of a push until every generator is verified", "s", RUN, CONTROLLER),
    Metric("time/push_pause_s", "longest time one generator did not sample because of the push", "s", RUN,
           "maximum over generators"),
    Metric("time/evaluate_s", "held-out evaluation", "s", "steps with an evaluation", CONTROLLER),
    Metric("time/checkpoint_stop_s", "what the checkpoint before this step made the loop wait: the ranks' host copies, "
           "and the end of an earlier checkpoint if that was still being written", "s", "steps after a checkpoint",
           CONTROLLER),
    Metric("time/checkpoint_s", "from the begin of a checkpoint until it was committed, while training went on", "s",
           "the first step after that", CONTROLLER),
    Metric("checkpoint/num_bytes", "learner state in that checkpoint", "bytes", "all ranks of learner and critic", SUM),
    Metric("throughput/generate_tokens_per_s", "completion tokens / time/generate_s; in asynchronous runs / time "
           "between two batches", "tokens/s", "all completions sampled for or during the step",
           "sum over generators / wall time"),
    Metric("throughput/learn_tokens_per_s", "completion tokens of the batch / time/learn_s; those of samples without a "
           "gradient count, though they are skipped", "tokens/s", TOKENS,
           "sum over ranks / wall time"),
    Metric("throughput/samples_per_s", "samples of the trained groups / time/step_s", "samples/s", COMPLETIONS,
           "sum / wall time"),
    Metric("push/num_bytes", "bytes of weights sent to one generator", "bytes", "all pushed parameters", CONTROLLER),
    # --- accounting (docs/accounting.md) --------------------------------------------------------
    Metric("accounting/<name>/useful_fraction", "share of the role's time that generated, scored, learned, or computed "
           "reference log-probs or values", "fraction", ROLE, SHARE_OF_TIME),
    *(
        Metric(f"accounting/<name>/{cause}_fraction", definition, "fraction", ROLE, SHARE_OF_TIME)
        for cause, definition in (
            ("generate", "share in which a worker sampled at least one group"),
            ("prefill_again", "share in which it sampled again what a lost attempt had sampled, and nothing else"),
            ("score", "share in which it scored"),
            ("reference", "share in which it computed reference log-probs"),
            ("values", "share in which it computed the critic's values of sampled groups"),
            ("learn", "share in which it updated: targets, forward, backward, optimizer"),
            ("push", "share in which it wrote, sent or verified weights and had nothing better to do"),
            ("pause", "share in which an engine stood still to take weights in"),
            ("wait", "share in which it waited for another worker"),
            ("checkpoint", "share in which it saved or exported and had nothing better to do"),
            ("evaluate", "share in which it sampled or scored held-out prompts and nothing else"),
            ("start", "share in which it was constructed, restored or probed"),
            ("idle", "share in which it had nothing to do and nobody did anything it could wait for"),
        )
    ),
    Metric("accounting/<name>/wait_for_<name>_fraction", "share in which the role waited for the second <name>: "
           "generator, learner, critic, score, reference, push, checkpoint, evaluation or start", "fraction", ROLE,
           SHARE_OF_TIME),
    # --- evaluation ---------------------------------------------------------------------------
    Metric("eval/accuracy", "pass@1 on held-out prompts: share of samples whose accuracy reward is at least 1",
           "fraction", HELD_OUT, "mean over a prompt's samples, then over prompts"),
    Metric("eval/pass_at_k", "share of prompts with at least one correct sample among evaluation.num_samples",
           "fraction", HELD_OUT, "mean over prompts"),
    Metric("eval/reward", "total reward on held-out prompts", "reward", EVALUATED, "mean over samples"),
    Metric("eval/<name>/mean", "reward part <name> on held-out prompts", "reward",
           "held-out samples where the part has a value", "mean over samples"),
    Metric("eval/num_prompts", "held-out prompts evaluated", "prompts", "all held-out prompts", SUM),
    Metric("eval/mean_length", "length of held-out completions, EOS included", "tokens", "all held-out completions",
           MEAN),
    Metric("eval/win_rate", "chance that a sample's total reward is above that of the same sample at step 0; ties "
           "count half", "fraction", "held-out samples with a valid reward at both steps",
           MEAN),
    Metric("eval/win_rate_low", "lower end of its 95 % interval", "fraction", "as eval/win_rate",
           "bootstrap over prompts"),
    Metric("eval/win_rate_high", "upper end of that interval", "fraction", "as eval/win_rate",
           "bootstrap over prompts"),
    Metric("eval/distinct_2", "different pairs of neighbouring words / all such pairs", "fraction",
           "all held-out completions together", "over all of them at once"),
    Metric("eval/unique", "share of held-out completions left when each text is counted once", "fraction",
           "all held-out completions", "over all of them at once"),
    Metric("eval/reward_length_correlation", "Pearson correlation of total reward and length", "1",
           "held-out samples with a valid reward", "over all of them at once"),
    Metric("eval/clipped_ratio", "share of held-out completions cut at max_tokens (finish_reason length)", "fraction",
           "all held-out completions", MEAN),
    # --- learner ------------------------------------------------------------------------------
    Metric("learner/peak_memory_bytes", "peak memory of a rank since it started: allocated on GPU, resident on CPU",
           "bytes", RUN, "maximum over ranks"),
    Metric("learner/num_microbatches", "micro-batches of one rank in one step, zero-weight ones included", "count", RUN,
           "sum over updates; equal on all ranks"),
    Metric("learner/padding_fraction", "share of computed positions that hold no token", "fraction",
           "all positions of all micro-batches", "sum of padding over ranks / sum of positions"),
    Metric("learner/shared_prompt_fraction", "prompt tokens not computed again thanks to sharing / all prompt tokens",
           "fraction", "prompt tokens of all trained samples", "sum over ranks / sum over ranks"),
    Metric("learner/reference_s", "time that the learner spent on the reference's log-probs, its adapter as it started",
           "s", RUN, "rank 0"),
    Metric("learner/parameters_changed_fraction", "share of the policy's parameters whose float32 value its first "
           "update with a gradient changed; measured once a start", "fraction",
           "evenly spaced elements of every trained tensor, 4096 of each or all", "mean, tensors weighted by size"),
    # --- supervised training ------------------------------------------------------------------
    # loss is the mean cross-entropy of the target tokens, num_tokens and epoch count examples' tokens and examples.
    Metric("num_target_tokens", "tokens of the step that are learned: completions, assistant's turns, plain text",
           "tokens", "all examples of the step, EOS included", SUM),
    Metric("mixture/<name>", "share of the step's examples that come from dataset <name>", "fraction",
           "all examples of the step", MEAN),
    Metric("eval/loss", "mean cross-entropy of held-out target tokens; of preference learning its loss",
           "nats per token", "target tokens of all held-out examples", "sum over ranks / number of tokens"),
    Metric("eval/num_target_tokens", "held-out tokens the loss is taken over", "tokens",
           "target tokens of all held-out examples", SUM),
    # --- PPO ----------------------------------------------------------------------------------
    Metric("objective/scores", "total reward after normalisation, clipping and the missing-EOS penalty", "reward",
           "samples that are trained on", MEAN),
    Metric("objective/kl", "sum over a completion's tokens of proximal_ - reference_ log-prob (k1): policy against "
           "reference before the update", "nats per completion", "samples that are trained on", MEAN),
    Metric("objective/non_score_reward", "minus what the KL cost a sample in the reward; 0 with the KL in the loss",
           "reward", "samples that are trained on", MEAN),
    Metric("objective/rlhf_reward", "objective/scores + objective/non_score_reward: what PPO maximises", "reward",
           "samples that are trained on", MEAN),
    Metric("kl_coef", "coefficient beta of the KL in this step, fixed or steered to algorithm.ppo.kl_target",
           "reward per nat", RUN, "value at the start of the step"),
    Metric("pretrain_loss", "mean cross-entropy of the pretraining texts, before algorithm.ppo.pretrain_coef",
           "nats per token", "tokens of the texts drawn for the step", "mean over tokens, then over updates"),
    Metric("critic/loss", "half the squared distance of values from returns, with the clipped one where it is larger",
           "reward squared", "completion tokens trained on", "mean over tokens, then over updates of the step"),
    Metric("critic/clip_ratio", "share of tokens whose value left its trust region towards the return: no gradient",
           "fraction", "completion tokens trained on", TOKEN_MEAN),
    Metric("critic/value_mean", "value of the state before a token, before the update", "reward",
           "completion tokens trained on", MEAN),
    Metric("critic/return_mean", "advantage + value: what the critic learns", "reward", "completion tokens trained on",
           MEAN),
    Metric("critic/explained_variance", "1 - variance(returns - values) / variance(returns), before the update",
           "1", "completion tokens trained on", "over all tokens of the batch"),
    Metric("critic/grad_norm", "L2 norm of the critic's whole gradient before clipping", "loss",
           "all parameters of the critic", "norm over all ranks' shards, mean over updates of the step"),
    Metric("critic/learning_rate", "learning rate of the critic's last update", "1", RUN, LAST),
    Metric("critic/peak_memory_bytes", "as learner/peak_memory_bytes, of a critic rank", "bytes", RUN,
           "maximum over ranks"),
    Metric("time/learn_prepare_s", "proximal log-probs, KL, advantages, returns and their whitening", "s", RUN,
           CONTROLLER),
    Metric("time/learn_policy_s", "all updates of the policy on this batch; 0 in the value warm-up", "s", RUN,
           CONTROLLER),
    Metric("time/learn_critic_s", "all updates of the critic on this batch", "s", RUN, CONTROLLER),
    Metric("time/learn_overlap_s", "time in which policy and critic were updating both", "s", RUN, CONTROLLER),
    # --- online DPO ---------------------------------------------------------------------------
    # loss, rewards/... and logps/... are those of preference learning below, means over the pairs of all updates.
    Metric("pairs/num", "pairs of a best and a worst sample that were trained on, one a group at most", "pairs", RUN,
           SUM),
    Metric("pairs/num_ties", "groups without a pair: all their samples have one reward", "groups",
           "all trained groups", SUM),
    Metric("pairs/num_single", "groups without a pair: fewer than two of their samples may be trained on", "groups",
           "all trained groups", SUM),
    Metric("objective/scores_margin", "total reward of the chosen minus that of the rejected sample", "reward", PAIRS,
           "mean over pairs, then over updates of the step"),
    # --- reward model -------------------------------------------------------------------------
    # loss is the Bradley-Terry loss with its options (algorithm.label_smoothing, margin_column, centering_coef).
    Metric("accuracy", "pairs whose better answer has the higher score, before the update; ties count half", "fraction",
           PAIRS, COMPARISON_MEAN),
    Metric("margin", "score of the better answer minus that of the worse one", "reward", PAIRS, COMPARISON_MEAN),
    Metric("center_rewards_loss", "squared sum of a pair's two scores, before algorithm.centering_coef", "reward^2",
           PAIRS, COMPARISON_MEAN),
    Metric("mean_reward", "score of an answer, before the update", "reward", "all answers of the step", MEAN),
    Metric("min_reward", "lowest score", "reward", "all answers of the step", MIN),
    Metric("max_reward", "highest score", "reward", "all answers of the step", MAX),
    Metric("eval/pair_loss", "Bradley-Terry loss on held-out pairs, without smoothing, margin or centring", "nats",
           "all held-out pairs", COMPARISON_MEAN),
    Metric("eval/pair_accuracy", "held-out pairs whose better answer has the higher score; ties count half",
           "fraction", "all held-out pairs", MEAN),
    Metric("eval/pair_accuracy_low", "lower end of its 95 % interval (over prompts where they have several pairs)",
           "fraction", "all held-out pairs", "Wilson, or wider"),
    Metric("eval/pair_accuracy_high", "upper end of that interval", "fraction", "all held-out pairs",
           "Wilson, or wider"),
    Metric("eval/ece", "expected calibration error of P(preferred) = sigmoid(margin)", "fraction",
           "all held-out pairs, in both orientations", "mean over algorithm.num_bins bins, weighted by their pairs"),
    Metric("eval/margin", "held-out score of the better answer minus that of the worse one", "reward",
           "all held-out pairs", MEAN),
    Metric("eval/mean_reward", "score of a held-out answer", "reward", "all held-out answers, each once", MEAN),
    Metric("eval/std_reward", "standard deviation of the scores of held-out answers", "reward",
           "all held-out answers, each once", "standard deviation over answers"),
    Metric("eval/num_pairs", "held-out pairs judged", "pairs", "all held-out pairs", SUM),
    # --- preference learning ------------------------------------------------------------------
    # loss is algorithm.loss over the pairs (kto: the answers) of the step.
    *_OF_PAIRS,
    *(replace(metric, name=f"eval/{metric.name}", definition=f"{metric.name} on held-out data",
              mask="all held-out pairs; KTO: answers") for metric in _OF_PAIRS),
    Metric("eval/kl", "KTO's z on held-out answers", "nats per answer", "all held-out answers, with mismatched ones",
           "mean, at least 0"),
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
        "that of a reward, a dataset or a role. A value that cannot be had (NaN, infinite) is `null`, never a number.",
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
