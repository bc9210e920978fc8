"""Photo files as images a codec takes: upright, in sRGB, without transparency."""

import contextlib
import io
import os
import warnings
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano.codec import from_uint8

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""What is taken from a folder of photos; a file that is named may be any that Pillow reads."""


def photo_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a photo as `read_photo` turns it.

    Only the file's head is read. Raises `PidRuntimeError` for a file that is no image.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if on_its_side else (width, height)


def read_photo(photo: str | os.PathLike[str] | Image.Image) -> NDArray[np.float32]:
    """Read a photo, in a file or opened, as float32 `[3, H, W]` in [-1, 1].

    It is turned as its EXIF data says and converted to sRGB from the colour profile in it, if that
    can be used; what is transparent is put on white. Greyscale of 16 bits keeps its precision;
    colours of 16 bits are read as 8. Of several frames or pages the first one is taken.
    Raises `PidRuntimeError` for a file that is no image, or a damaged one.
    """
    if isinstance(photo, Image.Image):
        return _read(photo, "it")
    with _opened(Path(photo)) as image:
        return _read(image, str(photo))


def _read(image: Image.Image, where: str) -> NDArray[np.float32]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        return _grey16(upright)
    if upright.mode == "F":
        raise PidRuntimeError(
            f"expected a photo of whole numbers, but got floats in {where}; save it as 8 bits"
        )
    return from_uint8(np.asarray(_on_white(upright)))


def resized(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """`[3, H, W]` in [-1, 1] at another size, by Lanczos' filter; the same at its own."""
    if image.shape[1:] == (height, width):
        return image
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS))
        for channel in image
    ]
    return np.clip(np.stack(channels), -1, 1)


def middle_square(image: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Of `[3, H, W]` in [-1, 1] the square in the middle, at another size: `[3, side, side]`."""
    least = min(image.shape[1:])
    top, left = ((length - least) // 2 for length in image.shape[1:])
    return resized(image[:, top : top + least, left : left + least], side, side)


def padded(image: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    """`[3, H, W]` with its last row and column repeated until both sides divide by `multiple`."""
    _, height, width = image.shape
    return np.pad(image, ((0, 0), (0, -height % multiple), (0, -width % multiple)), "edge")


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Image.Image, None, None]:
    """Open an image; what goes wrong until it is closed is said in one line."""
    if not path.is_file():
        raise PidRuntimeError(f"expected a photo, but {path} is no file; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, in several lines
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except PidRuntimeError:
        raise
    except Image.UnidentifiedImageError:
        raise PidRuntimeError(
            f"expected a photo, but {path} is no image that Pillow reads; convert it to PNG or JPEG"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PidRuntimeError(
            f"expected a photo of at most {Image.MAX_IMAGE_PIXELS} pixels, but {path} has more; "
            "reduce it first"
        ) from None
    except Exception as error:  # a damaged file fails its parser in almost any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise PidRuntimeError(
            f"expected a whole photo, but cannot read {path}: {reason}; save it again"
        ) from error


def _grey16(image: Image.Image) -> NDArray[np.float32]:
    """Grey of 16 bits, by its colour profile, and its transparent value as white."""
    values = np.asarray(image)
    grey = values.astype(np.float32)
    if grey.min() < 0 or grey.max() > 65535:
        raise PidRuntimeError("expected a grey photo of at most 16 bits, but got other values")
    grey = _toned(image, grey)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 65535
    grey /= 32767.5
    grey -= 1.0
    return np.stack([grey] * 3)


def _toned(image: Image.Image, grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values 0 to 65535 by the tone curve of the image's profile.

    The curve is known at 256 levels, which is as fine as Pillow converts, and straight between.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    ramp.info["icc_profile"] = image.info.get("icc_profile")
    curve = np.asarray(_in_srgb(ramp))[0, :, 1].astype(np.float32)
    if np.array_equal(curve, np.arange(256)):
        return grey
    return np.interp(grey, 257.0 * np.arange(256), 257.0 * curve).astype(np.float32)


def _on_white(image: Image.Image) -> Image.Image:
    """In sRGB, and opaque."""
    if not image.has_transparency_data:
        return _in_srgb(image)
    layered = image.convert("RGBA")
    colours = image.convert("L") if image.mode in ("L", "LA") else layered  # as profiles have it
    colours.info["icc_profile"] = image.info.get("icc_profile")
    white = Image.new("RGB", image.size, "white")
    white.paste(_in_srgb(colours), mask=layered.getchannel("A"))
    return white


def _in_srgb(image: Image.Image) -> Image.Image:
    """As RGB, by the colour profile in the file if it is one that can be used."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        from PIL import ImageCms
    except ImportError:  # not in every build of Pillow
        return image.convert("RGB")
    plain = image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")
    # Optimised, dark greys of a linear profile are ten levels off.
    flags = ImageCms.Flags.NOOPTIMIZE if plain.mode == "L" else ImageCms.Flags.NONE
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            plain,
            own,
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
            flags=flags,
        )
    except (ImageCms.PyCMSError, ImportError, OSError):  # a broken profile, or another mode's
        converted = None
    return image.convert("RGB") if converted is None else converted
