"""Shares follow the weights at any time, an epoch holds every unit once, and a stream resumes where it stood."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from trainers.errors import InputError
from trainers.mixture import Knots, MixtureStream, check_knots, weight_at

SIZES = (50, 7, 23)


def test_long_run_shares_equal_the_weights_and_are_never_far_from_them() -> None:
    weights: list[Knots] = [[(0, 0.6)], [(0, 0.3)], [(0, 0.1)]]
    stream = MixtureStream(SIZES, weights, seed=3)
    for num_drawn in range(10, 4001, 10):
        stream.take(10, 0.5)
        error = np.array(stream.num_drawn) - num_drawn * np.array([0.6, 0.3, 0.1])
        assert np.abs(error).max() < len(SIZES)
    assert np.array(stream.num_drawn) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)


def test_shares_follow_weights_that_change_over_the_schedule() -> None:
    weights: list[Knots] = [[(0.5, 1.0), (1.0, 0.0)], [(0.5, 0.0), (1.0, 1.0)]]
    stream = MixtureStream((100, 100), weights, seed=0)
    num_steps, batch = 200, 20
    shares = []
    for step in range(num_steps):
        drawn = Counter(dataset for dataset, _ in stream.take(batch, step / num_steps))
        shares.append(drawn[1] / batch)
    assert sum(shares[:100]) == 0, "instructions are mixed into the second half only"
    for step in (120, 150, 180):  # the expected share at a step is linear in it
        assert np.mean(shares[step - 5 : step + 5]) == pytest.approx((step - 100) / 100, abs=0.05)


def test_a_dataset_whose_weight_falls_to_zero_is_not_drawn_for_what_it_was_owed() -> None:
    weights: list[Knots] = [[(0.0, 1.0)], [(0.0, 0.45), (0.5, 0.45), (0.5001, 0.0)]]
    stream = MixtureStream((9, 9), weights, seed=0)
    stream.take(2, 0.0)
    assert all(dataset == 0 for dataset, _ in stream.take(50, 0.9))


def test_without_weights_an_epoch_holds_every_unit_exactly_once() -> None:
    stream = MixtureStream(SIZES, None, seed=1)
    epochs = [stream.take(sum(SIZES), 0.0) for _ in range(3)]
    whole = {(dataset, index) for dataset, size in enumerate(SIZES) for index in range(size)}
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) and set(epoch) == whole
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_each_dataset_is_shuffled_by_the_seed() -> None:
    orders = [[i for _, i in MixtureStream((30,), None, seed).take(30, 0.0)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("cut", [0, 1, 13, 80, 81, 200])
def test_a_resumed_stream_continues_as_if_it_had_not_stopped(cut: int) -> None:
    weights: list[Knots] = [[(0, 1), (1, 3)], [(0, 2)], [(0, 1 / 3)]]
    whole = MixtureStream(SIZES, weights, seed=5)
    expected = [whole.take(1, n / 240)[0] for n in range(240)]
    first = MixtureStream(SIZES, weights, seed=5)
    before = [first.take(1, n / 240)[0] for n in range(cut)]
    state = json.loads(json.dumps(first.state_dict()))
    second = MixtureStream(SIZES, weights, seed=5)
    second.load_state_dict(state)
    assert before + [second.take(1, n / 240)[0] for n in range(cut, 240)] == expected


def test_a_state_of_other_datasets_or_another_seed_is_refused() -> None:
    state = MixtureStream(SIZES, None, seed=5).state_dict()
    with pytest.raises(InputError, match="data.train"):
        MixtureStream((50, 7, 24), None, seed=5).load_state_dict(state)
    with pytest.raises(InputError, match="run.seed"):
        MixtureStream(SIZES, None, seed=6).load_state_dict(state)


def test_weights_are_linear_between_knots_and_constant_outside() -> None:
    knots = [(0.2, 1.0), (0.6, 3.0)]
    assert [weight_at(knots, p) for p in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([1, 1, 1.5, 3, 3])


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([[(0.5, 1.0), (0.2, 1.0)]], "ascend"),
        ([[(0.0, 1.0), (1.5, 1.0)]], "ascend"),
        ([[(0.0, -1.0)]], "negative"),
        ([[(0.0, 1.0), (0.5, 0.0)], [(0.0, 0.0), (0.5, 0.0), (1.0, 1.0)]], "weight 0 at progress 0.5"),
    ],
)
def test_weights_that_give_no_mixture_are_refused(weights: list[Knots], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_knots(["a", "b"], weights)
