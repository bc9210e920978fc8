"""Cascades: a latent space's own decoder, followed by super-resolution.

Each does what PiD does, from the same latent to the same pixels. Weights are random; caption
embeddings are given, so that no text encoder counts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pid_bench.diffusers_modules import (
    UPSCALER_VAE,
    VAES,
    Sd3Velocity,
    UpscalerVelocity,
    Vae,
    VaeDecode,
    VaeEncode,
)
from pid_bench.errors import BenchInputError
from pid_bench.rrdbnet import RRDBNet
from pid_bench.stage import Pipeline, Stage, normal
from pid_ref.registry import find_space

SCALE = 4
"""Output pixels per pixel of the encoded image, along each axis."""

TILE, OVERLAP = 64, 8
"""Side of a tile of `vae+onestep-sd3`, and what neighbours share, in latent pixels."""

UPSCALER_STEPS, UPSCALER_GUIDANCE, UPSCALER_NOISE_LEVEL = 75, 9.0, 20
"""What the release of Stable Diffusion x4 upscaler decodes with by default."""

Modules = Mapping[str, nn.Module]
Run = Callable[[Modules, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What is asked of a cascade."""

    height: int
    """Of the image that comes out, in pixels."""
    width: int
    """See `height`."""
    depth: float
    """Share of the super-resolution network's blocks that are kept, in (0, 1]."""
    steps: int
    """Sampler steps of `vae+sdx4`."""

    @property
    def encoded(self) -> tuple[int, int]:
        """Height and width of the image the latent stands for."""
        return self.height // SCALE, self.width // SCALE

    def layers(self, full: int) -> int:
        """How many of a network's blocks are kept, at least one."""
        return max(1, round(self.depth * full))


@dataclass(frozen=True)
class Upscaler:
    """The second half of a cascade: from the decoded image on."""

    stages: tuple[Stage, ...]
    run: Run
    """Modules by stage name and the image `[1, 3, h, w]`, to pixels `[1, 3, 4 h, 4 w]`."""
    blocks: tuple[int, int] | None = None
    """How many of the network's blocks were kept, and how many it has."""


@dataclass(frozen=True)
class Cascade:
    """A way from a latent to pixels that is compared with PiD."""

    name: str
    upscaler: Callable[[Options], Upscaler]
    opt_in: bool = False
    """Whether it only runs when asked for by name: it takes long."""


def build_cascade(
    name: str,
    space: str,
    height: int,
    width: int,
    *,
    depth: float = 1.0,
    steps: int = UPSCALER_STEPS,
) -> Pipeline:
    """The pipeline of a cascade from a latent of `space` to an image of `height` x `width` pixels.

    depth: share of the super-resolution network's blocks to keep, in (0, 1]; the space's own
    decoder stays whole. steps: sampler steps of `vae+sdx4`. Nothing is built yet.
    Raises `BenchInputError` for an unknown cascade, a space whose autoencoder diffusers lacks, or a
    size, depth or number of steps that cannot be; `PidInputError` for an unknown space.
    """
    if name not in CASCADES:
        raise BenchInputError(f"expected a cascade ({', '.join(CASCADES)}), but got {name!r}")
    cascade, vae = CASCADES[name], find_vae(space)
    multiple = SCALE * vae.down
    if min(height, width) < 1 or height % multiple or width % multiple:
        raise BenchInputError(
            f"expected width and height in multiples of {multiple} for {space}, "
            f"but got {width}x{height}"
        )
    if not 0 < depth <= 1:
        raise BenchInputError(f"expected a depth above 0 and at most 1, but got {depth}")
    if not 1 <= steps <= TRAINED_TIMES:
        raise BenchInputError(f"expected 1 to {TRAINED_TIMES} steps, but got {steps}")
    options = Options(height, width, depth, steps)
    upscaler = cascade.upscaler(options)
    h, w = height // multiple, width // multiple
    decode = _stage("vae decode", lambda: VaeDecode(vae), (vae.channels, h, w))

    def run(modules: Modules, latent: Tensor) -> Tensor:
        dtype = next(modules[decode.name].parameters()).dtype
        image = modules[decode.name](latent.to(dtype))
        return upscaler.run(modules, image).float()

    kept, full = upscaler.blocks or (1, 1)
    return Pipeline(
        name=cascade.name,
        space=find_space(space).name,
        latent_shape=(1, vae.channels, h, w),
        encoded=(width // SCALE, height // SCALE),
        size=(width, height),
        stages=(decode, *upscaler.stages),
        run=run,
        reduced=f"{kept} of {full} blocks" if kept < full else "",
    )


def find_vae(space: str) -> Vae:
    """The autoencoder of a latent space (name or alias).

    Raises `BenchInputError` when diffusers lacks it, `PidInputError` when there is no such space.
    """
    name = find_space(space).name
    if name not in VAES:
        raise BenchInputError(
            f"expected a latent space whose autoencoder diffusers has ({', '.join(VAES)}), "
            f"but got {space!r}; leave the cascades out"
        )
    return VAES[name]


def _stage(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], **calls: int) -> Stage:
    """A stage whose module takes one tensor `[1, *shape]`."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (normal((1, *shape), device, dtype),)

    return Stage(name, make, inputs, **calls)


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


def _resize(options: Options, name: str) -> Stage:
    target = (options.height, options.width)
    return _stage(name, lambda: LanczosResize(options.encoded, target), (3, *options.encoded))


def _lanczos(options: Options) -> Upscaler:
    return Upscaler(
        (_resize(options, "lanczos"),), lambda modules, image: modules["lanczos"](image)
    )


def _rrdbnet(options: Options) -> Upscaler:
    blocks = options.layers(RRDBNet.BLOCKS)
    stage = _stage("rrdbnet", lambda: RRDBNet(blocks), (3, *options.encoded))

    def run(modules: Modules, image: Tensor) -> Tensor:
        return 2 * modules["rrdbnet"]((image + 1) / 2) - 1

    return Upscaler((stage,), run, (blocks, RRDBNet.BLOCKS))


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


def _onestep_sd3(options: Options) -> Upscaler:
    """After TSD-SR (arXiv 2411.18263): encode the resized image, one step from it, decode."""
    vae, layers = VAES["sd3"], options.layers(Sd3Velocity.LAYERS)
    h, w = options.height // vae.down, options.width // vae.down
    tile = (1, vae.channels, min(TILE, h), min(TILE, w))

    def captions(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (
            torch.full((1,), 1000.0, device=device),
            normal((1, *Sd3Velocity.CAPTION), device, dtype, seed=1),
            normal((1, Sd3Velocity.POOLED), device, dtype, seed=2),
        )

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return normal(tile, device, dtype), *captions(device, dtype)

    stages = (
        _resize(options, "resize"),
        _stage("sd3 vae encode", lambda: VaeEncode(vae), (3, options.height, options.width)),
        Stage(
            "sd3 transformer",
            lambda: Sd3Velocity(layers),
            inputs,
            tiles=len(tile_starts(h)) * len(tile_starts(w)),
        ),
        _stage("sd3 vae decode", lambda: VaeDecode(vae), (vae.channels, h, w)),
    )

    def run(modules: Modules, image: Tensor) -> Tensor:
        latent = modules["sd3 vae encode"](modules["resize"](image).clamp(-1, 1))
        given = captions(latent.device, latent.dtype)
        velocity = over_tiles(lambda part: modules["sd3 transformer"](part, *given), latent)
        return modules["sd3 vae decode"](latent - velocity)

    return Upscaler(stages, run, (layers, Sd3Velocity.LAYERS))


# Many steps of a UNet


def _sdx4(options: Options) -> Upscaler:
    """Stable Diffusion x4 upscaler: DDIM (arXiv 2010.02502) on velocities, with guidance."""
    layers = options.layers(UpscalerVelocity.LAYERS)
    latent_shape = (1, UPSCALER_VAE.channels, *options.encoded)

    def conditions(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        level = torch.full((1,), UPSCALER_NOISE_LEVEL, device=device)
        return level, *(normal((1, *UpscalerVelocity.CAPTION), device, dtype, s) for s in (1, 2))

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        level, caption, _ = conditions(device, dtype)
        image = normal((1, 3, *options.encoded), device, dtype, seed=3)
        timestep = torch.full((1,), 999, device=device)
        return normal(latent_shape, device, dtype), image, timestep, level, caption

    stages = (
        Stage("sdx4 unet", lambda: UpscalerVelocity(layers), inputs, steps=options.steps, cfg=2),
        _stage("sdx4 vae decode", lambda: VaeDecode(UPSCALER_VAE), latent_shape[1:]),
    )
    times, signal = ddim_schedule(options.steps)

    def run(modules: Modules, image: Tensor) -> Tensor:
        device, dtype = image.device, image.dtype
        level, caption, empty = conditions(device, dtype)
        kept = signal_share(UPSCALER_NOISE_LEVEL)
        noise = normal(image.shape, device, dtype, seed=3)
        image = math.sqrt(kept) * image + math.sqrt(1 - kept) * noise
        x = normal(latent_shape, device, dtype, seed=4)
        for t, now, after in zip(times, signal, [*signal[1:], 1.0], strict=True):
            timestep = torch.full((1,), t, device=device)
            free, guided = (
                modules["sdx4 unet"](x, image, timestep, level, each) for each in (empty, caption)
            )
            v = free + UPSCALER_GUIDANCE * (guided - free)
            clean = math.sqrt(now) * x - math.sqrt(1 - now) * v
            noise = math.sqrt(now) * v + math.sqrt(1 - now) * x
            x = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
        return modules["sdx4 vae decode"](x)

    return Upscaler(stages, run, (layers, UpscalerVelocity.LAYERS))


TRAINED_TIMES = 1000
BETAS = 1e-4, 0.02
"""First and last noise variance of a trained time; their square roots are evenly spaced."""


def signal_share(time: int) -> float:
    """Share of the variance that is signal at one of the `TRAINED_TIMES` (alpha bar)."""
    low, high = (math.sqrt(beta) for beta in BETAS)
    betas = ((low + (high - low) * i / (TRAINED_TIMES - 1)) ** 2 for i in range(time + 1))
    return math.prod(1 - beta for beta in betas)


def ddim_schedule(steps: int) -> tuple[list[int], list[float]]:
    """The times that `steps` steps visit, from noise to image, and the `signal_share` of each."""
    times = [TRAINED_TIMES - 1 - i * TRAINED_TIMES // steps for i in range(steps)]
    return times, [signal_share(time) for time in times]


CASCADES = {
    cascade.name: cascade
    for cascade in (
        Cascade("vae+lanczos", _lanczos),  # the floor
        Cascade("vae+rrdbnet", _rrdbnet),
        Cascade("vae+onestep-sd3", _onestep_sd3),
        Cascade("vae+sdx4", _sdx4, opt_in=True),
    )
}
"""Every cascade by name."""
