"""The autoencoders of latent spaces, as data: their classes, and their released sizes."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_ref.registry import SPACES

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Vae:
    """An autoencoder: its class, of diffusers if not said otherwise, and its dimensions."""

    kind: str
    """The class."""
    down: int
    """Pixels per latent pixel, along each axis."""
    channels: int
    """Channels of the latent as the space has it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the class's defaults."""
    factor: tuple[float, ...] | None = (1.0,)
    """With `shift`: a normalised latent is factor * (z - shift); of all channels, or of each.
    None where the statistics are part of the model: those of FLUX.2's batch normalisation."""
    shift: tuple[float, ...] | None = (0.0,)
    """See `factor`."""
    file: str = ""
    """Where NVIDIA keeps its weights, beside the decoders': a file, or the folder of one."""
    repository: str | None = None
    """Where its authors keep it as diffusers saves it; of one that is not read from `file`."""
    side: int | None = None
    """Of the squares that are all it takes, in pixels; None where any picture will do."""
    decodes: bool = True
    """Whether its decoder is read too."""


class Codec(Protocol):
    """Images `[B, 3, H, W]` in [-1, 1] to normalised latents `[B, C, h, w]`, and back."""

    @property
    def decodes(self) -> bool:
        """Whether `decode` can be called."""
        ...

    def encode(self, image: Floats) -> Floats: ...

    def decode(self, latent: Floats) -> Floats: ...

    def close(self) -> None:
        """Give its memory back."""
        ...


def _vae(kind: str, space: str, file: str, **config: Any) -> Vae:
    """The autoencoder of a latent space, by whose rule latents are normalised."""
    spec = SPACES[space]
    return Vae(kind, spec.down, spec.channels, config, spec.factor, spec.shift, file)


def blocks(latent_channels: int, *channels: int) -> dict[str, Any]:
    """The layout of Stable Diffusion's autoencoder, and of its descendants'."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 2,
        "latent_channels": latent_channels,
    }


_LATER = {**blocks(16, 128, 256, 512, 512), "use_quant_conv": False, "use_post_quant_conv": False}

VAES = {
    "flux": _vae("AutoencoderKL", "flux", "checkpoints/ae.safetensors", **_LATER),
    "flux2": _vae("AutoencoderKLFlux2", "flux2", "checkpoints/flux2_ae.safetensors"),
    "sd3": _vae("AutoencoderKL", "sd3", "checkpoints/sd3_vae", **_LATER),
    "sdxl": _vae(
        "AutoencoderKL",
        "sdxl",
        "checkpoints/sdxl_vae.safetensors",
        **blocks(4, 128, 256, 512, 512),
    ),
    "qwenimage": _vae("AutoencoderKLQwenImage", "qwenimage", "checkpoints/QwenImage_VAE_2d.pth"),
}
"""By latent space of the generators of diffusers."""

RAES = {
    "dinov2": Vae(
        "AutoencoderRAE",
        16,
        768,
        {"encoder_type": "dinov2", "encoder_input_size": 448, "encoder_patch_size": 14},
        repository="nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
        side=512,
    ),
    "siglip": Vae(
        "SiglipVisionModel",
        16,
        1152,
        {"hidden_size": 1152, "image_size": 224, "patch_size": 14},
        repository="google/siglip2-so400m-patch14-224",
        side=256,
        decodes=False,
    ),
}
"""Representation autoencoders, by latent space. Their statistics are in the model.

Of Scale-RAE (`siglip`) the encoder alone, a class of transformers.
"""

AUTOENCODERS: Mapping[str, Vae] = ChainMap(VAES, RAES)
"""All of them."""


def spec_of(space: str) -> Vae:
    """The autoencoder of a space. Raises `PipelineInputError` for a space without one."""
    spec = AUTOENCODERS.get(space)
    if spec is not None:
        return spec
    raise PipelineInputError(
        f"expected a latent space with an autoencoder here ({', '.join(AUTOENCODERS)}), but got "
        f"{space!r}; take a bundle of one of these"
    )


def check_image(image: NDArray[np.float32], down: int, side: int | None = None) -> None:
    """Raise `PipelineInputError` unless images are `[B, 3, H, W]` with multiples of `down`.

    side: what H and W have to be; None for any multiple.
    """
    if side is not None and image.shape[1:] != (3, side, side):
        raise PipelineInputError(
            f"expected images [B, 3, {side}, {side}], but got {list(image.shape)}; resize them"
        )
    if image.ndim != 4 or image.shape[1] != 3 or any(side % down for side in image.shape[2:]):
        raise PipelineInputError(
            f"expected images [B, 3, H, W] with H and W multiples of {down}, but got "
            f"{list(image.shape)}; crop or pad them"
        )


def check_decodes(spec: Vae) -> None:
    """Raise `PipelineInputError` for an autoencoder of which only the encoder is known here."""
    if not spec.decodes:
        raise PipelineInputError(
            f"expected an autoencoder with a decoder, but {spec.kind} encodes alone; decode with "
            "PiD"
        )


def check_latent(latent: NDArray[np.float32], channels: int) -> None:
    """Raise `PipelineInputError` unless latents are `[B, channels, h, w]`."""
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise PipelineInputError(
            f"expected latents [B, {channels}, h, w], but got {list(latent.shape)}"
        )
