"""Latents from images and back, for bundles that say how: those of the `nano` space do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import as_array
from pid_runtime.bundle.manifest import PACKED_DCT, Manifest
from pid_runtime.errors import PidRuntimeError
from pid_runtime.latents import noisy
from pid_runtime.nano import block_dct

Floats = NDArray[np.float32]

MOST = 1.5
"""No float image has larger values; what a VAE decodes goes a little beyond 1."""


def encode(manifest: Manifest, image: Any, sigma: float = 0.0, seed: int = 0) -> Floats:
    """See `Decoder.encode`."""
    std = _std(manifest)
    if isinstance(sigma, bool | str) or not 0 <= sigma <= 1:
        raise PidRuntimeError(f"expected sigma in [0, 1], but got {sigma!r}; 0 is a clean latent")
    return noisy(manifest, block_dct.encode(_floats(as_array(image)), std), sigma, seed)


def native_decode(manifest: Manifest, latent: Any) -> Floats:
    """See `Decoder.native_decode`."""
    return block_dct.decode(as_array(latent).astype(np.float32, copy=False), _std(manifest))


def _std(manifest: Manifest) -> Sequence[float]:
    codec = manifest.codec
    if codec is None or codec.kind != PACKED_DCT:
        got = "without" if codec is None else f"with an unknown one, {codec.kind[:80]!r}"
        raise PidRuntimeError(
            f"expected a bundle with a codec, as those of space nano have, but got one {got}; "
            "make latents with the encoder of its own space"
        )
    return codec.std


def from_uint8(pixels: NDArray[np.uint8]) -> Floats:
    """8-bit pixels `[.., H, W, 3]` to float images `[.., 3, H, W]` in [-1, 1]."""
    image = np.moveaxis(pixels, -1, -3).astype(np.float32)
    image /= 127.5
    image -= 1.0
    return image


def _floats(image: NDArray[Any]) -> Floats:
    """Images as `block_dct.encode` takes them."""
    if image.dtype == np.uint8:
        if image.ndim != 4 or image.shape[3] != 3:
            raise PidRuntimeError(
                f"expected uint8 images of shape (B, H, W, 3), but got {image.shape}"
            )
        return from_uint8(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise PidRuntimeError(
            f"expected float images in [-1, 1] or uint8 ones, but got {image.dtype}; convert them"
        )
    largest = float(np.abs(image).max(initial=0))
    if largest > MOST:  # NaN is refused later
        raise PidRuntimeError(
            f"expected float images in [-1, 1], but got values up to {largest:g}; scale them, or "
            "give uint8"
        )
    return image.astype(np.float32, copy=False)
