"""Cascades: a latent space's own decoder, followed by super-resolution.

Each does what PiD does, from the same latent to the same pixels. Weights are random; caption
embeddings are given, so that no text encoder counts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pid_bench.cases import Case
from pid_bench.diffusers_modules import (
    UPSCALER_VAE,
    Sd3Velocity,
    UpscalerVelocity,
    VaeDecode,
    VaeEncode,
    diffusers,
)
from pid_bench.errors import BenchInputError
from pid_bench.rrdbnet import RRDBNet
from pid_bench.stage import Pipeline, Stage, normal
from pid_pipelines.vaes import VAES

SCALE = 4
"""Output pixels per pixel of the encoded image, along each axis."""

TILE, OVERLAP = 64, 8
"""Side of a tile of `vae+onestep-sd3`, and what neighbours share, in latent pixels."""

UPSCALER_STEPS, UPSCALER_GUIDANCE, UPSCALER_NOISE_LEVEL = 75, 9.0, 20
"""What the release of Stable Diffusion x4 upscaler decodes with by default."""

TRAINED_TIMES = 1000
"""Of Stable Diffusion x4 upscaler: the most steps it can take."""

Modules = Mapping[str, nn.Module]
Run = Callable[[Modules, Tensor], Tensor]

Upscaler = tuple[tuple[Stage, ...], Run, tuple[int, int]]
"""The second half of a cascade: its stages; what makes of the modules by stage and of the image
`[1, 3, h, w]` the pixels `[1, 3, 4 h, 4 w]`; and how many of its blocks are kept, of how many."""


def build_cascade(case: Case) -> Pipeline:
    """The pipeline of a case, from a latent of its space to its image. Nothing is built yet.

    The case's depth is the share of the super-resolution network's blocks to keep; the space's own
    decoder stays whole. Raises `BenchInputError` for a size, depth or number of steps that cannot
    be.
    """
    vae = VAES[case.space]
    multiple = SCALE * vae.down
    if min(case.size) < 1 or case.width % multiple or case.height % multiple:
        raise BenchInputError(
            f"expected width and height in multiples of {multiple} for {case.space}, "
            f"but got {case.width}x{case.height}"
        )
    if not 0 < case.depth <= 1:
        raise BenchInputError(f"expected a depth above 0 and at most 1, but got {case.depth}")
    stages, upscale, (kept, full) = CASCADES[case.pipeline](case)
    shape = vae.channels, case.height // multiple, case.width // multiple
    decode = _stage("vae decode", lambda: VaeDecode(vae), shape)

    def run(modules: Modules, latent: Tensor) -> Tensor:
        dtype = next(modules[decode.name].parameters()).dtype
        return upscale(modules, modules[decode.name](latent.to(dtype))).float()

    return Pipeline(
        latent_shape=(1, *shape),
        encoded=(case.width // SCALE, case.height // SCALE),
        stages=(decode, *stages),
        run=run,
        reduced=f"{kept} of {full} blocks" if kept < full else "",
    )


def _stage(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Stage:
    """A stage whose module takes one tensor `[1, *shape]`."""
    return Stage(name, make, lambda device, dtype: (normal((1, *shape), device, dtype),))


def _encoded(case: Case) -> tuple[int, int]:
    """Height and width of the image the latent stands for."""
    return case.height // SCALE, case.width // SCALE


def _kept(case: Case, blocks: int) -> int:
    """How many of a network's blocks are kept, at least one."""
    return max(1, round(case.depth * blocks))


# Resizing


class LanczosResize(nn.Module):
    """Images `[B, C, h, w]` to `[B, C, height, width]`, no smaller: two matrix products.

    The window is sinc(x) sinc(x / 3), |x| < 3, renormalised at the borders, as Pillow's LANCZOS.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", lanczos_matrix(size[0], target[0]))
        self.register_buffer("columns", lanczos_matrix(size[1], target[1]))

    def forward(self, image: Tensor) -> Tensor:
        return self.rows @ image @ self.columns.T


def lanczos_matrix(size: int, target: int) -> Tensor:
    """What resizes a line of `size` pixels to `target` pixels, at least as many: [target, size]."""
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * (size / target) - 0.5
    distance = centres[:, None] - torch.arange(size, dtype=torch.float64)
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return (weights / weights.sum(dim=1, keepdim=True)).to(torch.get_default_dtype())


def _resize(case: Case, name: str) -> Stage:
    size, target = _encoded(case), (case.height, case.width)
    return _stage(name, lambda: LanczosResize(size, target), (3, *size))


def _lanczos(case: Case) -> Upscaler:
    stage = _resize(case, "lanczos")
    return (stage,), lambda modules, image: modules["lanczos"](image), (1, 1)


def _rrdbnet(case: Case) -> Upscaler:
    blocks = _kept(case, RRDBNet.BLOCKS)
    stage = _stage("rrdbnet", lambda: RRDBNet(blocks), (3, *_encoded(case)))

    def run(modules: Modules, image: Tensor) -> Tensor:
        return 2 * modules["rrdbnet"]((image + 1) / 2) - 1

    return (stage,), run, (blocks, RRDBNet.BLOCKS)


# One step of a large transformer, over tiles


def tile_starts(size: int, tile: int = TILE, overlap: int = OVERLAP) -> list[int]:
    """Where tiles begin that cover `size` and share at least `overlap`; the last ends at the end.

    One tile, and that no larger than `size`, when they are not needed.
    """
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [*(i * (tile - overlap) for i in range(count - 1)), size - tile]


def over_tiles(
    function: Callable[[Tensor], Tensor], latent: Tensor, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """`function` of every tile of `[1, C, h, w]`, blended where they overlap; same shape.

    A tile's weight falls off linearly over `overlap` towards its edges.
    """
    height, width = latent.shape[-2:]
    tall, wide = min(tile, height), min(tile, width)
    mask = _ramp(tall, overlap, latent)[:, None] * _ramp(wide, overlap, latent)
    blended, weight = torch.zeros_like(latent), torch.zeros_like(latent[:, :1])
    for y in tile_starts(height, tile, overlap):
        for x in tile_starts(width, tile, overlap):
            part = (..., slice(y, y + tall), slice(x, x + wide))
            blended[part] += mask * function(latent[part])
            weight[part] += mask
    return blended / weight


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    up = torch.arange(1, size + 1, device=like.device, dtype=like.dtype) / (overlap + 1)
    return torch.minimum(up, up.flip(0)).clamp(max=1)


def _onestep_sd3(case: Case) -> Upscaler:
    """After TSD-SR (arXiv 2411.18263): encode the resized image, one step from it, decode."""
    vae, layers = VAES["sd3"], _kept(case, Sd3Velocity.LAYERS)
    h, w = case.height // vae.down, case.width // vae.down
    tile = (1, vae.channels, min(TILE, h), min(TILE, w))

    def captions(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (
            torch.full((1,), 1000.0, device=device),
            normal((1, *Sd3Velocity.CAPTION), device, dtype, seed=1),
            normal((1, Sd3Velocity.POOLED), device, dtype, seed=2),
        )

    stages = (
        _resize(case, "resize"),
        _stage("sd3 vae encode", lambda: VaeEncode(vae), (3, case.height, case.width)),
        Stage(
            "sd3 transformer",
            lambda: Sd3Velocity(layers),
            lambda device, dtype: (normal(tile, device, dtype), *captions(device, dtype)),
            tiles=len(tile_starts(h)) * len(tile_starts(w)),
        ),
        _stage("sd3 vae decode", lambda: VaeDecode(vae), (vae.channels, h, w)),
    )

    def run(modules: Modules, image: Tensor) -> Tensor:
        latent = modules["sd3 vae encode"](modules["resize"](image).clamp(-1, 1))
        given = captions(latent.device, latent.dtype)
        velocity = over_tiles(lambda part: modules["sd3 transformer"](part, *given), latent)
        return modules["sd3 vae decode"](latent - velocity)

    return stages, run, (layers, Sd3Velocity.LAYERS)


def _sdx4(case: Case) -> Upscaler:
    """Stable Diffusion x4 upscaler: DDIM (arXiv 2010.02502) on velocities, with guidance."""
    if not 1 <= case.steps <= TRAINED_TIMES:
        raise BenchInputError(f"expected 1 to {TRAINED_TIMES} steps, but got {case.steps}")
    layers = _kept(case, UpscalerVelocity.LAYERS)
    latent_shape = (1, UPSCALER_VAE.channels, *_encoded(case))

    def conditions(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        level = torch.full((1,), UPSCALER_NOISE_LEVEL, device=device)
        return level, *(normal((1, *UpscalerVelocity.CAPTION), device, dtype, s) for s in (1, 2))

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        level, caption, _ = conditions(device, dtype)
        image = normal((1, 3, *_encoded(case)), device, dtype, seed=3)
        timestep = torch.full((1,), 999, device=device)
        return normal(latent_shape, device, dtype), image, timestep, level, caption

    stages = (
        Stage("sdx4 unet", lambda: UpscalerVelocity(layers), inputs, steps=case.steps, cfg=2),
        _stage("sdx4 vae decode", lambda: VaeDecode(UPSCALER_VAE), latent_shape[1:]),
    )

    def run(modules: Modules, image: Tensor) -> Tensor:
        device, dtype = image.device, image.dtype
        level, caption, empty = conditions(device, dtype)
        schedule = diffusers().DDIMScheduler(
            TRAINED_TIMES,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
        )
        schedule.set_timesteps(case.steps)
        noise = normal(image.shape, device, dtype, seed=3)
        image = schedule.add_noise(image, noise, level)
        x = normal(latent_shape, device, dtype, seed=4)
        for time in schedule.timesteps.tolist():
            timestep = torch.full((1,), time, device=device)
            free, guided = (
                modules["sdx4 unet"](x, image, timestep, level, each) for each in (empty, caption)
            )
            velocity = free + UPSCALER_GUIDANCE * (guided - free)
            (x,) = schedule.step(velocity, time, x, return_dict=False)[:1]
        return modules["sdx4 vae decode"](x)

    return stages, run, (layers, UpscalerVelocity.LAYERS)


CASCADES: Mapping[str, Callable[[Case], Upscaler]] = {
    "vae+lanczos": _lanczos,  # the floor
    "vae+rrdbnet": _rrdbnet,
    "vae+onestep-sd3": _onestep_sd3,
    "vae+sdx4": _sdx4,
}
"""Ways from a latent to pixels that are compared with PiD, by name."""

OPT_IN = ("vae+sdx4",)
"""Those that only run when asked for by name: they take long."""
