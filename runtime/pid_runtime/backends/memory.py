"""The memory a decoder works in: the host's, or a device's."""

import ctypes
import math
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.blending import Blending, HostBlending, writable
from pid_runtime.backends.dlpack import CPU, RawTensor
from pid_runtime.noise import standard_normal

Block = Any
"""One allocation, as the backend holds it."""

Tensor = Any
"""A contiguous typed part of a block, as the backend holds it."""

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "uint8": np.dtype(np.uint8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""By the manifest's names."""

EXTENSIONS = ("bfloat16", "float8_e4m3fn")
"""Those that NumPy has not by itself."""

ALIGNMENT = 4096
"""Of the host's memory, in bytes."""

PART = 1 << 18
"""Values that are looked at together."""


class Memory(Protocol):
    """Memory of one backend."""

    @property
    def blending(self) -> Blending | None:
        """What decodes in tiles do with their state in this memory; None where it cannot."""
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
        """Copy a tensor to a new numpy array (`EXTENSIONS` come as float32)."""
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

    def is_finite(self, tensor: Tensor) -> bool:
        """Whether a tensor has neither NaN nor infinity."""
        ...

    def fill_normal(self, tensor: Tensor, seed: int, draw: int, start: int = 0) -> None:
        """Fill a float32 tensor with `pid_runtime.noise.standard_normal(seed, draw, size)`.

        start: a multiple of 4.
        """
        ...

    def synchronize(self) -> None:
        """Wait for all that was started."""
        ...


class HostMemory:
    """The host's memory, as numpy arrays."""

    blending = HostBlending()

    def allocate(self, size_bytes: int) -> RawTensor:
        memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        return RawTensor(address, "uint8", (size_bytes,), (CPU, 0), memory)

    def tensor(
        self, block: RawTensor, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> RawTensor:
        return block.part(offset_bytes, dtype, shape)

    def write(self, tensor: RawTensor, source: Any) -> None:
        if tensor.dtype in EXTENSIONS:
            source, tensor = as_bytes(as_array(source), tensor.dtype), _as_bytes(tensor)
        target = writable(tensor)
        np.copyto(target, as_array(source).reshape(target.shape))

    def read(self, tensor: RawTensor) -> NDArray[Any]:
        if tensor.dtype in EXTENSIONS:
            content: Any = np.from_dlpack(_as_bytes(tensor))
            return from_bytes(content, tensor.dtype).reshape(tensor.shape)
        return np.from_dlpack(tensor).copy()

    def clone(self, tensor: RawTensor) -> NDArray[Any]:
        return self.read(tensor)

    def copy(self, source: RawTensor, target: RawTensor) -> None:
        np.copyto(writable(target), np.from_dlpack(source))

    def fill_zero(self, tensor: RawTensor) -> None:
        writable(_as_bytes(tensor)).fill(0)

    def is_finite(self, tensor: RawTensor) -> bool:
        return all_finite(np.from_dlpack(tensor))

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int, start: int = 0) -> None:
        flat = writable(tensor).reshape(-1)
        standard_normal(seed, draw, flat.size, start=start, out=flat)

    def synchronize(self) -> None:
        pass


def write_normal(memory: Memory, tensor: Tensor, seed: int, draw: int, start: int) -> None:
    """`fill_normal` of a memory that has to be given the numbers."""
    count = math.prod(tensor.shape)
    memory.write(tensor, standard_normal(seed, draw, count, start=start))


def as_array(source: Any) -> NDArray[Any]:
    """Any array on the host, without a copy where possible."""
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "__dlpack__"):
        on_host = source.__dlpack_device__()[0] == CPU
        return np.from_dlpack(source if on_host else source.cpu())
    return np.asarray(source)


def all_finite(array: NDArray[Any]) -> bool:
    """Whether a contiguous array has neither NaN nor infinity."""
    flat = array.reshape(-1)
    parts = range(0, flat.size, PART)  # of a whole image the answers would take 50 MB
    return all(np.isfinite(flat[begin : begin + PART]).all() for begin in parts)


def as_bytes(array: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """The bytes of an array converted to a tensor's dtype; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, NUMPY_TYPES[dtype]).reshape(-1).view(np.uint8)


def from_bytes(content: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """The reverse of `as_bytes`, flat; `EXTENSIONS` as float32."""
    values = content.view(NUMPY_TYPES[dtype])
    return values.astype(np.float32) if dtype in EXTENSIONS else values


def _as_bytes(tensor: RawTensor) -> RawTensor:
    return tensor.part(0, "uint8", (tensor.size_bytes,))


def trim_heap() -> None:
    """Return to the system what the C library keeps of memory that was freed; glibc alone can.

    It keeps blocks below 32 MB, as weights are, while anything above them is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
