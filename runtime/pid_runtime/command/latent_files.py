"""Latents and caption embeddings in files, read without torch but for those that torch wrote."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import PidRuntimeError
from pid_runtime.latents import (
    RAW_PATCH,
    Normalization,
    batch_normalization,
    comfyui_normalization,
    in_blocks,
    may_be_tokens,
    unpacked,
)

LATENT_SUFFIXES = (".safetensors", ".latent", ".npy", ".pt")
"""Of latent files; the second is ComfyUI's."""

FORMS = ("auto", "normalised", "raw", "packed")
"""What a latent may be: what its file says, as the bundle takes it, as a VAE's encoder gives it, or
tokens of a normalised one."""

NEGATIVE = "negative"
CAPTION_SUFFIX = ".safetensors"

LATENT, CAPTION, SIGMA = "latent", "caption", "sigma"
"""Names of tensors in a latent file."""

_COMFYUI_LATENT, _COMFYUI_MARK = "latent_tensor", "latent_format_version_0"
"""Names of tensors in ComfyUI's latent files: the raw latent, and an empty one that says so."""

_STATISTICS = ("bn.running_mean", "bn.running_var")
"""In the file of FLUX.2's autoencoder, its authors' or diffusers'."""

_STATISTICS_EPS = 1e-4
"""What FLUX.2's autoencoder adds to its variances."""

_NUMPY = b"\x93NUMPY"
_TORCH = (b"PK\x03\x04", b"\x80")
"""How files that are none of safetensors begin: NumPy's, and those of torch.save, old and new."""

_LONGEST_HEADER = 100_000_000
"""Bytes of the header of a safetensors file, whose number it begins with."""

_DTYPES = ("F32", "F16", "BF16")
"""What safetensors calls the accepted types."""

_Floats = NDArray[np.float32]

_Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of every tensor of a file, by name."""


@dataclass(frozen=True)
class LatentForm:
    """What latents in files are, as somebody who knows says."""

    kind: str = "auto"
    """One of `FORMS`."""
    size: tuple[int, int] | None = None
    """Of packed ones width and height in pixels of the picture that they are of; None for one that
    is square."""
    statistics: Path | None = None
    """Of raw ones the safetensors file of their autoencoder, whose statistics normalise them as
    FLUX.2's do; None for the rule of the bundle."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, of which only the header has been read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    """As the decoder takes it, with a batch axis; the file's own where that is not clear."""
    normalization: Normalization | None = None
    """What is to be done to its values; None for nothing."""
    arrange: Callable[[_Floats], _Floats] | None = None
    """How the file's values come into this shape; None where they lie as they are to be."""

    def read(self) -> _Floats:
        """Its values in float32. Raises `PidRuntimeError` for NaN, or a file that changed."""
        try:
            arrays = _other_arrays(self.path)
            if arrays is not None:
                values: _Floats = arrays[self.name].astype(np.float32)
            else:
                with safe_open(self.path, "np") as file:
                    values = file.get_tensor(self.name).astype(np.float32)
            if self.arrange is not None:
                values = self.arrange(values)
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
    note: str | None = None
    """What is done to the latent when it is read; None for nothing."""


def open_latent_file(
    path: Path,
    manifest: Manifest,
    key: str | None = None,
    *,
    form: LatentForm = LatentForm(),
    embedded_caption: bool = True,
) -> LatentFile:
    """Find a latent `[C, h, w]` or `[B, C, h, w]`, and the caption and sigma beside it.

    The latent is the tensor called `key`; without one, the tensor called "latent", or the only one
    that is neither "caption" `[T, D]` or `[B, T, D]` nor "sigma" (a number or one per image). That
    of ComfyUI's files is known, and normalised when it is read. An axis of one frame,
    `[B, C, 1, h, w]`, is left out. Each is float32, float16 or bfloat16. A NumPy file is a latent;
    one of torch.save is a tensor, or a dictionary of them, of which nothing else is unpickled.
    manifest: of the bundle that is to decode it. form: what the latent is. embedded_caption: look
    for "caption".
    Raises `PidRuntimeError` for a file that cannot be read or holds something else.
    """
    header = _read_header(path)
    latent = _find_latent(path, header, manifest, key, form)
    caption = sigma = None
    if embedded_caption and CAPTION in header:
        caption = _find_caption(path, header, CAPTION)
    if SIGMA in header:
        sigma = _find(path, header, SIGMA, (0, 1), "[] or [B]")
    note = None
    if latent.normalization is not None:
        note = "raw latents, normalised as this bundle takes them"
    elif latent.arrange is not None:
        note = f"tokens, unpacked to {list(latent.shape)}"
    return LatentFile(latent, caption, sigma, note)


def open_caption_file(path: Path, key: str | None = None) -> StoredTensor:
    """Find a caption embedding `[T, D]` or `[B, T, D]`.

    It is the tensor called `key`; without one, the tensor called "caption", or the only one.
    Raises `PidRuntimeError` as `open_latent_file` does.
    """
    header = _read_header(path)
    return _find_caption(path, header, _choose(path, header, CAPTION, key, "--caption-key"))


def open_negative_file(path: Path) -> StoredTensor:
    """Find a negative caption embedding, as `open_caption_file` finds a caption's.

    It is the tensor called "negative", as pid-caption --negative writes it beside the caption; in
    a file without one what would be the caption.
    """
    header = _read_header(path)
    if NEGATIVE in header:
        return _find_caption(path, header, NEGATIVE)
    fix = f"name that of the negative caption {NEGATIVE!r}"
    return _find_caption(path, header, _choose(path, header, CAPTION, None, fix=fix))


def _read_header(path: Path) -> _Header:
    """What a file holds, in the order of names; raises for anything but a whole one."""
    if not path.is_file():
        raise PidRuntimeError(f"expected a safetensors file, but {path} is none; check the path")
    arrays = _other_arrays(path)
    if arrays is not None:
        return {name: (_dtype(array), array.shape) for name, array in arrays.items()}
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}
    except (OSError, SafetensorError) as error:
        raise PidRuntimeError(
            f"expected {path} to be a safetensors file, but got: {error}; save it again"
        ) from None


def _other_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The tensors of a file of NumPy or torch, by name; None for any other file.

    Raises `PidRuntimeError` for one that cannot be read without running what is in it.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if int.from_bytes(start, "little") <= _LONGEST_HEADER:  # a safetensors file's header
        return None
    try:
        if start.startswith(_NUMPY):
            return {LATENT: np.load(path, mmap_mode="r", allow_pickle=False)}
        if start.startswith(_TORCH):
            from pid_runtime.command.torch_files import read_tensors

            return read_tensors(path)
    except ImportError:
        raise PidRuntimeError(
            f"expected PyTorch to read {path}, which torch.save wrote, but it is not installed; "
            "pip install 'pid-trt[torch]', or save its tensor with save_file of the safetensors "
            "package"
        ) from None
    except PidRuntimeError:
        raise
    except Exception as error:  # torch raises almost anything for what it does not read
        reason = str(error).partition("\n")[0][:100]
        raise PidRuntimeError(
            f"expected an array or tensors in {path}, but cannot read it: {reason}; save them "
            "with save_file of the safetensors package"
        ) from error
    return None


def _dtype(array: NDArray[Any]) -> str:
    """What safetensors calls the type of an array that is read as float32."""
    kinds = {"float16": "F16", "float32": "F32", "float64": "F32"}
    return kinds.get(str(array.dtype), str(array.dtype))


def _choose(
    path: Path, names: _Header, role: str, key: str | None, option: str = "", fix: str | None = None
) -> str:
    """The name of the tensor that is a file's latent or caption.

    option: which gives the key. fix: what to do where the file does not say; None for the option.
    """
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
            f"{fix or f'choose with {option}'}"
        )
    return others[0]


def _find_latent(
    path: Path, header: _Header, manifest: Manifest, key: str | None, form: LatentForm
) -> StoredTensor:
    is_comfyui = _COMFYUI_LATENT in header and _COMFYUI_MARK in header
    if is_comfyui and key is None:
        key = _COMFYUI_LATENT
    key = _choose(path, header, LATENT, key, "--latent-key")
    shape = _floats(path, header, key)
    latent = StoredTensor(path, key, shape)
    if form.kind == "packed":
        return _packed(latent, manifest, form)
    if len(shape) == 3 and shape[0] == manifest.network["latent_channels"]:
        if form.kind != "auto" or not may_be_tokens(manifest, shape):
            latent = replace(latent, shape=(1, *shape))
    elif len(shape) == 5 and shape[2] == 1:
        latent = replace(latent, shape=(*shape[:2], *shape[3:]))
    if form.statistics is not None:
        return _by_statistics(latent, manifest, form.statistics)
    if manifest.model.get("space") == "flux2" and _is_in_parts(latent.shape, manifest):
        raise PidRuntimeError(
            f"expected {path} to hold latents of {manifest.network['latent_channels']} channels, "
            f"but got raw ones, {list(latent.shape)}; name the file of FLUX.2's autoencoder, whose "
            "statistics normalise them, as --latent-form raw:flux2_ae.safetensors"
        )
    is_raw = is_comfyui and key == _COMFYUI_LATENT
    if form.kind == "normalised" or (form.kind == "auto" and not is_raw):
        return latent
    rule = comfyui_normalization(manifest)
    if rule is None or (form.kind == "raw" and rule.is_identity):
        whose = "ComfyUI's raw one" if is_raw else "a raw one"
        raise PidRuntimeError(
            f"expected {path} to hold a normalised latent, but got {whose}, and this "
            "bundle does not say how to normalise it; normalise it and save it as 'latent'"
        )
    return replace(latent, normalization=rule)


def _is_in_parts(shape: tuple[int, ...], manifest: Manifest) -> bool:
    """Whether latents are FLUX.2's raw ones, of which 2x2 pixels are one of the bundle's."""
    return len(shape) == 4 and shape[1] * RAW_PATCH**2 == manifest.network["latent_channels"]


def _by_statistics(latent: StoredTensor, manifest: Manifest, statistics: Path) -> StoredTensor:
    """A raw latent, to be normalised by the statistics in a file.

    Raises `PidRuntimeError` for a file without them, or with those of other latents.
    """
    channels = manifest.network["latent_channels"]
    header = _read_header(statistics)
    if any(header.get(name, ("", ()))[1] != (channels,) for name in _STATISTICS):
        raise PidRuntimeError(
            f"expected {' and '.join(_STATISTICS)} of {channels} channels in {statistics}, but got "
            "none; give the safetensors file of the autoencoder that made the latents, FLUX.2's"
        )
    mean, variance = (StoredTensor(statistics, name, (channels,)).read() for name in _STATISTICS)
    latent = replace(latent, normalization=batch_normalization(mean, variance, _STATISTICS_EPS))
    shape = latent.shape
    if not _is_in_parts(shape, manifest):
        return latent
    if any(side % RAW_PATCH for side in shape[2:]):
        raise PidRuntimeError(
            f"expected raw latents of even height and width in {latent.path}, but got "
            f"{list(shape)}; generate a picture whose sides are multiples of "
            f"{manifest.network['latent_down']}"
        )
    sides = (side // RAW_PATCH for side in shape[2:])
    return replace(latent, shape=(shape[0], channels, *sides), arrange=in_blocks)


def _packed(latent: StoredTensor, manifest: Manifest, form: LatentForm) -> StoredTensor:
    """Tokens, to be unpacked. Raises `PidRuntimeError` for what cannot be tokens of this bundle."""
    network, shape = manifest.network, latent.shape
    channels, width = network["latent_channels"], manifest.model.get("token_width")
    if width is None or len(shape) != 3 or shape[2] != width:
        wanted = f"tokens [B, n, {width}]" if width else "a bundle whose latents are ever packed"
        raise PidRuntimeError(
            f"expected {wanted} in {latent.path}, but got {list(shape)}; change --latent-form"
        )
    patch = math.isqrt(width // channels)
    if form.size is None:
        side = math.isqrt(shape[1]) * patch
        rows, columns = side, side
    else:
        columns, rows = (side // network["latent_down"] for side in form.size)
    if rows * columns != shape[1] * patch**2 or rows % patch or columns % patch:
        asked = "a square" if form.size is None else "x".join(map(str, form.size))
        raise PidRuntimeError(
            f"expected tokens of {asked}, but {latent.path} has {shape[1]}, of {patch}x{patch} "
            f"latent pixels of {network['latent_down']} pixels each; give the size of the picture "
            "that was generated, as --latent-form packed:1024x768"
        )
    arrange = functools.partial(unpacked, height=rows, width=columns, patch=patch)
    return replace(latent, shape=(shape[0], channels, rows, columns), arrange=arrange)


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
