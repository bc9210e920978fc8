"""Our kernels on a GPU, which `kernels.cu` says what they do."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pid_runtime.backends.blending import ring_parts
from pid_runtime.backends.dlpack import RawTensor

PTX = Path(__file__).with_name("kernels.ptx")
THREADS_PER_BLOCK = 256
NORMALS_PER_THREAD = 4

_log = logging.getLogger(__name__)


class Kernels:
    """Noise, and the `Blending` of a GPU's memory. All is enqueued on one stream."""

    def __init__(self, core: Any, stream: Any, use: Callable[[], None]) -> None:
        """core: the module cuda.core. use: makes the stream's context current in a thread.

        Raises what cuda.core raises when the driver refuses the kernels.
        """
        self._core, self._stream, self._use = core, stream, use
        self.after: Callable[[], None] | None = None
        """Called when a kernel has been enqueued."""
        code = self._core.ObjectCode.from_ptx(PTX.read_bytes())
        names = ("standard_normal", "take_tile", "add_tile", "mix")
        self._kernels = {name: code.get_kernel(f"pid_{name}") for name in names}

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int, start: int) -> None:
        """As of `Memory`."""
        count = math.prod(tensor.shape)
        self._launch(
            "standard_normal",
            -(-count // NORMALS_PER_THREAD),
            np.uint64(tensor.address),
            np.uint64(count),
            np.uint64(seed),
            np.uint32(draw),
            np.uint64(start),
        )

    def take(self, state: RawTensor, tile: RawTensor, row: int, column: int) -> None:
        for image in range(state.shape[0]):
            count, *lengths = _lengths(state, tile)
            self._launch(
                "take_tile",
                count,
                _address(state, image),
                _address(tile, image),
                np.uint64(count),
                *map(np.uint64, lengths),
                np.uint64(row),
                np.uint64(column * _token(state)),
            )

    def add(
        self,
        ring: RawTensor,
        tile: RawTensor,
        down: RawTensor,
        across: RawTensor,
        row: int,
        column: int,
    ) -> None:
        for image in range(ring.shape[0]):
            count, *lengths = _lengths(ring, tile)
            self._launch(
                "add_tile",
                count,
                _address(ring, image),
                _address(tile, image),
                np.uint64(down.address),
                np.uint64(across.address),
                np.uint64(count),
                *map(np.uint64, lengths),
                np.uint64(row),
                np.uint64(column * _token(ring)),
                np.uint32(ring.shape[1]),
                np.uint32(ring.shape[3]),
            )

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
        values = math.prod(state.shape[2:])
        for image in range(state.shape[0]):
            for first, at, count in ring_parts(row, rows, ring.shape[1]):
                self._launch(
                    "mix",
                    count * values,
                    _address(state, image, row + first),
                    _address(ring, image, at),
                    np.uint64(0) if before is None else _address(before, image, row + first),
                    np.uint64(0) if noise is None else _address(noise, image, first),
                    np.uint64(count * values),
                    *map(np.float32, factors),
                )

    def _launch(self, name: str, threads: int, *arguments: Any) -> None:
        blocks = -(-threads // THREADS_PER_BLOCK)
        config = self._core.LaunchConfig(grid=blocks, block=THREADS_PER_BLOCK)
        self._use()
        self._core.launch(self._stream, config, self._kernels[name], *arguments)
        if self.after is not None:
            self.after()


def load_kernels(core: Any, stream: Any, use: Callable[[], None]) -> Kernels | None:
    """The kernels; None, with a line in the log, where the driver refuses them."""
    try:
        return Kernels(core, stream, use)
    except Exception as error:  # noqa: BLE001 - any of cuda.core's and the driver's
        reason = str(error).partition("\n")[0]
        _log.info("Noise is made, and tiles are blended, on the host: %s", reason)
        return None


def _address(tensor: RawTensor, image: int, row: int = 0) -> np.uint64:
    """Of a row of an image."""
    batch, rows, *_ = tensor.shape
    row_bytes = tensor.size_bytes // (batch * rows)
    return np.uint64(tensor.address + (image * rows + row) * row_bytes)


def _token(tensor: RawTensor) -> int:
    """Values of a token."""
    return math.prod(tensor.shape[3:])


def _lengths(state: RawTensor, tile: RawTensor) -> tuple[int, int, int]:
    """Values of an image's tile, of a row of the state, and of a row of the tile."""
    return math.prod(tile.shape[1:]), math.prod(state.shape[2:]), math.prod(tile.shape[2:])
