"""Position tables: the only place where H and W enter a decode.

Each is computed on the host, once per shape, as docs/bundle-format.md specifies.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.sizes import Sizes
from pid_runtime.errors import PidRuntimeError

Table = NDArray[np.float32]


def rope_2d(sizes: Sizes, head_dim: int, reference: float, extent: float, theta: float) -> Table:
    """Angles of the 2-D rotary embedding, float32 `[L, head_dim / 2]`.

    Pair 2j turns by x, pair 2j + 1 by y, at theta'^(-4j / head_dim), with
    theta' = theta (n / reference)^(a / (a - 2)) per axis, a = head_dim / 2; positions are n values
    from 0 to `extent`. NTK-aware scaling as in PiD (arXiv 2605.23902).
    """
    a = head_dim // 2

    def axis(count: int) -> Table:
        scaled = theta * (count / reference) ** (a / (a - 2))
        frequencies = _frequencies(scaled, np.arange(0, head_dim, 4), head_dim)
        return np.outer(np.linspace(0, extent, count, dtype=np.float32), frequencies)

    width, height = sizes.value("Ws"), sizes.value("Hs")
    angles = np.empty((height, width, head_dim // 4, 2), np.float32)
    angles[..., 0] = axis(width)[None]
    angles[..., 1] = axis(height)[:, None]
    return angles.reshape(height * width, head_dim // 2)


def rope_1d(sizes: Sizes, head_dim: int, theta: float) -> Table:
    """Angles of the text's rotary embedding, float32 `[T, head_dim / 2]`."""
    frequencies = _frequencies(theta, np.arange(0, head_dim, 2), head_dim)
    return np.outer(np.arange(sizes.value("T"), dtype=np.float32), frequencies)


def _frequencies(theta: float, numbers: NDArray[np.int64], head_dim: int) -> Table:
    """theta^(-number / head_dim), rounded to float32 at every step, each step exact before it.

    Where float32 functions of a library are off by a bit, two readers would differ: deep networks
    make that ten thousand times larger.
    """
    exponents = (numbers.astype(np.float32) / np.float32(head_dim)).astype(np.float64)
    powers = np.power(np.float64(np.float32(theta)), exponents).astype(np.float32)
    return np.float32(1) / powers


def pixel_axis(sizes: Sizes, axis: str, size: int, patch_size: int, theta: float) -> Table:
    """What each pixel column (or row) of a patch adds, float32 `[L, P, size / 2]`.

    Sine then cosine of position theta^(-k / (size / 4)), computed in float64.
    """
    width, height = sizes.value("Ws"), sizes.value("Hs")
    quarter = size // 4
    frequencies = theta ** (-np.arange(quarter, dtype=np.float64) / quarter)
    count = width if axis == "column" else height
    angles = np.outer(np.arange(count * patch_size, dtype=np.float64), frequencies)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    line = line.reshape(count, patch_size, size // 2)
    grid = (height, width, patch_size, size // 2)
    spread = line[None] if axis == "column" else line[:, None]
    return np.ascontiguousarray(np.broadcast_to(spread, grid)).reshape(height * width, *grid[2:])


def _cosine(angles: Callable[..., Table]) -> Callable[..., Table]:
    return lambda *args, **options: _rounded(np.cos, angles(*args, **options))


def _sine(angles: Callable[..., Table]) -> Callable[..., Table]:
    return lambda *args, **options: _rounded(np.sin, angles(*args, **options))


def _rounded(function: Callable[[Any], Any], angles: Table) -> Table:
    """A function's value, rounded to float32 once; see `_frequencies`."""
    return function(angles.astype(np.float64)).astype(np.float32)


TABLES: dict[str, Callable[..., Table]] = {
    "rope_2d_cos": _cosine(rope_2d),
    "rope_2d_sin": _sine(rope_2d),
    "rope_1d_cos": _cosine(rope_1d),
    "rope_1d_sin": _sine(rope_1d),
    "pixel_axis": pixel_axis,
}
"""Every table by the name the manifest gives it."""


def compute_table(source: dict[str, Any], sizes: Sizes) -> Table:
    """The table a buffer's `source` describes. Raises `PidRuntimeError` if it is unknown."""
    options = dict(source)
    name = options.pop("table", None)
    if name not in TABLES:
        raise PidRuntimeError(f"expected a table of {', '.join(TABLES)}, but got {name!r}")
    return TABLES[name](sizes, **options)
