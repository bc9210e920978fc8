"""How a decode is judged: PSNR and SSIM over RGB, and grids, of 8-bit images; and its rivals."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def resized(
    image: NDArray[np.uint8],
    height: int,
    width: int,
    by: Image.Resampling = Image.Resampling.BICUBIC,
) -> NDArray[np.uint8]:
    """An image `[H, W, 3]` in another size, by a filter of Pillow's."""
    return np.asarray(Image.fromarray(image).resize((width, height), by))


def psnr(original: NDArray[np.uint8], image: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of images `[H, W, 3]`."""
    return float(peak_signal_noise_ratio(original, image, data_range=255))


def ssim(original: NDArray[np.uint8], image: NDArray[np.uint8]) -> float:
    """Structural similarity as in Wang et al., 2004: Gaussian windows, mean of the channels."""
    value: Any = structural_similarity(
        original,
        image,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
        data_range=255,
    )
    return float(value)


def grid(image: NDArray[np.uint8], side: int) -> float:
    """How much steeper an image `[H, W, 3]` is across the lines of a grid than elsewhere.

    The mean absolute difference of pixels on both sides of a line, every `side` pixels, over that
    of all other neighbours: about 1 where no grid is seen.
    """
    on: list[NDArray[np.float64]] = []
    off: list[NDArray[np.float64]] = []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean((1 - axis, 2))
        lines = np.arange(1, len(steps) + 1) % side == 0
        on.append(steps[lines])
        off.append(steps[~lines])
    return float(np.concatenate(on).mean() / np.concatenate(off).mean())
