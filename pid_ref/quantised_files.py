"""Weights that others quantised, made floats again, where their format says exactly how.

The formats are ComfyUI's, as its loader and its kernels read them: beside a weight `x.weight` of 8
bits stand its scales, `x.weight_scale` (in older files `x.scale_weight`), and `x.comfy_quant`, the
bytes of a JSON text that names the format; or the safetensors file's metadata name it. Older files
have only a tensor `scaled_fp8`, and plain casts to fp8 have nothing beside them.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pid_ref.errors import PidInputError
from pid_ref.tensor_files import Shape, Tensors

_log = logging.getLogger("pid_ref")

_SCALES = ("weight_scale", "scale_weight")
_MARK = "comfy_quant"
_UNUSED = ("input_scale", "scale_input")
"""Scales of activations, which are not quantised here."""
_MORE = ("weight_scale_2", "pre_quant_scale")
"""What only formats have that are not read here."""
_BESIDE = (*_SCALES, _MARK, *_UNUSED, *_MORE)
_OLD_MARK = "scaled_fp8"
_METADATA = "_quantization_metadata"

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_FEW_BITS = ("torch.float8", "torch.float4", "torch.int8", "torch.uint8", "F4", "F6_", "F8_")
"""How the names of dtypes of 8 bits and fewer begin; F64 is none."""
_EXPONENTS = ("torch.uint8", "torch.float8_e8m0fnu")
"""Dtypes of the scales of mxfp8: bytes, or said to be powers of two."""

_MX_BLOCK = 32
"""Neighbours in a row that share a scale in mxfp8."""
_ROTATION = 256
"""Neighbours in a row that int8_tensorwise rotates together unless its mark says otherwise."""
_ROTATIONS = [4**power for power in range(1, 7)]


@dataclass(frozen=True)
class _Layer:
    """How one tensor of 8 bits becomes floats."""

    format: str
    """In words, for the log."""
    scale: str | None
    """Key of the scales; None for a plain cast."""
    blocks: bool = False
    """Whether the scales are those of mxfp8."""
    rotated: int = 0
    """Neighbours in a row that were rotated together; 0 for none."""


class _Unread(Exception):
    """A layer whose format is not read; the text names it."""


def dequantised(file: Path, tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of a file, those of 8 bits under `prefix` as float32 and without their scales.

    Every value is the one that the format defines, rounded once, to float32. What was lost when
    the file was made does not come back: the "pid_ref" logger is told so. Nothing is read yet but
    marks. Raises `PidInputError`, one line, for a format that is not read.
    """
    keys = tensors.keys()
    present = set(keys)
    metadata = _metadata_marks(tensors, prefix)
    layers: dict[str, _Layer] = {}
    spent = {_OLD_MARK, prefix + _OLD_MARK}
    unread: set[str] = set()
    for key in keys:
        stem, _, leaf = key.rpartition(".")
        if not key.startswith(prefix) or leaf in (*_BESIDE, _OLD_MARK):
            continue
        beside = {name: f"{stem}.{name}" for name in _BESIDE if leaf == "weight"}
        beside = {name: other for name, other in beside.items() if other in present}
        mark = metadata.get(stem) if leaf == "weight" else None
        if _MARK in beside:
            mark = _tensor_mark(tensors, beside[_MARK])
        try:
            layer = _layer(tensors, key, beside, mark)
        except _Unread as format:
            unread.add(str(format))
            continue
        if layer is not None:
            layers[key] = layer
            spent.update(beside.values())
    if unread:
        raise PidInputError(
            "expected weights of bfloat16, float16 or float32, or quantised in a way that is read "
            f"here, but got quantised ones ({', '.join(sorted(unread))}) in {file}; pass the bf16 "
            "file they were made of"
        )
    if layers:
        counts = Counter(layer.format for layer in layers.values())
        _log.warning(
            "the weights in %s are quantised (%s): what was rounded away when that file was made "
            "is lost; the bf16 file has it",
            file,
            ", ".join(f"{count} of {format}" for format, count in sorted(counts.items())),
        )
    return _Dequantised(tensors, layers, spent)


class _Dequantised:
    """The tensors of a file by key, those of quantised layers as float32."""

    def __init__(self, tensors: Tensors, layers: Mapping[str, _Layer], spent: set[str]) -> None:
        self._tensors = tensors
        self._layers = layers
        self._spent = spent

    def keys(self) -> list[str]:
        keys = self._tensors.keys()
        return [key for key in keys if key not in self._spent]

    def kind(self, key: str) -> tuple[Shape, str]:
        shape, dtype = self._tensors.kind(key)
        return shape, "torch.float32" if key in self._layers else dtype

    def get(self, key: str) -> torch.Tensor:
        value = self._tensors.get(key)
        layer = self._layers.get(key)
        if layer is None:
            return value
        value = value.float()
        if layer.scale is None:
            return value
        scale = self._tensors.get(layer.scale)
        if layer.blocks:
            scale = _block_scales(scale, len(value), value.shape[1] // _MX_BLOCK)
            return (value.unflatten(1, (-1, _MX_BLOCK)) * scale[:, :, None]).flatten(1)
        scale = scale.float()
        if layer.rotated:
            # Sums of integers are exact, and so is a division by the root, a power of two.
            value = value.unflatten(1, (-1, layer.rotated)) @ _hadamard(layer.rotated)
            value, scale = value.flatten(1), scale / math.isqrt(layer.rotated)
        return value * scale

    def metadata(self) -> dict[str, str]:
        return self._tensors.metadata()


def _mark(text: bytes | str) -> dict[str, Any]:
    """What a mark says of a layer; no mark that can be read says nothing."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tensor_mark(tensors: Tensors, key: str) -> dict[str, Any]:
    if tensors.kind(key)[1] != "torch.uint8":
        return {}
    return _mark(tensors.get(key).numpy().tobytes())


def _metadata_marks(tensors: Tensors, prefix: str) -> dict[str, dict[str, Any]]:
    """Marks by layer that stand in the file's metadata, where names may lack the prefix."""
    layers = _mark(tensors.metadata().get(_METADATA, "{}")).get("layers", {})
    if not isinstance(layers, dict):
        return {}
    return {
        prefix + str(name).removeprefix(prefix): mark if isinstance(mark, dict) else {}
        for name, mark in layers.items()
    }


def _layer(
    tensors: Tensors, key: str, beside: Mapping[str, str], mark: Mapping[str, Any] | None
) -> _Layer | None:
    """How a tensor was quantised, or None for one that was not."""
    shape, dtype = tensors.kind(key)
    bits = dtype.removeprefix("torch.")
    scale = next((beside[name] for name in _SCALES if name in beside), None)
    if mark is None and scale is None:
        if bits in _FP8:
            return _Layer(f"{bits} without scales", None)
        if dtype.startswith(_FEW_BITS):
            raise _Unread(f"{bits} without a mark of its format")
        return None
    if mark is None and bits not in _FP8:
        raise _Unread(f"scales beside {bits}")
    format = bits if mark is None else str(mark.get("format", "format without a name"))[:40]
    reader = _READERS.get(format)
    if reader is None or scale is None or any(name in beside for name in _MORE):
        raise _Unread(f"ComfyUI's {format}")
    stored = _Stored(shape, bits, *tensors.kind(scale), mark or {})
    layer = reader(stored, scale)
    if layer is None:
        raise _Unread(
            f"ComfyUI's {format} of {bits} {list(shape)} with scales {list(stored.scale_shape)}"
        )
    return layer


@dataclass(frozen=True)
class _Stored:
    """A weight with scales, as far as can be told without reading it."""

    shape: Shape
    bits: str
    """The weight's dtype without the name of torch."""
    scale_shape: Shape
    scale_dtype: str
    mark: Mapping[str, Any]

    def option(self, name: str, default: Any) -> Any:
        """What the mark says, itself or among its "params"."""
        params = self.mark.get("params")
        return self.mark.get(name, (params if isinstance(params, dict) else {}).get(name, default))


def _scaled_fp8(stored: _Stored, scale: str) -> _Layer | None:
    """One scale for the whole tensor."""
    if stored.bits != stored.mark.get("format", stored.bits) or math.prod(stored.scale_shape) != 1:
        return None
    return _Layer(f"scaled {stored.bits}", scale)


def _int8(stored: _Stored, scale: str) -> _Layer | None:
    """One scale for the whole tensor or for each row, whose neighbours may have been rotated."""
    rows = stored.shape[0] if len(stored.shape) == 2 else 0
    if stored.bits != "int8" or stored.scale_shape not in ((), (1,), (1, 1), (rows, 1)):
        return None
    if not stored.option("convrot", False):
        return _Layer("int8_tensorwise", scale)
    group = stored.option("convrot_groupsize", _ROTATION)
    # A regular Hadamard matrix is made of those of four rows.
    if group not in _ROTATIONS or not rows or stored.shape[1] % group:
        return None
    return _Layer("int8_tensorwise with convrot", scale, rotated=group)


def _mxfp8(stored: _Stored, scale: str) -> _Layer | None:
    """A power of two for 32 neighbours in a row, in tiles."""
    rows, columns = stored.shape if len(stored.shape) == 2 else (0, 1)
    count = 128 * 4 * math.prod(_tiles(rows, columns // _MX_BLOCK))
    fits = columns % _MX_BLOCK == 0 and math.prod(stored.scale_shape) == count
    if stored.bits != "float8_e4m3fn" or stored.scale_dtype not in _EXPONENTS or not fits:
        return None
    return _Layer("mxfp8", scale, blocks=True)


_READERS: dict[str, Callable[[_Stored, str], _Layer | None]] = {
    "float8_e4m3fn": _scaled_fp8,
    "float8_e5m2": _scaled_fp8,
    "int8_tensorwise": _int8,
    "mxfp8": _mxfp8,
}
"""What tells how a layer of a format is stored, or None for a way that the format does not have."""


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    """Tiles of 128 x 4 scales down and across, the last ones filled up."""
    return -(-rows // 128), -(-columns // 4)


def _block_scales(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales `(rows, columns)`, float32, of bytes that are powers of two less 127.

    They are stored as cuBLAS wants them: tiles of 128 x 4, of which row `32 i + j` lies in the
    16 bytes of `j`, after those of smaller `i`.
    """
    down, across = _tiles(rows, columns)
    tiles = stored.view(torch.float8_e8m0fnu).float().reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns]


def _hadamard(size: int) -> torch.Tensor:
    """The rotation of `size` neighbours, times the root of `size`: ones and minus ones.

    A Kronecker power of the regular Hadamard matrix of four rows, minus ones from corner to
    corner. It is symmetric, and its square is `size` times the identity.
    """
    four = 1 - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix
