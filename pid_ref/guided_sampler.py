"""The sampler of the undistilled decoder: DPM-Solver++(2M) with guidance."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.sampler import check_times

STEPS = 25
GUIDANCE = 5.0
FLOW_SHIFT = 6.0
"""Of a square image of `BASE_SIZE` pixels a side; see `shifted_times`."""
BASE_SIZE = 2048
FIRST_TIME = 0.999


def shifted_times(steps: int, height: int, width: int) -> tuple[float, ...]:
    """The `steps + 1` times of a decode to `height` x `width` pixels, from below 1 to 0.

    Even times, moved towards noise by a factor that grows with the image: the timestep shift of
    Esser et al., arXiv 2403.03206, section 5.3.2. Raises `PidInputError` for less than a step.
    """
    if steps < 1:
        raise PidInputError(f"expected at least 1 step, but got {steps}")
    factor = FLOW_SHIFT * math.sqrt(math.sqrt(height * width) / BASE_SIZE)
    even = [FIRST_TIME * (1 - i / steps) for i in range(steps + 1)]
    return tuple(factor * s / (1 + (factor - 1) * s) for s in even)


@torch.no_grad()
def sample_guided(
    net: PidNet,
    latent: Tensor,
    caption: Tensor,
    negative: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    guidance: float,
    times: Sequence[float],
) -> Tensor:
    """Decode a latent to an image `[B, 3, H, W]`, about [-1, 1] (not clamped), in noise's dtype.

    latent `[B, C, h, w]`, sigma `[B]` and noise `[B, 3, H, W]` as of `sample`; caption and negative
    `[B, T, text_dim]`. guidance: 1 for the caption alone. times: descending from below 1 to 0.

    DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2, with alpha = 1 - t and sigma = t,
    the first and last steps of first order. The network's velocity is noise less the clean image.
    Raises `PidInputError` for times that do not descend, or begin at noise alone.
    """
    check_times(times)
    if times[0] >= 1:
        raise PidInputError(f"expected times below 1, but got {times[0]}")
    dtype = net.s_embedder.proj.weight.dtype
    latent, caption, negative = (each.to(dtype) for each in (latent, caption, negative))

    def velocity(x: Tensor, t: float) -> Tensor:
        timestep = torch.full((len(x),), 1000.0 * t, device=x.device, dtype=x.dtype)
        with_caption = net(x.to(dtype), timestep, caption, latent, sigma).to(x.dtype)
        if guidance == 1:
            return with_caption
        without = net(x.to(dtype), timestep, negative, latent, sigma).to(x.dtype)
        return without + guidance * (with_caption - without)

    x, before, last_h = noise, None, 0.0
    for t, t_next in pairwise(times):
        clean = x - t * velocity(x, t)
        if t_next == 0:
            return clean
        h = math.log((1 - t_next) / t_next) - math.log((1 - t) / t)
        direction = clean
        if before is not None:
            direction = clean + (clean - before) * h / (2 * last_h)
        x = t_next / t * x - (1 - t_next) * math.expm1(-h) * direction
        before, last_h = clean, h
    raise AssertionError("the last time is 0")
