"""Random pieces of pictures, and the small photographs that an encoder would have been given."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nano_photos import Pixels
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pid_ref.registry import NANO_CONFIG, NANO_STD
from pid_runtime.bundle.files import whole_file
from pid_runtime.nano.block_dct import encode

LATENT_PIXELS = NANO_CONFIG.size_multiple
"""Output pixels per latent pixel, along each axis."""


def in_sizes(pictures: Iterable[Pixels]) -> list[Pixels]:
    """Each picture in several sizes."""
    sizes: list[Pixels] = []
    for picture in pictures:
        for reduction in (1.0, 0.7, 0.5, 0.35):
            height, width = (round(side * reduction) for side in picture.shape[:2])
            if min(height, width) >= 8 * LATENT_PIXELS:
                image = Image.fromarray(picture)
                sizes.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    return sizes


def crop(rng: np.random.Generator, pictures: list[Pixels], height: int, width: int) -> Tensor:
    """A random piece `[3, height, width]` in [-1, 1], turned, stretched, mirrored, recoloured."""
    shares = np.sqrt([picture.shape[0] * picture.shape[1] for picture in pictures])
    picture = pictures[int(rng.choice(len(pictures), p=shares / shares.sum()))]
    angle = rng.uniform(0, 4) if rng.random() < 0.6 else rng.integers(4)  # right angles
    zoom, stretch = math.exp(rng.uniform(-0.3, 0.15)), math.exp(rng.uniform(-0.1, 0.1))
    cos, sin = math.cos(angle * math.pi / 2), math.sin(angle * math.pi / 2)
    scales = zoom * np.diag([stretch * rng.choice((-1, 1)), 1 / stretch])
    turn = np.array([[cos, -sin], [sin, cos]]) @ scales  # from the piece's (x, y) to the picture's
    half = np.abs(turn) @ (width / 2, height / 2) + 2
    below, right = (max(0, math.ceil(2 * half[axis]) - picture.shape[1 - axis]) for axis in (1, 0))
    picture = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="symmetric")
    middle = [rng.uniform(half[axis], picture.shape[1 - axis] - half[axis]) for axis in (0, 1)]
    left, top = (int(middle[axis] - half[axis]) for axis in (0, 1))
    across, down = (math.ceil(2 * half[axis]) + 1 for axis in (0, 1))
    around = Image.fromarray(picture[top : top + down, left : left + across])
    origin = np.array(middle) - (left, top) - turn @ (width / 2, height / 2)
    affine = (*turn[0], origin[0], *turn[1], origin[1])
    turned = around.transform(
        (width, height), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    piece = np.asarray(turned).astype(np.float32) / 255
    if rng.random() < 0.3:
        piece = piece[..., rng.permutation(3)]
    if rng.random() < 0.15:
        piece = 1 - piece
    gamma, gain = np.float32(np.exp(rng.uniform(-0.25, 0.25))), np.float32(rng.uniform(0.75, 1.0))
    piece = gain * piece**gamma + np.float32(rng.uniform(0, 1 - gain))
    return torch.from_numpy(np.ascontiguousarray(piece.transpose(2, 0, 1))) * 2 - 1


def reduce(images: Tensor) -> NDArray[np.float32]:
    """The photographs an encoder would have been given: `[B, 3, H/4, W/4]`, in 8-bit steps."""
    small = F.interpolate(
        images, scale_factor=1 / NANO_CONFIG.scale, mode="bicubic", antialias=True
    )
    return np.asarray(((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1)


def crops_file(folder: Path, pictures: list[Pixels], seed: int, side: int, count: int) -> Path:
    """A .npy file of `count` square crops, uint8 `[count, 3, H, W]`; made unless it is there.

    side: of the crops, in latent pixels. Every crop follows from the seed and its index.
    """
    path = folder / f"crops-{side}-{count}-{seed}.npy"
    if path.exists():
        return path
    pixels = side * LATENT_PIXELS
    shape = (count, 3, pixels, pixels)
    make = partial(_crop, seed, pixels)
    with (
        whole_file(path) as aside,
        ProcessPoolExecutor(os.cpu_count(), initializer=_begin, initargs=(pictures,)) as workers,
    ):
        crops = np.lib.format.open_memmap(aside, "w+", np.uint8, shape)
        for index, image in enumerate(workers.map(make, range(count), chunksize=100)):
            crops[index] = image
        crops.flush()
    return path


_pictures: list[Pixels] = []
"""Of a worker process: given once, not with every crop."""


def _begin(pictures: list[Pixels]) -> None:
    torch.set_num_threads(1)
    _pictures[:] = pictures


def _crop(seed: int, pixels: int, index: int) -> Pixels:
    rng = np.random.default_rng((seed, pixels, index))
    image = crop(rng, _pictures, pixels, pixels)
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def latent_of(image: Tensor) -> NDArray[np.float32]:
    """Latents `[B, 192, h, w]` of images `[B, 3, H, W]` that were reduced 4x."""
    return encode(reduce(image), NANO_STD)
