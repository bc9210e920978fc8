"""Photo files of every kind a user may have, as the image that a codec gets."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pid_runtime.command.images import to_uint8
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano import photos

Pixels = NDArray[np.uint8]


def picture(height: int = 24, width: int = 40) -> Pixels:
    """Smooth, and unlike itself however it is turned."""
    y, x = np.mgrid[:height, :width]
    planes = [40 + 200 * x // width, 30 + 180 * y // height, 120 + 60 * (x > y)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def read(path: Path) -> Pixels:
    image = photos.read_photo(path)
    assert image.dtype == np.float32 and np.abs(image).max() <= 1
    return to_uint8(image)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_colours_are_kept(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.tif"):
        path = saved(tmp_path / name, Image.fromarray(picture()))
        np.testing.assert_array_equal(read(path), picture())
        assert photos.photo_size(path) == (40, 24)
    for name in ("a.jpg", "a.webp"):
        path = saved(tmp_path / name, Image.fromarray(picture()), quality=95)
        assert np.abs(read(path).astype(int) - picture()).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_photos_are_turned_upright(tmp_path: Path, name: str, orientation: int) -> None:
    """Each orientation of the EXIF standard, undone by numpy."""
    upright = picture()
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if name.endswith("jpg") else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    got = read(saved(tmp_path / name, image, exif=exif, **options))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 3


def test_transparent_is_white(tmp_path: Path) -> None:
    alpha = np.full((24, 40), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    want = picture().astype(float)
    cover = alpha[..., None] / 255
    want = want * cover + 255 * (1 - cover)
    layered = Image.fromarray(np.dstack([picture(), alpha]))
    for name, image in (
        ("rgba.png", layered),
        ("rgba.webp", layered),
        ("rgba.tif", layered),
    ):
        options = {"lossless": True} if name.endswith("webp") else {}
        got = read(saved(tmp_path / name, image, **options))
        assert np.abs(got - want).max() <= 1.01, name
    grey = Image.fromarray(np.dstack([picture()[..., 0], alpha]))
    assert grey.mode == "LA"
    got = read(saved(tmp_path / "la.png", grey))
    assert np.abs(got - (picture()[..., :1] * cover + 255 * (1 - cover))).max() <= 1.01


def test_palettes(tmp_path: Path) -> None:
    image = Image.fromarray(picture()).quantize(16)
    plain = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read(saved(tmp_path / "p.png", image)), plain)
    index = int(np.asarray(image)[0, 0])
    got = read(saved(tmp_path / "t.png", image, transparency=index))
    clear = np.asarray(image) == index
    assert (got[clear] == 255).all()
    np.testing.assert_array_equal(got[~clear], plain[~clear])
    got = read(saved(tmp_path / "g.gif", image))
    np.testing.assert_array_equal(got, plain)


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    got = read(saved(tmp_path / "l.png", Image.fromarray(grey)))
    np.testing.assert_array_equal(got, np.dstack([grey] * 3))
    bits = Image.fromarray(grey > 128)
    got = read(saved(tmp_path / "1.png", bits))
    np.testing.assert_array_equal(got[..., 1], np.where(grey > 128, 255, 0))


def test_grey_of_16_bits_keeps_its_precision(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        got = photos.read_photo(saved(tmp_path / name, Image.fromarray(values)))
        np.testing.assert_allclose(got, np.stack([values / 32767.5 - 1] * 3), atol=1e-6)
    wide = Image.fromarray(values.astype(np.int32) * 3)
    with pytest.raises(PidRuntimeError, match="at most 16 bits"):
        photos.read_photo(saved(tmp_path / "wide.tif", wide))
    with pytest.raises(PidRuntimeError, match="but got floats in "):
        photos.read_photo(saved(tmp_path / "f.tif", Image.fromarray(values.astype(np.float32))))


def test_cmyk(tmp_path: Path) -> None:
    image = Image.fromarray(picture()).convert("CMYK")
    got = read(saved(tmp_path / "a.jpg", image, quality=98, subsampling=0))
    assert np.abs(got.astype(int) - np.asarray(image.convert("RGB"))).mean() < 3


def test_colour_profiles_are_converted_to_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(picture())
    got = read(saved(tmp_path / "srgb.png", image, icc_profile=srgb))
    assert np.abs(got.astype(int) - picture()).max() <= 1
    lab = ImageCms.createProfile("LAB")
    to_lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    assert to_lab is not None
    profile = ImageCms.ImageCmsProfile(lab).tobytes()
    got = read(saved(tmp_path / "lab.tif", to_lab, icc_profile=profile))
    assert np.abs(got.astype(int) - picture()).mean() < 3
    # One that is broken, or of another kind of image, is as good as none.
    for useless in (b"no profile", srgb[:200]):
        got = read(saved(tmp_path / "odd.png", image, icc_profile=useless))
        np.testing.assert_array_equal(got, picture())
    grey = Image.fromarray(picture()[..., 0])
    got = read(saved(tmp_path / "grey.png", grey, icc_profile=srgb))
    np.testing.assert_array_equal(got[..., 0], picture()[..., 0])


def linear_grey() -> bytes:
    """An ICC profile (ICC.1:2001-04) of grey without gamma: a white point and an identity curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    table = struct.pack(">I", 2)
    table += b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 12)
    illuminant = struct.pack(">3i", 63190, 65536, 54061)
    header = struct.pack(">I4sI4s4s4s", 188, b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + illuminant + bytes(48)
    return header + table + white + curve


def as_srgb(linear: NDArray[Any]) -> NDArray[Any]:
    """IEC 61966-2-1, of 0 to 1."""
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_grey_has_profiles_too(tmp_path: Path) -> None:
    profile = linear_grey()
    assert len(profile) == 188
    values = np.linspace(0, 255, 24 * 40).reshape(24, 40).astype(np.uint8)
    wanted = 255 * as_srgb(values / 255)
    got = read(saved(tmp_path / "l.png", Image.fromarray(values), icc_profile=profile))
    assert np.abs(got - wanted[..., None]).max() < 1.5 and got.max() == 255
    half = np.full_like(values, 128)
    layered = Image.merge("LA", [Image.fromarray(values), Image.fromarray(half)])
    got = read(saved(tmp_path / "la.png", layered, icc_profile=profile))
    assert np.abs(got - (wanted * 128 + 255 * 127)[..., None] / 255).max() < 2
    fine = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    path = saved(tmp_path / "l16.png", Image.fromarray(fine), icc_profile=profile)
    got16 = (photos.read_photo(path)[0] + 1) / 2
    assert np.abs(got16 - as_srgb(fine / 65535))[fine > 2000].max() < 0.004
    assert len(np.unique(got16)) > 500  # finer than 8 bits


def test_the_transparent_value_of_grey_is_white(tmp_path: Path) -> None:
    values = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60
    path = saved(tmp_path / "a.png", Image.fromarray(values), transparency=1200)
    got = photos.read_photo(path)[0]
    assert got[0, 20] == 1 and (got == 1).sum() == 1
    np.testing.assert_allclose(got[0, :20], values[0, :20] / 32767.5 - 1, atol=1e-6)


def test_the_first_frame_is_taken(tmp_path: Path) -> None:
    first, second = Image.fromarray(picture()), Image.fromarray(picture()[::-1].copy())
    path = saved(tmp_path / "a.tif", first, save_all=True, append_images=[second])
    np.testing.assert_array_equal(read(path), picture())


def test_files_that_are_no_photos(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.jpg", Image.fromarray(picture(200, 200)))
    png = saved(tmp_path / "whole.png", Image.fromarray(picture(200, 200)))
    cut, text, empty = (tmp_path / name for name in ("cut.jpg", "text.png", "empty.jpg"))
    cut.write_bytes(whole.read_bytes()[:-900])
    text.write_text("not an image")
    empty.touch()
    broken = tmp_path / "broken.png"
    broken.write_bytes(png.read_bytes()[:-100])
    for path, message in (
        (cut, "expected a whole photo, but cannot read "),
        (broken, "expected a whole photo, but cannot read "),
        (text, "is no image that Pillow reads; convert it"),
        (empty, "is no image that Pillow reads; convert it"),
        (tmp_path, "is no file; check the path"),
        (tmp_path / "missing.jpg", "is no file; check the path"),
    ):
        with pytest.raises(PidRuntimeError, match=message) as caught:
            photos.read_photo(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_pixels_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(picture()))
    for most in (500, 100):  # Pillow warns at once the number, and refuses at twice
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(PidRuntimeError, match=f"at most {most} pixels, but .* reduce it"):
            photos.photo_size(path)


def test_padding_repeats_the_border() -> None:
    image = photos.from_uint8(picture(9, 16))
    wide = photos.padded(image, 8)
    assert wide.shape == (3, 16, 16)
    np.testing.assert_array_equal(wide[:, :9], image)
    np.testing.assert_array_equal(wide[:, 9:], np.repeat(image[:, 8:9], 7, axis=1))
    assert photos.padded(image[:, :8], 8).shape == (3, 8, 16)
    assert photos.padded(image[:, :1, :1], 8).shape == (3, 8, 8)
