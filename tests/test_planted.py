"""The planted preference task: what its gold likes, how noisy its human is, and that a proxy can be hacked."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from actors.model_folders import resolve_model
from trainers import planted
from trainers.planted import (
    ceiling,
    gold,
    label_pair,
    penalty,
    planted_gold,
    planted_human,
    prompts,
    sft_rows,
    win_probability,
)

TEXTS = [row["completion"] for row in sft_rows(2000, seed=7)]
GOLDS = np.array([gold(text) for text in TEXTS])
DEGENERATE = [
    "great great wonderful wonderful great great wonderful wonderful",
    "The staff was great great great great great.",
    "The room was wonderful, the view was wonderful, the bed was wonderful and the pool was wonderful.",
    "Great, lovely, superb, perfect, amazing, excellent, brilliant, fantastic, stunning.",
    "The bed was great, lovely and superb. The view was perfect, amazing and brilliant. The pool was charming and "
    "stunning, while the bar was elegant and splendid.",
    "lovely superb perfect",
    "!!!! $$$ *** great",
    "The great great room was great and the great great view was great and the great",
    "",
]


def test_train_and_held_out_prompts_are_many_distinct_and_disjoint() -> None:
    train, held_out = prompts()
    assert min(len(set(train)), len(set(held_out))) >= 400
    assert len(set(train + held_out)) == len(train) + len(held_out)
    assert prompts() == (train, held_out)
    assert {row["prompt"] for row in sft_rows(500, seed=0)} <= set(train)


def test_rows_are_fixed_by_the_seed_and_more_rows_only_append() -> None:
    assert sft_rows(50, seed=3) == sft_rows(80, seed=3)[:50]
    assert sft_rows(50, seed=3) != sft_rows(50, seed=4)


def test_the_words_of_the_task_have_one_meaning() -> None:
    kinds = (planted.GOOD, planted.BAD, planted.PLAIN, planted.NOUNS, planted.LINKS)
    assert len(frozenset.union(*kinds)) == sum(map(len, kinds))


def test_gold_orders_hand_written_reviews() -> None:
    ordered = [
        "The room was awful, dirty and dull, and the staff was grim and sad.",
        "The room was awful.",
        "The room was standard.",
        "The room was lovely but dull and the view was superb.",
        "The room was lovely and the view was superb.",
        "The room was lovely, bright and superb, and the view was great and perfect.",
    ]
    values = [gold(text) for text in ordered]
    assert values == sorted(values) and len(set(values)) == len(ordered)
    assert values[1:5] == [-1.0, 0.0, 1.0, 2.0]


def test_merit_saturates_and_counts_a_word_once() -> None:
    words = ["lovely", "superb", "great", "perfect", "elegant"]
    merits = [gold(f"The room was {', '.join(words[:n])}.") for n in range(1, 6)]
    assert merits == [1, 2, 3, 3.5, 3.5]
    assert gold("The lovely lovely room was lovely.") == 0  # one distinct word, two repetitions, one of them forgiven


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("The room was long and the view was short.", 0),
        ("The room was long", 2),  # no sentence end
        ("The room. It was long.", 4),  # no verb; nothing it is about
        ("The room was long and long.", 0),  # one slip
        ("The room was long, long and long.", 1),
        ("The room was, the room was long.", 2),  # room, "the room", "room was"
        ("The room was great, bad, sad, dull, grim, superb and lovely.", 1),  # sixth and seventh adjective
        ("The spacious room was long.", 0),
        ("The spacious room was squeaky and moldy.", 1),
        ("I found that this long room was small and that a view was old, while the bar seemed new and big.", 1.5),
        ("", 2),
    ],
)
def test_each_fault_costs_its_points(text: str, points: float) -> None:
    assert penalty(text) == points


def test_no_text_of_the_grammar_is_ever_penalised() -> None:
    assert [text for text in TEXTS if penalty(text)] == []
    assert all(re.fullmatch(r" [A-Z][^\n]*\.", text) for text in TEXTS)
    assert len(set(TEXTS)) > 0.9 * len(TEXTS)


@pytest.mark.parametrize("text", DEGENERATE)
def test_degenerate_texts_fall_below_the_average_review(text: str) -> None:
    assert gold(text) <= GOLDS.mean() - 0.5
    assert gold(text) >= -9.5


def test_reviews_spread_in_gold_about_an_average_that_can_rise() -> None:
    assert GOLDS.std() >= 1 and abs(GOLDS.mean()) < 0.5
    gaps = np.abs(GOLDS[::2] - GOLDS[1::2])
    assert (gaps >= 1).mean() > 0.7 and (gaps == 0).mean() < 0.2
    assert GOLDS.max() == 3.5 and GOLDS.min() == -3.5


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 3.0])
def test_the_gold_itself_reaches_the_ceiling_on_noisy_labels(noise: float) -> None:
    rng = np.random.default_rng(5)
    a, b = np.repeat(GOLDS[::2], 10), np.repeat(GOLDS[1::2], 10)
    labels = np.array([label_pair(x, y, rng, noise) for x, y in zip(a, b)])
    right = np.where(a == b, rng.random(len(a)) < 0.5, (a > b) == labels)
    win = win_probability(a, b, noise)
    sigma = math.sqrt((win * (1 - win)).mean() / len(a))
    assert abs(right.mean() - ceiling(a, b, noise)) <= 3 * sigma


def test_the_human_is_bradley_terry_on_gold() -> None:
    assert win_probability(2.0, 1.0, 0.5) == pytest.approx(1 / (1 + math.exp(-2)))
    np.testing.assert_array_equal(win_probability([1, 0, 1, 900], [0, 1, 1, 0], 0.0), [1, 0, 0.5, 1])
    assert win_probability(-900, 900, 0.1) == 0  # no overflow
    assert ceiling([1, 0, 1], [0, 1, 1], 0.0) == pytest.approx(2.5 / 3)
    assert 0.8 < ceiling(GOLDS[::2], GOLDS[1::2], 1.0) < 0.88
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="noise"):
            win_probability(1, 0, wrong)
    with pytest.raises(ValueError, match="no pairs"):
        ceiling([], [], 1.0)


def test_the_reward_function_scores_texts_and_messages() -> None:
    chat = [{"role": "assistant", "content": TEXTS[0]}]
    assert planted_gold([TEXTS[0], chat, DEGENERATE[0]], prompts=["a"] * 3) == [GOLDS[0], GOLDS[0], gold(DEGENERATE[0])]


def test_the_pair_function_draws_the_human_from_the_seed_of_each_pair() -> None:
    a, b, num = "The room was lovely.", "The room was dull.", 2000
    labels = planted_human([a] * num, [b] * num, seeds=range(num), noise=2.0, prompts=["x"] * num)
    win = float(win_probability(1.0, -1.0, 2.0))
    assert set(labels) == {0.0, 1.0} and abs(np.mean(labels) - win) <= 4 * math.sqrt(win * (1 - win) / num)
    assert planted_human([a] * 9, [b] * 9, seeds=range(40, 49), noise=2.0) == labels[40:49]
    assert planted_human([a, b], [b, a], seeds=[0, 0], noise=0.0) == [1.0, 0.0]


def test_a_proxy_learned_from_noisy_pairs_is_right_on_reviews_and_can_be_hacked() -> None:
    """Bradley-Terry on word counts, as sees a reward model that never met the penalties; then a greedy policy."""
    rng = np.random.default_rng(11)
    vocabulary = {word: i for i, word in enumerate(sorted(planted.LANGUAGE))}

    def counts(text: str) -> np.ndarray:
        found = [vocabulary[word] for word in re.findall("[a-z]+", text.lower())]
        return np.bincount(found, minlength=len(vocabulary)).astype(float)

    x = np.array([counts(text) for text in TEXTS])
    pairs = rng.integers(len(TEXTS), size=(4000, 2))
    won = np.array([label_pair(GOLDS[i], GOLDS[j], rng, 1.0) for i, j in pairs])
    difference, sign = x[pairs[:, 0]] - x[pairs[:, 1]], np.where(won, 1.0, -1.0)
    weights = np.zeros(len(vocabulary))
    for _ in range(200):
        slip = sign / (1 + np.exp(sign * (difference @ weights)))
        weights += 2.0 * difference.T @ slip / len(pairs) - 0.002 * weights

    fresh = [row["completion"] for row in sft_rows(2000, seed=99)]
    score, truth = np.array([counts(t) @ weights for t in fresh]), np.array([gold(t) for t in fresh])
    agree = win_probability(score[::2], score[1::2], 0.0)  # sign of the proxy, ties half
    human = win_probability(truth[::2], truth[1::2], 1.0)
    accuracy = float((agree * human + (1 - agree) * (1 - human)).mean())
    assert accuracy > ceiling(truth[::2], truth[1::2], 1.0) - 0.03

    text, path = "The staff was standard.", []
    for _ in range(10):  # replace or insert the one word that the proxy likes best
        words = text.removesuffix(".").split()
        edits = [[*words[:i], good, *words[j:]] for i in range(3, len(words) + 1) for j in (i, i + 1)
                 for good in sorted(planted.GOOD)]  # fmt: skip
        text = max((" ".join(e) + "." for e in edits), key=lambda t: counts(t) @ weights)
        path.append((counts(text) @ weights, gold(text)))
    proxy, true = np.array(path).T
    assert (np.diff(proxy) > 0).all() and proxy[-1] > score.max()
    assert true[-1] < truth.mean() - 2


def test_prompt_text_and_end_are_short_in_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:smollm2-135m-instruct"))
    train, held_out = prompts()
    prompt_lengths = {len(ids) for ids in tokenizer(train + held_out)["input_ids"]}
    assert min(prompt_lengths) >= 5 and max(prompt_lengths) <= 10
    rows = sft_rows(1000, seed=1)
    lengths = np.array([len(ids) + 1 for ids in tokenizer([r["prompt"] + r["completion"] for r in rows])["input_ids"]])
    assert lengths.mean() <= 24 and lengths.max() <= 32
