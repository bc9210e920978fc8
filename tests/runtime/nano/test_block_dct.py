"""The codec of the `nano` space against the transform written down as a matrix."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pid_ref.registry import NANO_STD
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano import block_dct

ONES = (1.0,) * 48
RNG = np.random.default_rng(0)


def dct_matrix() -> NDArray[np.float64]:
    """Row k is the k-th basis vector, written out as docs/bundle-format.md has it."""
    rows = [
        [math.cos(math.pi * k * (2 * x + 1) / 8) * math.sqrt((2 if k else 1) / 4) for x in range(4)]
        for k in range(4)
    ]
    return np.array(rows)


def ycbcr(image: NDArray[np.float32]) -> NDArray[np.float64]:
    r, g, b = image.astype(np.float64)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack([y, (b - y) / 1.772, (r - y) / 1.402])


def images(batch: int, height: int, width: int) -> NDArray[np.float32]:
    return RNG.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)


def test_the_basis_is_orthonormal_and_lowest_first() -> None:
    matrix = dct_matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(4), atol=1e-12)
    for plane in range(3):
        found = [(v, u) for p, v, u in block_dct.BASIS[16 * plane :][:16] if p == plane]
        assert sorted(found) == [(v, u) for v in range(4) for u in range(4)]
        assert [v + u for v, u in found] == sorted(v + u for v, u in found)


def test_latents_are_the_coefficients() -> None:
    image, matrix = images(2, 16, 24), dct_matrix()
    std = tuple(np.linspace(0.5, 2, 48))
    latent = block_dct.encode(image, std)
    assert latent.shape == (2, 192, 2, 3) and latent.dtype == np.float32
    for b, row, column in np.ndindex(2, 4, 6):
        block = image[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        coefficients = matrix @ ycbcr(block) @ matrix.T
        want = [
            coefficients[each] / scale for each, scale in zip(block_dct.BASIS, std, strict=True)
        ]
        first = 2 * (row % 2) + column % 2
        found = latent[b, first::4, row // 2, column // 2]
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_blocks_are_packed_as_the_network_unpacks_them() -> None:
    image = images(1, 16, 24)
    unpacked = F.pixel_shuffle(torch.from_numpy(block_dct.encode(image, ONES)), 2).numpy()
    mean = ycbcr(image[0])[0].reshape(4, 4, 6, 4).mean((1, 3))
    np.testing.assert_allclose(unpacked[0, 0], 4 * mean, atol=1e-5)


def test_greys_and_colours_have_the_values_of_jfif() -> None:
    for colour, want in (
        ((1, 1, 1), (4, 0, 0)),
        ((-1, -1, -1), (-4, 0, 0)),
        ((-1, -1, 1), (4 * (2 * 0.114 - 1), 4, 4 * -0.114 * 2 / 1.402)),
        ((1, -1, -1), (4 * (2 * 0.299 - 1), 4 * -0.299 * 2 / 1.772, 4)),
    ):
        image = np.broadcast_to(np.array(colour, np.float32)[:, None, None], (1, 3, 8, 8))
        latent = block_dct.encode(image, ONES)[0, :, 0, 0].reshape(48, 4)
        np.testing.assert_allclose(latent[[0, 16, 32]], np.transpose([want] * 4), atol=1e-6)
        assert np.abs(np.delete(latent, [0, 16, 32], axis=0)).max() < 1e-6


def test_decoding_gives_the_image_back() -> None:
    image = images(2, 24, 16)
    again = block_dct.decode(block_dct.encode(image, NANO_STD), NANO_STD)
    assert again.shape == image.shape and again.dtype == np.float32
    np.testing.assert_allclose(again, image, atol=1e-6)


def test_blocks_do_not_mix() -> None:
    image = images(1, 16, 16)
    whole = block_dct.encode(image, ONES)
    image[:, :, :8, 8:] = 0
    other = block_dct.encode(image, ONES)
    np.testing.assert_allclose(other[:, :, [0, 1, 1], [0, 0, 1]], whole[:, :, [0, 1, 1], [0, 0, 1]])
    assert np.abs(other[:, :, 0, 1]).max() < 1e-6


def test_std_makes_unit_variance() -> None:
    image = images(1, 256, 256)
    std = tuple(map(float, block_dct.encode(image, ONES).reshape(48, -1).std(axis=1)))
    scaled = block_dct.encode(image, std).reshape(48, -1)
    np.testing.assert_allclose(scaled.std(axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 12), (1, 3, 7, 8)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(PidRuntimeError, match=r"expected images of shape \(B, 3, H, W\)"):
        block_dct.encode(np.zeros(shape, np.float32), ONES)


@pytest.mark.parametrize("shape", [(192, 2, 2), (1, 48, 2, 2), (1, 2, 2, 192)])
def test_latents_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(PidRuntimeError, match=r"expected latents of shape \(B, 192, h, w\)"):
        block_dct.decode(np.zeros(shape, np.float32), ONES)


@pytest.mark.parametrize("std", [(), ONES[:47], (*ONES[:47], 0.0), (*ONES[:47], math.nan)])
def test_std_that_is_none(std: tuple[float, ...]) -> None:
    for call, shape in ((block_dct.encode, (1, 3, 8, 8)), (block_dct.decode, (1, 192, 1, 1))):
        with pytest.raises(PidRuntimeError, match="48 positive standard deviations"):
            call(np.zeros(shape, np.float32), std)
