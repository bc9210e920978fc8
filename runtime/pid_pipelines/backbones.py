"""The image generators whose latents PiD decodes, as data; nothing here needs diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pid_pipelines.errors import PipelineInputError
from pid_ref.registry import LatentSpace, find_space
from pid_runtime.bundle.manifest import Manifest


@dataclass(frozen=True)
class Backbone:
    """One generator, and how the public PiD calls it."""

    name: str
    """The name used on command lines, which is that of a latent space or an alias of one."""
    pipeline: str
    """The class in diffusers; "" where it has none."""
    model: str = ""
    """Default id on the Hugging Face hub."""
    steps: int = 0
    """Generator steps."""
    guidance: float = 1.0
    """Strength of guidance."""
    early: int | None = None
    """Steps after which a latent decodes well, counted from 1; None: the end alone."""
    extra: Mapping[str, int | str] = field(default_factory=dict[str, int | str])
    """Further arguments of the pipeline's call."""
    guidance_argument: str = "guidance_scale"
    """The argument of the pipeline's call that takes `guidance`."""
    prompt_argument: str = "prompt"
    """The one that takes the prompt."""

    @property
    def space(self) -> str:
        """The latent space of what it makes."""
        return find_space(self.name).name


_LONG = {"max_sequence_length": 512}
_QWEN = {"negative_prompt": " ", **_LONG}
_KLEIN = "Flux2KleinPipeline"
_BFL, _SAI = "black-forest-labs", "stabilityai"

BACKBONES = {
    each.name: each
    for each in (
        Backbone("flux", "FluxPipeline", f"{_BFL}/FLUX.1-dev", 28, 3.5, 24, _LONG),
        Backbone("flux2", "Flux2Pipeline", f"{_BFL}/FLUX.2-dev", 50, 4.0, 46, _LONG),
        Backbone("flux2-klein-4b", _KLEIN, f"{_BFL}/FLUX.2-klein-4B", 4, 1.0),
        Backbone("flux2-klein-9b", _KLEIN, f"{_BFL}/FLUX.2-klein-9B", 4, 1.0),
        Backbone(
            "sd3",
            "StableDiffusion3Pipeline",
            f"{_SAI}/stable-diffusion-3-medium-diffusers",
            28,
            4.0,
            24,
        ),
        Backbone(
            "sdxl",
            "StableDiffusionXLPipeline",
            f"{_SAI}/stable-diffusion-xl-base-1.0",
            30,
            7.5,
            26,
        ),
        Backbone(
            "qwenimage",
            "QwenImagePipeline",
            "Qwen/Qwen-Image",
            50,
            4.0,
            44,
            _QWEN,
            "true_cfg_scale",
        ),
        Backbone(
            "qwenimage-2512",
            "QwenImagePipeline",
            "Qwen/Qwen-Image-2512",
            50,
            4.0,
            44,
            _QWEN,
            "true_cfg_scale",
        ),
        Backbone("zimage", "ZImagePipeline", "Tongyi-MAI/Z-Image", 50, 5.0, 46, _LONG),
        Backbone("zimage-turbo", "ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", 9, 0.0, None, _LONG),
        Backbone(
            "boogu-image",
            "BooguImagePipeline",
            "Boogu/Boogu-Image-0.1-Base",
            50,
            4.0,
            guidance_argument="text_guidance_scale",
            prompt_argument="instruction",
        ),
        Backbone("dinov2", ""),
        Backbone("siglip", ""),
    )
}
"""Of the public PiD, and Boogu-Image, which makes FLUX's latents."""


def find_backbone(name: str) -> Backbone:
    """A generator that diffusers can run. Raises `PipelineInputError` for another name."""
    runnable = ", ".join(each.name for each in BACKBONES.values() if each.pipeline)
    if name in BACKBONES and BACKBONES[name].pipeline:
        return BACKBONES[name]
    if name in BACKBONES:
        raise PipelineInputError(
            f"expected a generator of diffusers ({runnable}), but got {name}, whose latents "
            "generators of another kind make; give them to pid-decode"
        )
    raise PipelineInputError(
        f"expected a generator ({runnable}), but got {name!r}; of another model that shares a "
        "latent space give --model and the generator whose class it has"
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
