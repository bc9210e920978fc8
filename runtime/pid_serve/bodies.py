"""What a request holds, as arrays and settings; nothing in it is trusted."""

import io
import warnings
from typing import Any, Literal

import numpy as np
from fastapi import UploadFile
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pid_runtime.errors import PidRuntimeError

_NAMES = ("latent", "caption", "sigma")
_PHOTOS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "safetensors": "application/octet-stream",
}


class TooManyPixelsError(PidRuntimeError):
    """A picture is larger than the server takes."""


class Settings(BaseModel):
    """How an image is made."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="name of a bundle; the first one")
    seed: int = Field(0, ge=0, le=2**64 - 1, description="of the first image")
    steps: int | None = Field(None, ge=1, le=4, description="1, 2 or 4; the bundle's default")
    output: Literal["png", "jpeg", "webp", "safetensors"] = "png"


class DecodeSettings(Settings):
    """Beside a latent."""

    sigma: float | None = Field(None, ge=0, le=1, description="noise level; the body's, or 0")


class UpscaleSettings(Settings):
    """Beside a picture."""

    image: UploadFile = Field(description="PNG, JPEG, WebP, TIFF or BMP")
    sigma: float = Field(0.0, ge=0, le=1, description="noise to add to its latent")


def read_tensors(body: bytes) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors body: "latent" `[C, h, w]` or `[1, C, h, w]`, perhaps "caption"
    `[T, D]` or `[1, T, D]` and "sigma", a number.

    Raises `PidRuntimeError` for anything else.
    """
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise PidRuntimeError(
            f"expected a safetensors body, but got: {reason}; save it with safetensors"
        ) from None
    if "latent" not in tensors or not tensors.keys() <= set(_NAMES):
        names = ", ".join(sorted(tensors))[:100] or "no tensors"
        raise PidRuntimeError(
            f"expected a tensor latent, and at most caption and sigma, but got {names}; rename them"
        )
    latent = tensors["latent"]
    tensors["latent"] = latent[None] if latent.ndim == 3 else latent
    if tensors["latent"].shape[:1] != (1,):
        raise PidRuntimeError(
            f"expected one latent [C, h, w], but got {list(latent.shape)}; send one each time"
        )
    if "caption" in tensors and tensors["caption"].ndim == 2:
        tensors["caption"] = tensors["caption"][None]
    return tensors


def read_picture(body: bytes, most_pixels: int) -> Image.Image:
    """A picture, of which only the head has been looked at when it is refused.

    Raises `TooManyPixelsError` above `most_pixels`, and `PidRuntimeError` for no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(body), formats=_PHOTOS)
            if image.width * image.height <= most_pixels:
                image.load()
                return image
    except Exception as error:  # a damaged file fails its parser in almost any way
        raise PidRuntimeError(
            f"expected a whole picture ({', '.join(_PHOTOS)}), but got none; save it again"
        ) from error
    raise TooManyPixelsError(
        f"expected a picture of at most {most_pixels} pixels, but got {image.width}x"
        f"{image.height}; reduce it first"
    )


def encoded(pixels: NDArray[np.uint8], output: str) -> bytes:
    """One image `[H, W, 3]` as the file that was asked for.

    Raises `PidRuntimeError` for one that the format cannot hold.
    """
    if output == "safetensors":
        return save({"image": np.ascontiguousarray(pixels)})
    file = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 4} if output == "png" else {"quality": 95}
    try:
        Image.fromarray(pixels).save(file, output.upper(), **options)
    except (OSError, ValueError):
        raise PidRuntimeError(
            f"expected an image that {output} holds, but got {pixels.shape[1]}x{pixels.shape[0]}; "
            "ask for png"
        ) from None
    return file.getvalue()
