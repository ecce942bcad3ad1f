"""One batch of preference learning as all ranks see it: its weights, its packs, and what a pack adds to the loss.

Everything that depends on the whole batch is fixed here before anything is computed, the same on every rank; the
engine and the collectives are somebody else's (actors/preference_learner.py).
Axes: N scored tokens of a pack, A answers of a pack.
May import: numpy, torch, actors.{packing, sequence_packing}, trainers.*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.packing import Pack, build_pack
from actors.sequence_packing import laid_side_by_side, pair_indices
from trainers.batching import plan_whole
from trainers.bradley_terry import pair_weights
from trainers.comparisons import Comparison
from trainers.preference_losses import AnswerLogps, Outcome, mismatched_kl, paired_outcome, unpaired_outcome
from trainers.preference_training import LABELLED, PreferenceSettings


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch of a rank."""

    pack: Pack
    members: tuple[int, ...]  # comparisons of the batch; all answers of each are in the pack, in their order
    is_filler: bool  # computed with weight 0, so that all ranks make equally many passes


def answer_logps(logprobs: torch.Tensor, pack: Pack) -> torch.Tensor:
    """float64 [A]: the sum of each answer's token log-probs (float32 [N])."""
    return torch.stack([part.double().sum() for part in logprobs.split(pack.lengths)])


class PreferenceBatch:
    """``batch`` is that of all ranks.

    Args:
        reference: of each comparison, float64 [K]; None where the loss has no reference.
        share_prompts: compute a prompt once for all its answers.
    """

    def __init__(
        self,
        batch: Sequence[Comparison],
        reference: Sequence[np.ndarray] | None,
        settings: PreferenceSettings,
        share_prompts: bool,
        device: torch.device,
    ) -> None:
        self.settings, self.share_prompts, self.device = settings, share_prompts, device
        self._is_paired = settings.kind.rows != LABELLED
        self._weights = pair_weights([len(c.pairs) for c in batch])
        self._num_desirable = sum(c.label is True for c in batch)
        self._reference = reference
        self._judged, self._mismatched = list(batch), list[Comparison]()
        if not self._is_paired:
            self._judged = [replace(c, completion_ids=c.completion_ids[:1]) for c in batch]
            self._mismatched = [replace(c, completion_ids=c.completion_ids[1:]) for c in batch]
        self.kl = 0.0  # KTO's z, see settle_kl

    @property
    def needs_kl(self) -> bool:
        """Whether :meth:`settle_kl` comes before the first :meth:`outcome`."""
        return bool(self._mismatched)

    @property
    def num_judged_tokens(self) -> int:
        """Tokens of the answers that have a gradient, each with its prompt."""
        return sum(c.num_tokens for c in self._judged)

    def plan(self, rank: int, num_ranks: int, token_budget: int, mismatched: bool = False) -> list[tuple[int, ...]]:
        """Which comparisons stand in which pack of one rank; equally many packs on each, of which some may be empty.

        ``mismatched``: of KTO's answers to other prompts, instead of what is judged.
        """
        costs = [unit.cost(self.share_prompts) for unit in self._units(mismatched)]
        return plan_whole(costs, num_ranks, token_budget)[rank]

    def share(self, members: tuple[int, ...], mismatched: bool = False) -> Share:
        """The pack of ``members``; for none of them, a cheap one that counts for nothing."""
        units = self._units(mismatched)
        shown = members or (min(range(len(units)), key=lambda i: units[i].cost(self.share_prompts)),)
        pieces, prompts, answers = laid_side_by_side([units[m] for m in shown], self.share_prompts)
        return Share(build_pack(pieces, prompts, answers, self.device), shown, not members)

    def _units(self, mismatched: bool) -> list[Comparison]:
        return self._mismatched if mismatched else self._judged

    def mismatched_ratios(self, logprobs: torch.Tensor, share: Share) -> torch.Tensor:
        """float64 []: a pack's share of the sum that :meth:`settle_kl` needs; its own log-probs, float32 [N]."""
        if share.is_filler:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        ratios: torch.Tensor = answer_logps(logprobs, share.pack) - self._reference_of(share, slice(1, None))
        return ratios.sum()

    def settle_kl(self, total: float) -> None:
        """``total``: the sum of :meth:`mismatched_ratios` over the packs of all ranks."""
        self.kl = mismatched_kl(total, len(self._mismatched))

    def outcome(self, logprobs: torch.Tensor, share: Share) -> Outcome:
        """What a pack adds to loss and metrics of the batch, from the log-probs of its targets, float32 [N]."""
        if share.is_filler:
            return Outcome(logprobs.sum() * 0.0, self.nothing().metrics)
        policy = answer_logps(logprobs, share.pack)
        lengths = torch.tensor(share.pack.lengths, dtype=torch.float64, device=self.device)
        kept = slice(None) if self._is_paired else slice(0, 1)
        reference = None if self._reference is None else self._reference_of(share, kept)
        answers = AnswerLogps(policy, reference, lengths)
        members = [self._judged[m] for m in share.members]
        if not self._is_paired:
            return self._unpaired(answers, torch.tensor([c.label is True for c in members], device=self.device))
        index = torch.from_numpy(pair_indices(members)).to(self.device)
        weights = np.repeat(self._weights[list(share.members)], [len(c.pairs) for c in members])
        chosen, rejected = (_picked(answers, index[:, side]) for side in (0, 1))
        return paired_outcome(chosen, rejected, torch.from_numpy(weights).to(self.device), self.settings)

    def nothing(self) -> Outcome:
        """What no pack at all adds: every metric that this batch has, as 0."""
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        answers = AnswerLogps(none, none if self.settings.kind.has_reference else None, none)
        if self._is_paired:
            return paired_outcome(answers, answers, none, self.settings)
        return self._unpaired(answers, none.bool())

    def _unpaired(self, answers: AnswerLogps, desirable: torch.Tensor) -> Outcome:
        return unpaired_outcome(answers, desirable, self._num_desirable, len(self._judged), self.kl, self.settings)

    def _reference_of(self, share: Share, answers: slice) -> torch.Tensor:
        """float64 [A] of the pack's answers."""
        if self._reference is None:
            raise ValueError(f"loss {self.settings.loss} needs the reference's log-probs")
        rows = np.concatenate([self._reference[m][answers] for m in share.members])
        return torch.from_numpy(rows).to(self.device)


def _picked(answers: AnswerLogps, index: torch.Tensor) -> AnswerLogps:
    reference = None if answers.reference is None else answers.reference[index]
    return AnswerLogps(answers.policy[index], reference, answers.num_tokens[index])
