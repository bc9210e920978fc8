"""The autoencoder of the `nano` latent space: an orthonormal 8x8 block DCT in YCbCr, no weights.

A latent keeps the lowest frequencies of every block, as a JPEG file of low quality would: ten of
luma and three of each chroma, every one divided by its standard deviation over photographs.
Colours: JFIF (ITU-T T.871), full range. Transform: DCT-II, orthonormal, as `scipy.fft.dctn`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pid_runtime.errors import PidRuntimeError

Floats = NDArray[np.float32]

BLOCK = 8
"""Side of a block in pixels, and so the pixels per latent pixel along each axis."""

_LUMA = tuple((row, total - row) for total in range(4) for row in range(total + 1))
_CHROMA = _LUMA[:3]
BASIS = (
    *((0, *each) for each in _LUMA),
    *((1, *each) for each in _CHROMA),
    *((2, *each) for each in _CHROMA),
)
"""Plane (0 Y, 1 Cb, 2 Cr), vertical and horizontal frequency of every latent channel."""

_TO_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772],
        [0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402],
    ]
)


def encode(image: Floats, std: Sequence[float]) -> Floats:
    """Images `[B, 3, H, W]` in [-1, 1] to latents `[B, 16, H / 8, W / 8]`, float32.

    std: of every channel of `BASIS`, what the coefficients are divided by. Raises
    `PidRuntimeError` unless H and W are multiples of 8 and `std` has 16 positive numbers.
    """
    scale = _checked(std)
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % BLOCK or image.shape[3] % BLOCK:
        raise PidRuntimeError(
            f"expected images of shape (B, 3, H, W) with H and W multiples of {BLOCK}, "
            f"but got {image.shape}; crop them"
        )
    batch, _, height, width = image.shape
    blocks = image.reshape(batch, 3, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    latent = np.einsum("bphywx,cpyx->bchw", blocks, _filters(), optimize=True)
    return np.asarray(latent / scale[:, None, None], np.float32)


def decode(latent: Floats, std: Sequence[float]) -> Floats:
    """The native decoder: latents `[B, 16, h, w]` to images `[B, 3, 8 h, 8 w]`, about [-1, 1].

    The inverse of `encode` but for the frequencies it dropped, which are taken as zero. Raises
    `PidRuntimeError` for another shape, or unless `std` has 16 positive numbers.
    """
    scale = _checked(std)
    if latent.ndim != 4 or latent.shape[1] != len(BASIS):
        raise PidRuntimeError(
            f"expected latents of shape (B, {len(BASIS)}, h, w), but got {latent.shape}"
        )
    batch, _, height, width = latent.shape
    blocks = np.einsum(
        "bchw,cpyx->bphywx", latent * scale[:, None, None], _inverse(), optimize=True
    )
    return np.asarray(blocks.reshape(batch, 3, height * BLOCK, width * BLOCK), np.float32)


def _checked(std: Sequence[float]) -> NDArray[np.float64]:
    scale = np.asarray(std, np.float64)
    if scale.shape != (len(BASIS),) or not (np.isfinite(scale) & (scale > 0)).all():
        raise PidRuntimeError(
            f"expected {len(BASIS)} positive standard deviations, but got {list(std)}"
        )
    return scale


@cache
def _cosines() -> NDArray[np.float64]:
    """Row k is the k-th orthonormal DCT-II vector of length 8."""
    k, x = np.mgrid[:BLOCK, :BLOCK]
    rows = np.cos(np.pi * k * (2 * x + 1) / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    rows[0] /= np.sqrt(2)
    return rows


def _planes(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each channel its 8x8 cosine pattern times a row of `colours`, `[16, 3, 8, 8]`."""
    cosines = _cosines()
    return np.stack(
        [np.einsum("p,y,x->pyx", colours[plane], cosines[v], cosines[u]) for plane, v, u in BASIS]
    )


@cache
def _filters() -> NDArray[np.float64]:
    """What a block of RGB is multiplied with to give each channel."""
    return _planes(_TO_YCBCR)


@cache
def _inverse() -> NDArray[np.float64]:
    """What each channel adds to a block of RGB."""
    return _planes(np.linalg.inv(_TO_YCBCR).T)
