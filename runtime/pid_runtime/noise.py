"""The decoder's noise: the same numbers for a seed on every backend, in Python and in C++.

Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC'11) turns a counter into four 32-bit words, Box-Muller turns the words into normals. Value i
of an image is lane i % 4 of block n = i // 4, and i counts in token order: the flat index into
an array `[L, P*P, 3]` of tokens, their pixels row-major, and channels.

    counter = (n mod 2**32, n div 2**32, draw, 0)      key = (seed mod 2**32, seed div 2**32)
    u_j     = (word_j + 0.5) / 2**32                   in float64, never 0 or 1
    lane 0  = sqrt(-2 ln u_0) cos(2 pi u_1)            lane 1 = sqrt(-2 ln u_0) sin(2 pi u_1)
    lane 2  = sqrt(-2 ln u_2) cos(2 pi u_3)            lane 3 = sqrt(-2 ln u_2) sin(2 pi u_3)

`draw` is 0 for the initial noise and k for the noise added after step k, counted from 1. Image b
of a batch uses seed + b (mod 2**64), so it is the image its own seed gives alone. Values are
rounded to float32; two implementations agree to 1e-6.
"""

import math
import operator
import os
from concurrent.futures import ThreadPoolExecutor
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from pid_runtime.errors import PidRuntimeError

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)

_COS_TAYLOR = tuple((-1) ** k / math.factorial(2 * k) for k in range(9))
_SIN_TAYLOR = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(9))
"""Coefficients of cos x and of sin x / x in x^2; the next term is below 1e-17 at pi / 4."""

_CHUNK_BLOCKS = 1 << 15
"""Blocks worked on at a time: few enough for their words to stay in a core's cache."""


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox 4x32-10 of every counter: uint32 `[n, 4]` to uint32 `[n, 4]`, for two 32-bit keys.

    Raises `PidRuntimeError` for another shape or dtype, or a key outside 32 bits.
    """
    if counter.ndim != 2 or counter.shape[1] != 4 or counter.dtype != np.uint32:
        raise PidRuntimeError(
            f"expected counters of shape (n, 4) and dtype uint32, "
            f"but got {counter.shape} {counter.dtype}"
        )
    key = _within("key", key[0], 32), _within("key", key[1], 32)
    words = counter.T.astype(np.uint64, order="C")
    _mix(words, np.empty((2, len(counter)), np.uint64), key)
    return np.ascontiguousarray(words.T, dtype=np.uint32)


def standard_normal(
    seed: int,
    draw: int,
    count: int,
    *,
    start: int = 0,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Values `start` to `start + count` of one draw of one image, float32 `[count]`.

    seed: 0 to 2**64 - 1. draw: 0 for the initial noise, k for the noise after step k. out: a
    contiguous float32 array of `count` values, of any shape, to fill and return instead of a new
    one. Large counts are spread over the processor's cores; the values do not depend on that.
    Raises `PidRuntimeError` for numbers out of range or an unsuitable `out`.
    """
    seed, draw = _within("seed", seed, 64), _within("draw", draw, 32)
    start, count = _within("start", start, 62), _within("count", count, 62)
    if out is None:
        out = np.empty(count, np.float32)
    if out.size != count or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise PidRuntimeError(
            f"expected a contiguous float32 array of {count} values to fill, "
            f"but got {out.shape} {out.dtype}"
        )
    flat = out.reshape(-1)
    end_block = -(-(start + count) // 4)
    chunks = range(start // 4, end_block, _CHUNK_BLOCKS)
    threads = min(core_count(), len(chunks))

    def fill(thread: int) -> None:
        """Write every chunk of `out` that is this thread's."""
        scratch = _Scratch(min(_CHUNK_BLOCKS, end_block - start // 4))
        for first_block in chunks[thread::threads]:
            lanes = _normals(
                seed, draw, first_block, min(_CHUNK_BLOCKS, end_block - first_block), scratch
            )
            begin = 4 * first_block - start
            skipped = max(0, -begin)
            flat[begin + skipped : begin + lanes.size] = lanes[skipped : count - begin]

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, range(threads)):
                pass
    elif threads == 1:
        fill(0)
    return out


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a batch decoded with `seed`: their sum modulo 2**64."""
    return (_within("seed", seed, 64) + operator.index(index)) % 2**64


def image_noise(
    seed: int, draw: int, height: int, width: int, patch_size: int = 16
) -> NDArray[np.float32]:
    """One draw of one image laid out as the image, float32 `[3, height, width]`.

    These are `standard_normal`'s values, moved from token order to where their pixels lie: what
    to hand a decoder that takes noise as an image. Raises `PidRuntimeError` for a height or
    width (pixels) that patches of `patch_size` pixels do not divide.
    """
    if patch_size < 1 or min(height, width) < 1 or height % patch_size or width % patch_size:
        raise PidRuntimeError(
            f"expected a height and width divisible by {patch_size}, but got {height}x{width}"
        )
    rows, columns = height // patch_size, width // patch_size
    tokens = standard_normal(seed, draw, 3 * height * width)
    grid = tokens.reshape(rows, columns, patch_size, patch_size, 3)
    return np.ascontiguousarray(grid.transpose(4, 0, 2, 1, 3)).reshape(3, height, width)


class _Scratch:
    """One thread's working memory for chunks of up to `blocks` blocks.

    Kept between chunks: fresh arrays of this size cost as much in page faults as the arithmetic.
    """

    def __init__(self, blocks: int) -> None:
        self.words = np.empty((4, blocks), np.uint64)
        self.products = np.empty((2, blocks), np.uint64)
        self.radius = np.empty((2, blocks), np.float64)
        self.trigonometry = np.empty((4, 2, blocks), np.float64)
        self.lanes = np.empty((blocks, 2, 2), np.float32)


def _mix(words: NDArray[np.uint64], products: NDArray[np.uint64], key: tuple[int, int]) -> None:
    """Turn counters into random words in place: uint64 `[4, n]`, the low 32 bits used of each.

    products: uint64 `[2, n]`, overwritten.
    """
    c0, c1, c2, c3 = words
    product0, product1 = products
    for step in range(_ROUNDS):
        key0 = np.uint64((key[0] + step * _KEY_STEPS[0]) & 0xFFFFFFFF)
        key1 = np.uint64((key[1] + step * _KEY_STEPS[1]) & 0xFFFFFFFF)
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        np.right_shift(product1, _HALF_WORD, out=c0)
        c0 ^= c1
        c0 ^= key0
        np.right_shift(product0, _HALF_WORD, out=c2)
        c2 ^= c3
        c2 ^= key1
        np.bitwise_and(product1, _LOW, out=c1)
        np.bitwise_and(product0, _LOW, out=c3)


def _normals(
    seed: int, draw: int, first_block: int, blocks: int, scratch: _Scratch
) -> NDArray[np.float32]:
    """All four lanes of consecutive blocks, float32 `[4 * blocks]`, inside `scratch`."""
    words = scratch.words[:, :blocks]
    index = np.arange(first_block, first_block + blocks, dtype=np.uint64)
    np.bitwise_and(index, _LOW, out=words[0])
    np.right_shift(index, _HALF_WORD, out=words[1])
    words[2], words[3] = draw, 0
    _mix(words, scratch.products[:, :blocks], (seed & 0xFFFFFFFF, seed >> 32))

    radius = scratch.radius[:, :blocks]  # one row per pair of lanes
    np.add(words[0::2], 0.5, out=radius)
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)

    trigonometry = scratch.trigonometry[:, :, :blocks]
    cosine, sine = _cos_sin_turns(words[1::2], trigonometry)
    cosine *= radius
    sine *= radius
    lanes = scratch.lanes[:blocks]
    lanes[:, :, 0] = cosine.T
    lanes[:, :, 1] = sine.T
    return lanes.reshape(-1)


def _cos_sin_turns(
    words: NDArray[np.uint64], scratch: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine of 2 pi (word + 0.5) / 2**32, to 1e-15, inside `scratch` `[4, *words.shape]`.

    Several times as fast as `np.cos` and `np.sin` in float64: Taylor polynomials of a quarter of
    the angle less half a turn, |x| <= pi / 4, then two doublings and a change of sign.
    """
    x, square, cosine, sine = scratch
    np.add(words, 0.5 - 2.0**31, out=x)
    x *= math.pi * 2.0**-33
    np.multiply(x, x, out=square)
    for result, coefficients in ((cosine, _COS_TAYLOR), (sine, _SIN_TAYLOR)):
        np.multiply(square, coefficients[-1], out=result)
        for coefficient in coefficients[-2:0:-1]:
            result += coefficient
            result *= square
        result += coefficients[0]
    sine *= x
    for _ in range(2):  # cos 2x = 1 - 2 sin^2 x, sin 2x = 2 sin x cos x
        np.multiply(sine, sine, out=square)
        sine *= cosine
        sine *= 2.0
        np.multiply(square, -2.0, out=cosine)
        cosine += 1.0
    # Not np.negative: numpy 2.4 on AVX-512 computes it wrongly in place, with a stride.
    cosine *= -1.0
    sine *= -1.0
    return cosine, sine


def core_count() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _within(name: str, value: SupportsIndex, bits: int) -> int:
    """`value` as an int, checked to be unsigned and of at most `bits` bits."""
    number = operator.index(value)
    if not 0 <= number < 2**bits:
        raise PidRuntimeError(f"expected {name} from 0 to 2**{bits} - 1, but got {number}")
    return number
