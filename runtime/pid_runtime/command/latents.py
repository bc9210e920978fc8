"""Latents and caption embeddings in safetensors files, read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.errors import PidRuntimeError

LATENT, CAPTION, SIGMA = "latent", "caption", "sigma"
"""Names of tensors in a latent file."""

_DTYPES = ("F32", "F16", "BF16")
"""What safetensors calls the accepted types."""

_Floats = NDArray[np.float32]

_Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of every tensor of a file, by name."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, of which only the header has been read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    """As the decoder takes it, with a batch axis."""

    def read(self) -> _Floats:
        """Its values in float32. Raises `PidRuntimeError` for NaN, or a file that changed."""
        try:
            with safe_open(self.path, "np") as file:
                values = file.get_tensor(self.name).astype(np.float32).reshape(self.shape)
        except (OSError, SafetensorError, ValueError) as error:
            raise PidRuntimeError(f"cannot read {self.path}: {error}") from None
        if not np.isfinite(values).all():
            raise PidRuntimeError(
                f"expected {self.name!r} in {self.path} to be finite, but it holds NaN or "
                "infinity; look at the step that made it"
            )
        return values

    def outline(self) -> _Floats:
        """Zeros of its shape, which take no memory."""
        return np.broadcast_to(np.float32(0), self.shape)


@dataclass(frozen=True)
class LatentFile:
    """What one file has."""

    latent: StoredTensor
    """`[B, C, h, w]`."""
    caption: StoredTensor | None
    """`[B, T, D]` or `[1, T, D]`."""
    sigma: StoredTensor | None
    """`[B]` or `[1]`."""


def open_latent_file(
    path: Path, key: str | None = None, *, embedded_caption: bool = True
) -> LatentFile:
    """Find a latent `[C, h, w]` or `[B, C, h, w]`, and the caption and sigma beside it.

    The latent is the tensor called `key`; without one, the tensor called "latent", or the only one
    that is neither "caption" `[T, D]` or `[B, T, D]` nor "sigma" (a number or one per image).
    Each is float32, float16 or bfloat16. embedded_caption: look for "caption".
    Raises `PidRuntimeError` for a file that cannot be read or holds something else.
    """
    header = _read_header(path)
    key = _choose(path, header, LATENT, key, "--latent-key")
    latent = _find(path, header, key, (3, 4), "[C, h, w] or [B, C, h, w]")
    caption = sigma = None
    if embedded_caption and CAPTION in header:
        caption = _find_caption(path, header, CAPTION)
    if SIGMA in header:
        sigma = _find(path, header, SIGMA, (0, 1), "[] or [B]")
    return LatentFile(latent, caption, sigma)


def open_caption_file(path: Path, key: str | None = None) -> StoredTensor:
    """Find a caption embedding `[T, D]` or `[B, T, D]`.

    It is the tensor called `key`; without one, the tensor called "caption", or the only one.
    Raises `PidRuntimeError` as `open_latent_file` does.
    """
    header = _read_header(path)
    return _find_caption(path, header, _choose(path, header, CAPTION, key, "--caption-key"))


def _read_header(path: Path) -> _Header:
    """What a file holds, in the order of names; raises for anything but a whole one."""
    if not path.is_file():
        raise PidRuntimeError(f"expected a safetensors file, but {path} is none; check the path")
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}
    except (OSError, SafetensorError) as error:
        raise PidRuntimeError(
            f"expected {path} to be a safetensors file, but got: {error}; save it again"
        ) from None


def _choose(path: Path, names: _Header, role: str, key: str | None, option: str) -> str:
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


def _find_caption(path: Path, header: _Header, name: str) -> StoredTensor:
    return _find(path, header, name, (2, 3), "[T, D] or [B, T, D]")


def _find(
    path: Path, header: _Header, name: str, ranks: tuple[int, int], wanted: str
) -> StoredTensor:
    """A tensor of one of these ranks, the larger of which has a batch axis."""
    dtype, shape = header[name]
    if dtype not in _DTYPES:
        raise PidRuntimeError(
            f"expected {name!r} in {path} to be {', '.join(_DTYPES)}, but got {dtype}; "
            "convert it to float32"
        )
    if len(shape) not in ranks or 0 in shape:
        raise PidRuntimeError(
            f"expected {name!r} in {path} to be {wanted}, but got {list(shape)}; reshape it"
        )
    return StoredTensor(path, name, shape if len(shape) == max(ranks) else (1, *shape))
