"""How a picture is cut into tiles: equal in size, overlapping, blended by weights that sum to one.

Every tile is run as an image of its own, within each step, on one state and one noise. All
lengths here are in pixels of the latent unless they say otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.advice import DEMONSTRATED, Size
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import PidRuntimeError

DEFAULT_OVERLAP = 8
"""Of neighbours, in pixels of the latent."""

LARGEST_SIDE = 16_384
"""Longest side of a picture that is decoded in tiles, in pixels of the result."""

TileOption = Literal["auto"] | Sequence[int] | None
"""None for the whole picture at once; "auto"; or width and height in pixels of the result."""


@dataclass(frozen=True)
class Axis:
    """The tiles along one axis."""

    size: int
    """Of the picture."""
    tile: int
    """Of every tile."""
    starts: tuple[int, ...]
    """Where each begins; the first at 0, the last where it ends with the picture."""

    def weights(self, index: int, scale: int) -> NDArray[np.float32]:
        """What tile `index` counts for at each of its places, float32 `[tile * scale]`.

        scale: places per pixel of the latent. Over all tiles the weights of a place sum to 1.
        Weights rise from a tile's edge over the overlap with its neighbour, in a line.
        """
        places = (np.arange(self.tile * scale) + 0.5) / scale + self.starts[index]
        here = self.starts[index]
        near = [i for i, start in enumerate(self.starts) if abs(start - here) < self.tile]
        heights = sum(self._height(each, places) for each in near)
        return (self._height(index, places) / heights).astype(np.float32)

    def _height(self, index: int, places: NDArray[np.float64]) -> NDArray[np.float64]:
        begin = self.starts[index]
        height = ((places > begin) & (places < begin + self.tile)).astype(np.float64)
        if index > 0 and (overlap := self._overlap(index)):
            height *= np.clip((places - begin) / overlap, 0, 1)
        if index + 1 < len(self.starts) and (overlap := self._overlap(index + 1)):
            height *= np.clip((begin + self.tile - places) / overlap, 0, 1)
        return height

    def _overlap(self, index: int) -> int:
        """Of a tile with the one before."""
        return self.starts[index - 1] + self.tile - self.starts[index]


@dataclass(frozen=True)
class Tiling:
    """The tiles of a picture."""

    rows: Axis
    columns: Axis
    overlap: int
    """The least of neighbours that was asked for."""
    reason: str
    """Why there are tiles, for people."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of a tile's latent."""
        return self.rows.tile, self.columns.tile


def pixels_per_latent_pixel(manifest: Manifest) -> int:
    """Pixels of the result per pixel of the latent, along each axis."""
    return manifest.tokens_per_latent * int(manifest.network["patch_size"])


def cut(size: int, tile: int, overlap: int) -> Axis:
    """As few tiles as cover an axis, spread evenly. `overlap` is below `tile`."""
    count = 1 if tile >= size else -(-(size - overlap) // (tile - overlap))
    gaps = max(count - 1, 1)
    return Axis(size, tile, tuple(index * (size - tile) // gaps for index in range(count)))


def tiling_of(
    manifest: Manifest, height: int, width: int, tile: TileOption, overlap: int | None = None
) -> Tiling | None:
    """The tiles of a decode of a latent `height` x `width`; None to decode it whole.

    tile, overlap: as of `Decoder.decode`. Raises `PidRuntimeError` for tiles that cannot be.
    """
    side = pixels_per_latent_pixel(manifest)
    apart = overlap_of(manifest, overlap)
    if tile is None:
        if overlap is not None:
            raise PidRuntimeError(
                "expected a tile with the overlap, but got none; give one, or auto"
            )
        return None
    if max(height, width) * side > LARGEST_SIDE:
        raise PidRuntimeError(
            f"expected sides of at most {LARGEST_SIDE} pixels, but got {side * width}x"
            f"{side * height}; decode a smaller latent"
        )
    if tile == "auto":
        reason = _need(manifest, height, width, side)
        return None if reason is None else automatic(manifest, height, width, apart, reason)
    columns, rows = _tile(tile, side)
    given = f"{columns * side}x{rows * side}"
    if rows > height or columns > width:
        raise PidRuntimeError(
            f"expected a tile no larger than the picture, {side * width}x{side * height}, but got "
            f"{given}; give a smaller one, or auto"
        )
    tokens = rows * columns * manifest.tokens_per_latent**2
    if tokens > manifest.most_tokens:
        raise PidRuntimeError(
            f"expected a tile of at most {manifest.megapixels(manifest.most_tokens)}, the largest "
            f"bucket of this bundle, but got {given}; give a smaller one, or auto"
        )
    for length, whole in ((rows, height), (columns, width)):
        if length < whole and 2 * apart >= length:
            raise PidRuntimeError(
                f"expected an overlap below half of the tile, {given}, but got {apart * side}; "
                "give a smaller overlap or a larger tile"
            )
    asked = Tiling(cut(height, rows, apart), cut(width, columns, apart), apart, "as asked for")
    return None if asked.count == 1 else asked


def automatic(
    manifest: Manifest,
    height: int,
    width: int,
    overlap: int,
    reason: str,
    most_tokens: int | None = None,
) -> Tiling:
    """The tiles that cost least: fewest tokens in all, then the largest tiles, then the squarest.

    Of sizes that the checkpoint was trained at, if it says, else of the picture cut evenly.
    most_tokens: of a tile, where buckets would hold more. Raises `PidRuntimeError` when there is
    no such tile.
    """
    per_latent = manifest.tokens_per_latent**2
    allowed = manifest.most_tokens if most_tokens is None else most_tokens
    most = min(allowed, manifest.most_tokens) // per_latent
    side = pixels_per_latent_pixel(manifest)
    trained = {
        (min(h // side, height), min(w // side, width))
        for w, h in _trained(manifest)
        if h % side == 0 and w % side == 0
    }
    for candidates in (trained, _even(height, width, overlap, most)):
        tilings = [
            Tiling(cut(height, rows, overlap), cut(width, columns, overlap), overlap, reason)
            for rows, columns in candidates
            if rows * columns <= most
            and (rows == height or 2 * overlap < rows)
            and (columns == width or 2 * overlap < columns)
        ]
        if tilings:
            return min(tilings, key=_cost)
    raise PidRuntimeError(
        f"expected tiles of at most {manifest.megapixels(most * per_latent)} with an overlap of "
        f"{overlap * side} pixels, but there are none; give a smaller overlap"
    )


def _cost(tiling: Tiling) -> tuple[int, int, int, int]:
    rows, columns = tiling.latent
    return tiling.count * rows * columns, tiling.count, max(rows, columns), rows


def _even(height: int, width: int, overlap: int, most: int) -> set[tuple[int, int]]:
    """Tiles of a picture cut into 1, 2, 3 .. along each axis."""

    def lengths(size: int) -> set[int]:
        counts = range(1, max(1, size // max(overlap, 1)) + 1)  # more would be all overlap
        return {-(-(size + (count - 1) * overlap) // count) for count in counts}

    across = lengths(width)
    return {(r, c) for r in lengths(height) for c in across if r * c <= most}


def _need(manifest: Manifest, height: int, width: int, side: int) -> str | None:
    """Why a picture has to be decoded in tiles; None if it has not."""
    if height * width * manifest.tokens_per_latent**2 > manifest.most_tokens:
        return "no bucket holds the whole picture"
    size = (width * side, height * side)
    largest = max((w * h for w, h in _trained(manifest)), default=None)
    is_4k = str(manifest.model.get("variant")).startswith("2kto4k")
    if largest is None or size[0] * size[1] <= largest or (is_4k and size in DEMONSTRATED):
        return None
    return "the picture is larger than the decoder was trained for"


def _trained(manifest: Manifest) -> list[Size]:
    return [(int(w), int(h)) for w, h in manifest.model.get("trained_sizes", ())]


def overlap_of(manifest: Manifest, overlap: Any) -> int:
    """An overlap as of `Decoder.decode`, in pixels of the latent. Raises `PidRuntimeError`."""
    side = pixels_per_latent_pixel(manifest)
    if overlap is None:
        return DEFAULT_OVERLAP
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0 or overlap % side:
        raise PidRuntimeError(
            f"expected an overlap in multiples of {side} pixels, but got {str(overlap)[:40]!r}; "
            f"{side} pixels are one of the latent"
        )
    return overlap // side


def _tile(tile: Any, side: int) -> tuple[int, int]:
    """Width and height of a tile, in pixels of the latent."""
    is_pair = isinstance(tile, Sequence) and not isinstance(tile, str) and len(tile) == 2
    lengths: list[Any] = list(tile) if is_pair else []
    good = all(type(length) is int and length > 0 and length % side == 0 for length in lengths)
    if not lengths or not good:
        got = "x".join(map(str, lengths)) or str(tile)
        raise PidRuntimeError(
            f"expected a tile as auto, or width and height in multiples of {side} pixels, but got "
            f"{got[:40]}; {side} pixels are one of the latent"
        )
    return lengths[0] // side, lengths[1] // side


def described(tiling: Tiling, side: int) -> str:
    """For people, such as "4 tiles of 2176x2176, overlapping by 256 pixels or more"."""
    rows, columns = tiling.latent
    least = math.inf
    for axis in (tiling.rows, tiling.columns):
        pairs = zip(axis.starts, axis.starts[1:], strict=False)
        least = min([least, *(first + axis.tile - second for first, second in pairs)])
    return (
        f"{tiling.count} tiles of {columns * side}x{rows * side}, overlapping by "
        f"{int(least) * side} pixels or more"
    )
