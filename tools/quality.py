"""How close an image is to the original: PSNR and SSIM over RGB, 8 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


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
