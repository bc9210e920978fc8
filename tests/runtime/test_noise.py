"""Noise: published vectors, our own vectors, a scalar twin, and the shape of the distribution."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pid_runtime import noise
from pid_runtime.errors import PidRuntimeError
from places import GOLDEN

VECTORS = json.loads((GOLDEN / "philox.json").read_text())
TOLERANCE = 1e-6
WORD = 2**32


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """One counter's words, in plain integers and written apart from the array code."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def scalar_normal(seed: int, draw: int, index: int) -> float:
    """Value `index` of a draw, by the formulas of the module's docstring."""
    block, lane = divmod(index, 4)
    words = scalar_philox((block % WORD, block // WORD, draw, 0), (seed % WORD, seed // WORD))
    u = [(word + 0.5) / WORD for word in words]
    first = lane // 2 * 2
    turn = math.cos if lane % 2 == 0 else math.sin
    return math.sqrt(-2 * math.log(u[first])) * turn(2 * math.pi * u[first + 1])


def words_of(entries: list[str]) -> list[int]:
    return [int(word, 16) for word in entries]


@pytest.mark.parametrize("entry", VECTORS["known_answers"])
def test_published_known_answers(entry: dict[str, list[str]]) -> None:
    counter = np.array([words_of(entry["counter"])], np.uint32)
    k0, k1 = words_of(entry["key"])
    assert noise.philox(counter, (k0, k1))[0].tolist() == words_of(entry["words"])


@pytest.mark.parametrize("entry", VECTORS["blocks"])
def test_words_of_a_block(entry: dict[str, Any]) -> None:
    seed, block, draw = int(entry["seed"], 16), int(entry["block"], 16), entry["draw"]
    counter = (block % WORD, block // WORD, draw, 0)
    key = (seed % WORD, seed // WORD)
    words = words_of(entry["words"])
    assert scalar_philox(counter, key) == words
    assert noise.philox(np.array([counter], np.uint32), key)[0].tolist() == words


@pytest.mark.parametrize("entry", VECTORS["normals"])
def test_normals(entry: dict[str, Any]) -> None:
    seed, start, draw = int(entry["seed"], 16), int(entry["start"], 16), entry["draw"]
    values = entry["values"]
    scalar = [scalar_normal(seed, draw, start + k) for k in range(len(values))]
    np.testing.assert_allclose(scalar, values, rtol=0, atol=TOLERANCE)
    got = noise.standard_normal(seed, draw, len(values), start=start)
    np.testing.assert_allclose(got, values, rtol=0, atol=TOLERANCE)


def test_extreme_words_stay_finite() -> None:
    words = np.array([[0, WORD - 1, 2**31, 2**30]], np.uint64)
    cosine, sine = noise._cos_sin_turns(words, np.empty((4, *words.shape)))
    angles = 2 * math.pi * (words + 0.5) / WORD
    np.testing.assert_allclose(cosine, np.cos(angles), rtol=0, atol=1e-11)
    np.testing.assert_allclose(sine, np.sin(angles), rtol=0, atol=1e-11)


def test_moments() -> None:
    count = 1 << 20
    values = noise.standard_normal(7, 0, count).astype(np.float64)
    standard_error = 1 / math.sqrt(count)
    assert abs(values.mean()) < 4 * standard_error
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * standard_error
    assert abs((values**3).mean()) < 4 * math.sqrt(15) * standard_error
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * standard_error
    lanes = values.reshape(-1, 4)
    correlation = np.corrcoef(lanes.T) - np.eye(4)
    assert abs(correlation).max() < 4 * 2 * standard_error


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 300),
    count=st.integers(0, 300),
    chunk=st.integers(1, 20),
    cores=st.integers(1, 3),
)
@example(start=0, count=35, chunk=8, cores=1)  # a last chunk of one block
def test_chunks_threads_and_starts_do_not_show(
    start: int, count: int, chunk: int, cores: int
) -> None:
    whole = noise.standard_normal(3, 1, 600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_CHUNK_BLOCKS", chunk)
        patch.setattr(noise, "core_count", lambda: cores)
        part = noise.standard_normal(3, 1, count, start=start)
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_large_counts_are_the_small_ones_continued() -> None:
    count = 4 * noise._CHUNK_BLOCKS * 2 + 5
    whole = noise.standard_normal(3, 1, count)
    np.testing.assert_array_equal(whole[-100:], noise.standard_normal(3, 1, 100, start=count - 100))


def test_fills_out_in_place() -> None:
    out = np.full((2, 3, 5), np.nan, np.float32)
    assert noise.standard_normal(9, 0, 30, out=out) is out
    np.testing.assert_array_equal(out.reshape(-1), noise.standard_normal(9, 0, 30))


def test_seeds_and_draws_differ() -> None:
    draws = [
        noise.standard_normal(seed, draw, 64)
        for seed, draw in ((0, 0), (0, 1), (1, 0), (1 << 32, 0))
    ]
    for index, first in enumerate(draws):
        assert all(not np.array_equal(first, other) for other in draws[index + 1 :])


def test_batch_seeds() -> None:
    assert [noise.image_seed(41, b) for b in range(3)] == [41, 42, 43]
    assert noise.image_seed(2**64 - 1, 1) == 0


def test_image_layout() -> None:
    height, width, patch = 8, 12, 4
    image = noise.image_noise(5, 2, height, width, patch)
    assert image.shape == (3, height, width) and image.flags.c_contiguous
    flat = noise.standard_normal(5, 2, 3 * height * width)
    for channel, y, x in ((0, 0, 0), (2, 5, 9), (1, 7, 11)):
        token = (y // patch) * (width // patch) + x // patch
        pixel = (y % patch) * patch + x % patch
        assert image[channel, y, x] == flat[(token * patch * patch + pixel) * 3 + channel]


def test_bad_input_is_refused() -> None:
    wrong_calls = (
        lambda: noise.standard_normal(-1, 0, 4),
        lambda: noise.standard_normal(2**64, 0, 4),
        lambda: noise.standard_normal(0, 2**32, 4),
        lambda: noise.standard_normal(0, 0, -1),
        lambda: noise.standard_normal(0, 0, 4, start=-4),
        lambda: noise.standard_normal(0, 0, 4, out=np.empty(5, np.float32)),
        lambda: noise.standard_normal(0, 0, 4, out=np.empty((4, 2), np.float32)[:, 0]),
        lambda: noise.image_noise(0, 0, 30, 32),
        lambda: noise.philox(np.zeros((2, 3), np.uint32), (0, 0)),
        lambda: noise.philox(np.zeros((2, 4), np.uint32), (0, 2**32)),
        lambda: noise.image_seed(-1, 0),
    )
    for call in wrong_calls:
        with pytest.raises(PidRuntimeError, match=r"^expected .*, but got .*"):
            call()
