"""Decoded images as 8-bit pixels, files and contact sheets."""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from pid_runtime import __version__
from pid_runtime.bundle.files import whole_file
from pid_runtime.errors import PidRuntimeError


class _Format(NamedTuple):
    name: str
    """What Pillow calls it, if that writes it."""
    largest_side: int
    """Most pixels the format stores along one side."""
    options: dict[str, Any]


_JPEG = _Format("JPEG", 65_535, {"quality": 95, "subsampling": 0})
_TIFF = _Format("TIFF", 2**31 - 1, {"compression": "zlib", "compressionargs": {"level": 4}})
_FORMATS = {
    ".png": _Format("PNG", 2**31 - 1, {"compress_level": 4}),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", 16_383, {"quality": 95}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
}

SUFFIXES = tuple(_FORMATS)
"""Of image files, in small letters."""

FORMATS = ("png", "jpg", "webp", "tiff")
"""What images may be, by their suffixes."""

LARGEST_PNG = 178_956_970
"""Pixels of the largest picture that Pillow opens without being told to: twice its limit."""

_TIFF_TILE = 512
"""Side of a tile of a TIFF file, in pixels: a multiple of 16."""

_MARGIN = 8
_SHEET_BACKGROUND, _SHEET_TEXT = (24, 24, 24), (235, 235, 235)


def to_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float images `[.., 3, H, W]` in [-1, 1] to 8-bit pixels `[.., H, W, 3]`.

    Values outside are clamped; 127.5 (x + 1) is rounded to the nearest integer, halves to even.
    Raises `PidRuntimeError` for another shape or for NaN.
    """
    if image.ndim < 3 or image.shape[-3] != 3:
        raise PidRuntimeError(f"expected an image of shape (.., 3, H, W), but got {image.shape}")
    pixels = np.empty((*image.shape[:-3], *image.shape[-2:], 3), np.uint8)
    for channel in range(3):  # by channel: a 4096 x 4096 image is 200 MB in float32
        plane = np.clip(image[..., channel, :, :], -1.0, 1.0)
        if np.isnan(plane).any():
            raise PidRuntimeError("expected an image of numbers, but got NaN")
        plane += 1.0
        plane *= 127.5
        pixels[..., channel] = np.rint(plane, out=plane)
    return pixels


def usual_format(height: int, width: int) -> str:
    """What a picture of a size is written as where nobody says: PNG, or TIFF if it is huge."""
    return "tiff" if height * width > LARGEST_PNG else "png"


def check_image_path(path: str | os.PathLike[str]) -> None:
    """Raise `PidRuntimeError` unless an image may be written to `path`.

    To be called before minutes of work: the suffix must be a known one, what writes it installed,
    and the folder writable.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise PidRuntimeError(
            f"expected an image name ending in {', '.join(_FORMATS)}, but got {str(target)!r}"
        )
    is_tiff = _FORMATS[target.suffix.lower()] is _TIFF
    if is_tiff and importlib.util.find_spec("tifffile") is None:
        raise PidRuntimeError(
            f"expected the package tifffile to write {target.name}, but it is not installed; "
            "pip install 'pid-trt[tiff]', or write a PNG"
        )
    if not target.parent.is_dir():
        raise PidRuntimeError(
            f"expected a folder to write {target.name} in, but got {str(target.parent)!r}, "
            f"which is not one"
        )
    if target.is_dir():
        raise PidRuntimeError(f"expected an image's name, but got the folder {str(target)!r}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PidRuntimeError(f"expected a writable folder, but got {str(target.parent)!r}")


def check_image_size(path: str | os.PathLike[str], height: int, width: int) -> None:
    """Raise `PidRuntimeError` unless the format of `path`, a known one, holds such an image."""
    kind = _FORMATS[Path(path).suffix.lower()]
    if max(height, width) > kind.largest_side:
        raise PidRuntimeError(
            f"expected at most {kind.largest_side} pixels along a side of a {kind.name} file, "
            f"but got {height}x{width}; write a PNG"
        )


def save_image(
    path: str | os.PathLike[str],
    pixels: NDArray[np.uint8],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write 8-bit pixels `[H, W, 3]` as PNG, JPEG, WebP or TIFF, by the suffix of `path`.

    TIFF is BigTIFF in tiles, compressed without loss, and written tile by tile: it takes no memory
    to speak of beside the pixels.
    record: how the image was made, which goes into it as JSON: as the text "pid-trt" of a PNG, and
    as the image description of a TIFF or of EXIF data otherwise; all name the software.
    An existing file is replaced. The file appears whole or not at all. Raises `PidRuntimeError`
    for what `check_image_path` refuses and for images the format cannot hold, `OSError` when
    writing fails half-way (no space on the disk).
    """
    check_image_path(path)
    target = Path(path)
    _check_pixels(pixels)
    check_image_size(path, *pixels.shape[:2])
    kind = _FORMATS[target.suffix.lower()]
    options = kind.options if record is None else {**kind.options, **_described(kind, record)}
    with whole_file(target) as aside, aside.open("wb") as file:
        if kind is _TIFF:
            _write_tiff(file, pixels, options)
        else:
            Image.fromarray(pixels).save(file, kind.name, **options)


def _write_tiff(file: BinaryIO, pixels: NDArray[np.uint8], options: Mapping[str, Any]) -> None:
    from tifffile import TiffWriter  # an extra

    with TiffWriter(file, bigtiff=True) as writer:
        writer.write(
            _tiles(pixels),
            shape=pixels.shape,
            dtype=pixels.dtype,
            photometric="rgb",
            tile=(_TIFF_TILE, _TIFF_TILE),
            predictor=True,
            metadata=None,
            maxworkers=1,  # more of them would be given all tiles at once
            **{"software": False, **options},
        )


def _tiles(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Row by row; those at the right and the bottom end in zeros."""
    height, width, channels = pixels.shape
    for top in range(0, height, _TIFF_TILE):
        for left in range(0, width, _TIFF_TILE):
            part = pixels[top : top + _TIFF_TILE, left : left + _TIFF_TILE]
            tile = np.zeros((_TIFF_TILE, _TIFF_TILE, channels), np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _described(kind: _Format, record: Mapping[str, Any]) -> dict[str, Any]:
    """Options of what writes a file that put a record into it."""
    software, text = f"pid-trt {__version__}", json.dumps(record)
    if kind is _TIFF:
        return {"software": software, "description": text}
    if kind.name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("Software", software)
        info.add_itxt("pid-trt", text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = software
    exif[ExifTags.Base.ImageDescription] = text
    return {"exif": exif}


def side_by_side(images: Sequence[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """A contact sheet `[H', W', 3]` of labelled images `[H, W, 3]`, from left to right.

    Smaller images are enlarged to the height of the tallest, so that the same part of a scene
    has the same size; none is reduced. Labels too long for their image are cut. Raises
    `PidRuntimeError` when there is no image, or one of another shape or dtype.
    """
    if not images:
        raise PidRuntimeError("expected at least one image for a sheet, but got none")
    for _, pixels in images:
        _check_pixels(pixels)
    height = max(pixels.shape[0] for _, pixels in images)
    sheet_height, sheet_width = sheet_size([pixels.shape[:2] for _, pixels in images])
    font, label_height = _label_font(height)
    sheet = Image.new("RGB", (sheet_width, sheet_height), _SHEET_BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    tiles = (_enlarged(pixels, height) for _, pixels in images)
    left = _MARGIN
    for (label, _), tile in zip(images, tiles, strict=True):
        draw.text((left, _MARGIN), _cut(label, tile.width, font), _SHEET_TEXT, font)
        sheet.paste(tile, (left, label_height))
        left += tile.width + _MARGIN
    return np.array(sheet)


def sheet_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of the sheet `side_by_side` makes of images of these heights and widths."""
    height = max(height for height, _ in sizes)
    _, label_height = _label_font(height)
    width = sum(_enlarged_width(size, height) for size in sizes) + _MARGIN * (len(sizes) + 1)
    return label_height + height + _MARGIN, width


def _label_font(height: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """The font of the labels above images of `height`, and the pixels they take."""
    font = ImageFont.load_default(size=max(12, height // 32))
    return font, int(font.getbbox("Ag")[3]) + 2 * _MARGIN


def _enlarged_width(size: tuple[int, int], height: int) -> int:
    """Width of an image of `size` (height, width) once it has `height`."""
    return max(1, round(size[1] * height / size[0]))


def _check_pixels(pixels: NDArray[np.uint8]) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise PidRuntimeError(
            f"expected uint8 pixels of shape (H, W, 3), but got {pixels.dtype} {pixels.shape}"
        )


def _enlarged(pixels: NDArray[np.uint8], height: int) -> Image.Image:
    image = Image.fromarray(pixels)
    if image.height == height:
        return image
    width = _enlarged_width(pixels.shape[:2], height)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _cut(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`label`, or as much of it as is at most `width` pixels wide, with dots at the end."""
    if font.getlength(label) <= width:
        return label
    for length in range(len(label) - 1, 0, -1):
        short = label[:length].rstrip() + "..."
        if font.getlength(short) <= width:
            return short
    return ""
