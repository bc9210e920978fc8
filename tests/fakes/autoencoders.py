"""Small autoencoders of the real classes, and their weights under the names of their authors."""

import re
from dataclasses import replace
from typing import Any

import diffusers
import torch
from transformers.models.siglip import SiglipConfig, SiglipModel

from pid_pipelines.vaes import RAES, VAES, Vae

SMALL_KL = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL = {
    "flux": SMALL_KL,
    "sd3": SMALL_KL,
    "sdxl": SMALL_KL,
    "flux2": SMALL_KL,
    "qwenimage": {"base_dim": 4},
}


def small_spec(space: str) -> Vae:
    """A space's autoencoder with fewer weights."""
    return replace(VAES[space], config={**VAES[space].config, **SMALL[space]})


def small_model(space: str) -> Any:
    """The same as a model with random weights, and statistics of the space."""
    spec = small_spec(space)
    torch.manual_seed(0)
    config = dict(spec.config)
    if spec.kind == "AutoencoderKL":
        assert spec.factor is not None and spec.shift is not None
        config |= {"scaling_factor": spec.factor[0], "shift_factor": spec.shift[0]}
    model = getattr(diffusers, spec.kind)(**config).eval()
    if space == "flux2":
        torch.nn.init.uniform_(model.bn.running_mean, -0.5, 0.5)
        torch.nn.init.uniform_(model.bn.running_var, 0.5, 2)
    return model


def small_rae() -> tuple[Vae, Any]:
    """A representation autoencoder of dinov2, of 64 channels and 4x4 tokens, and its spec."""
    config: dict[str, Any] = {**RAES["dinov2"].config, "encoder_input_size": 56}
    spec = replace(RAES["dinov2"], config=config, channels=64, side=64)
    decoder: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = diffusers.AutoencoderRAE(
        **config,
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
        **{f"decoder_{name}": value for name, value in decoder.items()},
        latents_mean=torch.randn(64, 4, 4).tolist(),
        latents_std=(1 + torch.rand(64, 4, 4)).tolist(),
    )
    return spec, model.eval()


def small_siglip() -> tuple[Vae, Any]:
    """A SigLIP with its text half, of 64 channels and 4x4 tokens, and the spec of its encoder."""
    sizes: dict[str, Any] = {"hidden_size": 64, "image_size": 56, "patch_size": 14}
    spec = replace(RAES["siglip"], config=sizes, channels=64, side=64)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = SiglipConfig(
        text_config={"hidden_size": 64, "vocab_size": 10, **layers},
        vision_config={**sizes, **layers},
    )
    torch.manual_seed(0)
    return spec, SiglipModel(config).eval()


def ldm_names(model: Any) -> dict[str, torch.Tensor]:
    """As Stable Diffusion's own code names them; FLUX.2 has two of them inside."""
    inside = hasattr(model, "bn")
    rules = [
        (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block."),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    if inside:
        rules += [
            (r"^quant_conv", "encoder.quant_conv"),
            (r"^post_quant_conv", "decoder.post_quant_conv"),
        ]
    named: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)  # pyright: ignore[reportArgumentType,reportCallIssue]
        is_product = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        named[name] = value[:, :, None, None] if is_product else value
    return named


def wan_names(model: Any, *, flat: bool) -> dict[str, torch.Tensor]:
    """As Wan's own code names them; flat: without the time axis, as NVIDIA keeps Qwen-Image's."""
    rules = [
        (r"encoder\.down_blocks\.", "encoder.downsamples."),
        (
            r"decoder\.up_blocks\.(\d)\.resnets\.(\d)",
            lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}",
        ),
        (
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}",
        ),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"(?<=\d)\.norm1", ".residual.0"),
        (r"(?<=\d)\.conv1", ".residual.2"),
        (r"(?<=\d)\.norm2", ".residual.3"),
        (r"(?<=\d)\.conv2", ".residual.6"),
        (r"conv_shortcut", "shortcut"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"conv_in", "conv1"),
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
    ]
    named: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)  # pyright: ignore[reportArgumentType,reportCallIssue]
        if flat:
            if "time_conv" in name:
                continue
            if value.ndim == 5:
                value = value[:, :, -1]
            if name.endswith("gamma"):
                value = value.reshape(-1, 1, 1)
        named[name] = value
    return named
