"""Autoencoders in tiles: of one that looks at blocks alone nothing may change."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes.autoencoders import small_model, small_spec
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_model import LoadedVae
from pid_pipelines.vae_tiles import AUTO, Autoencoder, TiledVae, VaeTile
from pid_pipelines.vaes import Codec

Floats = NDArray[np.float32]
DOWN = 8


class Blocks:
    """Encodes each block of 8x8 pixels by itself, as its mean, and the other way."""

    down, decodes = DOWN, True

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.is_open = True

    def encode(self, image: Floats) -> Floats:
        self.seen.append(image.shape)
        blocks = image.reshape(*image.shape[:2], image.shape[2] // DOWN, DOWN, -1, DOWN)
        return blocks.mean((3, 5))

    def decode(self, latent: Floats) -> Floats:
        self.seen.append(latent.shape)
        return latent.repeat(DOWN, 2).repeat(DOWN, 3)

    def close(self) -> None:
        self.is_open = False


def picture(height: int, width: int, batch: int = 1) -> Floats:
    return np.random.default_rng(0).uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("tile", "shape", "tiles"),
    [
        ((64, 64), (1, 160, 120), (64, 64)),
        ((64, 96), (2, 96, 128), (96, 64)),
        ((512, 64), (1, 80, 104), (64, 104)),  # no wider than the picture
    ],
)
def test_tiles_of_one_size_change_nothing(
    tile: VaeTile, shape: tuple[int, int, int], tiles: tuple[int, int]
) -> None:
    assert tile is not None
    batch, height, width = shape
    blocks, image = Blocks(), picture(height, width, batch)
    vae: Codec = TiledVae(blocks, tile)
    latent = vae.encode(image)
    assert set(blocks.seen) == {(batch, 3, *tiles)} and len(blocks.seen) > 1
    np.testing.assert_allclose(latent, Blocks().encode(image), atol=1e-6)
    blocks.seen.clear()
    back = vae.decode(latent)
    assert set(blocks.seen) == {(batch, 3, *(side // DOWN for side in tiles))}
    np.testing.assert_allclose(back, Blocks().decode(latent), atol=1e-6)
    assert vae.decodes
    vae.close()
    assert not blocks.is_open


def test_neighbours_share_a_quarter_and_fade() -> None:
    class Numbered(Blocks):
        def encode(self, image: Floats) -> Floats:
            self.seen.append(image.shape)
            return np.full((1, 4, 8, 8), len(self.seen), np.float32)

    found = TiledVae(Numbered(), (64, 64)).encode(picture(64, 112))
    np.testing.assert_allclose(
        found[0, 0, 3], [1, 1, 1, 1, 1, 1, 1.25, 1.75, 2, 2, 2, 2, 2, 2], atol=1e-6
    )


def test_auto_takes_tiles_of_larger_pictures_alone() -> None:
    blocks = Blocks()
    vae = TiledVae(blocks, "auto")
    vae.encode(picture(512, 2 * AUTO))
    vae.encode(picture(AUTO, AUTO))
    assert [shape[2:] for shape in blocks.seen] == [(512, 2 * AUTO), (AUTO, AUTO)]
    blocks.seen.clear()
    vae.encode(picture(1032, AUTO))
    assert [shape[2:] for shape in blocks.seen] == [(AUTO, AUTO)] * 2


def test_a_tile_is_encoded_as_a_picture_of_its_own() -> None:
    image = picture(64, 112)
    with LoadedVae(small_spec("flux"), small_model("flux"), "cpu") as vae:
        latent = TiledVae(vae, (64, 64)).encode(image)
        left, right = vae.encode(image[..., :64]), vae.encode(image[..., 48:])
    assert latent.shape == (1, 16, 8, 14)
    np.testing.assert_array_equal(latent[..., :6], left[..., :6])
    np.testing.assert_array_equal(latent[..., 8:], right[..., 2:])
    blend = 0.75 * left[..., 6] + 0.25 * right[..., 0]
    np.testing.assert_allclose(latent[..., 6], blend, atol=1e-6)


@pytest.mark.parametrize("tile", [(100, 64), (64, 56), (0, 64)])
def test_tiles_that_cannot_be(tile: tuple[int, int]) -> None:
    blocks: Autoencoder = Blocks()
    with pytest.raises(PipelineInputError, match=r"multiples of 8 pixels from 64 on, but got \d+x"):
        TiledVae(blocks, tile)
