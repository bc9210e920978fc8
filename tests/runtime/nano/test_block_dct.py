"""The codec of the `nano` space against the transform written down as a matrix."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pid_ref.registry import NANO_STD
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano import block_dct

ONES = (1.0,) * 16
RNG = np.random.default_rng(0)


def dct_matrix() -> NDArray[np.float64]:
    """Row k is the k-th basis vector, written out as docs/bundle-format.md has it."""
    rows = [
        [
            math.cos(math.pi * k * (2 * x + 1) / 16) * math.sqrt((2 if k else 1) / 8)
            for x in range(8)
        ]
        for k in range(8)
    ]
    return np.array(rows)


def ycbcr(image: NDArray[np.float32]) -> NDArray[np.float64]:
    r, g, b = image.astype(np.float64)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack([y, (b - y) / 1.772, (r - y) / 1.402])


def images(batch: int, height: int, width: int) -> NDArray[np.float32]:
    return RNG.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)


def smooth(height: int, width: int) -> NDArray[np.float32]:
    """A gradient, of which a block keeps nearly all."""
    y, x = np.mgrid[:height, :width] / 64
    return np.stack([np.sin(x + y), np.cos(x), np.sin(y - x)])[None].astype(np.float32)


def test_the_basis_is_orthonormal_and_lowest_first() -> None:
    matrix = dct_matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(8), atol=1e-12)
    planes = [plane for plane, _, _ in block_dct.BASIS]
    assert planes == [0] * 10 + [1] * 3 + [2] * 3
    luma = [(v, u) for plane, v, u in block_dct.BASIS if plane == 0]
    assert sorted(luma) == [(v, u) for v in range(4) for u in range(4) if v + u < 4]
    assert [v + u for v, u in luma] == sorted(v + u for v, u in luma)


def test_latents_are_the_coefficients() -> None:
    image, matrix = images(2, 16, 24), dct_matrix()
    std = tuple(np.linspace(0.5, 2, 16))
    latent = block_dct.encode(image, std)
    assert latent.shape == (2, 16, 2, 3) and latent.dtype == np.float32
    for b, row, column in np.ndindex(2, 2, 3):
        block = image[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        coefficients = matrix @ ycbcr(block) @ matrix.T
        want = [
            coefficients[each] / scale for each, scale in zip(block_dct.BASIS, std, strict=True)
        ]
        np.testing.assert_allclose(latent[b, :, row, column], want, atol=1e-6)


def test_greys_and_colours_have_the_values_of_jfif() -> None:
    for colour, want in (
        ((1, 1, 1), (8, 0, 0)),
        ((-1, -1, -1), (-8, 0, 0)),
        ((-1, -1, 1), (8 * (2 * 0.114 - 1), 8, 8 * -0.114 * 2 / 1.402)),
        ((1, -1, -1), (8 * (2 * 0.299 - 1), 8 * -0.299 * 2 / 1.772, 8)),
    ):
        image = np.broadcast_to(np.array(colour, np.float32)[:, None, None], (1, 3, 8, 8))
        latent = block_dct.encode(image, ONES)[0, :, 0, 0]
        np.testing.assert_allclose(latent[[0, 10, 13]], want, atol=1e-6)
        assert np.abs(np.delete(latent, [0, 10, 13])).max() < 1e-6


def test_decoding_inverts_encoding_on_what_a_latent_holds() -> None:
    latent = RNG.standard_normal((2, 16, 3, 2)).astype(np.float32)
    std = NANO_STD
    image = block_dct.decode(latent, std)
    assert image.shape == (2, 3, 24, 16) and image.dtype == np.float32
    np.testing.assert_allclose(block_dct.encode(image, std), latent, atol=1e-5)
    # What is dropped is dropped once: a second time changes nothing.
    picture = smooth(32, 24)
    once = block_dct.decode(block_dct.encode(picture, std), std)
    twice = block_dct.decode(block_dct.encode(once, std), std)
    np.testing.assert_allclose(twice, once, atol=1e-5)
    assert np.abs(once - picture).max() < 0.05


def test_blocks_do_not_mix() -> None:
    image = images(1, 16, 16)
    whole = block_dct.encode(image, ONES)
    image[:, :, :8, 8:] = 0
    other = block_dct.encode(image, ONES)
    np.testing.assert_allclose(other[:, :, [0, 1, 1], [0, 0, 1]], whole[:, :, [0, 1, 1], [0, 0, 1]])
    assert np.abs(other[:, :, 0, 1]).max() < 1e-6


def test_std_makes_unit_variance() -> None:
    image = images(1, 256, 256)
    std = tuple(map(float, block_dct.encode(image, ONES).std(axis=(0, 2, 3))))
    np.testing.assert_allclose(block_dct.encode(image, std).std(axis=(0, 2, 3)), 1, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 12), (1, 3, 7, 8)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(PidRuntimeError, match=r"expected images of shape \(B, 3, H, W\)"):
        block_dct.encode(np.zeros(shape, np.float32), ONES)


@pytest.mark.parametrize("shape", [(16, 2, 2), (1, 15, 2, 2), (1, 2, 2, 16)])
def test_latents_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(PidRuntimeError, match=r"expected latents of shape \(B, 16, h, w\)"):
        block_dct.decode(np.zeros(shape, np.float32), ONES)


@pytest.mark.parametrize("std", [(), ONES[:15], (*ONES[:15], 0.0), (*ONES[:15], math.nan)])
def test_std_that_is_none(std: tuple[float, ...]) -> None:
    for call, shape in ((block_dct.encode, (1, 3, 8, 8)), (block_dct.decode, (1, 16, 1, 1))):
        with pytest.raises(PidRuntimeError, match="16 positive standard deviations"):
            call(np.zeros(shape, np.float32), std)
