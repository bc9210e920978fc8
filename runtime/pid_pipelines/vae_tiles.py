"""Large pictures through an autoencoder: in tiles of one size, blended by weights that sum to one.

An autoencoder's memory grows with a picture, and that of its attention with the square of it. A
tile is encoded, or decoded, as a picture of its own, so what the autoencoder takes of a whole
picture (its norms, its attention) it takes of a tile.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vaes import Codec
from pid_runtime.tiles import Axis, cut

Floats = NDArray[np.float32]

VaeTile = tuple[int, int] | Literal["auto"] | None
"""Width and height in pixels of the photograph; "auto" or None for `AUTO` where it is larger."""

AUTO = 1024
"""Side of a tile, in pixels: what the autoencoders were trained at, or more."""

LEAST = 8
"""Side of a tile, in pixels of the latent."""

OVERLAP = 4
"""Of a tile's side this part is at least shared with its neighbour, as in diffusers."""


class Autoencoder(Codec, Protocol):
    """What is run tile by tile."""

    down: int
    """Pixels per pixel of the latent, along each axis."""


class TiledVae:
    """An autoencoder that takes pictures tile by tile."""

    def __init__(self, vae: Autoencoder, tile: VaeTile = None) -> None:
        """Raises `PipelineInputError` for a tile that `check_vae_tile` refuses."""
        check_vae_tile(tile, vae.down)
        self._vae, self._tile, self._down = vae, tile, vae.down

    @property
    def decodes(self) -> bool:
        """Whether `decode` can be called."""
        return self._vae.decodes

    def encode(self, image: Floats) -> Floats:
        """Normalised latents of images, as of the autoencoder."""
        height, width = (side // self._down for side in image.shape[2:])
        return self._run(self._vae.encode, image, height, width, self._down, 1)

    def decode(self, latent: Floats) -> Floats:
        """Images of normalised latents, as of the autoencoder."""
        height, width = latent.shape[2:]
        return self._run(self._vae.decode, latent, height, width, 1, self._down)

    def close(self) -> None:
        """Give the autoencoder's memory back."""
        self._vae.close()

    def _run(
        self,
        run: Callable[[Floats], Floats],
        values: Floats,
        height: int,
        width: int,
        given: int,
        made: int,
    ) -> Floats:
        """height, width: of the latent. given, made: places per latent pixel of values, results."""
        tile = self._tile
        if not isinstance(tile, tuple):
            if height * width * self._down**2 <= AUTO**2:
                return run(values)
            tile = (AUTO, AUTO)
        across, down = tile
        columns, rows = self._axis(width, across), self._axis(height, down)
        if len(rows.starts) == len(columns.starts) == 1:
            return run(values)
        found: Floats | None = None
        for down in range(len(rows.starts)):
            for across in range(len(columns.starts)):
                part = values[:, :, _places(rows, down, given), _places(columns, across, given)]
                result = run(np.ascontiguousarray(part))
                if found is None:
                    shape = (*result.shape[:2], height * made, width * made)
                    found = np.zeros(shape, np.float32)
                weights = rows.weights(down, made)[:, None] * columns.weights(across, made)
                found[:, :, _places(rows, down, made), _places(columns, across, made)] += (
                    weights * result
                )
        assert found is not None
        return found

    def _axis(self, size: int, side: int) -> Axis:
        """size: of the latent. side: of a tile, in pixels of the picture."""
        tile = min(size, side // self._down)
        return cut(size, tile, tile // OVERLAP)


def check_vae_tile(tile: VaeTile, down: int) -> None:
    """Raise `PipelineInputError` unless a tile of a given size holds whole pixels of the latent.

    down: pixels per pixel of the latent.
    """
    if tile is None or tile == "auto":
        return
    if any(side % down or side < LEAST * down for side in tile):
        raise PipelineInputError(
            f"expected --vae-tile auto, or width and height in multiples of {down} pixels from "
            f"{LEAST * down} on, but got {tile[0]}x{tile[1]}; give for example {AUTO}x{AUTO}"
        )


def _places(axis: Axis, index: int, scale: int) -> slice:
    return slice(axis.starts[index] * scale, (axis.starts[index] + axis.tile) * scale)
