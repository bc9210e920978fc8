"""An autoencoder, loaded: pictures to latents, and back without PiD."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_files import find_vae, read_vae
from pid_pipelines.vaes import Vae, check_decodes, check_image, check_latent, spec_of
from pid_runtime.backends.memory import trim_heap
from pid_runtime.errors import memory_shortage

Floats = NDArray[np.float32]


def load_vae(space: str, source: str | Path | None = None, device: str = "cpu") -> "LoadedVae":
    """The autoencoder of a latent space.

    source: a folder of diffusers, of the autoencoder or of a whole pipeline; a file (.safetensors,
    or .pth, of which only tensors are read) in the layout of diffusers or of the model's authors;
    or a repository of the hub. None takes the file that NVIDIA keeps beside the decoders, or of a
    representation autoencoder its authors' repository, of which neither files are read.
    device: torch's name of it. It computes in float32.
    Raises `PipelineInputError` for a space without one, for what is no autoencoder, and for that
    of another space.
    """
    spec = spec_of(space)
    found = find_vae(space, spec, source)
    model = read_vae(space, spec, found)
    try:
        return LoadedVae(spec, model.eval().to(device), device)
    except (RuntimeError, AssertionError) as error:
        if memory_shortage(error) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise PipelineInputError(
            f"expected a device of torch, but got {device!r}: {reason}; try cpu or cuda"
        ) from None


def normalization(spec: Vae, model: Any) -> tuple[Any, Any]:
    """Factor and shift of a space's latents, tensors `[C, 1, 1]` or `[1, 1, 1]`, float32."""
    if spec.factor is None or spec.shift is None:
        statistics = model.bn
        std = torch.sqrt(statistics.running_var.float() + statistics.eps)
        return (1 / std)[:, None, None], statistics.running_mean.float()[:, None, None]
    factor, shift = (torch.tensor(values)[:, None, None] for values in (spec.factor, spec.shift))
    return factor, shift


def encode_mean(kind: str, model: Any, image: Any) -> Any:
    """What a model of diffusers makes of images `[B, 3, H, W]`: the means, before normalising.

    Of FLUX.2 2x2 of its latent pixels are one of the space. A representation autoencoder has no
    spread, and normalises by itself.
    """
    if kind == "AutoencoderRAE":
        return model.encode(image / 2 + 0.5, return_dict=False)[0]
    if kind == "SiglipVisionModel":
        return model.encode(image)
    if kind == "AutoencoderKLQwenImage":  # a video's, with a time axis
        return model.encode(image[:, :, None], return_dict=False)[0].mode()[:, :, 0]
    mean = model.encode(image, return_dict=False)[0].mode()
    return F.pixel_unshuffle(mean, 2) if kind == "AutoencoderKLFlux2" else mean


def decode_raw(kind: str, model: Any, z: Any) -> Any:
    """Images `[B, 3, H, W]`, about [-1, 1], of what `encode_mean` gives."""
    if kind == "AutoencoderRAE":
        return 2 * model.decode(z, return_dict=False)[0] - 1
    if kind == "AutoencoderKLQwenImage":
        return model.decode(z[:, :, None], return_dict=False)[0][:, :, 0]
    if kind == "AutoencoderKLFlux2":
        z = F.pixel_shuffle(z, 2)
    return model.decode(z, return_dict=False)[0]


class LoadedVae:
    """An autoencoder that can be run, in float32.

    with load_vae("flux", "ae.safetensors") as vae:
        latent = vae.encode(image)  # [1, 16, h, w] of [1, 3, 8 h, 8 w]
    """

    def __init__(self, spec: Vae, model: Any, device: str) -> None:
        """Most callers want `load_vae`."""
        self.down, self.channels, self.decodes = spec.down, spec.channels, spec.decodes
        self._spec, self._device = spec, device
        self._model: Any = model
        self._factor, self._shift = (each.to(device) for each in normalization(spec, model))

    def encode(self, image: Floats) -> Floats:
        """Normalised latents `[B, C, H / down, W / down]` of images `[B, 3, H, W]` in [-1, 1].

        The mean of what the encoder says, without its spread, so the same each time.
        Raises `PipelineInputError` unless H and W are multiples of `down`, or what the
        autoencoder's only size is.
        """
        check_image(image, self.down, self._spec.side)
        return self._run(
            lambda model, x: (encode_mean(self._spec.kind, model, x) - self._shift) * self._factor,
            image,
        )

    def decode(self, latent: Floats) -> Floats:
        """Images `[B, 3, H, W]`, about [-1, 1], of normalised latents `[B, C, h, w]`.

        Raises `PipelineInputError` for one of which only the encoder is known here.
        """
        check_decodes(self._spec)
        check_latent(latent, self.channels)
        return self._run(
            lambda model, z: decode_raw(self._spec.kind, model, z / self._factor + self._shift),
            latent,
        )

    def _run(self, function: Any, values: Floats) -> Floats:
        if self._model is None:
            raise PipelineInputError("expected an open autoencoder, but it was closed; load it")
        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device)
            return function(self._model, given).float().cpu().numpy()

    def __enter__(self) -> "LoadedVae":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back; nothing can be encoded afterwards."""
        self._model = None
        gc.collect()
        trim_heap()
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()
