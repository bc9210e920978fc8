"""Autoencoders in files: found on disk or on the hub, told apart, and read into diffusers' classes.

Four layouts are known: diffusers' folder (of an autoencoder or a pipeline), diffusers' weights in
one file, Stable Diffusion's own names ("encoder.down.0.block.."), which FLUX kept, and Wan's, of
which Qwen-Image's is a child ("encoder.downsamples.0.residual.."). diffusers converts the names.
"""

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.siglip import read_siglip
from pid_pipelines.vaes import Vae
from pid_ref.hub import why_not
from pid_ref.registry import CODE_LICENSE, HUB_REPO, WEIGHTS_LICENSE

_log = logging.getLogger("pid_pipelines")

Tensors = dict[str, torch.Tensor]
Floats = NDArray[np.float64]

_PREFIXES = ("first_stage_model.", "vae.")
"""In front of the names where the autoencoder was cut from a larger file."""

_SAME = 1e-3
"""Most that statistics of the same space differ, as they are rounded in files."""


def find_vae(space: str, spec: Vae, source: str | Path | None) -> Path:
    """The file or folder of a space's autoencoder, fetched if need be; source: as of `load_vae`.

    The licence of what NVIDIA's repository holds is stated.
    Raises `PipelineInputError` for one that cannot be had.
    """
    source = source or spec.repository
    if source is None:
        official = spec.file
        _log.warning(WEIGHTS_LICENSE)
        _log.info(CODE_LICENSE)
        is_file = "." in official.rpartition("/")[2]
        folder = _fetch(space, HUB_REPO, [official if is_file else f"{official}/**"])
        return folder / official
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix in (".safetensors", ".pth", ".pt", ".ckpt") or path.is_absolute():
        raise PipelineInputError(
            f"expected an autoencoder of {space}, but {path} is neither file nor folder; check "
            "the path"
        )
    folder = _fetch(space, str(source), ["vae/config.json", "vae/*.safetensors"])
    if (folder / "vae").is_dir():
        return folder
    weights = ["diffusion_pytorch_model*.safetensors", "model*.safetensors*"]
    return _fetch(space, str(source), ["config.json", *weights])


def _fetch(space: str, repository: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import (
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]
        )

        return Path(snapshot_download(repository, allow_patterns=patterns))
    except ImportError:
        raise
    except Exception as error:  # each transport the hub may pick raises classes of its own
        raise PipelineInputError(
            f"expected the autoencoder of {space} ({patterns[0]} of {repository}), but "
            f"{why_not(error)}; fetch it by other means and pass --vae FILE_OR_DIR"
        ) from error


def read_vae(space: str, spec: Vae, path: Path) -> Any:
    """A model of `spec.kind` with the weights of a file or folder, in float32 on the CPU.

    Raises `PipelineInputError` for what is no autoencoder, and for that of another space.
    """
    if spec.kind == "SiglipVisionModel" and path.is_dir():
        return read_siglip(space, spec, path)
    if path.is_dir():
        return _read_folder(space, spec, path)
    if spec.side is not None:
        library = "diffusers" if spec.decodes else "transformers"
        raise PipelineInputError(
            f"expected the autoencoder of {space} as {library} saves it, but got the file {path}; "
            f"give a folder, or a repository such as {spec.repository}"
        )
    tensors = _renamed(space, spec, path, _open(path))
    _check_channels(space, spec, path, tensors)
    with torch.device("meta"):
        model = _class(spec)(**spec.config)
    wanted: dict[str, Any] = model.state_dict()
    tensors = _shaped(tensors, wanted)
    if wrong := _differences(tensors, wanted):
        raise PipelineInputError(
            f"expected the autoencoder of {space}, but {path} has other tensors: {wrong}; take "
            f"the file of {space}"
        )
    model.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    return model


def _class(spec: Vae) -> Any:
    import diffusers

    kind = getattr(diffusers, spec.kind, None)
    if kind is None:
        raise PipelineInputError(
            f"expected a diffusers with {spec.kind}, but got {diffusers.__version__}; "
            "pip install -U diffusers"
        )
    return kind


def _read_folder(space: str, spec: Vae, path: Path) -> Any:
    folder = path if (path / "config.json").is_file() else path / "vae"
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PipelineInputError(
            f"expected an autoencoder as diffusers saves it, but {path} has no config.json that "
            "names its class; give its folder, that of a whole pipeline, or a single file"
        ) from None
    if kind != spec.kind:
        raise PipelineInputError(
            f"expected the autoencoder of {space}, {spec.kind}, but {folder} holds {kind}; take "
            f"that of {space}"
        )
    known = _class(spec)
    try:
        model = known.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # classes of diffusers, safetensors and others
        reason = " ".join(str(error).split())[:200]
        raise PipelineInputError(
            f"expected an autoencoder that diffusers loads, but got from {folder}: {reason}; "
            "save it again with diffusers"
        ) from error
    _check_config(space, spec, folder, model.config)
    return model


def channels_of(spec: Vae, config: Mapping[str, Any]) -> int:
    """Channels of the space that an autoencoder of this kind and configuration makes."""
    if spec.kind == "AutoencoderRAE":
        return config["encoder_hidden_size"]
    return _packed(spec) * config["z_dim" if "z_dim" in config else "latent_channels"]


def rule_of(spec: Vae, config: Mapping[str, Any]) -> tuple[Floats, Floats]:
    """Factor and shift that a configuration names, of all channels or of each."""
    if spec.kind == "AutoencoderKLQwenImage":
        return 1 / np.array(config["latents_std"]), np.array(config["latents_mean"])
    factor, shift = (config.get(name) or 0.0 for name in ("scaling_factor", "shift_factor"))
    return np.array([factor]), np.array([shift])


def is_rule_of(spec: Vae, config: Mapping[str, Any]) -> bool:
    """Whether that is the space's; of statistics in the model nothing can be told."""
    if spec.factor is None or spec.shift is None:
        return True
    pairs = zip(rule_of(spec, config), (spec.factor, spec.shift), strict=True)
    return all(np.allclose(got, wanted, atol=_SAME) for got, wanted in pairs)


def _check_config(space: str, spec: Vae, folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `PipelineInputError` for channels or statistics of another space."""
    channels = channels_of(spec, config)
    if channels != spec.channels:
        raise _other_channels(space, spec, folder, channels)
    if spec.kind == "AutoencoderRAE" and (said := _encoder(config)) != _encoder(spec.config):
        raise PipelineInputError(
            f"expected the autoencoder of {space}, {_encoder(spec.config)}, but {folder} holds "
            f"{said}; take {spec.repository}"
        )
    if spec.factor is not None and spec.shift is not None and not is_rule_of(spec, config):
        factor, shift = rule_of(spec, config)
        said = f"factor {factor[0]:g}, shift {shift[0]:g}"
        wanted = f"factor {spec.factor[0]:g}, shift {spec.shift[0]:g}"
        raise PipelineInputError(
            f"expected latents of {space} ({wanted}), but those of {folder} have {said}: it is "
            f"another space's; take the autoencoder of {space}"
        )


def _encoder(config: Mapping[str, Any]) -> str:
    """Of a representation autoencoder."""
    side = config["encoder_input_size"] // config["encoder_patch_size"]
    return f"{config['encoder_type']} of {side}x{side} tokens"


def _open(path: Path) -> Tensors:
    """The tensors of a file. Raises `PipelineInputError` for one that cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise PipelineInputError(
            f"expected a file of weights, but cannot read {path}: {reason}; give a .safetensors "
            "file, or a .pth file of tensors only"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise PipelineInputError(
            f"expected tensors by their names, but {path} holds a {type(content).__name__}; save "
            "the model's state_dict"
        )
    return {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def _renamed(space: str, spec: Vae, path: Path, tensors: Tensors) -> Tensors:
    """Under diffusers' names. Raises `PipelineInputError` for a layout that is not known."""
    from diffusers.loaders import single_file_utils

    for prefix in _PREFIXES:
        if f"{prefix}encoder.conv_out.weight" in tensors:
            names = [name for name in tensors if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): tensors[name] for name in names}
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors
    is_wan = any(name.startswith("encoder.downsamples.") for name in tensors)
    is_ldm = any(name.startswith("encoder.down.") for name in tensors)
    if is_wan and spec.kind == "AutoencoderKLQwenImage":
        return single_file_utils.convert_wan_vae_to_diffusers(tensors)
    if is_ldm and spec.kind != "AutoencoderKLQwenImage":
        _check_channels(space, spec, path, tensors)
        for name in ("encoder.quant_conv", "decoder.post_quant_conv"):  # FLUX.2 has them inside
            for part in (".weight", ".bias"):
                if name + part in tensors:
                    tensors[name.partition(".")[2] + part] = tensors.pop(name + part)
        depth = len(spec.config.get("block_out_channels", range(4)))
        config = {f"{way}_block_types": range(depth) for way in ("down", "up")}
        found = single_file_utils.convert_ldm_vae_checkpoint(tensors, config)
        return found | {name: tensors[name] for name in tensors if name.startswith("bn.")}
    if is_wan or is_ldm:
        other = "Wan's or Qwen-Image's" if is_wan else "Stable Diffusion's or FLUX's"
        raise PipelineInputError(
            f"expected the autoencoder of {space}, but {path} holds one of {other}; take that of "
            f"{space}"
        )
    raise PipelineInputError(
        f"expected the autoencoder of {space}, but {path} holds no encoder of a layout known here "
        f"(its first tensor is {next(iter(tensors), 'none')!r}); take the released file, or a "
        "folder of diffusers"
    )


def _check_channels(space: str, spec: Vae, path: Path, tensors: Tensors) -> None:
    """Raise `PipelineInputError` for an encoder whose latents have another number of channels."""
    last = tensors.get("encoder.conv_out.weight")
    if last is None:
        return
    channels = _packed(spec) * last.shape[0] // 2  # means and variances
    if channels != spec.channels:
        raise _other_channels(space, spec, path, channels)


def _packed(spec: Vae) -> int:
    """Channels of the space for each of the model's."""
    return 4 if spec.kind == "AutoencoderKLFlux2" else 1


def _other_channels(space: str, spec: Vae, path: Path, channels: int) -> PipelineInputError:
    return PipelineInputError(
        f"expected the autoencoder of {space}, of {spec.channels} channels, but that of {path} "
        f"has {channels}; take that of {space}"
    )


def _shaped(tensors: Tensors, wanted: Mapping[str, Any]) -> Tensors:
    """With what images alone do not need of a video's autoencoder.

    Of a kernel over time, a first frame meets the last slice alone, since before it are zeros; a
    convolution between frames is never run.
    """
    shaped = dict(tensors)
    for name, model in wanted.items():
        own = tensors.get(name)
        if own is None:
            if ".time_conv." in name:
                shaped[name] = torch.zeros(model.shape)
        elif own.ndim == 4 and model.ndim == 5:
            shaped[name] = torch.zeros(*own.shape[:2], model.shape[2], *own.shape[2:])
            shaped[name][:, :, -1] = own.float()
        elif own.numel() == model.numel() and name.endswith(".gamma"):
            shaped[name] = own.reshape(model.shape)
        elif own.ndim == 4 and model.ndim == 2 and own.shape[2:] == (1, 1):
            shaped[name] = own[:, :, 0, 0]  # attention by convolution
    return shaped


def _differences(tensors: Tensors, wanted: Mapping[str, Any]) -> str:
    """The first of the tensors that are missing, too many or of another shape; "" for none."""
    for name, model in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != model.shape:
            return f"{name} is {list(tensors[name].shape)}, not {list(model.shape)}"
    extra = [name for name in tensors if name not in wanted]
    return f"{extra[0]} is none of its" if extra else ""
