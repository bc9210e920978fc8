"""How a decode is judged: bicubic resizing, and PSNR and SSIM over RGB, of 8-bit images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An image `[H, W, 3]` in another size, by Pillow's bicubic."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


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
