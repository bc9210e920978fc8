"""What a network is calibrated on: latents and captions in files, photographs, or made up."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_export.errors import ExportInputError
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.decode_jobs import Inputs, Settings, find_sources, request_of
from pid_runtime.nano import codec
from pid_runtime.nano.photos import PHOTO_SUFFIXES, padded, read_photo
from pid_runtime.request import empty_caption
from pid_runtime.tiles import pixels_per_latent_pixel

_log = logging.getLogger(__name__)

MADE_UP = "synthetic latents"
SIGMAS = (0.0, 0.4)
"""Noise levels that each photograph, and each synthetic latent, is decoded at."""
_SYNTHETIC, _SIDE = 2, 8
"""How many latents are made up, and their sides in latent pixels."""


def read_inputs(
    manifest: Manifest,
    path: Path,
    captions: Path | None = None,
    negative: NDArray[np.float32] | None = None,
) -> tuple[list[Inputs], str]:
    """Latents or, for a bundle with a codec, photographs in a folder; and what they are, in words.

    captions: a folder of captions named as the latents, which may also hold their own. negative:
    `[1, T, D]`, for a bundle with guidance; None for zeros, with a warning.
    Raises `PidRuntimeError` or `ExportInputError` for what is not there or does not fit.
    """
    if not path.exists():
        raise ExportInputError(f"expected latents to calibrate on, but {path} is not there")
    photos = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    photos = [each for each in photos if each.suffix.lower() in PHOTO_SUFFIXES]
    if photos and manifest.codec is not None:
        return _photographs(manifest, photos), _counted(len(photos), "photograph")
    settings = Settings()
    batches = [each.read(manifest, settings) for each in find_sources(path, captions=captions)]
    inputs = [batch.image(index) for batch in batches for index in range(len(batch.latent))]
    inputs = _guided(manifest, inputs, negative)
    for each in inputs:
        request_of(manifest, each, settings, 0)
    return inputs, _counted(len(inputs), "latent")


def _guided(
    manifest: Manifest, inputs: Sequence[Inputs], negative: NDArray[np.float32] | None
) -> list[Inputs]:
    """Inputs with the negative caption that a bundle with guidance wants."""
    if negative is None and manifest.sampler.guidance == 1:
        return list(inputs)
    if negative is None:
        _log.warning(
            "zeros stand for the negative caption; calibrate by pid-calibrate --negative FILE with "
            "the one that you will decode with"
        )
    found: list[Inputs] = []
    for each in inputs:
        caption = empty_caption(manifest) if each.caption is None else each.caption
        found.append(
            replace(
                each,
                caption=caption,
                negative=np.zeros_like(caption[:1]) if negative is None else negative,
            )
        )
    return found


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _photographs(manifest: Manifest, photos: Sequence[Path]) -> list[Inputs]:
    multiple = pixels_per_latent_pixel(manifest) // manifest.model["scale"]
    found: list[Inputs] = []
    for seed, photo in enumerate(photos):
        image = padded(read_photo(photo), multiple)[None]
        for sigma in SIGMAS:
            latent = codec.encode(manifest, image, sigma, seed)
            found.append(Inputs(latent, None, None, np.array([sigma], np.float32)))
    return found


def synthetic_inputs(manifest: Manifest) -> list[Inputs]:
    """Latents and captions of Gaussian noise, as spread as normalised ones are."""
    rng = np.random.default_rng(0)
    network = manifest.network
    side = _SIDE
    while (side * manifest.tokens_per_latent) ** 2 > manifest.most_tokens:
        side -= 1
    shape = 1, network["latent_channels"], side, side
    caption_shape = 1, network["text_max_length"], network["text_dim"]
    is_guided = manifest.sampler.guidance != 1
    found: list[Inputs] = []
    for _ in range(_SYNTHETIC):
        latent = rng.standard_normal(shape, np.float32)
        caption = rng.standard_normal(caption_shape, np.float32)
        negative = rng.standard_normal(caption_shape, np.float32) if is_guided else None
        found += [
            Inputs(latent, caption, negative, np.array([each], np.float32)) for each in SIGMAS
        ]
    return found
