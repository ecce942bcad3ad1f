"""The losses of preferences against the numbers of TRL and OpenRLHF (tests/golden), and where ours differ on purpose.

Five pairs, the last one a tie; KTO has their ten answers as rows of its own.  Differences are asserted in their exact
form.  docs/algorithms.md lists them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_kit import EXACT, SINGLE, Case, case, close, double

from trainers.bradley_terry import preference_loss
from trainers.online_pairs import pair_gradients
from trainers.preference_losses import AnswerLogps, Outcome, ipo_loss, mismatched_kl, paired_outcome, unpaired_outcome
from trainers.preference_training import PreferenceSettings

SIDES = ("chosen", "rejected")
NUM = 5
TIE = 4  # index of the pair whose answers are equally likely, by sums and by means


def settings_of(theirs: Case, **keys: Any) -> PreferenceSettings:
    given = {key: value for key, value in (theirs.settings | keys).items() if key != "label_smoothing" or value}
    return PreferenceSettings.model_validate({"name": "dpo", **given})


def answers(theirs: Case, side: str, has_reference: bool = True) -> AnswerLogps:
    data = theirs.data
    reference = double(data[f"reference_{side}"]) if has_reference else None
    return AnswerLogps(double(data[side]).requires_grad_(), reference, double(data[f"num_{side}"]))


def outcome_of(theirs: Case, made: PreferenceSettings) -> tuple[Outcome, tuple[torch.Tensor, ...]]:
    """Ours of the five pairs, each with the weight 1 / 5, and the gradients in the two sides' log-probs."""
    known = [answers(theirs, side, made.kind.has_reference) for side in SIDES]
    found = paired_outcome(known[0], known[1], torch.full((NUM,), 1 / NUM, dtype=torch.float64), made)
    return found, torch.autograd.grad(found.loss, [k.policy for k in known])


def metrics_agree(found: Outcome, theirs: Case, rtol: float, but: tuple[str, ...] = ()) -> None:
    """All that they show, by their names; a tie counts 1/2 in ours and 0 in theirs."""
    shown = dict(theirs.outputs["metrics"])
    if "rewards/accuracies" in shown:
        close(found.metrics["rewards/accuracies"] - 0.5 / NUM, shown.pop("rewards/accuracies"), SINGLE)
    for name, value in shown.items():
        if name not in but:
            close(found.metrics[name], value, rtol)


PAIRED = [
    ("trl", "dpo", EXACT),
    ("trl", "robust dpo", EXACT),
    ("trl", "simpo", EXACT),
    ("openrlhf", "dpo", EXACT),
    ("openrlhf", "conservative dpo", EXACT),
    ("openrlhf", "ipo", EXACT),
]


@pytest.mark.parametrize(("of", "name", "rtol"), PAIRED, ids=[f"{s} {n}" for s, n, _ in PAIRED])
def test_loss_gradient_and_metrics_of_pairs_are_theirs(of: str, name: str, rtol: float) -> None:
    theirs = case(of, name)
    found, gradients = outcome_of(theirs, settings_of(theirs))
    close(found.loss, theirs.outputs["loss"], rtol)
    for side, gradient in zip(SIDES, gradients, strict=True):
        close(gradient, theirs.outputs[f"gradient_{side}"], rtol)
        assert gradient.abs().min() > 1e-6, "the comparison says nothing"
    metrics_agree(found, theirs, rtol, but=("nll_loss",))  # SimPO has none; TRL shows 0


KTO = [case("trl", "kto"), case("trl", "kto, weighted"), case("trl", "kto, negative estimate")]


@pytest.mark.parametrize("theirs", KTO, ids=["plain", "weighted", "negative estimate"])
def test_kto_and_its_kl_estimate_are_trls(theirs: Case) -> None:
    data = theirs.data
    kl = mismatched_kl(float(np.sum(data["mismatched"]) - np.sum(data["reference_mismatched"])), 2 * NUM)
    close(kl, theirs.outputs["metrics"]["kl"])
    rows = {key: double(data[f"{key}chosen"] + data[f"{key}rejected"]) for key in ("", "reference_", "num_")}
    policy, label = rows[""].requires_grad_(), torch.tensor(data["label"])
    known = AnswerLogps(policy, rows["reference_"], rows["num_"])
    found = unpaired_outcome(known, label, int(label.sum()), 2 * NUM, kl, settings_of(theirs))
    close(found.loss, theirs.outputs["loss"])
    close(torch.autograd.grad(found.loss, policy)[0], theirs.outputs["gradient"])
    metrics_agree(found, theirs, EXACT, but=("kl",))


def test_one_kto_estimate_is_above_zero_and_one_would_be_below() -> None:
    assert KTO[0].outputs["metrics"]["kl"] > 0 and KTO[2].outputs["metrics"]["kl"] == 0
    assert np.sum(KTO[2].data["mismatched"]) < np.sum(KTO[2].data["reference_mismatched"])


def test_the_pairwise_loss_of_a_reward_model_is_openrlhfs() -> None:
    theirs = case("openrlhf", "bradley-terry")
    scores = [double(theirs.data[side]).requires_grad_() for side in SIDES]
    weights = torch.full((NUM,), 1 / NUM, dtype=torch.float64)
    loss = preference_loss(scores[0], scores[1], weights, double(theirs.settings["margin"])).loss
    close(loss, theirs.outputs["loss"])
    for side, gradient in zip(SIDES, torch.autograd.grad(loss, scores), strict=True):
        close(gradient, theirs.outputs[f"gradient_{side}"])


def test_what_online_dpo_asks_of_its_samples_is_the_gradient_of_trls_dpo() -> None:
    theirs = case("trl", "dpo")
    columns = [tuple(np.array(theirs.data[f"{key}{side}"]) for side in SIDES) for key in ("", "reference_", "num_")]
    found = pair_gradients(*columns, settings_of(theirs))  # type: ignore[arg-type]
    close(found.chosen / NUM, theirs.outputs["gradient_chosen"])
    close(found.rejected / NUM, theirs.outputs["gradient_rejected"])


# --- where ours differ on purpose -----------------------------------------------------------------


def test_a_tie_counts_half_in_the_accuracies() -> None:
    """TRL counts the pairs that are right; a policy that knows nothing would have 0 there, and 0.5 here."""
    theirs = case("trl", "dpo")
    found, _ = outcome_of(theirs, settings_of(theirs))
    known = [answers(theirs, side) for side in SIDES]
    margins = known[0].ratio - known[1].ratio
    assert margins[TIE] == 0 and (margins != 0).sum() == NUM - 1
    close(found.metrics["rewards/accuracies"], theirs.outputs["metrics"]["rewards/accuracies"] + 0.5 / NUM, SINGLE)


def test_ipo_is_of_whole_answers_where_trl_divides_each_by_its_length() -> None:
    """Ours is eq. 17 as printed (and OpenRLHF's, above).  TRL's on our formula: means over tokens in place of sums."""
    theirs = case("trl", "ipo")
    known = [answers(theirs, side) for side in SIDES]
    means = [k.ratio / k.num_tokens for k in known]
    loss = ipo_loss(*means, torch.full((NUM,), 1 / NUM, dtype=torch.float64), theirs.settings["beta"])
    close(loss, theirs.outputs["loss"])
    for side, gradient in zip(SIDES, torch.autograd.grad(loss, [k.policy for k in known]), strict=True):
        close(gradient, theirs.outputs[f"gradient_{side}"])
    ours, _ = outcome_of(theirs, settings_of(theirs))
    assert abs(ours.loss - loss) > 1
    metrics_agree(ours, theirs, EXACT)


def test_trls_sigmoid_reads_no_label_smoothing_and_ours_does() -> None:
    """Conservative DPO = DPO + e times the mean margin; OpenRLHF's numbers, above, are those of the note."""
    theirs = case("trl", "dpo, label smoothing")
    smoothing = theirs.settings["label_smoothing"]
    close(theirs.outputs["loss"], case("trl", "dpo").outputs["loss"])
    found, _ = outcome_of(theirs, settings_of(theirs))
    close(found.loss - smoothing * theirs.outputs["metrics"]["rewards/margins"], theirs.outputs["loss"])
    assert smoothing > 0


def test_the_first_term_of_orpo_is_of_the_answer_and_a_mean_over_answers() -> None:
    """TRL's is of the prompt too, and a mean over all tokens of the batch; the odds ratio is the same."""
    theirs = case("trl", "orpo")
    data, beta = theirs.data, theirs.settings["beta"]
    found, gradients = outcome_of(theirs, settings_of(theirs))
    chosen, count = np.array(data["chosen"]), np.array(data["num_chosen"])
    tokens = (count + np.array(data["num_prompt"])).sum()
    theirs_nll, ours_nll = -(chosen + np.array(data["prompt"])).sum() / tokens, -(chosen / count).mean()
    close(theirs.outputs["metrics"]["nll_loss"], theirs_nll)
    close(found.metrics["nll_loss"], ours_nll)
    close(found.loss - ours_nll, theirs.outputs["loss"] - theirs_nll, SINGLE)
    close(found.loss - ours_nll, -beta * theirs.outputs["metrics"]["log_odds_ratio"], SINGLE)
    close(gradients[0] + 1 / (NUM * double(data["num_chosen"])), theirs.tensor("gradient_chosen") + 1 / tokens, SINGLE)
    close(gradients[1], theirs.outputs["gradient_rejected"], SINGLE)
    metrics_agree(found, theirs, SINGLE, but=("nll_loss",))
    assert abs(theirs_nll - ours_nll) > 0.01
