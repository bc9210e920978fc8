"""Pixels, image files and contact sheets."""

import errno
import importlib.util
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pid_runtime import __version__
from pid_runtime.command import images
from pid_runtime.errors import PidRuntimeError


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    planes = [255 * x // width, 255 * y // height, 128 + 0 * x]
    return np.stack(planes, axis=-1).astype(np.uint8)


def test_to_uint8_clamps_and_rounds_halves_to_even() -> None:
    levels = np.array([-7, -1, -0.5, 0, 0.5, 1, np.inf, -np.inf], np.float32)
    image = np.broadcast_to(levels, (2, 3, 1, 8)).copy()
    pixels = images.to_uint8(image)
    assert pixels.shape == (2, 1, 8, 3) and pixels.dtype == np.uint8
    # 127.5 * 0.5 is 63.75, 127.5 * 1 is a half and goes to the even 128, 127.5 * 1.5 is 191.25
    assert pixels[1, 0, :, 2].tolist() == [0, 0, 64, 128, 191, 255, 255, 0]
    halves = ((np.arange(256) + 0.5) / 127.5 - 1).astype(np.float32)
    exact = (halves + np.float32(1)) * np.float32(127.5)
    got = images.to_uint8(np.broadcast_to(halves, (3, 1, 256)))[0, :, 0]
    assert got.tolist() == np.clip(np.rint(exact), 0, 255).tolist()


def test_to_uint8_leaves_its_input_and_keeps_channels_apart() -> None:
    image = np.linspace(-1, 1, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    before = image.copy()
    pixels = images.to_uint8(image)
    np.testing.assert_array_equal(image, before)
    assert pixels[3, 4].tolist() == images.to_uint8(image[:, 3:, 4:])[0, 0].tolist()
    assert pixels[0, 0, 0] < pixels[0, 0, 1] < pixels[0, 0, 2]


def test_to_uint8_refuses_nan_and_other_shapes() -> None:
    image = np.zeros((3, 2, 2), np.float32)
    image[1, 1, 1] = np.nan
    with pytest.raises(PidRuntimeError, match="NaN"):
        images.to_uint8(image)
    with pytest.raises(PidRuntimeError, match=r"expected an image of shape"):
        images.to_uint8(np.zeros((4, 2, 2), np.float32))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.tif", "a.TIFF"])
def test_saves_by_suffix(tmp_path: Path, name: str) -> None:
    pixels = gradient(48, 64)
    images.save_image(tmp_path / name, pixels)
    with Image.open(tmp_path / name) as image:
        read = np.asarray(image.convert("RGB")).astype(int)
    limit = 0 if name.lower().endswith(("png", "tif", "tiff")) else 16
    assert read.shape == pixels.shape and abs(read - pixels).max() <= limit
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (512, 1024), (700, 1030)])
def test_a_tiff_is_a_big_one_in_tiles(tmp_path: Path, height: int, width: int) -> None:
    target, pixels = tmp_path / "a.tiff", gradient(height, width)
    images.save_image(target, pixels, {"seed": 7})
    with tifffile.TiffFile(target) as file:
        (page,) = file.pages
        assert file.is_bigtiff and isinstance(page, tifffile.TiffPage) and page.is_tiled
        assert (page.tilelength, page.tilewidth) == (512, 512)
        assert page.software == f"pid-trt {__version__}"
        assert json.loads(page.description) == {"seed": 7}
        np.testing.assert_array_equal(page.asarray(), pixels)
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    images.save_image(target, pixels)
    with tifffile.TiffFile(target) as file:
        assert {270, 305}.isdisjoint(file.pages.first.tags.keys())  # description and software


def test_a_tiff_takes_little_memory(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4096, 4096, 3), np.uint8)
    tracemalloc.start()
    try:
        images.save_image(tmp_path / "a.tif", pixels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < pixels.nbytes / 4


def test_a_failed_tiff_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_pixels: object) -> Iterator[NDArray[np.uint8]]:
        yield np.zeros((512, 512, 3), np.uint8)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "_tiles", fail)
    with pytest.raises(OSError, match="No space"):
        images.save_image(tmp_path / "a.tif", gradient(600, 600))
    assert os.listdir(tmp_path) == []


def test_a_tiff_needs_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    images.check_image_path(tmp_path / "a.png")
    with pytest.raises(PidRuntimeError, match=r"pip install 'pid-trt\[tiff\]', or write a PNG"):
        images.check_image_path(tmp_path / "a.tiff")


def test_huge_pictures_are_tiffs_where_nobody_says() -> None:
    assert images.usual_format(8192, 8192) == "png"
    assert images.usual_format(16_384, 16_384) == "tiff"
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == images.LARGEST_PNG


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    images.save_image(target, gradient(8, 8))
    before = target.read_bytes()

    def fail(self: Image.Image, file: Any, *_: object, **__: object) -> None:
        file.write(b"half an image")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        images.save_image(target, gradient(16, 16))
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_refuses_bad_paths_and_pixels(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    pixels = gradient(8, 8)
    for path, message in (
        (tmp_path / "a.gif", "ending in .png, .jpg, .jpeg, .webp, .tif, .tiff, but"),
        (tmp_path / "a", "ending in"),
        (tmp_path / "missing" / "a.png", "expected a folder to write a.png in"),
        (tmp_path / "folder.png", "but got the folder"),
    ):
        with pytest.raises(PidRuntimeError, match=message):
            images.save_image(path, pixels)
    wrong: Any
    for wrong in (pixels[..., :2], pixels.astype(np.float32), pixels[:0]):
        with pytest.raises(PidRuntimeError, match=r"expected uint8 pixels of shape \(H, W, 3\)"):
            images.save_image(tmp_path / "a.png", wrong)
    with pytest.raises(PidRuntimeError, match="write a PNG"):
        images.save_image(tmp_path / "a.webp", np.zeros((1, 20_000, 3), np.uint8))
    assert os.listdir(tmp_path) == ["folder.png"]


def test_refuses_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no folder refuses.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PidRuntimeError, match="expected a writable folder"):
        images.save_image(tmp_path / "a.png", gradient(8, 8))


def test_sheet_enlarges_to_the_tallest_and_keeps_pixels() -> None:
    small, tall, wide = gradient(32, 64), gradient(128, 96), gradient(64, 16)
    sheet = images.side_by_side([("input", small), ("PiD", tall), ("a long label", wide)])
    assert sheet.shape[1] == 256 + 96 + 32 + 4 * 8 and sheet.shape[0] > 128 + 8
    top, left = sheet.shape[0] - 128 - 8, 256 + 2 * 8
    np.testing.assert_array_equal(sheet[top : top + 128, left : left + 96], tall)
    label = sheet[:top, 8:60].astype(int)
    assert label.max() > 200 and label.min() < 30
    past_the_last_label = sheet[:top, -8:]
    assert past_the_last_label.max() < 30


def test_sheet_refuses_nothing_and_wrong_pixels() -> None:
    with pytest.raises(PidRuntimeError, match="at least one image"):
        images.side_by_side([])
    with pytest.raises(PidRuntimeError, match="expected uint8 pixels"):
        images.side_by_side([("a", np.zeros((3, 4, 4), np.uint8))])
