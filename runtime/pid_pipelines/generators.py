"""Pipelines of diffusers: found, loaded, and whose latents they make."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from pid_pipelines.backbones import BACKBONES, Backbone
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_run import to_numpy
from pid_pipelines.vae_files import channels_of, is_rule_of
from pid_pipelines.vae_model import LoadedVae
from pid_pipelines.vaes import VAES
from pid_ref.hub import why_not
from pid_ref.registry import SPACES, LatentSpace, find_space
from pid_runtime.backends.memory import trim_heap
from pid_runtime.errors import memory_shortage
from pid_runtime.latents import Normalization, batch_normalization


def space_of(pipe: Any) -> LatentSpace:
    """The latent space of a pipeline, by its autoencoder, or else by its class.

    Raises `PipelineInputError` for one that is not known.
    """
    vae: Any = getattr(pipe, "vae", None)
    vae = getattr(vae, "_orig_mod", vae)  # what torch.compile wrapped
    for name, spec in VAES.items():
        if type(vae).__name__ != spec.kind or channels_of(spec, vae.config) != spec.channels:
            continue
        if is_rule_of(spec, vae.config):
            return SPACES[name]
    kind = type(pipe).__name__
    for backbone in BACKBONES.values():
        if backbone.pipeline == kind:
            return find_space(backbone.name)
    raise PipelineInputError(
        f"expected a pipeline whose latents are of {', '.join(VAES)}, but got {kind} with "
        f"{type(vae).__name__}, whose latents are of no space known here"
    )


def raw_rule(pipe: Any) -> Normalization | None:
    """How a pipeline's raw latents are normalised; None where it has none, or is None."""
    vae = getattr(pipe, "vae", None)
    statistics = getattr(vae, "bn", None)
    if vae is None or statistics is None:
        return None
    mean, variance = to_numpy(statistics.running_mean), to_numpy(statistics.running_var)
    return batch_normalization(mean, variance, float(statistics.eps))


DTYPES = ("bf16", "fp16", "fp32")
"""What generators compute in."""


@dataclass(frozen=True)
class Source:
    """A generator's weights."""

    model: str
    """A folder, or a repository of the hub."""
    revision: str | None
    """The commit of a repository."""


def find_generator(backbone: Backbone, model: str | None = None) -> Source:
    """The weights of a generator; model: a folder or a repository, None for the default one.

    Of a repository only the index is fetched. Raises `PipelineInputError` for one that cannot be
    had, and for that of another class.
    """
    source = model or backbone.model
    folder = Path(source).expanduser()
    revision = None
    if folder.is_dir():
        source, index = str(folder), folder / _INDEX
    else:
        index = _fetch_index(backbone, source)
        revision = index.parent.name  # a snapshot's folder is named by its commit
    try:
        kind = json.loads(index.read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PipelineInputError(
            f"expected a pipeline as diffusers saves it, but {source} has no {_INDEX} that names "
            "its class; give the folder of a whole pipeline"
        ) from None
    if kind != backbone.pipeline:
        raise PipelineInputError(
            f"expected a {backbone.pipeline}, which {backbone.name} is, but {source} is a {kind}; "
            "name its --backbone, or another --model"
        )
    return Source(source, revision)


_INDEX = "model_index.json"
_DTYPE_SINCE = Version("0.42")
"""Of diffusers, which warns of `torch_dtype` from then on."""


def _fetch_index(backbone: Backbone, repository: str) -> Path:
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(hf_hub_download(repository, _INDEX))
    except Exception as error:  # each transport the hub may pick raises classes of its own
        raise PipelineInputError(
            f"expected the generator {repository} of {backbone.name}, but {why_not(error)}; the "
            f"cache is {HF_HUB_CACHE}, and --model FOLDER takes a pipeline saved by diffusers"
        ) from error


def load_generator(
    backbone: Backbone,
    source: Source,
    *,
    dtype: str = "bf16",
    device: str = "cpu",
    offload: bool = False,
) -> Any:
    """A pipeline of diffusers, ready to be called.

    dtype: of `DTYPES`. device: torch's name of it. offload: keep on the GPU only the part that
    computes.
    Raises `PipelineInputError` for what diffusers cannot load, and for a device that is none.
    """
    import diffusers

    kind = getattr(diffusers, backbone.pipeline, None)
    if kind is None:
        raise PipelineInputError(
            f"expected a diffusers with {backbone.pipeline}, which {backbone.name} is, but got "
            f"{diffusers.__version__}, which has none; update it"
        )
    if offload and not device.startswith("cuda"):
        raise PipelineInputError(
            f"expected a GPU for --offload, but got {device}; drop it, or choose --device cuda"
        )
    numbers = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    name = "dtype" if Version(diffusers.__version__) >= _DTYPE_SINCE else "torch_dtype"
    try:
        pipe = kind.from_pretrained(
            source.model, revision=source.revision, **{name: numbers[dtype]}
        )
    except ImportError:
        raise
    except Exception as error:  # classes of diffusers, transformers, safetensors and the hub
        if memory_shortage(error) is not None:
            raise
        reason = " ".join(why_not(error).split())[:200]
        raise PipelineInputError(
            f"expected {source.model} to be a pipeline that diffusers loads, but got: {reason}; "
            "fetch or save all of it again"
        ) from error
    pipe.set_progress_bar_config(disable=True)  # commands have one of their own
    try:
        if offload:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        if memory_shortage(error) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise PipelineInputError(
            f"expected a device of torch, but got {device!r}: {reason}; try cpu or cuda"
        ) from None


def take_vae(pipe: Any, device: str) -> LoadedVae:
    """A pipeline's autoencoder in float32, as its own; the pipeline is not used any more."""
    space = space_of(pipe)
    pipe.remove_all_hooks()
    return LoadedVae(VAES[space.name], pipe.vae.eval().to(device, torch.float32), device)


class OpenGenerator:
    """A pipeline of diffusers until it is closed, or only its decoder is left of it."""

    def __init__(self, pipe: Any, device: str) -> None:
        self.pipe: Any = pipe
        self._device = device

    def become_vae(self) -> LoadedVae:
        """The pipeline's autoencoder in float32; all else is gone."""
        vae = take_vae(self.pipe, self._device)
        self.close()
        return vae

    def copy_vae(self) -> LoadedVae:
        """The pipeline's autoencoder in float32, beside the pipeline."""
        own, space = self.pipe.vae, space_of(self.pipe)
        vae = type(own).from_config(own.config)
        vae.load_state_dict(own.state_dict())
        return LoadedVae(VAES[space.name], vae.eval().to(self._device), self._device)

    def close(self) -> None:
        """Give the memory back."""
        self.pipe = None
        free_memory(self._device)

    def __enter__(self) -> "OpenGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_memory(device: str) -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    trim_heap()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def quiet_libraries() -> None:
    """Keep bars and notes of diffusers and transformers out of a command's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # before diffusers, which loads parts of it
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
