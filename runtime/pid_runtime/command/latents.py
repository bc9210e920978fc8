"""Latents and caption embeddings in safetensors files, read without torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.errors import PidRuntimeError

LATENT, CAPTION, SIGMA = "latent", "caption", "sigma"
"""Names of tensors in a latent file."""

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""What safetensors calls the accepted types, and how their bytes are read."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LatentFile:
    """What one file says; shapes as the decoder takes them, float32."""

    latent: _Floats
    """`[B, C, h, w]`."""
    caption: _Floats | None
    """`[B, T, D]` or `[1, T, D]`."""
    sigma: _Floats | None
    """`[B]` or `[1]`."""


def read_latent_file(
    path: Path, key: str | None = None, *, embedded_caption: bool = True
) -> LatentFile:
    """Read a latent `[C, h, w]` or `[B, C, h, w]`, and the caption and sigma beside it.

    The latent is the tensor called `key`; without one, the tensor called "latent", or the only one
    that is neither "caption" `[T, D]` or `[B, T, D]` nor "sigma" (a number or one per image).
    Each is float32, float16 or bfloat16. embedded_caption: read "caption", if there is one.
    Raises `PidRuntimeError` for a file that cannot be read or holds something else, such as NaN.
    """
    names = _tensor_names(path)
    key = _choose(path, names, LATENT, key, "--latent-key")
    latent = _read(path, key, (3, 4), "[C, h, w] or [B, C, h, w]")
    caption = sigma = None
    if embedded_caption and CAPTION in names:
        caption = read_caption_file(path, CAPTION)
    if SIGMA in names:
        sigma = _read(path, SIGMA, (0, 1), "[] or [B]").reshape(-1)
    return LatentFile(latent if latent.ndim == 4 else latent[None], caption, sigma)


def read_caption_file(path: Path, key: str | None = None) -> _Floats:
    """Read a caption embedding `[T, D]` or `[B, T, D]`, as float32 `[B or 1, T, D]`.

    It is the tensor called `key`; without one, the tensor called "caption", or the only one.
    Raises `PidRuntimeError` as `read_latent_file` does.
    """
    key = _choose(path, _tensor_names(path), CAPTION, key, "--caption-key")
    caption = _read(path, key, (2, 3), "[T, D] or [B, T, D]")
    return caption if caption.ndim == 3 else caption[None]


def _tensor_names(path: Path) -> list[str]:
    """Names of a file's tensors; raises for anything but a whole safetensors file."""
    if not path.is_file():
        raise PidRuntimeError(f"expected a safetensors file, but {path} is none; check the path")
    try:
        with safe_open(path, "np") as file:
            return sorted(file.keys())
    except (OSError, SafetensorError) as error:
        raise PidRuntimeError(
            f"expected {path} to be a safetensors file, but got: {error}; save it again"
        ) from None


def _choose(path: Path, names: Sequence[str], role: str, key: str | None, option: str) -> str:
    """The name of the tensor that is a file's latent or caption."""
    listed = ", ".join(names) or "no tensors"
    if key is not None:
        if key not in names:
            raise PidRuntimeError(
                f"expected a tensor {key!r} in {path}, but got {listed}; change {option}"
            )
        return key
    if role in names:
        return role
    others = [name for name in names if name not in (LATENT, CAPTION, SIGMA)]
    if len(others) != 1:
        raise PidRuntimeError(
            f"expected one tensor, or one named {role!r}, in {path}, but got {listed}; "
            f"choose with {option}"
        )
    return others[0]


def _read(path: Path, name: str, ranks: tuple[int, ...], wanted: str) -> _Floats:
    """A tensor of one of these ranks as float32, without NaN."""
    # By hand, because safetensors gives numpy no bfloat16. `_tensor_names` had it check the file.
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header_bytes))[name]
            dtype, shape = entry["dtype"], entry["shape"]
            if dtype not in _DTYPES:
                raise PidRuntimeError(
                    f"expected {name!r} in {path} to be {', '.join(_DTYPES)}, but got {dtype}; "
                    "convert it to float32"
                )
            if len(shape) not in ranks or 0 in shape:
                raise PidRuntimeError(
                    f"expected {name!r} in {path} to be {wanted}, but got {shape}; reshape it"
                )
            file.seek(8 + header_bytes + entry["data_offsets"][0])
            content = file.read(math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize)
    except OSError as error:
        raise PidRuntimeError(f"cannot read {path}: {error.strerror}") from None
    raw = np.frombuffer(content, _DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        values = np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
    else:
        values = raw.astype(np.float32)
    if not np.isfinite(values).all():
        raise PidRuntimeError(
            f"expected {name!r} in {path} to be finite, but it holds NaN or infinity; "
            "look at the step that made it"
        )
    return values
