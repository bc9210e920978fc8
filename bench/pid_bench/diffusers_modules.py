"""The modules of cascades that come from diffusers, in their released sizes.

Sizes are facts about the released models, held by the parameter counts in the tests. Weights are
random: only time, memory and finiteness mean anything. Diffusers is imported when first needed.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from pid_bench.errors import BenchInputError
from pid_pipelines.vae_model import decode_raw, encode_mean, normalization
from pid_pipelines.vaes import Vae, blocks


def diffusers() -> Any:
    """The package; raises `BenchInputError` where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BenchInputError(
            f"expected diffusers, which the cascades' models come from, but got: {error}; "
            "pip install 'pid-trt[bench]'"
        ) from None


UPSCALER_VAE = Vae("AutoencoderKL", 4, 4, blocks(4, 128, 256, 512), factor=(0.08333,))
"""Of Stable Diffusion x4 upscaler."""


class _Autoencoder(nn.Module):
    """What decoder and encoder share: the model, and how its latents are normalised."""

    factor: Tensor
    shift: Tensor

    def __init__(self, spec: Vae) -> None:
        super().__init__()
        self.kind, self.vae = spec.kind, getattr(diffusers(), spec.kind)(**spec.config)
        factor, shift = normalization(spec, self.vae)
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)


class VaeDecode(_Autoencoder):
    """Normalised latents `[B, C, h, w]` to images `[B, 3, H, W]`, about [-1, 1]."""

    def __init__(self, spec: Vae) -> None:
        super().__init__(spec)
        self.vae.encoder, self.vae.quant_conv = nn.Identity(), None

    def forward(self, latent: Tensor) -> Tensor:
        return decode_raw(self.kind, self.vae, latent / self.factor + self.shift)


class VaeEncode(_Autoencoder):
    """Images `[B, 3, H, W]` in [-1, 1] to normalised latents `[B, C, h, w]`: the means."""

    def __init__(self, spec: Vae) -> None:
        super().__init__(spec)
        self.vae.decoder, self.vae.post_quant_conv = nn.Identity(), None

    def forward(self, image: Tensor) -> Tensor:
        return (encode_mean(self.kind, self.vae, image) - self.shift) * self.factor


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
