"""What a backend offers the interpreter."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Block = Any
"""One allocation, as the backend holds it."""

Tensor = Any
"""A contiguous typed part of a block, as the backend holds it."""


class Session(Protocol):
    """Memory and graphs of one backend. All graphs share it; so do all calls of a decoder."""

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

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """A call that runs a graph on these inputs and outputs, by name, as often as wanted."""
        ...

    def close(self) -> None:
        """Release graphs and memory."""
        ...


def as_array(source: Any) -> NDArray[Any]:
    """Any array on the host, without a copy where possible."""
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "__dlpack__"):
        return np.from_dlpack(source)
    return np.asarray(source)
