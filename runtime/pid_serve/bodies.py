"""What a request holds, as arrays and settings; nothing in it is trusted."""

import base64
import binascii
import io
import math
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import UploadFile
from numpy.typing import NDArray
from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pid_runtime.bundle.manifest import LARGEST_GUIDANCE
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano.photos import middle_square, padded, read_photo
from pid_runtime.tiles import LARGEST_SIDE, TileOption

_NAMES = ("latent", "caption", "negative", "sigma")
_PHOTOS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "safetensors": "application/octet-stream",
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 4},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}
"""Of Pillow, as pid-decode writes files."""


class TooManyPixelsError(PidRuntimeError):
    """A picture is larger than the server takes."""


Prompt = Annotated[str, Field(min_length=1, max_length=4000)]


class Settings(BaseModel):
    """How an image is made."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="name of a bundle; the first one")
    seed: int = Field(0, ge=0, le=2**64 - 1, description="of the first image")
    steps: int | None = Field(None, ge=1, le=100, description="1, 2 or 4; the bundle's default")
    tile: str | None = Field(
        None,
        pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description="auto, or width x height of tiles in pixels of the image",
    )
    overlap: int | None = Field(None, ge=0, le=LARGEST_SIDE, description="of tiles, in pixels")
    sigma: float | None = Field(
        None, ge=0, le=1, description="noise level of the latent, or to add to a picture's"
    )
    prompt: Prompt | None = Field(None, description="what is to be seen, in place of a caption")
    negative_prompt: str | None = Field(
        None,
        max_length=4000,
        description="undistilled: what is not to be seen, in place of a negative caption",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        le=LARGEST_GUIDANCE,
        description="undistilled: how far from the negative, 1 for not at all; the bundle's",
    )
    output: Literal["png", "jpeg", "webp", "safetensors"] = "png"
    preview: bool = Field(False, description="of the state after each step, in events")
    native: bool = Field(False, description="also what the latent's own decoder makes, in events")

    @property
    def tiles(self) -> TileOption:
        """As `Decoder.decode` takes them."""
        if self.tile is None or self.tile == "auto":
            return self.tile
        return tuple(map(int, self.tile.split("x")))


class DecodeSettings(Settings):
    """Beside a safetensors body."""


class UpscaleSettings(Settings):
    """Beside a picture."""

    image: UploadFile = Field(description="PNG, JPEG, WebP, TIFF or BMP")


class Tensor(BaseModel):
    """An array in JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    shape: list[Annotated[int, Field(ge=1, le=2**24)]] = Field(min_length=1, max_length=4)
    dtype: Literal["float16", "float32"] = "float32"
    data: str = Field(description="base64 of the values, little-endian, the last axis fastest")

    def array(self, name: str) -> NDArray[Any]:
        """The values. Raises `PidRuntimeError` for other than the shape says."""
        try:
            data = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError):
            raise PidRuntimeError(f"expected base64 as data of {name}; encode its bytes") from None
        kind = np.dtype(self.dtype).newbyteorder("<")
        wanted = math.prod(self.shape) * kind.itemsize
        if len(data) != wanted:
            raise PidRuntimeError(
                f"expected {wanted} bytes of {self.dtype} {self.shape} as {name}, but got "
                f"{len(data)}; send all of it"
            )
        return np.frombuffer(data, kind).reshape(self.shape)


class DecodeBody(Settings):
    """A latent and all settings, in JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    latent: Tensor = Field(description="[C, h, w], normalised")
    caption: Tensor | None = Field(None, description="[T, D]")
    negative: Tensor | None = Field(None, description="undistilled: [T, D], as of the caption")


class CaptionBody(BaseModel):
    """Prompts to encode."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[Prompt] = Field(min_length=1, max_length=16)
    model: str | None = Field(None, max_length=200, description="of which bundle; the first one")


def as_tensors(body: DecodeBody) -> dict[str, NDArray[Any]]:
    """As `read_tensors`, of JSON."""
    tensors = {"latent": body.latent.array("latent")}
    for name, tensor in (("caption", body.caption), ("negative", body.negative)):
        if tensor is not None:
            tensors[name] = tensor.array(name)
    return _batched(tensors)


def read_tensors(body: bytes) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors body: "latent" `[C, h, w]` or `[1, C, h, w]`, perhaps "caption" and
    "negative" `[T, D]` or `[1, T, D]`, and "sigma", a number.

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
            f"expected a tensor latent, and at most caption, negative and sigma, but got {names}; "
            "rename them"
        )
    return _batched(tensors)


def _batched(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """With the axis of images in front, of which there is one."""
    latent = tensors["latent"]
    tensors["latent"] = latent[None] if latent.ndim == 3 else latent
    if tensors["latent"].shape[:1] != (1,):
        raise PidRuntimeError(
            f"expected one latent [C, h, w], but got {list(latent.shape)}; send one each time"
        )
    for name in ("caption", "negative"):
        if name in tensors and tensors[name].ndim == 2:
            tensors[name] = tensors[name][None]
    return tensors


def read_picture(
    body: bytes,
    most_pixels: int,
    check: Callable[[int, int], object],
    multiple: int,
    side: int | None = None,
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """A picture as `[1, 3, H, W]` in [-1, 1], padded to sides of `multiple`; and its own H and W.

    check: called with height and width of its latent; raises for one that is too large. side: of
    the square that its middle becomes; None where it stays as it is. Only its head has been looked
    at when it is refused: `TooManyPixelsError` above `most_pixels`, `PidRuntimeError` for no
    picture, and what check raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(body), formats=_PHOTOS)
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
                width, height = height, width
            if width * height <= most_pixels:
                height, width = (height, width) if side is None else (side, side)
                check(-(-height // multiple), -(-width // multiple))
                photo = read_photo(image)
                if side is not None:
                    photo = middle_square(photo, side)
                return padded(photo, multiple)[None], (photo.shape[1], photo.shape[2])
    except PidRuntimeError:
        raise
    except Exception as error:  # a damaged file fails its parser in almost any way
        raise PidRuntimeError(
            f"expected a whole picture ({', '.join(_PHOTOS)}), but got none; save it again"
        ) from error
    raise TooManyPixelsError(
        f"expected a picture of at most {most_pixels} pixels, but got {width}x{height}; reduce it "
        "first"
    )


def encoded(pixels: NDArray[np.uint8], output: str) -> bytes:
    """One image `[H, W, 3]` as the file that was asked for.

    Raises `PidRuntimeError` for one that the format cannot hold.
    """
    if output == "safetensors":
        return save({"image": np.ascontiguousarray(pixels)})
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).save(file, output.upper(), **_OPTIONS[output])
    except (OSError, ValueError):
        raise PidRuntimeError(
            f"expected an image that {output} holds, but got {pixels.shape[1]}x{pixels.shape[0]}; "
            "ask for png"
        ) from None
    return file.getvalue()
