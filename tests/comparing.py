"""Arrays to decode, and their comparison."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def assert_equal(got: NDArray[Any], want: NDArray[Any], tolerance: float) -> None:
    """The same but for errors up to `tolerance`, which a failure shows."""
    assert got.shape == want.shape and got.dtype == want.dtype
    errors = np.abs(got.astype(np.float64) - want.astype(np.float64))
    spread = {q: float(np.quantile(errors, q)) for q in (0.5, 0.99, 1)}
    assert errors.max() <= tolerance, f"quantiles of the error: {spread}"


def normal(*shape: int, seed: int) -> NDArray[np.float32]:
    """Numbers to decode."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
