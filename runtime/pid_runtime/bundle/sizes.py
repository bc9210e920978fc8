"""Shapes with symbols, and what the symbols stand for in one decode."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_SIZE = 1 << 24
"""Most of anything a shape counts along one axis: tokens, channels, rows."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "float8_e4m3fn": 1}

CHUNK = "C"
"""The first size of a buffer that holds no more than a slice: the tokens of a bucket's chunk."""

Shape = tuple[int | str, ...]
"""Sizes and symbols; see `Sizes`."""


@dataclass(frozen=True)
class Sizes:
    """Values of the symbols of one decode.

    B batch, T text tokens, h w latent, Hs Ws patch grid, L = Hs Ws, S = T + L, H W pixels,
    N rows of the modulation table or schedule, `row` and `step` of the step being run. What is
    planned or run in a bucket has C too, its `chunk_tokens`.
    """

    values: Mapping[str, int]

    def value(self, size: int | str) -> int:
        """A size, or the value of a symbol."""
        return size if isinstance(size, int) else self.values[size]

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """A shape in numbers."""
        return tuple(self.value(size) for size in shape)

    def bytes(self, dtype: str, shape: Shape) -> int:
        """Bytes of a buffer."""
        return ITEM_BYTES[dtype] * math.prod(self.shape(shape))

    def index(self, shape: Shape, start: Shape) -> int:
        """Flat index of the element at `start` of an array of `shape`."""
        flat = 0
        for size, at in zip(self.shape(shape), self.shape(start or (0,) * len(shape)), strict=True):
            flat = flat * size + at
        return flat

    def extended(self, dims: Mapping[str, str], **more: int) -> "Sizes":
        """These sizes with a graph's own symbols, and others, added."""
        return Sizes(
            {**self.values, **{name: self.values[of] for name, of in dims.items()}, **more}
        )

    def of_batch(self, batch: int) -> "Sizes":
        """These sizes with another number of images."""
        return Sizes({**self.values, "B": batch})

    def resized(self, height: int, width: int) -> "Sizes":
        """These sizes with a latent `height` x `width` instead."""
        across = self.value("Ws") // self.value("w")
        patch = self.value("W") // self.value("Ws")
        hs, ws = across * height, across * width
        values = {"h": height, "w": width, "Hs": hs, "Ws": ws, "H": hs * patch, "W": ws * patch}
        return Sizes({**self.values, **values, "L": hs * ws, "S": self.value("T") + hs * ws})


def sizes_of_request(
    network: Mapping[str, Any],
    tokens_per_latent: int,
    *,
    batch: int,
    latent_height: int,
    latent_width: int,
    text_tokens: int,
    rows: int,
) -> Sizes:
    """The sizes of a decode of `batch` latents `latent_height` x `latent_width`."""
    p = network["patch_size"]
    hs, ws = latent_height * tokens_per_latent, latent_width * tokens_per_latent
    tokens = hs * ws
    values = {"B": batch, "T": text_tokens, "h": latent_height, "w": latent_width}
    values |= {"Hs": hs, "Ws": ws, "H": hs * p, "W": ws * p, "L": tokens}
    values |= {"S": text_tokens + tokens, "N": rows, "row": 0, "step": 0}
    return Sizes(values)


def sizes_for(network: Mapping[str, Any], tokens_per_latent: int, rows: int, tokens: int) -> Sizes:
    """The sizes of the largest decode of one image within a budget of `tokens` patch tokens.

    All in one column: every product of sizes is at its largest then, or with h and w, Hs and Ws, H
    and W exchanged.
    """
    p = network["patch_size"]
    text = network["text_max_length"]
    values = {"B": 1, "T": text, "h": -(-tokens // tokens_per_latent**2), "w": 1}
    values |= {"Hs": tokens, "Ws": 1, "H": tokens * p, "W": p, "L": tokens, "S": text + tokens}
    return Sizes({**values, "N": rows, "row": rows - 1, "step": rows - 1})
