"""Position tables against the reference network's own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pid_ref.network import patchify, pixel_positions, rope_angles_1d, rope_angles_2d
from pid_runtime.bundle.sizes import Sizes
from pid_runtime.errors import PidRuntimeError
from pid_runtime.tables import TABLES, compute_table

TOLERANCE = 2e-6
"""A float32 angle of 16 is itself only good to 1e-6."""
GRIDS = [(1, 1), (1, 7), (9, 1), (2, 3), (64, 64), (128, 128), (112, 168), (256, 136), (7, 300)]
"""Rows and columns of patch tokens."""


def table(source: Mapping[str, Any], **sizes: int) -> NDArray[np.float32]:
    computed = compute_table(dict(source), Sizes(sizes))
    assert computed.dtype == np.float32 and computed.flags.c_contiguous
    return computed


def assert_close(got: NDArray[np.float32], wanted: torch.Tensor) -> None:
    assert got.shape == tuple(wanted.shape)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize(("head_dim", "reference"), [(64, 64), (72, 128), (8, 64), (12, 128)])
def test_rope_2d(height: int, width: int, head_dim: int, reference: int) -> None:
    angles = rope_angles_2d(height, width, head_dim, reference)
    options = {"head_dim": head_dim, "reference": float(reference), "extent": 16.0, "theta": 1e4}
    sizes = {"Hs": height, "Ws": width}
    assert_close(table({"table": "rope_2d_cos", **options}, **sizes), angles.cos())
    assert_close(table({"table": "rope_2d_sin", **options}, **sizes), angles.sin())


@pytest.mark.parametrize("length", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_1d(length: int, head_dim: int) -> None:
    angles = rope_angles_1d(length, head_dim)
    options = {"head_dim": head_dim, "theta": 10000.0}
    # The text's angles reach 300, where a float32 is itself only good to 2e-5.
    got = table({"table": "rope_1d_cos", **options}, T=length)
    assert got.shape == (length, head_dim // 2)
    np.testing.assert_allclose(got, angles.cos().numpy(), rtol=0, atol=2e-5)
    got = table({"table": "rope_1d_sin", **options}, T=length)
    np.testing.assert_allclose(got, angles.sin().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 1), (32, 8)])
@pytest.mark.parametrize(("size", "patch_size"), [(16, 16), (4, 16), (8, 4)])
def test_pixel_axes_are_the_halves_of_the_pixel_position(
    height: int, width: int, size: int, patch_size: int
) -> None:
    positions = pixel_positions(height * patch_size, width * patch_size, size)
    patches = patchify(positions.permute(2, 0, 1)[None], patch_size)[0]
    wanted = patches.unflatten(1, (patch_size, patch_size)).float()  # (L, P, P, size)
    options = {"table": "pixel_axis", "size": size, "patch_size": patch_size, "theta": 1e4}
    sizes = {"Hs": height, "Ws": width}
    columns = table({**options, "axis": "column"}, **sizes)
    rows = table({**options, "axis": "row"}, **sizes)
    for k in range(patch_size):  # a column is the same in every row of a patch, and the other way
        assert_close(columns, wanted[:, k, :, : size // 2])
        assert_close(rows, wanted[:, :, k, size // 2 :])


def test_unknown_table() -> None:
    with pytest.raises(PidRuntimeError, match="expected a table of"):
        compute_table({"table": "rope_3d_cos"}, Sizes({}))
    assert "rope_3d_cos" not in TABLES
