"""Laws of the critic's clipped loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.value_loss import clipped_value_loss

NUMBER = st.floats(-4, 4)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=8), st.floats(0.01, 2))
def test_the_value_loss_equals_plain_python(rows: list[tuple[float, float, float]], clip: float) -> None:
    values, proximal_values, returns = (column(*c) for c in zip(*rows, strict=True))
    found = clipped_value_loss(values, proximal_values, returns, clip)
    for i, (value, proximal, target) in enumerate(rows):
        bounded = min(max(value, proximal - clip), proximal + clip)
        plain, held = (value - target) ** 2, (bounded - target) ** 2
        assert found.loss[i].item() == pytest.approx(0.5 * max(plain, held), abs=1e-12)
        assert bool(found.clipped[i]) == (held > plain)


@pytest.mark.parametrize(
    ("value", "target", "clipped", "gradient"),
    [
        (1.1, 2.0, False, -0.9),  # inside the region: the plain gradient
        (1.5, 2.0, True, 0.0),  # left it towards the return: enough for one update
        (0.5, 2.0, False, -1.5),  # left it the other way: pulled back with its full error
        (1.5, 1.3, False, 0.2),  # left it, and went further past the return than the bound is from it
    ],
)
def test_a_value_that_moved_far_enough_towards_its_return_has_no_gradient(
    value: float, target: float, clipped: bool, gradient: float
) -> None:
    values = column(value).requires_grad_()
    found = clipped_value_loss(values, column(1.0), column(target), clip=0.2)
    found.loss.sum().backward()
    assert bool(found.clipped) == clipped
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8))
def test_before_the_first_update_and_without_a_clip_it_is_the_squared_error(rows: list[tuple[float, float]]) -> None:
    values, returns = (column(*c) for c in zip(*rows, strict=True))
    values.requires_grad_()
    for proximal, clip in ((values.detach(), 0.2), (values.detach() - 100.0, None)):
        found = clipped_value_loss(values, proximal, returns, clip)
        torch.testing.assert_close(found.loss, 0.5 * (values - returns) ** 2)
        (gradient,) = torch.autograd.grad(found.loss.sum(), values)
        torch.testing.assert_close(gradient, (values - returns).detach())
        assert not found.clipped.any()


def test_golden_numbers_of_the_value_loss() -> None:
    """``max((v - R)^2, (clamp(v, v_old - c, v_old + c) - R)^2) / 2``, in float32 as the learner runs it."""
    values = torch.tensor([0.9, 0.1, -1.0])
    found = clipped_value_loss(values, torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, -2.0]), clip=0.2)
    torch.testing.assert_close(found.loss, torch.tensor([0.045, 0.405, 2.645]))
    assert found.clipped.tolist() == [True, False, True]
    assert found.loss.dtype == torch.float32
    assert not found.clipped.requires_grad
