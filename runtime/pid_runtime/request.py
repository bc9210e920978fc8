"""A decode's inputs, checked against a bundle before anything runs."""

import logging
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import as_array
from pid_runtime.bundle.manifest import LARGEST_GUIDANCE, Manifest
from pid_runtime.bundle.sizes import Sizes, sizes_of_request
from pid_runtime.errors import PidRuntimeError
from pid_runtime.latents import shape_hint
from pid_runtime.noise import image_seed
from pid_runtime.schedule import Rule, Schedule, check_schedule, numbers, whole_number
from pid_runtime.tiles import (
    DEFAULT_OVERLAP,
    TileOption,
    Tiling,
    automatic,
    overlap_of,
    pixels_per_latent_pixel,
    tiling_of,
)

_log = logging.getLogger(__name__)

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Branch:
    """One of the runs of the network whose clean images are mixed at every step."""

    caption: Any
    """`[B, T, D]`, or `[1, T, D]` for every image."""
    weight: float
    """Of all branches they sum to 1."""


@dataclass(frozen=True)
class Request:
    """The inputs of one decode; every array is on the host, or on a device as it was given."""

    sizes: Sizes
    """Of the whole picture."""
    schedule: Schedule
    latent: Any
    """`[B, C, h, w]`."""
    branches: tuple[Branch, ...]
    """The caption's, after the negative caption's if there is guidance; of as many text tokens."""
    sigmas: NDArray[np.float32]
    """`[B]`."""
    seeds: tuple[int, ...]
    """B of them."""
    noises: tuple[Any, ...]
    """Noise images `[B, 3, H, W]`, one before and one per step; None where the seed makes it."""
    tiling: Tiling | None = None
    """None for the whole picture at once."""
    overlap: int = DEFAULT_OVERLAP
    """The least of tiles, in pixels of the latent."""
    is_automatic: bool = False
    """Whether the tiling, or that there is none, may be changed where memory is short."""
    branches_at_once: bool = False
    """Whether the program runs all branches as one batch, not one after another."""

    @property
    def groups(self) -> tuple[tuple[Branch, ...], ...]:
        """The branches, by what the program runs at a time."""
        return (self.branches,) if self.branches_at_once else tuple((b,) for b in self.branches)

    @property
    def program_sizes(self) -> Sizes:
        """Of what the program runs at a time: the pictures, or a tile of each, of a group."""
        sizes = self.sizes.of_batch(self.sizes.value("B") * len(self.groups[0]))
        return sizes if self.tiling is None else sizes.resized(*self.tiling.latent)

    @property
    def calls(self) -> int:
        """How often the network runs for an image, by itself or in a batch."""
        tiles = 1 if self.tiling is None else self.tiling.count
        return self.schedule.steps * tiles * len(self.branches)

    @property
    def is_plain(self) -> bool:
        """Whether the program makes every step on its own."""
        return self.tiling is None and len(self.branches) == 1 and not self.schedule.looks_back


def empty_caption(manifest: Manifest) -> NDArray[np.float32]:
    """The caption embedding that stands for none: zeros `[1, text_max_length, text_dim]`."""
    network = manifest.network
    return np.zeros((1, network["text_max_length"], network["text_dim"]), np.float32)


def check_request(
    manifest: Manifest,
    latent: Any,
    caption: Any = None,
    *,
    sigma: float | Sequence[float] | NDArray[np.float32] = 0.0,
    seed: Any = 0,
    noise: Any = None,
    step_noise: Sequence[Any] | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    rule: Rule | None = None,
    negative: Any = None,
    guidance: float | None = None,
    tile: TileOption = None,
    overlap: int | None = None,
) -> Request:
    """The arguments of `Decoder.decode`, complete and checked.

    Raises `PidRuntimeError` for an input that does not fit the bundle. Arrays on the host are
    looked through for NaN; those on a device are taken as they are.
    """
    network = manifest.network
    guidance = check_guidance(manifest, guidance, has_negative=negative is not None)
    fix = shape_hint(manifest, np.shape(latent))
    latent = _check_array(latent, "latent", ("B", network["latent_channels"], "h", "w"), fix)
    batch = latent.shape[0]
    caption = _check_caption(manifest, "caption", caption, batch)
    branches = [Branch(caption, 1.0)]
    if guidance != 1:
        other = _check_caption(manifest, "negative", negative, batch)
        if other.shape[1] != caption.shape[1]:
            raise PidRuntimeError(
                f"expected a negative of as many tokens as the caption, {caption.shape[1]}, but "
                f"got {other.shape[1]}; make both with pid-caption"
            )
        branches = [Branch(other, 1 - guidance), Branch(caption, guidance)]
    sigmas = _check_sigma(manifest, sigma, batch)
    seeds = _check_seeds(seed, batch)
    tiling = check_size(manifest, latent.shape[2], latent.shape[3], tile, overlap)
    side = pixels_per_latent_pixel(manifest)
    size = (side * latent.shape[3], side * latent.shape[2])
    schedule = check_schedule(manifest.sampler, steps=steps, times=times, rule=rule, size=size)
    sizes = sizes_of_request(
        network,
        manifest.tokens_per_latent,
        batch=batch,
        latent_height=latent.shape[2],
        latent_width=latent.shape[3],
        text_tokens=caption.shape[1],
        rows=len(manifest.sampler.times) or schedule.steps,
    )
    noises = _check_noises(noise, step_noise, sizes, schedule.steps, schedule.rule)
    return Request(
        sizes,
        schedule,
        latent,
        tuple(branches),
        sigmas,
        seeds,
        noises,
        tiling,
        overlap_of(manifest, overlap),
        tile == "auto",
    )


def _check_caption(manifest: Manifest, name: str, caption: Any, batch: int) -> Any:
    """A caption embedding, or the empty one for None."""
    if caption is None:
        return empty_caption(manifest)
    network = manifest.network
    most = network["text_max_length"]
    wanted = ("B", "T", network["text_dim"])
    fix = f"B is 1 or that of the latent, {batch}, and T at most {most}"
    caption = _check_array(caption, name, wanted, fix)
    if caption.shape[0] not in (1, batch) or caption.shape[1] > most:
        raise _shape_error(name, wanted, caption.shape, fix)
    return caption


def check_guidance(manifest: Manifest, guidance: Any, *, has_negative: bool) -> float:
    """How much more of the caption than of the negative one; 1 for the caption alone.

    guidance: None for what the bundle says. Raises `PidRuntimeError` for guidance that the bundle
    does not take, or that lacks a negative caption.
    """
    distilled = manifest.model.get("distilled") is True
    if distilled and (has_negative or guidance not in (None, 1)):
        given = (
            "a negative caption"
            if has_negative
            else f"guidance {str(guidance)[:40].removesuffix('.0')}"
        )
        raise PidRuntimeError(
            f"expected no guidance, which {manifest.model.get('name')} has learned at its "
            f"distillation, but got {given}; drop it"
        )
    asked = manifest.sampler.guidance if guidance is None else guidance
    if has_negative and guidance is None and asked == 1:
        raise PidRuntimeError(
            "expected guidance with the negative caption, but got none; give for example 5"
        )
    values = numbers(asked, "guidance").reshape(-1)
    if values.size != 1 or not 1 <= float(values[0]) <= LARGEST_GUIDANCE:
        raise PidRuntimeError(
            f"expected guidance from 1 to {LARGEST_GUIDANCE}, but got {str(asked)[:60]}; 5 is usual"
        )
    if values[0] != 1 and not has_negative:
        raise PidRuntimeError(
            f"expected a negative caption for guidance {float(values[0]):g}, but got none; give "
            "one, made by pid-caption of an empty text for example, or guidance 1"
        )
    return float(values[0])


def outline_request(
    manifest: Manifest, height: int, width: int, *, batch: int = 1, **options: Any
) -> Request:
    """The request of a decode to `height` x `width` pixels with zeros for inputs, to plan by.

    options: as of `check_request`. Raises `PidRuntimeError` as that does.
    """
    side = pixels_per_latent_pixel(manifest)
    if min(height, width) < 1 or height % side or width % side:
        raise PidRuntimeError(
            f"expected sides in multiples of {side} pixels, but got {width}x{height}; "
            f"{side} pixels are one of the latent"
        )
    shape = (batch, manifest.network["latent_channels"], height // side, width // side)
    zero = np.float32(0)
    guidance = options.get("guidance")
    wanted = manifest.sampler.guidance if guidance is None else guidance
    negative = empty_caption(manifest) if wanted != 1 else None
    latent = np.broadcast_to(zero, shape)
    return check_request(manifest, latent, negative=negative, **options)


def smaller_tiles(manifest: Manifest, request: Request) -> Request | None:
    """The same decode in tiles of half as many tokens or fewer; None where there are none."""
    most = request.program_sizes.value("L") // 2
    height, width = request.sizes.shape(("h", "w"))
    try:
        tiling = automatic(manifest, height, width, request.overlap, "memory is short", most)
    except PidRuntimeError:
        return None
    return replace(request, tiling=tiling)


def largest_latent(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest latent of about this shape that a bucket holds."""
    most = manifest.most_tokens // manifest.tokens_per_latent**2
    scale = min(1.0, math.sqrt(most / (height * width)))
    rows = max(1, math.floor(height * scale))
    columns = max(1, min(math.floor(width * scale), most // rows))
    return min(rows, most), columns


def check_size(
    manifest: Manifest, height: int, width: int, tile: TileOption, overlap: int | None
) -> Tiling | None:
    """The tiles of a decode of a latent `height` x `width`; None to decode it whole.

    Raises `PidRuntimeError` for a size that cannot be decoded so.
    """
    tiling = tiling_of(manifest, height, width, tile, overlap)
    if tiling is None:
        check_fits(manifest, height, width)
    return tiling


def check_fits(manifest: Manifest, height: int, width: int) -> None:
    """Raise `PidRuntimeError` for a latent of a height and width that no bucket holds."""
    per_latent = manifest.tokens_per_latent
    tokens = height * width * per_latent**2
    if tokens <= manifest.most_tokens:
        return
    side = pixels_per_latent_pixel(manifest)
    rows, columns = largest_latent(manifest, height, width)
    raise PidRuntimeError(
        f"expected an image of at most {manifest.megapixels(manifest.most_tokens)}, the largest "
        f"bucket of this bundle, but got {side * width}x{side * height}; the largest of this shape "
        f"is {side * columns}x{side * rows}, of a latent of height {rows} and width {columns}; or "
        f"export with --buckets large={tokens}, or decode in tiles (tile auto)"
    )


def _check_array(source: Any, name: str, wanted: tuple[int | str, ...], fix: str) -> Any:
    """An input as an array on the host, or as it is when it lives on a device.

    wanted: its shape; letters stand for any size but 0.
    """
    if isinstance(source, str | os.PathLike):
        if name == "caption":
            fix = "give the embedding, which pid-caption makes of a prompt"
        raise PidRuntimeError(f"expected an array as {name}, but got {str(source)[:60]!r}; {fix}")
    if getattr(source, "requires_grad", False):
        source = source.detach()
    kind = str(getattr(source, "dtype", "")).removeprefix("torch.")
    if kind == "bfloat16":  # numpy has none of its own
        source = source.float() if hasattr(source, "float") else source.astype(np.float32)
    on_host = not hasattr(source, "__dlpack_device__") or source.__dlpack_device__()[0] == 1
    array = as_array(source) if on_host else source
    shape = tuple(array.shape)
    if len(shape) != len(wanted) or any(
        has == 0 or (isinstance(size, int) and has != size)
        for has, size in zip(shape, wanted, strict=True)
    ):
        raise _shape_error(name, wanted, shape, fix)
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in _FLOATS:
        raise PidRuntimeError(
            f"expected {name} values of {', '.join(_FLOATS)}, but got {kind}; convert them"
        )
    if on_host and not np.isfinite(array).all():
        raise PidRuntimeError(
            f"expected a finite {name}, but it holds NaN or infinity; look at the step that made it"
        )
    return array


def _shape_error(
    name: str, wanted: Sequence[int | str], shape: Sequence[int], fix: str
) -> PidRuntimeError:
    letters = ", ".join(str(size) for size in wanted)
    return PidRuntimeError(f"expected {name} shape [{letters}], but got {list(shape)}; {fix}")


def _check_sigma(manifest: Manifest, sigma: Any, batch: int) -> NDArray[np.float32]:
    sigmas = numbers(sigma, "sigma").astype(np.float32)
    if sigmas.shape not in ((), (1,), (batch,)):
        raise PidRuntimeError(
            f"expected one sigma{_or_more(batch)}, but got shape {list(sigmas.shape)}; give one "
            "per image"
        )
    if not ((sigmas >= 0) & (sigmas <= 1)).all():
        fix = "0 is a clean latent"
        if manifest.model.get("partly_denoised") == "euler":
            fix += ", and for x0 + sigma noise divide latent and sigma by sqrt(sigma^2 + 1) first"
        shown = ", ".join(f"{value:g}" for value in np.atleast_1d(sigmas))
        raise PidRuntimeError(f"expected sigma in [0, 1], but got [{shown}]; {fix}")
    return np.ascontiguousarray(np.broadcast_to(sigmas, (batch,)))


def _check_seeds(seed: Any, batch: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbits(64)
        _log.info("Seed %s", seed)
    if np.ndim(seed) == 0:
        return tuple(image_seed(whole_number(seed, "seed"), b) for b in range(batch))
    seeds = tuple(image_seed(whole_number(each, "seed"), 0) for each in seed)
    if len(seeds) != batch:
        raise PidRuntimeError(f"expected one seed{_or_more(batch)}, but got {len(seeds)}")
    return seeds


def _or_more(batch: int) -> str:
    return "" if batch == 1 else f" or {batch}"


def _check_noises(
    noise: Any, step_noise: Sequence[Any] | None, sizes: Sizes, steps: int, rule: str
) -> tuple[Any, ...]:
    """The noise image of every draw, None where the seed makes it."""
    later: list[Any] = [None] * (steps - 1)
    if step_noise is not None and rule == "sde":  # ode adds none
        later = list(step_noise)
    if len(later) != steps - 1:
        raise PidRuntimeError(
            f"expected {steps - 1} step noises, one after every step but the last, "
            f"but got {len(later)}"
        )
    shape = sizes.shape(("B", 3, "H", "W"))
    fix = "it has the shape of the images"
    return tuple(
        None if image is None else _check_array(image, "noise", shape, fix)
        for image in (noise, *later, None)
    )
