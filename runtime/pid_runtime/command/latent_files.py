"""Latents and caption embeddings in safetensors files, read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import PidRuntimeError
from pid_runtime.latents import Normalization, comfyui_normalization, may_be_tokens

LATENT_SUFFIXES = (".safetensors", ".latent")
"""Of latent files; the second is ComfyUI's."""

CAPTION_SUFFIX = ".safetensors"

LATENT, CAPTION, SIGMA = "latent", "caption", "sigma"
"""Names of tensors in a latent file."""

_COMFYUI_LATENT, _COMFYUI_MARK = "latent_tensor", "latent_format_version_0"
"""Names of tensors in ComfyUI's latent files: the raw latent, and an empty one that says so."""

_OTHER_FORMATS = {
    b"\x93NUMPY": "a NumPy file",
    b"PK\x03\x04": "a ZIP archive, as torch.save and numpy.savez write",
    b"\x80": "a pickle",
}
"""What begins as no safetensors file does."""

_LONGEST_HEADER = 100_000_000
"""Bytes of the header of a safetensors file, whose number it begins with."""

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
    """As the decoder takes it, with a batch axis; the file's own where that is not clear."""
    normalization: Normalization | None = None
    """What is to be done to its values; None for nothing."""

    def read(self) -> _Floats:
        """Its values in float32. Raises `PidRuntimeError` for NaN, or a file that changed."""
        try:
            with safe_open(self.path, "np") as file:
                values: _Floats = file.get_tensor(self.name).astype(np.float32)
            values = values.reshape(self.shape)
        except (OSError, SafetensorError, ValueError) as error:
            raise PidRuntimeError(f"cannot read {self.path}: {error}") from None
        if not np.isfinite(values).all():
            raise PidRuntimeError(
                f"expected {self.name!r} in {self.path} to be finite, but it holds NaN or "
                "infinity; look at the step that made it"
            )
        return values if self.normalization is None else self.normalization.apply(values)

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
    path: Path, manifest: Manifest, key: str | None = None, *, embedded_caption: bool = True
) -> LatentFile:
    """Find a latent `[C, h, w]` or `[B, C, h, w]`, and the caption and sigma beside it.

    The latent is the tensor called `key`; without one, the tensor called "latent", or the only one
    that is neither "caption" `[T, D]` or `[B, T, D]` nor "sigma" (a number or one per image). That
    of ComfyUI's files is known, and normalised when it is read. An axis of one frame,
    `[B, C, 1, h, w]`, is left out. Each is float32, float16 or bfloat16.
    manifest: of the bundle that is to decode it. embedded_caption: look for "caption".
    Raises `PidRuntimeError` for a file that cannot be read or holds something else.
    """
    header = _read_header(path)
    latent = _find_latent(path, header, manifest, key)
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
    _refuse_other_formats(path)
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}
    except (OSError, SafetensorError) as error:
        raise PidRuntimeError(
            f"expected {path} to be a safetensors file, but got: {error}; save it again"
        ) from None


def _refuse_other_formats(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for signature, kind in _OTHER_FORMATS.items():
        if start.startswith(signature) and int.from_bytes(start, "little") > _LONGEST_HEADER:
            raise PidRuntimeError(
                f"expected {path} to be a safetensors file, but got {kind}; save its array as "
                "'latent' with save_file of the safetensors package"
            )


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


def _find_latent(path: Path, header: _Header, manifest: Manifest, key: str | None) -> StoredTensor:
    is_comfyui = _COMFYUI_LATENT in header and _COMFYUI_MARK in header
    if is_comfyui and key is None:
        key = _COMFYUI_LATENT
    key = _choose(path, header, LATENT, key, "--latent-key")
    shape = _floats(path, header, key)
    latent = StoredTensor(path, key, shape)
    if len(shape) == 3 and shape[0] == manifest.network["latent_channels"]:
        if not may_be_tokens(manifest, shape):
            latent = replace(latent, shape=(1, *shape))
    elif len(shape) == 5 and shape[2] == 1:
        latent = replace(latent, shape=(*shape[:2], *shape[3:]))
    if not (is_comfyui and key == _COMFYUI_LATENT):
        return latent
    rule = comfyui_normalization(manifest)
    if rule is None:
        raise PidRuntimeError(
            f"expected {path} to hold a normalised latent, but got ComfyUI's raw one, and this "
            "bundle does not say how to normalise it; normalise it and save it as 'latent'"
        )
    return replace(latent, normalization=rule)


def _find_caption(path: Path, header: _Header, name: str) -> StoredTensor:
    return _find(path, header, name, (2, 3), "[T, D] or [B, T, D]")


def _find(
    path: Path, header: _Header, name: str, ranks: tuple[int, int], wanted: str
) -> StoredTensor:
    """A tensor of one of these ranks, the larger of which has a batch axis."""
    shape = _floats(path, header, name)
    if len(shape) not in ranks:
        raise PidRuntimeError(
            f"expected {name!r} in {path} to be {wanted}, but got {list(shape)}; reshape it"
        )
    return StoredTensor(path, name, shape if len(shape) == max(ranks) else (1, *shape))


def _floats(path: Path, header: _Header, name: str) -> tuple[int, ...]:
    """The shape of a tensor of some floats."""
    dtype, shape = header[name]
    if dtype not in _DTYPES:
        raise PidRuntimeError(
            f"expected {name!r} in {path} to be {', '.join(_DTYPES)}, but got {dtype}; "
            "convert it to float32"
        )
    if 0 in shape:
        raise PidRuntimeError(f"expected values in {name!r} in {path}, but got {list(shape)}")
    return shape
