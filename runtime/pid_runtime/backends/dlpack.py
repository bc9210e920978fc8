"""Raw memory as an object other libraries take without a copy (DLPack, v0.8 layout)."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

CPU = 1
CUDA = 2
"""DLPack's device types."""

_TYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "uint8": (1, 8),
    "float8_e4m3fn": (10, 8),
}
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_exported: dict[int, Any] = {}
"""What a consumer still holds, by address: the structures and the memory behind them."""


@_Deleter
def _release(address: int) -> None:
    _exported.pop(address, None)


@dataclass(frozen=True)
class RawTensor:
    """A contiguous tensor at an address. Keeps `owner`, whose memory it is, alive."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    device: tuple[int, int]
    """DLPack device type and ordinal."""
    owner: Any

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * _TYPES[self.dtype][1] // 8

    def part(self, offset_bytes: int, dtype: str, shape: tuple[int, ...]) -> "RawTensor":
        """A tensor inside this one's memory, which lives as long."""
        return RawTensor(self.address + offset_bytes, dtype, shape, self.device, self.owner)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A capsule other libraries import; the memory lives as long as they hold it."""
        dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        code, bits = _TYPES[self.dtype]
        tensor = _Tensor(self.address, *self.device, len(self.shape), code, bits, 1, dims, None, 0)
        managed = _Managed(tensor, None, _release)
        address = ctypes.addressof(managed)
        _exported[address] = (managed, dims, self.owner)
        return _new_capsule(address, _NAME, None)
