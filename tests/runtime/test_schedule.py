"""Times and factors of the sampler, against what they are to do."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pid_runtime.bundle.manifest import FlowShift, Sampler
from pid_runtime.errors import PidRuntimeError
from pid_runtime.schedule import Schedule, check_schedule, shifted_times, update_factors

FREE = Sampler(4, 100, (), {})
SHIFTED = Sampler(25, 100, (), {}, "dpm++2m", 5.0, FlowShift(6.0, 2048))
KNOWN = Sampler(2, 2, (0.9, 0.4), {"1": (0,), "2": (0, 1)})


def schedule(*times: float, rule: Any = "sde") -> Schedule:
    return check_schedule(FREE, times=times, rule=rule)


@pytest.mark.parametrize("rule", ["sde", "ode", "dpm++2m"])
def test_every_rule_follows_a_known_image_exactly(rule: str) -> None:
    """Where the velocity is that of one clean image, each state is that image and its noise."""
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 50))
    times = (0.97, 0.8, 0.51, 0.2, 0.0)
    x, before = (1 - times[0]) * clean + times[0] * noise, clean
    for (state, now, last, fresh), after in zip(
        schedule(*times, rule=rule).mixes.astype(float), times[1:], strict=True
    ):
        x = state * x + now * clean + last * before + fresh * noise
        np.testing.assert_allclose(x, (1 - after) * clean + after * noise, atol=2e-6)


@pytest.mark.parametrize("rule", ["sde", "ode"])
def test_mixing_x0_is_the_programs_update(rule: Any) -> None:
    times = (1.0, 0.866, 0.634, 0.342, 0.0)
    made = schedule(*times, rule=rule)
    for t, update, mix in zip(times, made.updates, made.mixes, strict=False):
        x, v, noise = 0.3, -1.2, 0.7
        program = update[0] * x + update[1] * v + update[2] * noise
        assert program == pytest.approx(mix @ [x, x - t * v, 0, noise], abs=1e-6)
    np.testing.assert_allclose(made.predictions, [(1, -t, 0) for t in times[:-1]], rtol=1e-7)


def test_dpm_is_of_second_order() -> None:
    """On dx/dt = v with x0 that changes with t, halving the steps quarters the error or better."""

    def solve(steps: int) -> float:
        times = [*(0.9 - 0.9 * i / steps for i in range(steps)), 0.0]
        x, before = 1.0, 0.0
        mixes = schedule(*times, rule="dpm++2m").mixes.astype(float)
        for index in range(steps - 1):
            state, now, last, _ = mixes[index]
            clean = math.cos(3 * times[index])
            x, before = state * x + now * clean + last * before, clean
        return x / times[steps - 1]  # to compare at one time, see below

    def exact(t_end: float, count: int = 200_000) -> float:
        # d(x/t)/dt = -x0(t)/t^2, by the midpoint rule
        edges = np.linspace(0.9, t_end, count + 1)
        middle = (edges[1:] + edges[:-1]) / 2
        return 1 / 0.9 + float(np.sum(-np.cos(3 * middle) / middle**2 * np.diff(edges)))

    errors = [abs(solve(n) - exact(0.9 / n)) * (0.9 / n) for n in (16, 32, 64)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def test_dpm_may_begin_at_noise_alone() -> None:
    assert np.isfinite(schedule(1.0, 0.7, 0.3, 0.0, rule="dpm++2m").mixes).all()


def test_the_last_step_is_the_clean_image() -> None:
    np.testing.assert_array_equal(schedule(0.9, 0.0, rule="dpm++2m").mixes, [[0, 1, 0, 0]])


def test_shifted_times_follow_the_size() -> None:
    times = shifted_times(25, 2048, 2048, 6.0, 2048)
    assert len(times) == 26 and times[-1] == 0
    # f = 6 / sqrt(2048) * 2048^(1/2) = 6 at the base size
    s = 0.999 * (1 - 10 / 25)
    assert times[10] == pytest.approx(6 * s / (1 + 5 * s))
    larger = shifted_times(25, 4096, 4096, 6.0, 2048)
    assert larger[10] == pytest.approx((f := 6 * math.sqrt(2)) * s / (1 + (f - 1) * s))
    assert shifted_times(25, 1024, 4096, 6.0, 2048) == pytest.approx(times)


def test_a_bundle_with_a_shift_needs_no_times() -> None:
    made = check_schedule(SHIFTED, size=(2048, 2048))
    assert (made.steps, made.rule) == (25, "dpm++2m")
    assert made.times == shifted_times(25, 2048, 2048, 6.0, 2048)
    assert made.moments is not None and made.moments.shape == (25, 1)
    assert check_schedule(SHIFTED, steps=7).steps == 7
    assert check_schedule(SHIFTED, times=(0.5, 0), rule="ode").times == (0.5, 0.0)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (KNOWN, {"times": (1, 0)}, "no times, since this bundle knows only its own"),
        (KNOWN, {"steps": 3}, "expected 1, 2 steps, but got 3"),
        (KNOWN, {"rule": "euler"}, r"rule sde, ode, dpm\+\+2m, but got 'euler'"),
        (KNOWN, {"steps": "2"}, "a whole number as steps"),
        (FREE, {}, "expected times, since this bundle takes any"),
        (FREE, {"steps": 2}, "expected times, since this bundle takes any"),
        (FREE, {"times": (0.5, 0.7, 0)}, "times descending from at most 1 to 0"),
        (FREE, {"times": (0.5, 0.5, 0)}, "times descending from at most 1 to 0"),
        (FREE, {"times": (1.5, 0)}, "times descending from at most 1 to 0"),
        (FREE, {"times": (0.5, 0.1)}, "times descending from at most 1 to 0"),
        (FREE, {"times": (0.5, float("nan"), 0)}, "times descending from at most 1 to 0"),
        (FREE, {"times": "1,0"}, "expected numbers as times"),
        (FREE, {"times": (0.5, 0), "steps": 2}, "expected 2 steps, but got times of 1"),
        (replace(FREE, max_steps=1), {"times": (0.5, 0.2, 0)}, "at most 1 steps, but got 2"),
        (SHIFTED, {"steps": 0}, "from 1 to 100 steps, but got 0"),
        (SHIFTED, {"steps": 101}, "from 1 to 100 steps, but got 101"),
    ],
)
def test_schedules_that_the_bundle_does_not_know_are_refused(
    sampler: Sampler, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PidRuntimeError, match=message):
        check_schedule(sampler, **options)


def test_update_factors() -> None:
    assert update_factors(0.8, 0.5, "ode") == pytest.approx((1, -0.3, 0))
    assert update_factors(0.8, 0.5, "sde") == pytest.approx((0.5, -0.4, 0.5))
