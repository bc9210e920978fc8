"""What a decode in tiles, or with guidance, does with its state, in the memory where that lies."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.dlpack import RawTensor

Tensor = Any
"""A contiguous float32 tensor, as the memory's backend holds it."""


class Blending(Protocol):
    """Operations on states of one memory. All give the same numbers, to the bit.

    A state is float32 `[B, rows, columns, P, P, 3]`, tokens of P x P pixels. So is a tile, of fewer
    rows and columns, and a ring, which holds as many rows as a tile has: row n of the picture lies
    at n modulo these.
    """

    def take(self, state: Tensor, tile: Tensor, row: int, column: int) -> None:
        """Copy a tile out of a state, from a row and column of tokens on."""
        ...

    def add(
        self, ring: Tensor, tile: Tensor, down: Tensor, across: Tensor, row: int, column: int
    ) -> None:
        """Add a tile to a ring, weighted; the tile's values are of no use afterwards.

        down, across: weights of the tile's pixels along each axis, `[tokens, P]`. row, column:
        tokens of the picture at which the tile begins.
        """
        ...

    def mix(
        self,
        state: Tensor,
        ring: Tensor,
        before: Tensor | None,
        noise: Tensor | None,
        factors: Sequence[float],
        row: int,
        rows: int,
    ) -> None:
        """Make rows of the next state: of state, ring, before and noise, times these factors.

        The ring's rows become zero, once they are in `before` (of the state's shape) if there is
        one, which is read where its factor is not zero. noise: `[B, rows, ..]`, of these rows.
        """
        ...


def ring_parts(row: int, rows: int, ring_rows: int) -> Iterator[tuple[int, int, int]]:
    """Where rows of a picture lie in a ring: how many come before, where these begin, and how many.

    As few parts as lie together.
    """
    done = 0
    while done < rows:
        at = (row + done) % ring_rows
        count = min(rows - done, ring_rows - at)
        yield done, at, count
        done += count


class HostBlending:
    """In the host's memory, by NumPy."""

    def take(self, state: RawTensor, tile: RawTensor, row: int, column: int) -> None:
        _, height, width, *_ = tile.shape
        np.copyto(writable(tile), writable(state)[:, row : row + height, column : column + width])

    def add(
        self,
        ring: RawTensor,
        tile: RawTensor,
        down: RawTensor,
        across: RawTensor,
        row: int,
        column: int,
    ) -> None:
        values, sums = writable(tile), writable(ring)
        values *= writable(down)[:, None, :, None, None]
        values *= writable(across)[None, :, None, :, None]
        _, height, width, *_ = tile.shape
        for first, at, count in ring_parts(row, height, ring.shape[1]):
            sums[:, at : at + count, column : column + width] += values[:, first : first + count]

    def mix(
        self,
        state: RawTensor,
        ring: RawTensor,
        before: RawTensor | None,
        noise: RawTensor | None,
        factors: Sequence[float],
        row: int,
        rows: int,
    ) -> None:
        of_state, of_clean, of_before, of_noise = (np.float32(factor) for factor in factors)
        states, sums = writable(state), writable(ring)
        last = None if before is None else writable(before)
        fresh = None if noise is None else writable(noise)
        for each in range(row, row + rows):
            seen = sums[:, each % ring.shape[1]]
            mixed = of_state * states[:, each] + of_clean * seen
            if last is not None:
                if of_before:
                    mixed += of_before * last[:, each]
                last[:, each] = seen
            if fresh is not None:
                mixed += of_noise * fresh[:, each - row]
            states[:, each] = mixed
            seen[...] = 0


def writable(tensor: RawTensor) -> NDArray[Any]:
    """A tensor of the host's memory as an array: numpy marks what it imports read-only."""
    array = np.from_dlpack(tensor)
    if array.flags.writeable:
        return array
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("Memory", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)
