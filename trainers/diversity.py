"""Is the policy still saying different things?  Collapse, repetition and cut-off answers.

A text is a string, split into words and punctuation marks, or a sequence of token ids, taken as it is.
These numbers depend on length and on how many texts there are: compare policies on the same prompts, with the
same number of samples.
May import: numpy, trainers.{calibration, prompt_bootstrap}.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from trainers.calibration import Estimate, mean_estimate, proportion
from trainers.prompt_bootstrap import mean_over_prompts

Text = str | Sequence[int]
NGram = tuple[Hashable, ...]
WORD = re.compile(r"\w+|[^\w\s]")
BLEU_ORDERS = 4
MAX_BLEU_TEXTS = 1000
NO_MATCH = 0.5  # matches counted where an order has none, so that one missing order is not a BLEU of 0


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Different n-grams / all n-grams of all texts together (Li et al. 2016, arXiv:1510.03055); NaN without any."""
    counts: Counter[NGram] = Counter()
    for text in texts:
        counts.update(_ngrams(_tokens(text), n))
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Text], max_texts: int = MAX_BLEU_TEXTS, seed: int = 0) -> float:
    """Mean BLEU of each text against all the others, in [0, 1]; 1 means one answer (Zhu et al. 2018, arXiv:1802.01886).

    BLEU is the geometric mean of the clipped precisions of 1- to 4-grams times the brevity penalty towards the
    reference of the nearest length.  A text shorter than 4 tokens is judged by the orders it has; an empty one
    counts 1 where another is empty too, else 0.  Of more than ``max_texts`` a seeded subsample is taken.  NaN for
    fewer than two texts.
    """
    if len(texts) > max_texts:
        chosen = np.random.default_rng(seed).choice(len(texts), size=max_texts, replace=False)
        texts = [texts[i] for i in sorted(chosen)]
    if len(texts) < 2:
        return math.nan
    tokens = [_tokens(text) for text in texts]
    lengths = sorted(len(t) for t in tokens)
    # Clipping against "all others" needs, of each n-gram, the largest count and the largest elsewhere: linear work.
    counts = [[Counter(_ngrams(t, n)) for n in range(1, BLEU_ORDERS + 1)] for t in tokens]
    largest: dict[NGram, tuple[int, int, int]] = {}  # n-gram -> (largest count, whose, second largest)
    for owner, orders in enumerate(counts):
        for gram, count in (item for order in orders for item in order.items()):
            best, whose, second = largest.get(gram, (0, -1, 0))
            largest[gram] = (count, owner, best) if count > best else (best, whose, max(second, count))
    return float(np.mean([_bleu(owner, orders, largest, lengths) for owner, orders in enumerate(counts)]))


def _bleu(
    owner: int, orders: Sequence[Counter[NGram]], largest: dict[NGram, tuple[int, int, int]], lengths: list[int]
) -> float:
    length = orders[0].total()
    place = bisect.bisect_left(lengths, length)
    others = lengths[:place] + lengths[place + 1 :]
    if length == 0:
        return float(others[0] == 0)
    logs = []
    for order in orders[: min(BLEU_ORDERS, length)]:
        matched = 0
        for gram, count in order.items():
            best, whose, second = largest[gram]
            matched += min(count, second if whose == owner else best)
        logs.append(math.log(max(matched, NO_MATCH) / order.total()))
    near = bisect.bisect_left(others, length)
    nearest = min(others[max(0, near - 1) : near + 1], key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def unique_fraction(texts: Sequence[Text]) -> float:
    """Different texts / texts, white space at the ends of strings aside; NaN without any."""
    return len({t.strip() if isinstance(t, str) else tuple(t) for t in texts}) / len(texts) if texts else math.nan


def token_entropy(entropies: Sequence[ArrayLike]) -> Estimate:
    """Mean entropy a token (nats) from the entropies of each token's distribution, rows [T_i] a completion."""
    rows = [np.asarray(row, dtype=np.float64) for row in entropies]
    return mean_estimate([row.sum() for row in rows], [len(row) for row in rows])


def sampled_entropy(logprobs: Sequence[ArrayLike]) -> Estimate:
    """The same from log-probs of sampled tokens alone, -log p: unbiased, noisier, for samples at temperature 1."""
    return token_entropy([-np.asarray(row, dtype=np.float64) for row in logprobs])


def repetition_rate(text: Text, n: int = 4) -> float:
    """1 - different / all n-grams inside one text; 0 for a text shorter than n.  Loops come near 1."""
    grams = _ngrams(_tokens(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def truncation_share(finish_reasons: Sequence[str], prompt_ids: Sequence[Hashable] | None = None) -> Estimate:
    """Share of completions cut off by the token limit (finish reason ``length``).

    With ``prompt_ids``, where some share one, the interval is of the bootstrap over prompts, and ``n`` their number.
    """
    cut = [float(reason == "length") for reason in finish_reasons]
    if prompt_ids is None or len(set(prompt_ids)) == len(cut):
        return proportion(sum(cut), len(cut))
    return mean_over_prompts(cut, prompt_ids)


def diversity_report(texts: Sequence[Text], seed: int = 0) -> dict[str, float]:
    """Everything that texts alone can tell, by name."""
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "distinct_4": distinct_n(texts, 4),
        "self_bleu": self_bleu(texts, seed=seed),
        "unique_fraction": unique_fraction(texts),
        "repetition_rate": float(np.mean([repetition_rate(t) for t in texts])) if texts else math.nan,
    }


def _tokens(text: Text) -> Sequence[Hashable]:
    return WORD.findall(text) if isinstance(text, str) else text


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[NGram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
