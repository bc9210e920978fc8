"""Pipelines of diffusers: whose latents they make."""

from typing import Any

from pid_pipelines.backbones import BACKBONES
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_latents import batch_normalization
from pid_pipelines.generator_run import to_numpy
from pid_pipelines.vae_files import channels_of, is_rule_of
from pid_pipelines.vaes import VAES
from pid_ref.registry import SPACES, LatentSpace, find_space
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.latents import Normalization


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


def check_space(manifest: Manifest, space: LatentSpace, generator: str) -> None:
    """Raise `PipelineInputError` unless a bundle decodes latents of this space.

    generator: whose latents they are. Of a bundle that names no space the channels must do.
    """
    model = manifest.model.get("space")
    channels = manifest.network["latent_channels"]
    if model is None and channels == space.channels:
        return
    if model != space.name:
        got = f"one of {model}" if model else f"one of {channels} channels"
        raise PipelineInputError(
            f"expected a bundle of {space.name}, whose latents {generator} makes, but got {got}; "
            f"export one with pid-export --space {space.name}"
        )


def raw_rule(pipe: Any) -> Normalization | None:
    """How a pipeline's raw latents are normalised; None where it has none, or is None."""
    vae = getattr(pipe, "vae", None)
    statistics = getattr(vae, "bn", None)
    if vae is None or statistics is None:
        return None
    mean, variance = to_numpy(statistics.running_mean), to_numpy(statistics.running_var)
    return batch_normalization(mean, variance, float(statistics.eps))
