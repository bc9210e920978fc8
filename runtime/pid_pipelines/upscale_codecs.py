"""What makes latents of photos: a space's autoencoder, or the codec that a bundle says."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_graphs import OnnxVae, is_exported
from pid_pipelines.vae_tiles import TiledVae, VaeTile, check_vae_tile
from pid_pipelines.vaes import AUTOENCODERS, Codec
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.nano import codec
from pid_runtime.nano.block_dct import LATENT_PIXEL

Floats = NDArray[np.float32]


class BundleCodec:
    """The codec of a bundle of space nano, which needs neither weights nor torch."""

    decodes = True

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def encode(self, image: Floats) -> Floats:
        return codec.encode(self._manifest, image)

    def decode(self, latent: Floats) -> Floats:
        return codec.native_decode(self._manifest, latent)

    def close(self) -> None:
        """Nothing is held."""


def pixels_per_latent(manifest: Manifest) -> int:
    """Of which the sides of a picture to encode are multiples.

    Raises `PipelineInputError` for a bundle whose latents cannot be made here.
    """
    if manifest.codec is not None:
        return LATENT_PIXEL
    space = manifest.model.get("space")
    if space in AUTOENCODERS:
        return AUTOENCODERS[str(space)].down
    got = "one that names no latent space" if space is None else f"one of {space}"
    raise PipelineInputError(
        f"expected a bundle of {', '.join(AUTOENCODERS)} or nano, whose encoders are known here, "
        f"but got {got}; encode with its own, and give the latents to pid-decode"
    )


def side_of(manifest: Manifest) -> int | None:
    """Of the squares that are all a bundle's encoder takes, in pixels; None for any picture."""
    spec = AUTOENCODERS.get(str(manifest.model.get("space")))
    return None if manifest.codec is not None or spec is None else spec.side


def check_baseline(manifest: Manifest) -> None:
    """Raise `PipelineInputError` for a bundle whose space has no other decoder here."""
    space = str(manifest.model.get("space"))
    if manifest.codec is None and not AUTOENCODERS[space].decodes:
        raise PipelineInputError(
            f"expected no --baseline with a bundle of {space}, since only the encoder of that "
            "space's autoencoder is known here, but got it; drop it"
        )


def check_tile(manifest: Manifest, tile: VaeTile) -> None:
    """Raise `PipelineInputError` for tiles that the encoder of a bundle does not take."""
    if tile is None:
        return
    if manifest.codec is not None or side_of(manifest) is not None:
        why = (
            "it has a codec of its own"
            if manifest.codec is not None
            else "its encoder takes squares of one size alone"
        )
        raise PipelineInputError(
            f"expected no --vae-tile with this bundle, since {why}, but got one; drop it"
        )
    check_vae_tile(tile, pixels_per_latent(manifest))


def open_codec(
    manifest: Manifest, vae: str | Path | None, device: str, tile: VaeTile = None
) -> Codec:
    """What encodes photos for a bundle; vae and device as of `load_vae`, or vae the folder of
    one that pid-export made graphs of.

    tile: of what it is to run at a time. Raises `PipelineInputError` for an autoencoder that does
    not belong to the bundle, or for tiles that it does not take.
    """
    check_tile(manifest, tile)
    if manifest.codec is not None:
        if vae is not None:
            raise PipelineInputError(
                f"expected no --vae, since this bundle has a codec of its own, but got {vae}; "
                "drop it"
            )
        return BundleCodec(manifest)
    space = str(manifest.model["space"])
    if vae is not None and is_exported(vae):
        loaded = OnnxVae(Path(vae).expanduser(), space, device)
    else:
        from pid_pipelines.vae_model import load_vae

        loaded = load_vae(space, vae, device)
    return loaded if side_of(manifest) is not None else TiledVae(loaded, tile)
