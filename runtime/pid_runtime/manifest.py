"""The manifest: a decoder as data. See docs/bundle-format.md, which this module implements."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-bundle"
FORMAT_VERSION = (1, 0)
"""Major and minor version; a reader takes any minor version of its own major version."""

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

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
    """Run a graph; over slices of its axis `chunk`, if given. `dims` names the graph's own symbols."""

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
    """Fill `target` with the next draw of noise: generated, or given as an image through `graph`."""

    target: str
    image: str
    graph: str


Instruction = Run | Copy | Noise

SECTIONS = ("prologue", "timestep", "step", "image", "image_bytes")
"""The parts of a program: once; once per step before the first; per step; then one of the last two."""


@dataclass(frozen=True)
class Bucket:
    """A token budget: the largest L, the tokens of one chunk, and where each buffer lies."""

    max_tokens: int
    chunk_tokens: int
    arena_bytes: int
    offsets: dict[str, int]


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

    def bucket_for(self, tokens: int) -> tuple[str, Bucket]:
        """The smallest bucket that holds `tokens` patch tokens.

        Raises `PidRuntimeError` when none does.
        """
        fitting = [
            (b.max_tokens, name) for name, b in self.buckets.items() if b.max_tokens >= tokens
        ]
        if not fitting:
            largest = max(self.buckets.values(), key=lambda b: b.max_tokens).max_tokens
            raise PidRuntimeError(
                f"expected at most {largest} patch tokens (H/16 x W/16), the largest bucket of this "
                f"bundle, but got {tokens}; export with a larger bucket or decode a smaller latent"
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
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read and check manifest.json. Raises `PidRuntimeError` when it is not one we can run."""
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PidRuntimeError(f"expected {MANIFEST_FILE} to be JSON, but got {error}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise PidRuntimeError(f"expected a {FORMAT} manifest, but {MANIFEST_FILE} is none")
        version = raw.get("format_version")
        if not (
            isinstance(version, list) and len(version) == 2 and version[0] == FORMAT_VERSION[0]
        ):
            raise PidRuntimeError(
                f"expected bundle format {FORMAT_VERSION[0]}.x, but got version {version}; "
                "update pid-trt, or export the bundle again with this version"
            )
        try:
            manifest = _decode(raw)
            manifest.check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PidRuntimeError):
                raise
            raise PidRuntimeError(
                f"expected a complete {MANIFEST_FILE}, but reading it failed: {error!r}; "
                "export the bundle again"
            ) from None
        return manifest

    def check(self) -> None:
        """Raise `PidRuntimeError` when a name leads nowhere or a view leaves its buffer.

        After this an interpreter can run the program at any shape a bucket holds without
        touching memory outside the arena.
        """
        for name in (MANIFEST_FILE, *self.files, *(g.file for g in self.graphs.values())):
            if Path(name).name != name:
                raise PidRuntimeError(
                    f"expected plain file names in the manifest, but got {name!r}"
                )
        for graph in self.graphs.values():
            if graph.file not in self.files:
                raise PidRuntimeError(f"the manifest lists no file {graph.file!r}")
        for name, bucket in self.buckets.items():
            sizes = self.largest_sizes(bucket)
            for buffer_name, buffer in self.buffers.items():
                end = bucket.offsets[buffer_name] + sizes.bytes(buffer.dtype, buffer.shape)
                if bucket.offsets[buffer_name] < 0 or end > bucket.arena_bytes:
                    raise PidRuntimeError(
                        f"buffer {buffer_name!r} leaves the arena of bucket {name!r}"
                    )
            for instruction in self.instructions():
                self._check_instruction(instruction, sizes)

    def largest_sizes(self, bucket: Bucket) -> "Sizes":
        """The sizes a bucket's arena is planned for: one image of `max_tokens` tokens in a row."""
        return sizes_for(
            self.network, self.tokens_per_latent, self.sampler.max_steps, bucket.max_tokens
        )

    def _check_instruction(self, instruction: Instruction, sizes: "Sizes") -> None:
        if isinstance(instruction, Copy):
            source, target = self.buffers[instruction.source], self.buffers[instruction.target]
            if (source.dtype, source.shape) != (target.dtype, target.shape):
                raise PidRuntimeError(
                    f"copy of {instruction.source!r} to a different kind of buffer"
                )
            return
        if isinstance(instruction, Noise):
            self.buffers[instruction.target], self.buffers[instruction.image]
            self.graphs[instruction.graph]
            return
        graph = self.graphs[instruction.graph]
        local = sizes.extended(instruction.dims)
        for ports, operands in (
            (graph.inputs, instruction.inputs),
            (graph.outputs, instruction.outputs),
        ):
            if set(ports) != set(operands):
                raise PidRuntimeError(f"graph {instruction.graph!r} is run with the wrong operands")
            for name, port in ports.items():
                buffer = self.buffers[operands[name].buffer]
                count = math.prod(local.shape(port.shape))
                begin = sizes.index(buffer.shape, operands[name].start)
                if (
                    port.dtype != buffer.dtype
                    or begin < 0
                    or begin + count > math.prod(sizes.shape(buffer.shape))
                ):
                    raise PidRuntimeError(
                        f"input or output {name!r} of graph {instruction.graph!r} does not fit buffer "
                        f"{operands[name].buffer!r}"
                    )


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
    """The sizes of the largest decode of one image within a budget of `tokens` patch tokens."""
    p = network["patch_size"]
    text = network["text_max_length"]
    values = {"B": 1, "T": text, "h": -(-tokens // tokens_per_latent**2), "w": 1}
    values |= {"Hs": tokens, "Ws": 1, "H": tokens * p, "W": p, "L": tokens, "S": text + tokens}
    return Sizes({**values, "N": rows, "row": rows - 1, "step": 0})


def read_manifest(bundle: Path, verify: bool = True) -> Manifest:
    """Read a bundle's manifest and check its files.

    verify: hash every file (about a second per 2 GB); otherwise only their sizes are compared.
    Raises `PidRuntimeError` for a missing, altered or newer bundle.
    """
    path = bundle / MANIFEST_FILE
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PidRuntimeError(
            f"expected a bundle (a folder with {MANIFEST_FILE}), but cannot read {path}: {error}"
        ) from None
    manifest = Manifest.from_json(text)
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
    """Values of the buffers of kind "constant", float32, by buffer."""
    with safe_open(bundle / WEIGHTS_FILE, "np") as weights:
        return {
            name: weights.get_tensor(buffer.source["tensor"])
            for name, buffer in manifest.buffers.items()
            if buffer.kind == "constant"
        }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
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


def _decode_instruction(raw: dict[str, Any]) -> Instruction:
    if "copy" in raw:
        return Copy(raw["copy"], raw["to"])
    if "noise" in raw:
        return Noise(raw["noise"], raw["image"], raw["graph"])

    def operands(part: dict[str, Any]) -> dict[str, Operand]:
        return {
            name: Operand(o) if isinstance(o, str) else Operand(o["buffer"], tuple(o["start"]))
            for name, o in part.items()
        }

    return Run(
        raw["run"],
        operands(raw["inputs"]),
        operands(raw["outputs"]),
        raw.get("chunk"),
        raw.get("dims", {}),
    )


def _decode(raw: dict[str, Any]) -> Manifest:
    def ports(part: dict[str, Any]) -> dict[str, Port]:
        return {name: Port(p["dtype"], tuple(p["shape"])) for name, p in part.items()}

    sampler = raw["sampler"]
    return Manifest(
        producer=raw["producer"],
        model=raw["model"],
        precision=raw["precision"],
        network=raw["network"],
        tokens_per_latent=raw["tokens_per_latent"],
        sampler=Sampler(
            steps=sampler["steps"],
            max_steps=sampler["max_steps"],
            times=tuple(sampler["times"]),
            schedules={steps: tuple(rows) for steps, rows in sampler["schedules"].items()},
        ),
        files={name: File(**file) for name, file in raw["files"].items()},
        graphs={
            name: Graph(**{**g, "inputs": ports(g["inputs"]), "outputs": ports(g["outputs"])})
            for name, g in raw["graphs"].items()
        },
        buffers={
            name: Buffer(b["dtype"], tuple(b["shape"]), b["kind"], b["source"])
            for name, b in raw["buffers"].items()
        },
        buckets={name: Bucket(**bucket) for name, bucket in raw["buckets"].items()},
        program={
            name: tuple(_decode_instruction(i) for i in section)
            for name, section in raw["program"].items()
        },
        engines=raw.get("engines", {}),
    )
