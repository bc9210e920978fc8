"""The times a decode visits, and the sampler's update at each, as factors."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import as_array
from pid_runtime.bundle.manifest import RULES, Sampler
from pid_runtime.errors import PidRuntimeError

Rule = Literal["sde", "ode", "dpm++2m"]

FIRST_TIME = 0.999
"""Where shifted times begin; 1 is noise alone."""


@dataclass(frozen=True)
class Schedule:
    """The times a decode visits, as the program wants them."""

    times: tuple[float, ...]
    """Descending, the last one 0: one more than steps."""
    rows: tuple[int, ...]
    """Row of the modulation table, per step."""
    rule: str
    """One of `RULES`."""
    moments: NDArray[np.float32] | None
    """1000 t of every step, `[steps, 1]`, for a bundle that takes any times; None otherwise."""

    @property
    def steps(self) -> int:
        """How often the state is updated."""
        return len(self.rows)

    @property
    def looks_back(self) -> bool:
        """Whether a step needs the clean image of the one before, which the program has not."""
        return self.rule == "dpm++2m"

    @property
    def updates(self) -> NDArray[np.float32]:
        """Factors of state, velocity and noise in the program's update, `[steps, 3]`.

        Only of rules that need no earlier step.
        """
        factors = [update_factors(t, after, self.rule) for t, after in pairwise(self.times)]
        return np.array(factors, np.float32)

    @property
    def predictions(self) -> NDArray[np.float32]:
        """Factors with which the program's update gives the clean image x0 = x - t v."""
        return np.array([(1.0, -t, 0.0) for t in self.times[:-1]], np.float32)

    @property
    def mixes(self) -> NDArray[np.float32]:
        """Factors of state, x0, the x0 of the step before, and noise in an update, `[steps, 4]`."""
        return np.array([self._mix(step) for step in range(self.steps)], np.float32)

    def _mix(self, step: int) -> tuple[float, float, float, float]:
        t, after = self.times[step], self.times[step + 1]
        if self.rule == "sde":
            return 0.0, 1 - after, 0.0, after
        if self.rule == "ode":
            return after / t, 1 - after / t, 0.0, 0.0
        return _dpm(self.times[step - 1] if step else None, t, after)


def update_factors(t: float, t_next: float, rule: str) -> tuple[float, float, float]:
    """Factors of state, velocity and noise in the sampler's update from t to t_next.

    sde: x0 = x - t v, then (1 - t_next) x0 + t_next noise. ode: x + (t_next - t) v.
    """
    if rule == "ode":
        return 1.0, t_next - t, 0.0
    return 1.0 - t_next, -(1.0 - t_next) * t, t_next


def _dpm(before: float | None, t: float, after: float) -> tuple[float, float, float, float]:
    """A step of DPM-Solver++(2M) from t to `after`; `before` is the time before t, if any.

    Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2, for x_t = (1 - t) x0 + t noise:
    lambda = ln((1 - t) / t), h = lambda(after) - lambda(t), r = (lambda(t) - lambda(before)) / h;
    x' = after/t x - (1 - after) (e^-h - 1) D, D = x0 + (x0 - x0_before) / (2 r). The first step
    and the last are of first order, D = x0.
    """
    if after == 0:
        return 0.0, 1.0, 0.0, 0.0
    decay = (1 - t) / t * after / (1 - after)  # e^-h
    weight = (1 - after) * (1 - decay)
    ahead = 0.0  # 1 / (2 r)
    if before is not None and before < 1:
        ahead = -math.log(decay) / (2 * (_log_snr(t) - _log_snr(before)))
    return after / t, weight * (1 + ahead), -weight * ahead, 0.0


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t)


def shifted_times(
    steps: int, height: int, width: int, shift: float, base: int
) -> tuple[float, ...]:
    """The `steps + 1` times of an undistilled decode to `height` x `width` pixels, the last one 0.

    s_i = 0.999 (1 - i / steps), t = f s / (1 + (f - 1) s), f = shift sqrt(sqrt(height width) /
    base): the shift of Esser et al., arXiv 2403.03206, section 5.3.2, that grows with the image.
    """
    factor = shift * math.sqrt(math.sqrt(height * width) / base)
    even = [FIRST_TIME * (1 - index / steps) for index in range(steps + 1)]
    return tuple(factor * s / (1 + (factor - 1) * s) for s in even)


def check_schedule(
    sampler: Sampler,
    *,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    rule: Rule | None = None,
    size: tuple[int, int] | None = None,
) -> Schedule:
    """What a decode with these arguments of `Decoder.decode` visits.

    size: width and height of the image in pixels, by which the times of undistilled bundles shift;
    None where only the number of steps is asked for.
    Raises `PidRuntimeError` for a schedule the bundle does not know.
    """
    chosen = sampler.rule if rule is None else rule
    if chosen not in RULES:
        raise PidRuntimeError(f"expected rule {', '.join(RULES)}, but got {chosen!r}")
    steps = None if steps is None else whole_number(steps, "steps")
    if sampler.times:
        if times is not None:
            raise PidRuntimeError(
                "expected no times, since this bundle knows only its own, but got "
                f"{list(times)}; give steps, or export with --arbitrary-timesteps"
            )
        rows = sampler.schedules.get(str(sampler.steps if steps is None else steps))
        if rows is None:
            raise PidRuntimeError(
                f"expected {', '.join(sampler.schedules)} steps, but got {steps}; more steps "
                "need a bundle exported with --arbitrary-timesteps"
            )
        visited = (*(sampler.times[row] for row in rows), 0.0)
        return Schedule(visited, rows, chosen, None)
    visited = _visited(sampler, steps, times, size)
    if len(visited) - 1 > sampler.max_steps:
        raise PidRuntimeError(
            f"expected at most {sampler.max_steps} steps, but got {len(visited) - 1}; "
            "leave out some times"
        )
    moments = (1000 * np.array(visited[:-1])).astype(np.float32)[:, None]
    return Schedule(visited, tuple(range(len(visited) - 1)), chosen, moments)


def _visited(
    sampler: Sampler,
    steps: int | None,
    times: Sequence[float] | None,
    size: tuple[int, int] | None,
) -> tuple[float, ...]:
    """The times of a bundle that takes any."""
    if times is not None:
        visited = tuple(float(time) for time in numbers(times, "times").reshape(-1))
        descending = all(a > b for a, b in pairwise(visited))
        if len(visited) < 2 or visited[-1] != 0 or visited[0] > 1 or not descending:
            raise PidRuntimeError(
                f"expected times descending from at most 1 to 0, but got {list(visited)}; "
                "the last is 0"
            )
        if steps not in (None, len(visited) - 1):
            raise PidRuntimeError(
                f"expected {steps} steps, but got times of {len(visited) - 1}; give the times alone"
            )
        return visited
    shift = sampler.flow_shift
    if shift is None:
        raise PidRuntimeError(
            "expected times, since this bundle takes any, but got none; give for example "
            "1.0,0.75,0.5,0.25,0"
        )
    steps = sampler.steps if steps is None else steps
    if not 0 < steps <= sampler.max_steps:
        raise PidRuntimeError(
            f"expected from 1 to {sampler.max_steps} steps, but got {steps}; choose another number"
        )
    width, height = size or (shift.size, shift.size)
    return shifted_times(steps, height, width, shift.shift, shift.size)


def numbers(given: Any, name: str) -> NDArray[Any]:
    """A number, or several. Raises `PidRuntimeError` for text, truth values and others."""
    try:
        array = as_array(given.detach() if getattr(given, "requires_grad", False) else given)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.dtype.kind not in "fiu":
        raise PidRuntimeError(f"expected numbers as {name}, but got {str(given)[:60]!r}")
    return array


def whole_number(given: Any, name: str) -> int:
    """A whole number, or the seed of a `torch.Generator`; raises `PidRuntimeError` otherwise."""
    if hasattr(given, "initial_seed"):
        return int(given.initial_seed())
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise PidRuntimeError(
            f"expected a whole number as {name}, but got {str(given)[:60]!r}"
        ) from None
