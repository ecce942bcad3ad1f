"""Laws of the KL coefficient's controller."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.kl_controller import KLController

ADAPTIVE = KLController(coef=0.1, target=6.0, horizon=10_000)


@settings(deadline=None)
@given(st.floats(0, 100), st.integers(0, 1000))
def test_without_a_target_the_coefficient_is_fixed(kl: float, num_samples: int) -> None:
    assert KLController(coef=0.1, target=None, horizon=10).updated(kl, num_samples).coef == 0.1


@pytest.mark.parametrize(
    ("kl", "num_samples", "coef"),
    [
        (6.6, 256, 0.1 * (1 + 0.1 * 256 / 10_000)),  # 10 % above the target
        (5.4, 256, 0.1 * (1 - 0.1 * 256 / 10_000)),
        (7.2, 1000, 0.1 * 1.02),  # 20 %: the last one that is not clipped
        (60.0, 1000, 0.1 * 1.02),
        (0.0, 1000, 0.1 * 0.98),
        (-3.0, 1000, 0.1 * 0.98),  # an estimate may be negative
        (math.inf, 1000, 0.1 * 1.02),
        (6.0, 1000, 0.1),
        (math.nan, 0, 0.1),  # a batch of masked samples says nothing
    ],
)
def test_golden_numbers_of_the_proportional_controller(kl: float, num_samples: int, coef: float) -> None:
    """Ziegler et al. 2019: ``coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``."""
    assert ADAPTIVE.updated(kl, num_samples).coef == pytest.approx(coef, rel=1e-12)
    assert ADAPTIVE.coef == 0.1  # a value: nothing is changed in place


@settings(deadline=None)
@given(st.floats(0.5, 3))
def test_it_settles_where_the_kl_is_on_target(gain: float) -> None:
    """A world in which KL falls as the coefficient grows: ``kl = gain / coef``."""
    controller = KLController(coef=1.0, target=2.0, horizon=1000)
    for _ in range(400):
        controller = controller.updated(gain / controller.coef, 200)
    assert gain / controller.coef == pytest.approx(2.0, rel=1e-3)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 49))
def test_the_coefficient_never_reaches_0_nor_changes_sign(kls: list[float], num_samples: int) -> None:
    controller = KLController(coef=0.1, target=1.0, horizon=10)
    for kl in kls:
        controller = controller.updated(kl, num_samples)
        assert controller.coef > 0.0


@pytest.mark.parametrize(("kl", "num_samples"), [(math.nan, 8), (1.0, 50_000)])
def test_an_update_that_would_destroy_the_coefficient_is_refused(kl: float, num_samples: int) -> None:
    with pytest.raises(ValueError):
        ADAPTIVE.updated(kl, num_samples)


@pytest.mark.parametrize("wrong", [{"coef": -0.1}, {"coef": math.nan}, {"target": 0.0}, {"horizon": 0}])
def test_impossible_controllers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KLController(**{"coef": 0.1, "target": 6.0, "horizon": 10, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("controller", [ADAPTIVE.updated(9.0, 123), KLController(0.05)])
def test_a_resumed_controller_is_the_one_that_was_saved(controller: KLController) -> None:
    resumed = KLController.from_state(json.loads(json.dumps(controller.state_dict())))
    assert resumed == controller
    assert resumed.updated(7.0, 64) == controller.updated(7.0, 64)
