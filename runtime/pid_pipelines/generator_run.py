"""Runs a pipeline of diffusers, and catches its latents after steps on the way and at the end."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_latents import pid_latent, pid_noise
from pid_ref.registry import LatentSpace

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Caught:
    """The latents of a batch after a step, as PiD takes them."""

    step: int
    """How many steps were run, counted from 1."""
    steps: int
    """How many there are to the end."""
    sigma: float
    """Noise level of the latents, in [0, 1]."""
    latent: Floats
    """`[B, C, h, w]`."""


class Catcher:
    """A `callback_on_step_end` that keeps latents, and stops the pipeline when told to."""

    def __init__(
        self,
        space: LatentSpace,
        at: Collection[int] = (),
        *,
        stop_at: int | None = None,
        size: tuple[int, int] | None = None,
        then: Callable[..., Any] | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        """space: of the latents. at: after which steps, counted from 1, to keep them.

        stop_at: the step after which the pipeline is to stop; None to let it run to the end.
        size: height and width that the pipeline was given, None for its default, a square.
        then: a callback of the user's, called first. progress: called with 1 after each step.
        """
        self._space, self._at, self._stop_at, self._size = space, set(at), stop_at, size
        self._then, self._progress = then, progress
        self._kept: dict[int, Caught] = {}
        self._done = self._steps = 0
        self._last: tuple[Any, Any] | None = None

    def __call__(
        self, pipe: Any, index: int, timestep: Any, tensors: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """What diffusers calls after each step. Raises `PipelineInputError` as `run` does."""
        given = (self._then(pipe, index, timestep, tensors) if self._then else None) or {}
        self._done += 1
        self._steps = int(pipe.num_timesteps)
        if (most := max(self._at | {self._stop_at or 0})) > self._steps:
            raise PipelineInputError(
                f"expected at most {self._steps}, the generator's steps, but got step {most}; "
                "name an earlier one, or let it run more steps"
            )
        self._last = given.get("latents", tensors["latents"]), pipe.scheduler
        if self._done in self._at:
            self._kept[self._done] = self.last()
        if self._done == self._stop_at:
            pipe._interrupt = True  # the pipeline passes over the steps that are left
        self._progress(1)
        return given

    def after(self, step: int) -> Caught:
        """Latents after one of the steps of `at`. Raises `PipelineInputError` if it never came."""
        if step not in self._kept:
            raise PipelineInputError(
                f"expected {step} steps, but the generator stopped after {self._done}; name an "
                "earlier one"
            )
        return self._kept[step]

    def last(self) -> Caught:
        """Latents after the last step run: the end, unless the pipeline was stopped.

        Raises `PipelineInputError` if there are none, or nobody knows their noise level.
        """
        if self._last is None:
            raise PipelineInputError(
                "expected a generator of at least one step, but it ran none; give it more"
            )
        latents, scheduler = self._last
        latent = pid_latent(self._space, to_numpy(latents), self._size)
        sigma = _noise_level(scheduler, at_end=self._done == self._steps)
        # Those that keep the variance at 1 begin with noise of 1, others with that of their sigma.
        keeps_variance = float(getattr(scheduler, "init_noise_sigma", 0.0)) == 1.0
        latent, sigma = pid_noise(self._space, latent, sigma, keeps_variance=keeps_variance)
        return Caught(self._done, self._steps, sigma, latent)


def run(
    pipe: Any,
    space: LatentSpace,
    arguments: Mapping[str, Any],
    *,
    at: Collection[int] = (),
    stop_at: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Caught]:
    """Run a pipeline once, and give its latents after the steps `at` and after the last one.

    space: of its latents. arguments: of its call; with `height` and `width` unless the picture is a
    square. at, stop_at, progress: as of `Catcher`; after `stop_at` no further step is computed.
    Raises `PipelineInputError` for steps that there are not, and for a scheduler that does not say
    how much noise is left on the way.
    """
    size = size_of(arguments)
    catcher = Catcher(space, at, stop_at=stop_at, size=size, progress=progress)
    pipe(**arguments, output_type="latent", callback_on_step_end=catcher)
    last = catcher.last()
    return [*(catcher.after(step) for step in sorted(set(at) - {last.step})), last]


def size_of(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that a pipeline is called with; None for its default."""
    height, width = arguments.get("height"), arguments.get("width")
    return None if height is None or width is None else (int(height), int(width))


def to_numpy(latents: Any) -> Floats:
    """Latents of torch, on any device and of any precision, or of numpy, as float32."""
    if hasattr(latents, "detach"):
        return latents.detach().float().cpu().numpy()
    return np.asarray(latents, np.float32)


def _noise_level(scheduler: Any, *, at_end: bool) -> float:
    """Of the latents after a scheduler's last step, as it counts noise."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is not None and index is not None:
        return float(sigmas[index])
    if at_end:
        return 0.0
    kind = type(scheduler).__name__
    raise PipelineInputError(
        f"expected a scheduler that counts noise in sigmas, but got {kind}; take the latents of "
        "the end, or pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
    )
