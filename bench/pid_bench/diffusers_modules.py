"""The modules of cascades that come from diffusers, in their released sizes.

Sizes are facts about the released models, held by the parameter counts in the tests. Weights are
random: only time, memory and finiteness mean anything. Diffusers is imported when first needed.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_bench.errors import BenchInputError
from pid_ref.registry import SPACES


def diffusers() -> Any:
    """The package; raises `BenchInputError` where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BenchInputError(
            f"expected diffusers, which the cascades' models come from, but got: {error}; "
            "pip install 'pid-trt[bench]'"
        ) from None


@dataclass(frozen=True)
class Vae:
    """An autoencoder: its class in diffusers and its dimensions."""

    kind: str
    """The class."""
    down: int
    """Pixels per latent pixel, along each axis."""
    channels: int
    """Channels of the latent as the space has it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the class's defaults."""
    factor: tuple[float, ...] = (1.0,)
    """With `shift`: a normalised latent is factor * (z - shift); of all channels, or of each."""
    shift: tuple[float, ...] = (0.0,)
    """See `factor`."""


def _vae(kind: str, space: str, **config: Any) -> Vae:
    """The autoencoder of a latent space, by whose rule latents are normalised."""
    spec = SPACES[space]
    return Vae(kind, spec.down, spec.channels, config, spec.factor or (1.0,), spec.shift or (0.0,))


def _blocks(latent_channels: int, *channels: int) -> dict[str, Any]:
    """The layout of Stable Diffusion's autoencoder, and of its descendants'."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 2,
        "latent_channels": latent_channels,
    }


_LATER = {**_blocks(16, 128, 256, 512, 512), "use_quant_conv": False, "use_post_quant_conv": False}

VAES = {
    "flux": _vae("AutoencoderKL", "flux", **_LATER),
    "flux2": _vae("AutoencoderKLFlux2", "flux2"),
    "sd3": _vae("AutoencoderKL", "sd3", **_LATER),
    "sdxl": _vae("AutoencoderKL", "sdxl", **_blocks(4, 128, 256, 512, 512)),
    "qwenimage": _vae("AutoencoderKLQwenImage", "qwenimage"),
}
"""By latent space; the autoencoders of other spaces are not in diffusers."""

UPSCALER_VAE = Vae("AutoencoderKL", 4, 4, _blocks(4, 128, 256, 512), factor=(0.08333,))
"""Of Stable Diffusion x4 upscaler."""


class _Autoencoder(nn.Module):
    """What decoder and encoder share: the model, and how its latents are normalised."""

    factor: Tensor
    shift: Tensor

    def __init__(self, spec: Vae) -> None:
        super().__init__()
        self.kind, self.vae = spec.kind, getattr(diffusers(), spec.kind)(**spec.config)
        for name, values in (("factor", spec.factor), ("shift", spec.shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])


class VaeDecode(_Autoencoder):
    """Normalised latents `[B, C, h, w]` to images `[B, 3, H, W]`, about [-1, 1]."""

    def __init__(self, spec: Vae) -> None:
        super().__init__(spec)
        self.vae.encoder, self.vae.quant_conv = nn.Identity(), None

    def forward(self, latent: Tensor) -> Tensor:
        z = latent / self.factor + self.shift
        if self.kind == "AutoencoderKLQwenImage":  # a video's, with a time axis
            return self.vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0]
        if self.kind == "AutoencoderKLFlux2":
            norm = self.vae.bn
            std = torch.sqrt(norm.running_var + norm.eps)[:, None, None]
            z = F.pixel_shuffle(z * std + norm.running_mean[:, None, None], 2)
        return self.vae.decode(z, return_dict=False)[0]


class VaeEncode(_Autoencoder):
    """Images `[B, 3, H, W]` in [-1, 1] to normalised latents `[B, C, h, w]`: the means."""

    def __init__(self, spec: Vae) -> None:
        super().__init__(spec)
        self.vae.decoder, self.vae.post_quant_conv = nn.Identity(), None

    def forward(self, image: Tensor) -> Tensor:
        mean = self.vae.encode(image, return_dict=False)[0].mode()
        return (mean - self.shift) * self.factor


class Sd3Velocity(nn.Module):
    """Stable Diffusion 3 medium's transformer: velocity of latents `[B, 16, h, w]`."""

    LAYERS = 24
    CAPTION = (333, 4096)
    """Tokens and width of a caption embedding: 77 of CLIP, 256 of T5."""
    POOLED = 2048
    """Width of a pooled caption embedding."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.transformer = diffusers().SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=24,
            caption_projection_dim=1536,
            joint_attention_dim=self.CAPTION[1],
            pooled_projection_dim=self.POOLED,
            pos_embed_max_size=192,
        )

    def forward(self, latent: Tensor, timestep: Tensor, caption: Tensor, pooled: Tensor) -> Tensor:
        """`timestep` `[B]` in [0, 1000], `caption` `[B, 333, 4096]`, `pooled` `[B, 2048]`."""
        return self.transformer(latent, caption, pooled, timestep, return_dict=False)[0]


class UpscalerVelocity(nn.Module):
    """Stable Diffusion x4 upscaler's UNet: velocity of latents `[B, 4, h, w]`."""

    LAYERS = 2
    """Residual blocks at every resolution."""
    CAPTION = (77, 1024)
    """Tokens and width of a caption embedding."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.unet = diffusers().UNet2DConditionModel(
            in_channels=7,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            only_cross_attention=(True, True, True, False),
            block_out_channels=(256, 512, 512, 1024),
            layers_per_block=layers,
            cross_attention_dim=self.CAPTION[1],
            num_class_embeds=1000,
            use_linear_projection=True,
        )

    def forward(
        self, latent: Tensor, image: Tensor, timestep: Tensor, level: Tensor, caption: Tensor
    ) -> Tensor:
        """`image` `[B, 3, h, w]`: the small image; `level` `[B]`: its noise level, an integer."""
        x = torch.cat([latent, image], dim=1)
        return self.unet(x, timestep, caption, class_labels=level, return_dict=False)[0]
