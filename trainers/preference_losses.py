"""What offline preference learning minimises: DPO, conservative and robust DPO, IPO, KTO, ORPO and SimPO.

Every loss is a sum over pairs (KTO: answers) of a term times a weight.  The weights come from the whole batch of all
ranks before any backward pass, so a loss does not depend on how its pairs are packed or spread.  What a term needs of
an answer is the sum of its tokens' log-probs (float64: answers are long, and differences of sums are what counts) and,
for ORPO and SimPO, how many tokens it has.

In the formulas ``r(y) = log pi(y|x) - log pi_ref(y|x)``, w is the chosen and l the rejected answer, and
``mean(y) = log pi(y|x) / |y|``.
Axes: N pairs, or N answers where there are no pairs.  May import: torch, trainers.{bradley_terry, preference_training}.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from trainers.bradley_terry import preference_loss
from trainers.preference_training import PreferenceSettings

Tensor = torch.Tensor
LEAST_SURPRISE = 1e-7  # nats a token: nearer to certainty the odds p / (1 - p) have no finite gradient


class AnswerLogps(NamedTuple):
    """What is known of N answers."""

    policy: Tensor  # [N], sum over the answer's tokens, EOS included
    reference: Tensor | None  # [N], the same under the reference; None: the loss has none
    num_tokens: Tensor  # [N]

    @property
    def ratio(self) -> Tensor:
        """[N]: log pi - log pi_ref of the whole answer."""
        if self.reference is None:
            raise ValueError("a loss with a reference needs its log-probs")
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """[N]: log pi per token."""
        return self.policy / self.num_tokens


class Outcome(NamedTuple):
    """A part of the batch: its share of the loss, and of each metric, which add up over packs and ranks."""

    loss: Tensor  # scalar, differentiable
    metrics: dict[str, Tensor]  # TRL's names; scalars


# --- losses -----------------------------------------------------------------------------------


def dpo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``sum_i w_i (-(1-e) log sigmoid(h_i) - e log sigmoid(-h_i))`` with ``h = beta (r(w) - r(l))``.

    e = 0: DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.  e > 0: conservative DPO, the cross-entropy with target
    1 - e of Mitchell's note (2023, https://ericmitchell.ai/cdpo.pdf), lowest where ``sigmoid(h) = 1 - e``.

    Args:
        chosen, rejected: [N], r of the two answers.
        weights: [N].
    """
    return preference_loss(beta * chosen, beta * rejected, weights, label_smoothing=label_smoothing).loss


def robust_dpo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """``sum_i w_i (-(1-e) log sigmoid(h_i) + e log sigmoid(-h_i)) / (1 - 2e)``.

    Chowdhury, Kini and Natarajan 2024 (arXiv:2403.00409), the unbiased loss of section 3: where a share e of the
    labels was flipped, its expectation is the DPO loss of the true ones.  A single term has no lower bound.
    Arguments as in dpo_loss.
    """
    h = beta * (chosen - rejected)
    terms = (1.0 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return -(weights * terms).sum() / (1.0 - 2.0 * label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, tau: float) -> Tensor:
    """``sum_i w_i (r(w) - r(l) - 1 / (2 tau))^2``.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17.  r is of whole answers, as there (TRL takes means over tokens).
    Arguments as in dpo_loss.
    """
    return (weights * (chosen - rejected - 1.0 / (2.0 * tau)).square()).sum()


def kto_loss(
    ratio: Tensor,
    desirable: Tensor,
    weights: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``sum_i w_i (lambda_D (1 - sigmoid(beta (r_i - z))))`` of desirable answers, and
    ``sum_i w_i (lambda_U (1 - sigmoid(beta (z - r_i))))`` of the others.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8.

    Args:
        ratio: [N], r of each answer.
        desirable: bool [N].
        weights: [N].
        kl: z, see :func:`mismatched_kl`; nothing flows back through it.
    """
    surplus = ratio - kl
    value = torch.sigmoid(beta * torch.where(desirable, surplus, -surplus))
    sizes = undesirable_weight + (desirable_weight - undesirable_weight) * desirable.to(ratio.dtype)
    return (weights * sizes * (1.0 - value)).sum()


def mismatched_kl(sum_of_ratios: float, count: int) -> float:
    """KTO's z of one batch of all ranks, nats: ``max(0, mean of r(y'|x))`` over prompts x with answers y' of others.

    arXiv:2402.01306, section 4.1.  It is biased as an estimate of KL(pi || pi_ref), since y' is no sample of pi(.|x).
    """
    return max(0.0, sum_of_ratios / count)


def log_odds(mean: Tensor) -> Tensor:
    """``log(p / (1 - p))`` with ``log p = mean``; at most log(1 / LEAST_SURPRISE), where its gradient ends."""
    logp = mean.clamp(max=-LEAST_SURPRISE)
    near = logp > -math.log(2.0)  # log(1 - exp(x)) by the form that keeps its digits
    # Each form is fed what it is used for only: where() would carry the other one's NaN into the gradient.
    half = torch.full_like(logp, -math.log(2.0))
    complement = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, logp, half))),
        torch.log1p(-torch.exp(torch.where(near, half, logp))),
    )
    return logp - complement


def orpo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, ratio_weight: float) -> Tensor:
    """``sum_i w_i (-mean(w) - lambda log sigmoid(log odds(w) - log odds(l)))``.

    Hong, Lee and Thorne 2024 (arXiv:2403.07691), eqs. 4 to 7: odds of the geometric mean of an answer's token
    probabilities.  The first term is the cross-entropy of the chosen answer alone (TRL's is of its prompt too).

    Args:
        chosen, rejected: [N], mean log-prob per token of the two answers.
        weights: [N].
    """
    return -(weights * (chosen + ratio_weight * logsigmoid(log_odds(chosen) - log_odds(rejected)))).sum()


def simpo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float, gamma: float) -> Tensor:
    """``sum_i w_i (-log sigmoid(beta (mean(w) - mean(l)) - gamma))``.

    Meng, Xia and Chen 2024 (arXiv:2405.14734), eq. 6.  Arguments as in orpo_loss.
    """
    return preference_loss(beta * chosen, beta * rejected, weights, torch.full_like(chosen, gamma)).loss


# --- with their metrics -------------------------------------------------------------------------


def paired_outcome(
    chosen: AnswerLogps, rejected: AnswerLogps, weights: Tensor, settings: PreferenceSettings
) -> Outcome:
    """The loss of ``settings`` over N pairs.  ``weights``: [N], which sum to 1 over the pairs of the whole batch."""
    loss, beta, extra = settings.loss, settings.option("beta"), {}
    if settings.kind.has_reference:
        better, worse = chosen.ratio, rejected.ratio
        shown = chosen.policy, rejected.policy
    else:
        better, worse = shown = chosen.mean, rejected.mean
    if loss == "sigmoid":
        total = dpo_loss(better, worse, weights, beta, settings.label_smoothing)
    elif loss == "robust":
        total = robust_dpo_loss(better, worse, weights, beta, settings.label_smoothing)
    elif loss == "ipo":
        total = ipo_loss(better, worse, weights, beta)
    elif loss == "simpo":
        total = simpo_loss(better, worse, weights, beta, settings.option("gamma"))
    elif loss == "orpo":
        total = orpo_loss(better, worse, weights, beta)
        odds = (log_odds(better) - log_odds(worse)).detach()
        extra = {"nll_loss": -better.detach(), "log_odds_ratio": logsigmoid(odds), "log_odds_chosen": odds}
    else:
        raise ValueError(f"loss {loss} is not one of pairs")
    with torch.no_grad():
        margin = beta * (better - worse)
        each = {
            "rewards/chosen": beta * better,
            "rewards/rejected": beta * worse,
            "rewards/accuracies": (margin > 0).double() + 0.5 * (margin == 0).double(),
            "rewards/margins": margin,
            "logps/chosen": shown[0],
            "logps/rejected": shown[1],
            **extra,
        }
        metrics = {name: (weights * values).sum() for name, values in each.items()}
    return Outcome(total, {"loss": total.detach(), **metrics})


def unpaired_outcome(
    answers: AnswerLogps,
    desirable: Tensor,
    num_desirable: int,
    num_answers: int,
    kl: float,
    settings: PreferenceSettings,
) -> Outcome:
    """KTO over N of a batch's ``num_answers`` answers, of which ``num_desirable`` are labelled true.

    ``desirable``: bool [N].  A metric of a kind of answers that the batch has none of is left out.
    """
    beta, ratio = settings.option("beta"), answers.ratio
    total = kto_loss(
        ratio, desirable, torch.full_like(ratio, 1.0 / num_answers), kl, beta,
        settings.option("desirable_weight"), settings.option("undesirable_weight"),
    )  # fmt: skip
    metrics = {"loss": total.detach()}
    with torch.no_grad():
        kinds = (("chosen", desirable, num_desirable), ("rejected", ~desirable, num_answers - num_desirable))
        for name, members, count in kinds:
            if count:
                metrics[f"rewards/{name}"] = beta * ratio[members].sum() / count
                metrics[f"logps/{name}"] = answers.policy[members].sum() / count
        if 0 < num_desirable < num_answers:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return Outcome(total, metrics)
