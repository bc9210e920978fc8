"""Position tables against the reference network's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pid_ref.network import patchify, pixel_positions, rope_angles_1d, rope_angles_2d
from pid_runtime.bundle.sizes import Sizes
from pid_runtime.bundle.source import PixelAxis, Rope1d, Rope2d, Table
from pid_runtime.tables import compute_table

TOLERANCE = 2e-6
"""A float32 angle of 16 is itself only good to 1e-6."""
GRIDS = [(1, 1), (1, 7), (9, 1), (2, 3), (64, 64), (128, 128), (112, 168), (256, 136), (7, 300)]
"""Rows and columns of patch tokens."""


def compute(table: Table, **sizes: int) -> NDArray[np.float32]:
    computed = compute_table(table, Sizes(sizes))
    assert computed.dtype == np.float32 and computed.flags.c_contiguous
    return computed


def assert_close(got: NDArray[np.float32], wanted: torch.Tensor) -> None:
    assert got.shape == tuple(wanted.shape)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize(("head_dim", "reference"), [(64, 64), (72, 128), (8, 64), (12, 128)])
def test_rope_2d(height: int, width: int, head_dim: int, reference: int) -> None:
    angles = rope_angles_2d(height, width, head_dim, reference)
    table = Rope2d("cos", head_dim, float(reference), 16.0, 1e4)
    sizes = {"Hs": height, "Ws": width}
    assert_close(compute(table, **sizes), angles.cos())
    assert_close(compute(replace(table, function="sin"), **sizes), angles.sin())


@pytest.mark.parametrize("length", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_1d(length: int, head_dim: int) -> None:
    angles = rope_angles_1d(length, head_dim)
    # The text's angles reach 300, where a float32 is itself only good to 2e-5.
    got = compute(Rope1d("cos", head_dim, 10000.0), T=length)
    assert got.shape == (length, head_dim // 2)
    np.testing.assert_allclose(got, angles.cos().numpy(), rtol=0, atol=2e-5)
    got = compute(Rope1d("sin", head_dim, 10000.0), T=length)
    np.testing.assert_allclose(got, angles.sin().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 1), (32, 8)])
@pytest.mark.parametrize(("size", "patch_size"), [(16, 16), (4, 16), (8, 4)])
def test_pixel_axes_are_the_halves_of_the_pixel_position(
    height: int, width: int, size: int, patch_size: int
) -> None:
    positions = pixel_positions(height * patch_size, width * patch_size, size)
    patches = patchify(positions.permute(2, 0, 1)[None], patch_size)[0]
    wanted = patches.unflatten(1, (patch_size, patch_size)).float()  # (L, P, P, size)
    sizes = {"Hs": height, "Ws": width}
    columns = compute(PixelAxis("column", size, patch_size, 1e4), **sizes)
    rows = compute(PixelAxis("row", size, patch_size, 1e4), **sizes)
    for k in range(patch_size):  # a column is the same in every row of a patch, and the other way
        assert_close(columns, wanted[:, k, :, : size // 2])
        assert_close(rows, wanted[:, :, k, size // 2 :])
