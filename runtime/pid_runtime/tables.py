"""Position tables: the only place where H and W enter a decode.

Each is computed on the host, once per shape, as docs/bundle-format.md specifies.
"""

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.sizes import Sizes
from pid_runtime.bundle.source import Function, PixelAxis, Rope1d, Rope2d, Table

Values = NDArray[np.float32]


def rope_2d(rope: Rope2d, sizes: Sizes) -> Values:
    """Angles of the 2-D rotary embedding, float32 `[L, head_dim / 2]`.

    Pair 2j turns by x, pair 2j + 1 by y, at theta'^(-4j / head_dim), with
    theta' = theta (n / reference)^(a / (a - 2)) per axis, a = head_dim / 2; positions are n values
    from 0 to `extent`. NTK-aware scaling as in PiD (arXiv 2605.23902).
    """
    head_dim = rope.head_dim
    a = head_dim // 2

    def axis(count: int) -> Values:
        scaled = rope.theta * (count / rope.reference) ** (a / (a - 2))
        frequencies = _frequencies(scaled, np.arange(0, head_dim, 4), head_dim)
        return np.outer(np.linspace(0, rope.extent, count, dtype=np.float32), frequencies)

    width, height = sizes.value("Ws"), sizes.value("Hs")
    angles = np.empty((height, width, head_dim // 4, 2), np.float32)
    angles[..., 0] = axis(width)[None]
    angles[..., 1] = axis(height)[:, None]
    return angles.reshape(height * width, head_dim // 2)


def rope_1d(rope: Rope1d, sizes: Sizes) -> Values:
    """Angles of the text's rotary embedding, float32 `[T, head_dim / 2]`."""
    frequencies = _frequencies(rope.theta, np.arange(0, rope.head_dim, 2), rope.head_dim)
    return np.outer(np.arange(sizes.value("T"), dtype=np.float32), frequencies)


def _frequencies(theta: float, numbers: NDArray[np.int64], head_dim: int) -> Values:
    """theta^(-number / head_dim), rounded to float32 at every step, each step exact before it.

    Where float32 functions of a library are off by a bit, two readers would differ: deep networks
    make that ten thousand times larger.
    """
    exponents = (numbers.astype(np.float32) / np.float32(head_dim)).astype(np.float64)
    powers = np.power(np.float64(np.float32(theta)), exponents).astype(np.float32)
    return np.float32(1) / powers


def pixel_axis(pixels: PixelAxis, sizes: Sizes) -> Values:
    """What each pixel column (or row) of a patch adds, float32 `[L, P, size / 2]`.

    Sine then cosine of position theta^(-k / (size / 4)), computed in float64.
    """
    width, height = sizes.value("Ws"), sizes.value("Hs")
    size, patch_size = pixels.size, pixels.patch_size
    quarter = size // 4
    frequencies = pixels.theta ** (-np.arange(quarter, dtype=np.float64) / quarter)
    count = width if pixels.axis == "column" else height
    angles = np.outer(np.arange(count * patch_size, dtype=np.float64), frequencies)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    line = line.reshape(count, patch_size, size // 2)
    grid = (height, width, patch_size, size // 2)
    spread = line[None] if pixels.axis == "column" else line[:, None]
    return np.ascontiguousarray(np.broadcast_to(spread, grid)).reshape(height * width, *grid[2:])


def compute_table(table: Table, sizes: Sizes) -> Values:
    """A table of a buffer, at the sizes of a decode."""
    match table:
        case Rope2d():
            return _apply(table.function, rope_2d(table, sizes))
        case Rope1d():
            return _apply(table.function, rope_1d(table, sizes))
        case PixelAxis():
            return pixel_axis(table, sizes)


def _apply(function: Function, angles: Values) -> Values:
    """Cosine or sine, rounded to float32 once; see `_frequencies`."""
    of = np.cos if function == "cos" else np.sin
    return of(angles.astype(np.float64)).astype(np.float32)
