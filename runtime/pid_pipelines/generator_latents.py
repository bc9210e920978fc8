"""Latents as generators of diffusers have them, made those that PiD takes; without torch."""

import math

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_ref.registry import LatentSpace
from pid_runtime.latents import RAW_PATCH, Normalization, in_blocks, unpacked

Floats = NDArray[np.float32]


def pid_latent(
    space: LatentSpace,
    given: Floats,
    size: tuple[int, int] | None = None,
    raw: Normalization | None = None,
) -> Floats:
    """PiD's latents `[B, C, h, w]` of what a pipeline gave for `output_type="latent"`, or a step.

    given: tokens `[B, n, width]`, as FLUX, FLUX.2 and Qwen-Image pack them; `[B, C, h, w]`, or with
    an axis of one frame `[B, C, 1, h, w]`; or FLUX.2 [klein]'s raw `[B, C / 4, 2 h, 2 w]`, which
    are put together in blocks and normalised.
    size: of tokens height and width in pixels of the picture they are of; None for a square.
    raw: of raw latents the rule, that of the VAE's batch normalisation, for C channels.
    Raises `PipelineInputError` for what are no latents of this space.
    """
    if given.ndim == 5 and given.shape[2] == 1:
        given = given[:, :, 0]
    if given.ndim == 3 and given.shape[2] == space.token_width:
        return _of_tokens(space, given, size)
    if given.ndim == 4 and given.shape[1] == space.channels:
        return given
    is_raw = given.ndim == 4 and given.shape[1] * RAW_PATCH**2 == space.channels
    if not is_raw or space.factor is not None or any(side % RAW_PATCH for side in given.shape[2:]):
        tokens = f", or tokens [B, n, {space.token_width}]" if space.token_width else ""
        raise PipelineInputError(
            f"expected latents of {space.name}, [B, {space.channels}, h, w]{tokens}, but got "
            f"{list(given.shape)}; give what a pipeline of {', '.join(space.names)} returns with "
            'output_type="latent"'
        )
    if raw is None:
        raise PipelineInputError(
            f"expected normalised latents of {space.name}, but got raw ones {list(given.shape)}; "
            "give the pipeline that made them, whose VAE knows how to normalise them"
        )
    return raw.apply(in_blocks(given))


def _of_tokens(space: LatentSpace, given: Floats, size: tuple[int, int] | None) -> Floats:
    batch, count, width = given.shape
    patch = math.isqrt(width // space.channels)
    if size is None:
        rows = columns = math.isqrt(count)
    else:
        rows, columns = (side // (space.down * patch) for side in size)
    if rows * columns != count:
        said = "a square picture" if size is None else f"a picture of {size[1]}x{size[0]}"
        raise PipelineInputError(
            f"expected tokens of {said}, but got {batch} x {count}; give the height and width that "
            "the pipeline was given"
        )
    return unpacked(given, patch * rows, patch * columns, patch)


def pid_noise(
    space: LatentSpace, latent: Floats, sigma: float, *, keeps_variance: bool = False
) -> tuple[Floats, float]:
    """A partly denoised latent, and its noise level in [0, 1], as PiD takes them.

    sigma: what the scheduler calls it. Of SDXL a latent is z + sigma noise, and both are divided
    by sqrt(sigma^2 + 1); where the scheduler `keeps_variance`, which DPM-Solver's does and
    Euler's not, the latent is so divided already.
    """
    if space.partly_denoised != "euler":
        return latent, sigma
    scale = math.sqrt(sigma**2 + 1)
    scaled = latent if keeps_variance else (latent / np.float32(scale)).astype(np.float32)
    return scaled, sigma / scale
