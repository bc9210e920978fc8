"""What a bundle says about its latents, and what latents of another kind look like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.manifest import Manifest
from pid_runtime.noise import image_seed, standard_normal


@dataclass(frozen=True)
class Normalization:
    """factor * (z - shift), each one number for all channels or one per channel."""

    factor: tuple[float, ...]
    shift: tuple[float, ...]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is done."""
        return set(self.factor) == {1.0} and set(self.shift) == {0.0}

    def apply(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised latents of raw ones `[B, C, h, w]`, float32."""
        factor, shift = self._columns()
        return (z - shift) * factor

    def undo(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw latents, as a VAE's decoder takes them, of normalised ones `[B, C, h, w]`."""
        factor, shift = self._columns()
        return latent / factor + shift

    def _columns(self) -> list[NDArray[np.float32]]:
        return [np.array(values, np.float32)[:, None, None] for values in (self.factor, self.shift)]


def comfyui_normalization(manifest: Manifest) -> Normalization | None:
    """How ComfyUI's latents become this bundle's; None where the bundle does not say."""
    rule: Any = manifest.model.get("comfyui_latent")
    counts = (1, manifest.network["latent_channels"])
    if not isinstance(rule, dict):
        return None
    factor, shift = (_numbers(rule.get(name), counts) for name in ("factor", "shift"))
    return Normalization(factor, shift) if factor and shift else None


def batch_normalization(
    mean: NDArray[np.float32], variance: NDArray[np.float32], eps: float
) -> Normalization:
    """The rule of raw latents by FLUX.2's statistics `[C]`: (z - mean) / sqrt(variance + eps)."""
    factor = 1 / np.sqrt(variance.astype(np.float32) + np.float32(eps))
    return Normalization(tuple(factor.tolist()), tuple(mean.astype(np.float32).tolist()))


LATENT_DRAW = 2**32 - 1
"""The draw that a latent's own noise is; a decode of the same seed uses the first few."""


def noisy(
    manifest: Manifest, latent: NDArray[np.float32], sigma: float, seed: int
) -> NDArray[np.float32]:
    """Clean latents `[B, C, h, w]` as they are, partly denoised, at a noise level in [0, 1].

    (1 - sigma) z + sigma noise; where the bundle's generators follow Euler's rule, as SDXL's, the
    factor of z is sqrt(1 - sigma^2). The noise is that of seed + b for image b: the same for every
    sigma, and none that a decode of the seed draws.
    """
    if not sigma:
        return latent
    is_euler = manifest.model.get("partly_denoised") == "euler"
    keep = math.sqrt(1 - sigma**2) if is_euler else 1 - sigma
    result = latent * np.float32(keep)
    for b, each in enumerate(result):
        noise = standard_normal(image_seed(seed, b), LATENT_DRAW, each.size)
        each += np.float32(sigma) * noise.reshape(each.shape)
    return result


def unpacked(
    tokens: NDArray[np.float32], height: int, width: int, patch: int
) -> NDArray[np.float32]:
    """Latents `[B, C, height, width]` of tokens `[B, n, C patch^2]`, as generators pack them.

    A token has `patch` x `patch` latent pixels, channel by channel; tokens lie row by row.
    """
    batch, _, depth = tokens.shape
    channels = depth // patch**2
    grid = tokens.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


RAW_PATCH = 2
"""Of FLUX.2 the raw latent pixels along a side of one of the space."""


def in_blocks(raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[B, c, 2 h, 2 w]` as `[B, 4 c, h, w]`: channel by channel, then row by row of a block."""
    batch, channels, height, width = raw.shape
    grid = raw.reshape(batch, channels, height // RAW_PATCH, RAW_PATCH, -1, RAW_PATCH)
    blocks = grid.transpose(0, 1, 3, 5, 2, 4)
    return blocks.reshape(batch, -1, height // RAW_PATCH, width // RAW_PATCH)


def latents_of(manifest: Manifest) -> str:
    """What the latents of this bundle are, in words."""
    space, convention = (manifest.model.get(key) for key in ("space", "latent_convention"))
    return f"{space} latents, {convention}" if space else "latents of its own network"


def may_be_tokens(manifest: Manifest, shape: Sequence[int]) -> bool:
    """Whether latents of this shape may be packed tokens `[B, n, width]`, as generators have."""
    return len(shape) == 3 and shape[2] == manifest.model.get("token_width")


def shape_hint(manifest: Manifest, shape: Sequence[int]) -> str:
    """What to do about latents that are not `[B, C, h, w]`."""
    channels = manifest.network["latent_channels"]
    if may_be_tokens(manifest, shape):
        if shape[0] == channels:
            return (
                f"save one latent as [1, {channels}, h, w]; if these are tokens [B, n, {shape[2]}],"
                f" unpack them to [B, {channels}, h, w] first"
            )
        return (
            f"these look like tokens [B, n, {shape[2]}]: unpack them to [B, {channels}, h, w] "
            "first, as the pipeline that made them does before its VAE"
        )
    if len(shape) == 5:
        return "choose one frame, and leave its axis out"
    if len(shape) == 3 and shape[0] == channels:
        return "put an axis of images in front"
    return f"this bundle takes {latents_of(manifest)}"


def spread_warning(manifest: Manifest, latent: Any) -> str | None:
    """What to say of a latent whose values are too large or too small to be normalised ones.

    One on a device is not looked at.
    """
    spread = _numbers(manifest.model.get("latent_spread"), (2,))
    if not spread or not isinstance(latent, np.ndarray):
        return None
    std = float(np.std(cast("NDArray[np.float32]", latent), dtype=np.float64))
    if spread[0] <= std <= spread[1]:
        return None
    return (
        f"the latent's standard deviation is {std:.2f}, but about 1 is expected; normalise it "
        f"as this bundle takes it: {latents_of(manifest)}"
    )


def _numbers(raw: Any, counts: Sequence[int]) -> tuple[float, ...]:
    """A list of so many finite numbers; nothing of anything else, since no decode needs it."""
    if not isinstance(raw, list) or len(raw) not in counts:
        return ()
    are_numbers = all(type(each) in (int, float) and math.isfinite(each) for each in raw)
    return tuple(float(each) for each in raw) if are_numbers else ()
