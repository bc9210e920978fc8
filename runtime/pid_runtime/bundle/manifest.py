"""The manifest: a decoder as data. See docs/bundle-format.md, which this module implements."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-bundle"
FORMAT_VERSION = (1, 2)
"""Major and minor version; a reader takes any minor version of its own major version."""

MANIFEST_FILE = "manifest.json"
MANIFEST_MAX_BYTES = 1 << 24
WEIGHTS_FILE = "weights.safetensors"

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""What files, graphs, ports, buffers, buckets and sections may be called: never a path."""

LARGEST_INTEGER = 2**53 - 1
"""No integer of a manifest is larger, so that any JSON reader gets it exactly."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The dtype of activations and matrix weights, by the name of a bundle's precision."""

Shape = tuple[int | str, ...]
"""Sizes and symbols; see `Sizes`."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """One ONNX file and the stage it came from."""

    file: str
    stage: str
    options: dict[str, Any]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    weights_bytes: int
    weights_sha256: str
    contrib_file: str | None = None
    """The same graph with ONNX Runtime's own operators; see docs/bundle-format.md."""


@dataclass(frozen=True)
class Buffer:
    """A named piece of memory.

    kind: "input" and "schedule" are written for every decode, "table" for every new shape,
    "constant" once, "temporary" and "output" by the program.
    source: for a table how to compute it, for a constant the tensor it is filled from.
    """

    dtype: str
    shape: Shape
    kind: str
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operand:
    """A contiguous part of a buffer, from the element at index `start` (zeros when empty)."""

    buffer: str
    start: Shape = ()


@dataclass(frozen=True)
class Run:
    """Run a graph, over slices of its axis `chunk` if given.

    dims: what the graph's own symbols stand for.
    """

    graph: str
    inputs: dict[str, Operand]
    outputs: dict[str, Operand]
    chunk: str | None = None
    dims: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """Copy one buffer to another of the same size."""

    source: str
    target: str


@dataclass(frozen=True)
class Noise:
    """Fill `target` with the next draw of noise, generated or put by `graph` from an image."""

    target: str
    image: str
    graph: str


Instruction = Run | Copy | Noise

SECTIONS = ("prologue", "timestep", "step", "image", "image_bytes")
"""Parts of a program: once; once per step before the first; per step; then one of the last two."""


@dataclass(frozen=True)
class Bucket:
    """A token budget: the largest L, the tokens of one chunk, and where each buffer lies."""

    max_tokens: int
    chunk_tokens: int
    arena_bytes: int
    offsets: dict[str, int]

    def scratch_offset(self, section: str, index: int) -> int | None:
        """Where the scratch of an instruction lies in the arena; None if it is not planned."""
        return None


@dataclass(frozen=True)
class Sampler:
    """The times a decode visits.

    times: the known timesteps t, one per row of the modulation table; empty when any time goes.
    schedules: by number of steps, the rows visited. steps: the default.
    """

    steps: int
    max_steps: int
    times: tuple[float, ...]
    schedules: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class File:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


BLOCK_DCT = "block_dct"
"""The kind of codec this version knows; see `pid_runtime.nano.block_dct`."""


@dataclass(frozen=True)
class Codec:
    """How latents are made of images, where that needs no network.

    std: of every channel of a latent, for kind "block_dct".
    """

    kind: str
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know about a decoder."""

    producer: str
    model: dict[str, Any]
    precision: str
    network: dict[str, Any]
    tokens_per_latent: int
    sampler: Sampler
    files: dict[str, File]
    graphs: dict[str, Graph]
    buffers: dict[str, Buffer]
    buckets: dict[str, Bucket]
    program: dict[str, tuple[Instruction, ...]]
    engines: dict[str, Any] = field(default_factory=dict)
    codec: Codec | None = None
    """None where latents are made by a network that is not part of the bundle."""

    def bucket_for(self, tokens: int) -> tuple[str, Bucket]:
        """The smallest bucket that holds `tokens` patch tokens.

        Raises `PidRuntimeError` when none does.
        """
        fitting = [
            (b.max_tokens, name) for name, b in self.buckets.items() if b.max_tokens >= tokens
        ]
        if not fitting:
            largest = max(self.buckets.values(), key=lambda b: b.max_tokens).max_tokens
            p = self.network["patch_size"]
            raise PidRuntimeError(
                f"expected at most {largest} patch tokens (H/{p} x W/{p}), the largest bucket of "
                f"this bundle, but got {tokens}; export with a larger bucket or decode a smaller "
                "latent"
            )
        name = min(fitting)[1]
        return name, self.buckets[name]

    def instructions(self) -> Iterator[Instruction]:
        """All instructions in the order of `SECTIONS`."""
        for section in SECTIONS:
            yield from self.program.get(section, ())

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = asdict(self)
        fields["program"] = {
            name: [_encode(instruction) for instruction in section]
            for name, section in self.program.items()
        }
        for graph in fields["graphs"].values():
            if graph["contrib_file"] is None:
                del graph["contrib_file"]
        if self.codec is None:
            del fields["codec"]
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read and check manifest.json. Raises `PidRuntimeError` when it is not one we can run."""
        try:
            raw = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise PidRuntimeError(f"expected {MANIFEST_FILE} to be JSON, but got {error}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise PidRuntimeError(f"expected a {FORMAT} manifest, but {MANIFEST_FILE} is none")
        version = read_member(tuple[int, ...], raw.get("format_version"), "format_version")
        if len(version) != 2 or version[0] != FORMAT_VERSION[0]:
            raise PidRuntimeError(
                f"expected bundle format {FORMAT_VERSION[0]}.x, but got version "
                f"{'.'.join(map(str, version))}; "
                "update pid-trt, or export the bundle again with this version"
            )
        manifest: Manifest = read_member(cls, raw, MANIFEST_FILE)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raise `PidRuntimeError` when the manifest contradicts itself; see `check_manifest`."""
        from pid_runtime.bundle.manifest_check import check_manifest

        check_manifest(self)


@dataclass(frozen=True)
class Sizes:
    """Values of the symbols of one decode.

    B batch, T text tokens, h w latent, Hs Ws patch grid, L = Hs Ws, S = T + L, H W pixels,
    N rows of the modulation table or schedule, `row` and `step` of the step being run.
    """

    values: Mapping[str, int]

    def value(self, size: int | str) -> int:
        """A size, or the value of a symbol."""
        return size if isinstance(size, int) else self.values[size]

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """A shape in numbers."""
        return tuple(self.value(size) for size in shape)

    def bytes(self, dtype: str, shape: Shape) -> int:
        """Bytes of a buffer."""
        return ITEM_BYTES[dtype] * math.prod(self.shape(shape))

    def index(self, shape: Shape, start: Shape) -> int:
        """Flat index of the element at `start` of an array of `shape`."""
        flat = 0
        for size, at in zip(self.shape(shape), self.shape(start or (0,) * len(shape)), strict=True):
            flat = flat * size + at
        return flat

    def extended(self, dims: Mapping[str, str], **more: int) -> "Sizes":
        """These sizes with a graph's own symbols, and others, added."""
        return Sizes(
            {**self.values, **{name: self.values[of] for name, of in dims.items()}, **more}
        )


def sizes_of_request(
    network: Mapping[str, Any],
    tokens_per_latent: int,
    *,
    batch: int,
    latent_height: int,
    latent_width: int,
    text_tokens: int,
    rows: int,
) -> Sizes:
    """The sizes of a decode of `batch` latents `latent_height` x `latent_width`."""
    p = network["patch_size"]
    hs, ws = latent_height * tokens_per_latent, latent_width * tokens_per_latent
    tokens = hs * ws
    values = {"B": batch, "T": text_tokens, "h": latent_height, "w": latent_width}
    values |= {"Hs": hs, "Ws": ws, "H": hs * p, "W": ws * p, "L": tokens}
    values |= {"S": text_tokens + tokens, "N": rows, "row": 0, "step": 0}
    return Sizes(values)


def sizes_for(network: Mapping[str, Any], tokens_per_latent: int, rows: int, tokens: int) -> Sizes:
    """The sizes of the largest decode of one image within a budget of `tokens` patch tokens.

    All in one column: every product of sizes is at its largest then, or with h and w, Hs and Ws, H
    and W exchanged.
    """
    p = network["patch_size"]
    text = network["text_max_length"]
    values = {"B": 1, "T": text, "h": -(-tokens // tokens_per_latent**2), "w": 1}
    values |= {"Hs": tokens, "Ws": 1, "H": tokens * p, "W": p, "L": tokens, "S": text + tokens}
    return Sizes({**values, "N": rows, "row": rows - 1, "step": rows - 1})


def read_manifest(bundle: Path, verify: bool = True) -> Manifest:
    """Read a bundle's manifest and check its files.

    verify: hash every file (about a second per 2 GB); otherwise only their sizes are compared.
    Raises `PidRuntimeError` for a missing, altered or newer bundle.
    """
    path = bundle / MANIFEST_FILE
    try:
        with path.open("rb") as stream:
            text = stream.read(MANIFEST_MAX_BYTES + 1)
        if len(text) > MANIFEST_MAX_BYTES:
            raise PidRuntimeError(f"expected {path} to have at most {MANIFEST_MAX_BYTES} bytes")
        manifest = Manifest.from_json(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise PidRuntimeError(
            f"expected a bundle (a folder with {MANIFEST_FILE}), but cannot read {path}: {error}"
        ) from None
    for name, file in manifest.files.items():
        part = bundle / name
        if not part.is_file():
            raise PidRuntimeError(f"{bundle} has no file {name}; export or copy the bundle again")
        size = part.stat().st_size
        if size != file.bytes:
            raise PidRuntimeError(
                f"expected {part} to have {file.bytes} bytes, but it has {size}; "
                "export or copy the bundle again"
            )
        if verify and file_sha256(part) != file.sha256:
            raise PidRuntimeError(
                f"{part} was altered: its SHA-256 is not the manifest's; "
                "export or copy the bundle again"
            )
    return manifest


def read_constants(bundle: Path, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Values of the buffers of kind "constant", float32, by buffer.

    Raises `PidRuntimeError` when the weights file lacks one or holds it in another shape.
    """
    constants: dict[str, NDArray[np.float32]] = {}
    try:
        with safe_open(bundle / WEIGHTS_FILE, "np") as weights:
            for name, buffer in manifest.buffers.items():
                if buffer.kind == "constant":
                    constants[name] = weights.get_tensor(buffer.source["tensor"])
    except (OSError, SafetensorError, TypeError) as error:
        raise PidRuntimeError(f"cannot read constants from {WEIGHTS_FILE}: {error}") from None
    for name, values in constants.items():
        shape = manifest.buffers[name].shape
        if values.dtype != np.float32 or values.shape != shape:
            raise PidRuntimeError(
                f"expected constant {name!r} in {WEIGHTS_FILE} to be float32 of shape {shape}, but "
                f"got {values.dtype} {values.shape}"
            )
    return constants


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal. Raises `PidRuntimeError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise PidRuntimeError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def _encode(instruction: Instruction) -> dict[str, Any]:
    if isinstance(instruction, Copy):
        return {"copy": instruction.source, "to": instruction.target}
    if isinstance(instruction, Noise):
        return {"noise": instruction.target, "image": instruction.image, "graph": instruction.graph}
    encoded: dict[str, Any] = {"run": instruction.graph}
    if instruction.chunk:
        encoded["chunk"] = instruction.chunk
    if instruction.dims:
        encoded["dims"] = instruction.dims
    for key, operands in (("inputs", instruction.inputs), ("outputs", instruction.outputs)):
        encoded[key] = {
            name: {"buffer": o.buffer, "start": o.start} if o.start else o.buffer
            for name, o in operands.items()
        }
    return encoded


_MEMBERS: dict[str, tuple[type[Any], dict[str, str]]] = {
    "run": (Run, {"run": "graph"}),
    "copy": (Copy, {"copy": "source", "to": "target"}),
    "noise": (Noise, {"noise": "target"}),
}
"""By the member that tells instructions apart: its class, and fields by members of other names."""


def read_member(kind: Any, raw: Any, where: str) -> Any:
    """JSON as a value of the type `kind`, checked; without members this version does not know."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if isinstance(raw, dict):
        if kinds[-1] is type(None):  # an object that may be absent
            kind = kinds[0]
        if kind == dict[str, Any]:
            return raw
        if get_origin(kind) is dict:
            return {
                _name(name, where): read_member(get_args(kind)[1], raw[name], where) for name in raw
            }
        if kind == Instruction:
            return _read_instruction(raw, where)
        if is_dataclass(kind):
            return _read_object(kind, raw, where)
    elif isinstance(raw, list):
        if get_origin(kind) is tuple:
            return tuple(read_member(get_args(kind)[0], item, where) for item in raw)
    elif isinstance(raw, str):
        if str in kinds:
            return raw
        if kind is Operand:
            return Operand(raw)
    elif raw is None:
        if type(None) in kinds:
            return None
    elif isinstance(raw, bool):
        if bool in kinds:
            return raw
    elif type(raw) is int and int in kinds:
        if 0 <= raw <= LARGEST_INTEGER:
            return raw
    elif type(raw) in (int, float) and float in kinds and abs(raw) <= LARGEST_INTEGER:
        return float(raw)
    wanted = _DESCRIPTIONS.get(kind) or _DESCRIPTIONS.get(get_origin(kind), "an object")
    raise PidRuntimeError(f"expected {wanted} in {where}, but got {repr(raw)[:80]}")


_DESCRIPTIONS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer of at least 0",
    float: "a number",
    str: "a string",
    tuple: "a list",
    UnionType: "a name or an integer of at least 0",
    Instruction: "an instruction",
}


def _read_object(kind: Any, raw: dict[str, Any], where: str) -> Any:
    values: dict[str, Any] = {}
    types = _types(kind)
    for each in fields(kind):
        if each.name in raw:
            values[each.name] = read_member(
                types[each.name], raw[each.name], f"{where}, {each.name}"
            )
        elif each.default is MISSING and each.default_factory is MISSING:
            raise PidRuntimeError(f"expected a member {each.name!r} in {where}, but it is absent")
    return kind(**values)


def _read_instruction(raw: dict[str, Any], where: str) -> Instruction:
    found = [member for member in _MEMBERS if member in raw]
    if len(found) != 1:
        raise PidRuntimeError(f"expected run, copy or noise in {where}, but got {list(raw)}")
    kind, names = _MEMBERS[found[0]]
    return _read_object(kind, {names.get(key, key): value for key, value in raw.items()}, where)


def _name(name: str, where: str) -> str:
    if not NAME.fullmatch(name):
        raise PidRuntimeError(f"expected a plain name in {where}, but got {name[:80]!r}")
    return name


@cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number")
