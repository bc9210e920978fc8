"""The encoder of Scale-RAE's latents: SigLIP 2, of which transformers has the class.

A latent is what the last layer gives, before the model's own last norm and with none of its
weights: Tong et al., "Scaling Text-to-Image Diffusion Transformers with Representation
Autoencoders" (2026), arXiv 2601.16208, as the public PiD code computes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vaes import Vae
from pid_runtime.errors import memory_shortage

EPSILON = 1e-6
"""Of the norm over a token's channels."""


class SiglipEncoder(nn.Module):
    """Images `[B, 3, H, W]` in [-1, 1] to latents `[B, C, h, w]`, a channel for each of a token's.

    Images are resized to what the model was trained at.
    """

    def __init__(self, model: Any) -> None:
        """model: a `SiglipVisionModel`; its last norm is taken away."""
        super().__init__()
        tower = getattr(model, "vision_model", model)  # of transformers before 5
        tower.post_layernorm = nn.Identity()
        self.model = model

    def encode(self, image: Tensor) -> Tensor:
        config = self.model.config
        side, tokens = config.image_size, config.image_size // config.patch_size
        small = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
        states = self.model(pixel_values=small).last_hidden_state
        normed = F.layer_norm(states, states.shape[-1:], eps=EPSILON)
        return normed.transpose(1, 2).unflatten(2, (tokens, tokens))


def read_siglip(space: str, spec: Vae, path: Path) -> SiglipEncoder:
    """The encoder in a folder, in float32 on the CPU.

    Raises `PipelineInputError` for what transformers cannot load, and for another model.
    """
    from transformers.models.siglip import SiglipVisionModel
    from transformers.utils import logging

    what = f"expected the encoder of {space}, SigLIP 2 of {_described(spec.config)}"
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PipelineInputError(
            f"{what}, but {path} has no config.json of transformers; take {spec.repository}"
        ) from None
    if kind not in ("siglip", "siglip_vision_model"):
        raise PipelineInputError(f"{what}, but {path} holds {kind}; take {spec.repository}")
    logging.disable_progress_bar()  # commands have one of their own
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists the tensors of the text half, which it leaves out
    try:
        loaded: Any = SiglipVisionModel.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # classes of transformers, safetensors and others
        if memory_shortage(error) is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise PipelineInputError(
            f"{what}, but transformers cannot load {path}: {reason}; take {spec.repository}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise PipelineInputError(
            f"{what}, but {path} lacks {missing[0]}; fetch {spec.repository} again"
        )
    found = model.config.to_dict()
    if _described(found) != _described(spec.config):
        raise PipelineInputError(
            f"{what}, but {path} holds one of {_described(found)}; take {spec.repository}"
        )
    return SiglipEncoder(model)


def _described(config: Mapping[str, Any]) -> str:
    return (
        f"{config['hidden_size']} channels, {config['image_size']} pixels in patches of "
        f"{config['patch_size']}"
    )
