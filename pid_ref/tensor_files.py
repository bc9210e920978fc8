"""Opening a file of tensors: a `.pth` or a safetensors file, mapped and never run."""

import json
import logging
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open

from pid_ref.errors import PidInputError

Shape = tuple[int, ...]

_log = logging.getLogger("pid_ref")

_WRAPPERS = ("state_dict", "model")
"""Keys under which a `.pth` may hold the dict of tensors."""

_SAFETENSORS_DTYPES = {
    "BF16": "torch.bfloat16",
    "F16": "torch.float16",
    "F32": "torch.float32",
    "F8_E4M3": "torch.float8_e4m3fn",
    "F8_E5M2": "torch.float8_e5m2",
    "F8_E8M0": "torch.float8_e8m0fnu",
    "I8": "torch.int8",
    "U8": "torch.uint8",
}
"""torch's names of the dtypes that weights and what belongs to them have."""

_FIX = {
    "a GGUF file": "pass the bf16 file it was made of",
    "a pickle of no zip archive": "save it again with a newer PyTorch, or pass the official file",
}
_USUAL_FIX = "pass the weights file itself under its own name"


class Tensors(Protocol):
    """The tensors of a file by key; none is read before it is asked for."""

    def keys(self) -> list[str]:
        """Every key, in the file's order."""
        ...

    def kind(self, key: str) -> tuple[Shape, str]:
        """Shape and dtype, by torch's name where torch has one; of what is no tensor, its type."""
        ...

    def get(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        ...

    def metadata(self) -> dict[str, str]:
        """What a safetensors file says beside its tensors; nothing for a `.pth`."""
        ...


class _Torch:
    """The tensors of a mapped `.pth` file by key."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def kind(self, key: str) -> tuple[Shape, str]:
        value = self.tensors[key]
        if not isinstance(value, torch.Tensor):
            return (), type(value).__name__
        return tuple(value.shape), str(value.dtype)

    def get(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def metadata(self) -> dict[str, str]:
        return {}


class _Safetensors:
    """The tensors of a mapped safetensors file by key."""

    def __init__(self, file: Path) -> None:
        self.handle: Any = safe_open(str(file), framework="pt", device="cpu")

    def keys(self) -> list[str]:
        return list(self.handle.keys())

    def kind(self, key: str) -> tuple[Shape, str]:
        entry = self.handle.get_slice(key)
        dtype: str = entry.get_dtype()
        return tuple(entry.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)

    def get(self, key: str) -> torch.Tensor:
        return self.handle.get_tensor(key)

    def metadata(self) -> dict[str, str]:
        return dict(self.handle.metadata() or {})


def open_tensors(file: Path) -> Tensors:
    """Map a `.pth` or safetensors file; its first bytes tell which.

    A `.pth` is loaded without running code, and opened where its tensors lie under `state_dict`
    or `model`. Raises `PidInputError` for a file that cannot be read, ends too early, holds
    anything but a dict, or is of neither format.
    """
    try:
        with file.open("rb") as stream:
            kind = _format(stream.read(64))
    except OSError as error:
        raise unreadable(file, error) from error
    if kind == "torch" and file.suffix == ".safetensors":  # torch.load goes by the suffix.
        kind = "a .pth under a .safetensors name"
    found: Any = None
    try:
        if kind == "safetensors":
            return _Safetensors(file)
        if kind == "torch":
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise PidInputError(
            f"expected only tensors in {file}, but got other or damaged contents, which are not "
            "loaded because they could run code; pass the official file"
        ) from error
    except Exception as error:  # A damaged file fails its parser in almost any way.
        raise _damaged(file, kind, error) from error
    if kind != "torch":
        raise PidInputError(
            f"expected a .pth (zip) or .safetensors checkpoint, but got {kind} in {file}; "
            f"{_FIX.get(kind, _USUAL_FIX)}"
        )
    if not isinstance(found, dict):
        raise PidInputError(
            f"expected a flat dict of tensors in {file}, but got {type(found).__name__}; "
            "pass the official file or a repackaging of it"
        )
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), dict):
            _log.info("the tensors of %s are those of its %r", file, wrapper)
            found = found[wrapper]
    return _Torch({str(key): value for key, value in cast(Any, found).items()})


def unreadable(path: Path, error: OSError) -> PidInputError:
    """What to raise for a file that the system does not let be read."""
    return PidInputError(
        f"expected a readable checkpoint, but got {error.strerror or error} for {path}; "
        "check the path and its permissions"
    )


def _format(head: bytes) -> str:
    """What a file's first bytes say it is: "torch", "safetensors", or words for something else."""
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle of no zip archive"
    if len(head) >= 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < 2**27:
        return "safetensors"
    if not head:
        return "nothing"
    if head.lstrip()[:1] == b"<":
        return "a web page"
    return "something else"


def _damaged(file: Path, kind: str, error: Exception) -> PidInputError:
    """What to raise for a file that begins as one of the two formats and fails their parsers."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
    if _ends_early(file, kind):
        return PidInputError(
            f"expected a whole checkpoint, but got one that was cut short in {file} ({reason}); "
            "copy or download it again"
        )
    name = "safetensors" if kind == "safetensors" else "PyTorch"
    return PidInputError(
        f"expected a checkpoint that {name} can read, but got a damaged or foreign file {file} "
        f"({reason}); pass the official file or a repackaging of it"
    )


def _ends_early(file: Path, kind: str) -> bool:
    """Whether a file is shorter than it says: a zip archive's directory stands at its end."""
    if kind == "torch":
        return not zipfile.is_zipfile(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(length)
    try:
        entries = json.loads(header)  # None of this format, or not all of it, fails below.
        entries.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return len(header) < length
    return file.stat().st_size < 8 + length + end
