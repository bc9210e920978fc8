"""The latent spaces and the released checkpoints, as data; nothing here needs torch."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pid_ref.config import PidConfig, Version
from pid_ref.errors import PidInputError

Variant = Literal["2k", "2kto4k", "2kto4k-v1", "2kto4k-undistilled", "any"]

HUB_REPO = "nvidia/PiD"
"""Where NVIDIA publishes the weights, on the Hugging Face hub."""

CHECKPOINT_FILE = "model_ema_bf16.pth"
"""The one file in the folder of every checkpoint on the hub."""

WEIGHTS_LICENSE = (
    "The PiD weights are NVIDIA's, under its NSCLv1 license: non-commercial use only (research or "
    f"evaluation); see https://huggingface.co/{HUB_REPO}."
)
"""What a user is told before a download, and what bundles and images made of the weights say."""

CODE_LICENSE = "The code of pid-trt is under the Apache-2.0 license."

NANO_LICENSE = "The nano weights are part of pid-trt, under its Apache-2.0 license."
"""What a bundle made of them says."""

NANO_STD = (
    *(1.98, 0.298, 0.3, 0.156, 0.166, 0.171, 0.0884, 0.11),  # luma
    *(0.114, 0.104, 0.0666, 0.0829, 0.0718, 0.0536, 0.0553, 0.0387),
    *(0.405, 0.0421, 0.0439, 0.0188, 0.0223, 0.0235, 0.00928, 0.0129),  # blue difference
    *(0.0134, 0.0109, 0.00695, 0.0089, 0.00722, 0.00554, 0.00512, 0.00407),
    *(0.534, 0.0389, 0.0404, 0.017, 0.0204, 0.0198, 0.00864, 0.012),  # red difference
    *(0.0118, 0.00929, 0.00679, 0.00868, 0.00688, 0.00538, 0.00562, 0.00416),
)
"""Standard deviation over photographs of every coefficient of a block of a `nano` latent."""

NANO_CONFIG = PidConfig(
    latent_channels=192,
    latent_unpatchify=2,
    latent_hidden=196,
    latent_res_blocks=4,
    latent_padding="replicate",
    latent_gate="token",
    pixel_gate=True,
    hidden_size=128,
    num_heads=2,
    patch_depth=1,
    pixel_hidden_size=8,
    pixel_attn_size=72,
    pixel_num_heads=1,
    pixel_depth=1,
    text_dim=64,
    text_max_length=8,
    rope_reference=2048,
)
"""The network of the weights that ship: small, with the released head sizes."""


@dataclass(frozen=True)
class LatentSpace:
    """What one family of image generators calls a latent, and what the decoder expects of it."""

    name: str
    """The name used everywhere in this project."""
    aliases: tuple[str, ...]
    """Generators that share this space."""
    channels: int
    """C, channels of a latent `[B, C, h, w]`."""
    down: int
    """Pixels of the encoded image per latent pixel, along each axis."""
    scale: int
    """Output pixels per pixel of the encoded image, along each axis."""
    convention: str
    """How the decoder's input is made from the encoder's raw output z."""
    factor: tuple[float, ...] | None
    """With `shift`: the input is factor * (z - shift), each of one number for all channels or one
    per channel. None where the rule is not known here."""
    shift: tuple[float, ...] | None
    """See `factor`."""
    diffusers: str
    """What a diffusers pipeline returns for `output_type="latent"`, and what is left to do."""
    comfyui: Literal["raw", "normalised"] | None = "raw"
    """What ComfyUI's latent files hold: z, or the input; None for a space that it has not."""
    token_width: int | None = None
    """Channels of the tokens `[B, n, token_width]` in which generators or encoders pack latents;
    None where none does."""
    spread: tuple[float, float] | None = (0.3, 2.0)
    """Between which the standard deviation of a normalised latent lies, whatever its noise level;
    None where it may be anything."""
    std: tuple[float, ...] | None = None
    """Of a space whose encoder is the block DCT: the standard deviation of every channel."""
    partly_denoised: Literal["interpolation", "euler"] = "interpolation"
    """What a latent of noise level sigma is.

    "interpolation": (1 - sigma) * x0 + sigma * noise; the latent and sigma are passed as they are.
    "euler": x0 + sigma * noise; the latent and sigma are both divided by sqrt(sigma^2 + 1) first.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


_QWEN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
"""`latents_mean` in the configuration of Qwen-Image's VAE."""

_QWEN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""`latents_std` in the same."""

SPACES = {
    space.name: space
    for space in (
        LatentSpace(
            name="flux",
            aliases=("zimage", "zimage-turbo", "boogu-image"),
            channels=16,
            down=8,
            scale=4,
            convention="0.3611*(z - 0.1159)",
            factor=(0.3611,),
            shift=(0.1159,),
            diffusers="normalised; FLUX returns [B, hw/4, 64] tokens of 2x2 latent pixels: unpack",
            token_width=64,
        ),
        LatentSpace(
            name="flux2",
            aliases=("flux2-klein-4b", "flux2-klein-9b"),
            channels=128,
            down=16,
            scale=4,
            convention="2x2-patchified, then BatchNorm-normalised per channel (VAE statistics)",
            factor=None,
            shift=None,
            diffusers=(
                "FLUX.2 returns normalised tokens: unpack to [B, 128, h, w]; "
                "FLUX.2-klein returns 32 raw channels: patchify and normalise"
            ),
            comfyui="normalised",
            token_width=128,
        ),
        LatentSpace(
            name="sd3",
            aliases=(),
            channels=16,
            down=8,
            scale=4,
            convention="1.5305*(z - 0.0609)",
            factor=(1.5305,),
            shift=(0.0609,),
            diffusers="normalised [B, 16, h, w]: pass as it is",
        ),
        LatentSpace(
            name="sdxl",
            aliases=(),
            channels=4,
            down=8,
            scale=4,
            convention="0.13025*z",
            factor=(0.13025,),
            shift=(0.0,),
            diffusers="normalised [B, 4, h, w]: pass as it is",
            partly_denoised="euler",
        ),
        LatentSpace(
            name="qwenimage",
            aliases=("qwenimage-2512",),
            channels=16,
            down=8,
            scale=4,
            convention="(z - mean)/std per channel (latents_mean, latents_std of the VAE's config)",
            factor=tuple(1 / std for std in _QWEN_STD),
            shift=_QWEN_MEAN,
            diffusers="normalised tokens of 2x2 latent pixels: unpack and drop the time axis",
            token_width=64,
        ),
        LatentSpace(
            name="dinov2",
            aliases=(),
            channels=768,
            down=16,
            scale=4,
            convention="RAE latent",
            factor=None,
            shift=None,
            diffusers="not a diffusers pipeline: the RAE's [B, 768, h, w]",
            comfyui=None,
            token_width=768,
        ),
        LatentSpace(
            name="siglip",
            aliases=(),
            channels=1152,
            down=16,
            scale=8,
            convention="Scale-RAE latent",
            factor=None,
            shift=None,
            diffusers="not a diffusers pipeline: the Scale-RAE's [B, 1152, h, w]",
            comfyui=None,
            token_width=1152,
        ),
        LatentSpace(
            name="nano",
            aliases=(),
            channels=192,
            down=8,
            scale=4,
            convention="4x4 block DCT in YCbCr, each coefficient over its std, 2x2 blocks a pixel",
            factor=None,
            shift=None,
            diffusers="not a diffusers pipeline: what `Decoder.encode` makes of an image",
            comfyui=None,
            spread=None,
            std=NANO_STD,
        ),
    )
}
"""Every latent space by name."""


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights: NVIDIA's, on the hub, or our own, in this package."""

    name: str
    """Its folder on the hub, if it is there; "" for a network of other dimensions."""
    space: LatentSpace
    variant: Variant
    """"2kto4k" is the newest distilled one of its space, "2kto4k-v1" one that v1.5 superseded,
    "any" one that has no sizes it was trained for."""
    version: Version
    config: PidConfig
    """The network these weights fit."""
    distilled: bool
    """Whether it decodes in 4 steps; an undistilled one needs many steps and guidance."""
    deprecated: bool
    """Whether the hub moved it to `checkpoints_deprecated/`."""
    captioned: bool = True
    """Whether it was trained with captions; if not, the empty embedding is the right one."""
    license: str = WEIGHTS_LICENSE
    """Under which terms its weights may be used."""
    file: Path | None = None
    """The weights, if they are part of this package; None if they are on the hub."""

    @property
    def hub_path(self) -> str:
        """Its file on the hub, relative to the root of `HUB_REPO`."""
        root = "checkpoints_deprecated" if self.deprecated else "checkpoints"
        return f"{root}/{self.name}/{CHECKPOINT_FILE}"

    @property
    def label(self) -> str:
        """Space, variant and version, for messages."""
        label = f"{self.space.name} {self.variant} ({self.version})"
        return label if self.name else f"custom {label}"


def _config(space: LatentSpace, version: Version) -> PidConfig:
    """The network of a space; v1.5 widens the latent branch and gates the pixel blocks too."""
    v1 = PidConfig(latent_channels=space.channels, latent_down=space.down, scale=space.scale)
    if version == "v1":
        return v1
    return replace(
        v1,
        latent_unpatchify=2 if space.name == "flux2" else 1,
        latent_hidden=1024,
        latent_padding="replicate",
        latent_gate="token",
        pixel_gate=True,
        rope_reference=2048,
    )


_RELEASED: tuple[tuple[str, str, Variant, Version], ...] = (
    ("PiD_res2k_sr4x_official_flux_distill_4step", "flux", "2k", "v1"),
    ("PiD_res2k_sr4x_official_flux2_distill_4step", "flux2", "2k", "v1"),
    ("PiD_res2k_sr4x_official_sd3_distill_4step", "sd3", "2k", "v1"),
    ("PiD_res2k_sr4x_official_dinov2_distill_4step", "dinov2", "2k", "v1"),
    ("PiD_res2k_sr8x_official_siglip_distill_4step", "siglip", "2k", "v1"),
    ("PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step", "flux", "2kto4k", "v1.5"),
    ("PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step", "flux2", "2kto4k", "v1.5"),
    ("PiD_res2kto4k_sr4x_official_sd3_distill_4step", "sd3", "2kto4k", "v1"),
    ("PiD_res2kto4k_sr4x_official_sdxl_distill_4step", "sdxl", "2kto4k", "v1"),
    ("PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_distill_4step", "qwenimage", "2kto4k", "v1.5"),
    ("PiD_res2kto4k_sr4x_official_flux_distill_4step", "flux", "2kto4k-v1", "v1"),
    ("PiD_res2kto4k_sr4x_official_flux2_distill_4step_2606", "flux2", "2kto4k-v1", "v1"),
    ("PiD_res2kto4k_sr4x_official_qwenimage_distill_4step", "qwenimage", "2kto4k-v1", "v1"),
    ("PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled", "flux", "2kto4k-undistilled", "v1.5"),
    ("PiD_v1pt5_res2kto4k_sr4x_official_flux2_undistilled", "flux2", "2kto4k-undistilled", "v1.5"),
    (
        "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_undistilled",
        "qwenimage",
        "2kto4k-undistilled",
        "v1.5",
    ),
)

NANO = Checkpoint(
    name="nano_sr4x_4step",
    space=SPACES["nano"],
    variant="any",
    version="v1.5",
    config=NANO_CONFIG,
    distilled=True,
    deprecated=False,
    captioned=False,
    license=NANO_LICENSE,
    file=Path(__file__).parent / "nano" / "nano.safetensors",
)
"""The checkpoint that ships: a small decoder of photographs."""

CHECKPOINTS = {
    name: Checkpoint(
        name=name,
        space=SPACES[space],
        variant=variant,
        version=version,
        config=_config(SPACES[space], version),
        distilled=variant != "2kto4k-undistilled",
        deprecated=variant == "2kto4k-v1",
    )
    for name, space, variant, version in _RELEASED
} | {NANO.name: NANO}
"""Every checkpoint by its name."""

REFUSED = {
    "PiD_res2kto4k_sr4x_official_flux2_distill_4step": (
        "its colours drift; use PiD_res2kto4k_sr4x_official_flux2_distill_4step_2606 (2kto4k-v1) "
        "or the v1.5 checkpoint (2kto4k)"
    ),
}
"""Folders on the hub that must not be used, with the reason and what to use instead."""

_VARIANTS: tuple[Variant, ...] = get_args(Variant)

_V1PT5 = "2kto4k_v1pt5"
"""What the public code calls "2kto4k" of version v1.5."""

_SPELLINGS = {"flux1": "flux", "qwen": "qwenimage", "sd35": "sd3"}
"""Other words for a space in the names of repackaged files."""


def spaces_in_name(stem: str) -> list[LatentSpace]:
    """The latent spaces that a file's name speaks of, such as sd3 for "pid_sd3_512_to_2048"."""
    words = re.split(r"[^a-z0-9]+", stem.lower())
    words += [_SPELLINGS[word] for word in words if word in _SPELLINGS]
    return [space for space in SPACES.values() if not set(words).isdisjoint(space.names)]


def find_space(name: str) -> LatentSpace:
    """The latent space of that name or alias; raises `PidInputError` if there is none."""
    for space in SPACES.values():
        if name in space.names:
            return space
    known = [known for space in SPACES.values() for known in space.names]
    raise PidInputError(
        f"expected a latent space ({', '.join(known)}), but got {name!r}; {_hint(name, known)}"
    )


def find_checkpoint(space: str, variant: str | None = None) -> Checkpoint:
    """The checkpoint of a space (name or alias) and a variant; None for the only one it has.

    "2kto4k" is the newest distilled one, "2kto4k-v1" the v1 one, which is the same checkpoint
    where no v1.5 exists (sd3, sdxl). The names that the public code uses are known too:
    "2kto4k_v1pt5", and those of the folders on the hub. Raises `PidInputError` for an unknown
    space or variant, or for a space that was not released in that variant.
    """
    found = find_space(space)
    offered = {each.variant: each for each in CHECKPOINTS.values() if each.space == found}
    if variant is None:
        if len(offered) > 1:
            raise PidInputError(
                f"expected a variant of {found.name} ({', '.join(offered)}), but got none; "
                "choose one of these"
            )
        return next(iter(offered.values()))
    if variant in CHECKPOINTS and CHECKPOINTS[variant].space == found:
        return CHECKPOINTS[variant]
    newest = [name for name, each in offered.items() if not each.deprecated]
    if variant == _V1PT5 and "2kto4k" in offered and offered["2kto4k"].version == "v1.5":
        return offered["2kto4k"]
    if variant not in (*_VARIANTS, _V1PT5):
        raise PidInputError(
            f"expected a variant of {found.name} ({', '.join(offered)}), but got {variant!r}; "
            f"{_hint(variant, newest)}"
        )
    if variant == "2kto4k-v1" and variant not in offered and "2kto4k" in offered:
        return offered["2kto4k"]
    if variant not in offered:
        raise PidInputError(
            f"expected a variant {found.name} was released in, but got {variant!r}; "
            f"use {' or '.join(newest)}"
        )
    return offered[variant]


def _hint(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, as a question, or else advice."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "choose one of these"
