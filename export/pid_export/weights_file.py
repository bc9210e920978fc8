"""Writes a safetensors file tensor by tensor, hashing as it goes.

The safetensors library wants all tensors in memory at once, which a full-size export cannot
afford; the format itself (a length, a JSON header, the bytes) is simpler than a way around that.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 4096
"""The first tensor starts at a multiple of this, so that the file can be mapped."""

TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its type and shape, known before its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class WeightsWriter:
    """Fills a safetensors file, in the order of its slots."""

    def __init__(self, path: Path, slots: dict[str, Slot], metadata: dict[str, str]) -> None:
        self._slots = iter(slots.items())
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, slot in slots.items():
            begin, end = end, end + slot.bytes
            header[name] = {
                "dtype": TYPE_NAMES[slot.dtype],
                "shape": slot.shape,
                "data_offsets": (begin, end),
            }
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self.data_offset = len(text) + 8
        """Where in the file the first tensor starts."""
        self.offsets: dict[str, int] = {}
        """Where in the file each tensor written so far starts."""
        self._position = self.data_offset
        self._digest = hashlib.sha256()
        self._file = path.open("wb")
        self._write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> bytes:
        """Write the next tensor, which must be `name`; returns the SHA-256 of its bytes."""
        expected, slot = next(self._slots)
        if name != expected or tuple(tensor.shape) != slot.shape:
            raise ValueError(
                f"expected tensor {expected} of shape {slot.shape}, "
                f"but got {name} {tuple(tensor.shape)}"
            )
        values = tensor.to(slot.dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        self.offsets[name] = self._position
        self._position += slot.bytes
        self._write(values)
        return hashlib.sha256(values).digest()

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._position

    def sha256(self) -> str:
        """SHA-256 of the file so far, as hexadecimal."""
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
