"""The autoencoder of the `nano` latent space: an orthonormal 4x4 block DCT in YCbCr, no weights.

Every coefficient of a block is divided by its standard deviation over photographs, and 2x2 blocks
are packed into one latent pixel, as FLUX.2 packs its latents. Nothing is dropped: decoding gives
the picture back. Colours: JFIF (ITU-T T.871), full range. Transform: DCT-II, orthonormal, as
`scipy.fft.dctn`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pid_runtime.errors import PidRuntimeError

Floats = NDArray[np.float32]

BLOCK = 4
"""Side of a block in pixels."""
PACKED = 2
"""Side of the group of blocks that one latent pixel holds, in blocks."""
LATENT_PIXEL = BLOCK * PACKED
"""Pixels per latent pixel along each axis."""

BASIS = tuple(
    (plane, total - column, column)
    for plane in range(3)
    for total in range(2 * BLOCK - 1)
    for column in range(BLOCK)
    if 0 <= total - column < BLOCK
)
"""Plane (0 Y, 1 Cb, 2 Cr), vertical and horizontal frequency of every coefficient of a block."""

CHANNELS = len(BASIS) * PACKED**2
"""Of a latent: coefficient k of the block in row i and column j of a latent pixel is channel
4 k + 2 i + j."""

_TO_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772],
        [0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402],
    ]
)


def encode(image: Floats, std: Sequence[float]) -> Floats:
    """Images `[B, 3, H, W]` in [-1, 1] to latents `[B, 192, H / 8, W / 8]`, float32.

    std: of every coefficient of `BASIS`, what it is divided by. Raises `PidRuntimeError` unless H
    and W are multiples of 8 and `std` has 48 positive numbers.
    """
    scale = _checked(std)
    sides = image.shape[2:]
    if image.ndim != 4 or image.shape[1] != 3 or any(side % LATENT_PIXEL for side in sides):
        raise PidRuntimeError(
            f"expected images of shape (B, 3, H, W) with H and W multiples of {LATENT_PIXEL}, "
            f"but got {image.shape}; crop them"
        )
    h, w = (side // LATENT_PIXEL for side in sides)
    blocks = image.reshape(len(image), 3, h, PACKED, BLOCK, w, PACKED, BLOCK)
    latent = np.einsum("bphiywjx,kpyx->bkijhw", blocks, _filters(), optimize=True)
    latent /= scale[:, None, None, None, None]
    return np.asarray(latent.reshape(len(image), CHANNELS, h, w), np.float32)


def decode(latent: Floats, std: Sequence[float]) -> Floats:
    """The native decoder: latents `[B, 192, h, w]` to images `[B, 3, 8 h, 8 w]`, about [-1, 1].

    The inverse of `encode`. Raises `PidRuntimeError` for another shape, or unless `std` has 48
    positive numbers.
    """
    scale = _checked(std)
    if latent.ndim != 4 or latent.shape[1] != CHANNELS:
        raise PidRuntimeError(
            f"expected latents of shape (B, {CHANNELS}, h, w), but got {latent.shape}"
        )
    batch, _, h, w = latent.shape
    blocks = latent.reshape(batch, len(BASIS), PACKED, PACKED, h, w)
    image = np.einsum(
        "bkijhw,kpyx->bphiywjx", blocks, scale[:, None, None, None] * _inverse(), optimize=True
    )
    return np.asarray(image.reshape(batch, 3, h * LATENT_PIXEL, w * LATENT_PIXEL), np.float32)


def _checked(std: Sequence[float]) -> NDArray[np.float64]:
    scale = np.asarray(std, np.float64)
    if scale.shape != (len(BASIS),) or not (np.isfinite(scale) & (scale > 0)).all():
        raise PidRuntimeError(
            f"expected {len(BASIS)} positive standard deviations, but got {list(std)}"
        )
    return scale


@cache
def _cosines() -> NDArray[np.float64]:
    """Row k is the k-th orthonormal DCT-II vector of length 4."""
    k, x = np.mgrid[:BLOCK, :BLOCK]
    rows = np.cos(np.pi * k * (2 * x + 1) / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    rows[0] /= np.sqrt(2)
    return rows


def _planes(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each coefficient its cosine pattern times a row of `colours`, `[48, 3, 4, 4]`."""
    cosines = _cosines()
    return np.stack(
        [np.einsum("p,y,x->pyx", colours[plane], cosines[v], cosines[u]) for plane, v, u in BASIS]
    )


@cache
def _filters() -> NDArray[np.float64]:
    """What a block of RGB is multiplied with to give each coefficient."""
    return _planes(_TO_YCBCR)


@cache
def _inverse() -> NDArray[np.float64]:
    """What each coefficient adds to a block of RGB."""
    return _planes(np.linalg.inv(_TO_YCBCR).T)
