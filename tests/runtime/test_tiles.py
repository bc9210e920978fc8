"""How pictures are cut: where tiles lie, what they weigh, and which are chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import PidRuntimeError
from pid_runtime.tiles import DEFAULT_OVERLAP, Axis, automatic, cut, described, tiling_of

SIDE = 32
"""Pixels of the result per pixel of the latent, of the golden bundle as of PiD."""


@pytest.fixture(scope="module")
def manifest(golden_bundle: Path) -> Manifest:
    """Its largest bucket holds 1024 tokens: 16 x 16 pixels of the latent."""
    return read_manifest(golden_bundle, verify=False)


def trained(manifest: Manifest, variant: str, *sizes: tuple[int, int]) -> Manifest:
    model = {**manifest.model, "variant": variant, "trained_sizes": [list(size) for size in sizes]}
    return replace(manifest, model=model)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_weights_of_any_axis_sum_to_one(size: int, tile: int, data: st.DataObject) -> None:
    tile = min(tile, size)
    overlap = data.draw(st.integers(0, (tile - 1) // 2))
    scale = data.draw(st.sampled_from([1, 3, 32]))
    axis = cut(size, tile, overlap)
    total = np.zeros(size * scale, np.float32)
    for index, start in enumerate(axis.starts):
        weights = axis.weights(index, scale)
        assert weights.dtype == np.float32 and weights.min() >= 0
        total[start * scale : (start + tile) * scale] += weights
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_tiles_cover_an_axis_and_overlap_as_asked(
    size: int, tile: int, data: st.DataObject
) -> None:
    tile = min(tile, size)
    overlap = data.draw(st.integers(0, (tile - 1) // 2))
    axis = cut(size, tile, overlap)
    assert axis.starts[0] == 0 and axis.starts[-1] == size - tile
    apart = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(0 < each <= tile - overlap for each in apart)
    fewer = len(axis.starts) - 1
    assert fewer == 0 or fewer * (tile - overlap) + overlap < size  # no tile too many


def test_weights_fall_in_a_line_over_the_overlap() -> None:
    axis = Axis(12, 8, (0, 4))
    np.testing.assert_allclose(axis.weights(0, 1), [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(axis.weights(1, 1), [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])


def test_four_tiles_of_2176_make_4096(manifest: Manifest) -> None:
    large = replace(manifest, buckets={"2k": replace(manifest.buckets["small"], max_tokens=18_816)})
    tiling = tiling_of(large, 128, 128, (2176, 2176), 256)
    assert tiling is not None and tiling.count == 4 and tiling.latent == (68, 68)
    assert tiling.rows.starts == tiling.columns.starts == (0, 60)
    assert described(tiling, SIDE) == "4 tiles of 2176x2176, overlapping by 256 pixels or more"


def test_one_tile_as_large_as_the_picture_is_no_tile(manifest: Manifest) -> None:
    assert tiling_of(manifest, 8, 6, (6 * SIDE, 8 * SIDE)) is None


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        ((9 * SIDE, SIDE), None, "no larger than the picture, 256x256, but got 288x32"),
        ((100, 64), None, "width and height in multiples of 32 pixels"),
        ((64,), None, "as auto, or width and height"),
        ((0, 64), None, "as auto, or width and height"),
        ((64.0, 64.0), None, "as auto, or width and height"),
        ("large", None, "as auto, or width and height"),
        (512, None, "as auto, or width and height"),
        ((64, 64), 32, "an overlap below half of the tile, 64x64, but got 32"),
        ((128, 128), None, "an overlap below half of the tile, 128x128, but got 256"),
        ((128, 128), 20, "an overlap in multiples of 32 pixels"),
        ((128, 128), -32, "an overlap in multiples of 32 pixels"),
        ((128, 128), True, "an overlap in multiples of 32 pixels"),
        ((128, 128), "64", "an overlap in multiples of 32 pixels"),
        (None, 32, "a tile with the overlap"),
    ],
)
def test_tiles_that_cannot_be_are_refused(
    manifest: Manifest, tile: Any, overlap: Any, message: str
) -> None:
    with pytest.raises(PidRuntimeError, match=message):
        tiling_of(manifest, 8, 8, tile, overlap)


def test_a_tile_that_no_bucket_holds_is_refused(manifest: Manifest) -> None:
    with pytest.raises(PidRuntimeError, match=r"at most 0\.262 megapixels, .* got 640x640"):
        tiling_of(manifest, 40, 40, (640, 640))


def test_a_picture_beyond_16384_pixels_is_refused(manifest: Manifest) -> None:
    assert tiling_of(manifest, 512, 512, "auto", 64) is not None
    with pytest.raises(PidRuntimeError, match="sides of at most 16384 pixels, but got 16416x32"):
        tiling_of(manifest, 1, 513, "auto")


def test_auto_decodes_whole_what_a_bucket_holds(manifest: Manifest) -> None:
    assert tiling_of(manifest, 16, 16, "auto") is None


@pytest.mark.parametrize(
    ("height", "width"), [(17, 16), (40, 40), (16, 200), (511, 30), (512, 512)]
)
def test_auto_cuts_what_no_bucket_holds(manifest: Manifest, height: int, width: int) -> None:
    overlap = 3
    tiling = tiling_of(manifest, height, width, "auto", overlap * SIDE)
    assert tiling is not None and tiling.reason == "no bucket holds the whole picture"
    rows, columns = tiling.latent
    assert 4 * rows * columns <= 1024
    assert rows == height or rows > 2 * overlap
    assert columns == width or columns > 2 * overlap
    one = replace(tiling, columns=cut(width, min(columns + 1, width), overlap))
    assert 4 * rows * (columns + 1) > 1024 or one.count * (columns + 1) >= tiling.count * columns


def test_auto_takes_trained_sizes_for_pictures_beyond_training(manifest: Manifest) -> None:
    wide = replace(manifest, buckets={"4k": replace(manifest.buckets["small"], max_tokens=65_536)})
    known = trained(wide, "2k", (2048, 2048), (2688, 1536), (1536, 2688), (2304, 1728))
    assert tiling_of(known, 64, 64, "auto") is None
    assert tiling_of(known, 32, 32, "auto") is None  # tiles could not make it larger
    tiling = tiling_of(known, 128, 128, "auto")
    assert tiling is not None
    assert tiling.reason == "the picture is larger than the decoder was trained for"
    rows, columns = tiling.latent
    assert (columns * SIDE, rows * SIDE) in [tuple(s) for s in known.model["trained_sizes"]]
    # What the release itself shows is left whole.
    assert tiling_of(trained(wide, "2kto4k", (3584, 3584)), 128, 128, "auto") is None


def test_auto_says_when_there_is_no_such_tile(manifest: Manifest) -> None:
    with pytest.raises(PidRuntimeError, match="with an overlap of 512 pixels, but there are none"):
        automatic(manifest, 400, 400, 16, "memory is short", 1024)
    with pytest.raises(PidRuntimeError, match="but there are none"):
        automatic(manifest, 1, 1, 0, "memory is short", 0)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (1, 7), (2, 2), (9, 11), (13, 13), (5, 30)])
@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
def test_auto_finds_the_cheapest_tile_of_all(
    manifest: Manifest, height: int, width: int, overlap: int
) -> None:
    def cost(rows: int, columns: int) -> int:
        down, across = cut(height, rows, overlap), cut(width, columns, overlap)
        return rows * len(down.starts) * columns * len(across.starts)

    def good(tile: int, size: int) -> bool:
        return tile == size or tile > 2 * overlap

    for most in (1, 2, 3, 12, 40):
        costs = [
            cost(rows, columns)
            for rows in range(1, height + 1)
            for columns in range(1, width + 1)
            if rows * columns <= most and good(rows, height) and good(columns, width)
        ]
        if not costs:
            with pytest.raises(PidRuntimeError, match="but there are none"):
                automatic(manifest, height, width, overlap, "memory is short", 4 * most)
            continue
        rows, columns = automatic(manifest, height, width, overlap, "", 4 * most).latent
        assert rows * columns <= most and cost(rows, columns) == min(costs)


def test_of_tiles_that_cost_the_same_auto_takes_the_squarest(manifest: Manifest) -> None:
    assert automatic(manifest, 4, 4, 0, "memory is short", 16).latent == (2, 2)


def test_the_default_overlap_is_of_eight_latent_pixels(manifest: Manifest) -> None:
    large = replace(manifest, buckets={"2k": replace(manifest.buckets["small"], max_tokens=18_816)})
    tiling = tiling_of(large, 60, 60, (20 * SIDE, 20 * SIDE))
    assert tiling is not None and tiling.overlap == DEFAULT_OVERLAP == 8
