"""What a backend offers the interpreter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.manifest import Bucket

Block = Any
"""One allocation, as the backend holds it."""

Tensor = Any
"""A contiguous typed part of a block, as the backend holds it."""


Call = Callable[[], None]


class Session(Protocol):
    """Memory and graphs of one backend. All graphs share it; so do all calls of a decoder."""

    whole_batches: bool
    """Whether graphs take all images of a batch in one call, or one image per call."""

    def bucket_for(self, tokens: int) -> Bucket:
        """The bucket to decode so many patch tokens in.

        Raises `PidRuntimeError` when there is none.
        """
        ...

    def prepare(
        self, calls: Iterable[tuple[str, Mapping[str, int]]], needed_bytes: int, batch: int
    ) -> None:
        """Make ready for a shape, before its memory is allocated.

        calls: graphs and the sizes they are to run at, for one image. needed_bytes: what is going
        to be allocated. Raises `PidRuntimeError` when a graph cannot run at a size, or when memory
        is known not to suffice.
        """
        ...

    def allocate(self, size_bytes: int) -> Block:
        """Allocate memory, not initialised, aligned to at least 256 bytes."""
        ...

    def tensor(self, block: Block, offset_bytes: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """A view of a block; no memory is copied or allocated."""
        ...

    def write(self, tensor: Tensor, source: Any) -> None:
        """Copy into a tensor from an array: numpy, or DLPack on a device the backend reads."""
        ...

    def read(self, tensor: Tensor) -> NDArray[Any]:
        """Copy a tensor to a new numpy array (bfloat16 comes as float32)."""
        ...

    def clone(self, tensor: Tensor) -> Any:
        """Copy a tensor to new memory of the same device, as an object with `__dlpack__`."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy between tensors of the same size."""
        ...

    def fill_zero(self, tensor: Tensor) -> None:
        """Fill a tensor with zeros."""
        ...

    def fill_normal(self, tensor: Tensor, seed: int, draw: int) -> None:
        """Fill a float32 tensor with `pid_runtime.noise.standard_normal(seed, draw, size)`."""
        ...

    def bind(self, graph: str, tensors: Mapping[str, Tensor], scratch: Tensor | None) -> Call:
        """A call that runs a graph on these inputs and outputs, by name, as often as wanted.

        scratch: memory the graph may work in, from here to the end of the arena, if it is planned.
        """
        ...

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        """A call that makes these calls, bound or copies, in order; `name` is for profilers."""
        ...

    def close(self) -> None:
        """Release graphs and memory."""
        ...


def in_order(calls: Sequence[Call]) -> Call:
    """A call that makes these calls in order: the plain `Session.sequence`."""

    def run() -> None:
        for call in calls:
            call()

    return run


def as_array(source: Any) -> NDArray[Any]:
    """Any array on the host, without a copy where possible."""
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "__dlpack__"):
        return np.from_dlpack(source)
    return np.asarray(source)


def to_bits(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array converted to a tensor's dtype and contiguous; bfloat16 as the bits, in uint16.

    Rounds to nearest, ties to even; what is too large becomes infinite.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype)
    values = np.ascontiguousarray(array, np.float32)
    bits = values.view(np.uint32)
    # Half of the last bit kept, less one unless that bit is odd, carries where rounding goes up.
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def from_bits(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The reverse of `to_bits`, bfloat16 as float32; `array` holds values or bytes of `dtype`."""
    if dtype != "bfloat16":
        return array.view(dtype)
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
