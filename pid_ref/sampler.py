"""The sampler of the distilled decoder: four steps or fewer from noise to image."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pid_ref.errors import PidInputError
from pid_ref.network import PidNet

Rule = Literal["sde", "ode"]

STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342, 0.0)
"""The times the student was distilled at; 1 is noise, 0 is clean."""


def timesteps(steps: int) -> tuple[float, ...]:
    """The `steps + 1` times a decode of `steps` steps visits, as float32 values, the last one 0.

    Only 1, 2 and 4 steps exist: other counts would visit times the student never saw.
    Raises `PidInputError` otherwise.
    """
    if steps == 1:
        return (1.0, 0.0)
    if steps not in (2, 4):
        raise PidInputError(f"expected 1, 2 or 4 steps, but got {steps}")
    times = torch.tensor(STUDENT_TIMES)[:: 4 // steps]
    return tuple(times.tolist())


@torch.no_grad()
def sample(
    net: PidNet,
    latent: Tensor,
    caption: Tensor,
    sigma: Tensor,
    noise: Tensor,
    step_noise: Sequence[Tensor] | torch.Generator | None = None,
    *,
    steps: int = 4,
    rule: Rule = "sde",
    times: Sequence[float] | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Decode a latent to an image `[B, 3, H, W]`, float32, about [-1, 1] (not clamped).

    latent: `[B, C, h, w]`, normalised. caption: `[B, T, text_dim]`. sigma: `[B]` in [0, 1], the
    noise level of each latent. noise: `[B, 3, H, W]` float32, standard normal, the initial state.
    step_noise: what the "sde" rule adds after every step but the last, `steps - 1` tensors
    shaped like `noise`, or a generator to draw them from (torch's default one when None).
    times: the times to visit instead of `timesteps(steps)`, descending and ending in 0, for
    undistilled networks. on_step: called with (step index, velocity, new state).
    Raises `PidInputError` for a wrong number of steps, times or step noises.
    """
    schedule = timesteps(steps) if times is None else tuple(times)
    check_times(schedule)
    if rule not in ("sde", "ode"):
        raise PidInputError(f"expected rule sde or ode, but got {rule!r}")
    if isinstance(step_noise, Sequence) and rule == "sde":
        shapes = [tuple(each.shape) for each in step_noise]
        if shapes != [tuple(noise.shape)] * (len(schedule) - 2):
            raise PidInputError(
                f"expected {len(schedule) - 2} step noises of shape {tuple(noise.shape)}, "
                f"but got {len(shapes)} of {sorted(set(shapes))}"
            )
    if sigma.shape != latent.shape[:1] or not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise PidInputError(
            f"expected {latent.shape[0]} sigmas in [0, 1], one per latent, but got {sigma.tolist()}"
        )
    dtype = net.s_embedder.proj.weight.dtype
    x = noise.float()
    for step, (t, t_next) in enumerate(pairwise(schedule)):
        timestep = torch.full((x.shape[0],), 1000.0 * t, device=x.device)
        v = net(x.to(dtype), timestep, caption.to(dtype), latent.to(dtype), sigma).float()
        if rule == "ode":
            x = x + (t_next - t) * v
        else:
            x = (x.double() - t * v.double()).float()  # the predicted clean image
            if t_next > 0:
                x = (1 - t_next) * x + t_next * _noise_after(step, x, step_noise)
        if on_step is not None:
            on_step(step, v, x)
    return x


def check_times(times: Sequence[float]) -> None:
    """Raise `PidInputError` unless times descend from at most 1 to 0."""
    descending = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or times[0] > 1 or times[-1] != 0 or not descending:
        raise PidInputError(f"expected times descending from at most 1 to 0, but got {list(times)}")


def _noise_after(
    step: int, x: Tensor, step_noise: Sequence[Tensor] | torch.Generator | None
) -> Tensor:
    if isinstance(step_noise, Sequence):
        return step_noise[step]
    return torch.randn(x.shape, generator=step_noise, device=x.device)
