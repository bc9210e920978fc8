"""The manifest: a decoder as data. See docs/bundle-format.md, which this module implements."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pid_runtime.bundle.json_reader import Special, read_member, read_object, unexpected
from pid_runtime.bundle.sizes import CHUNK, Shape
from pid_runtime.bundle.source import Source, encode_source, read_source
from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-bundle"
FORMAT_VERSIONS = ((1, 4), (2, 0))
"""The newest of every major version this version reads, oldest first; a reader takes any minor
version of these. A writer writes the first that has all a bundle uses: `Manifest.format_version`.
"""

DTYPES_OF_VERSION_1 = frozenset(("float32", "float16", "bfloat16", "uint8"))

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "bfloat16",
    "fp8-fp32": "float32",
    "int8": "bfloat16",
    "int8-fp32": "float32",
}
"""The dtype of activations and matrix weights, by the name of a bundle's precision."""

FP8_PRECISIONS = ("fp8", "fp8-fp32")
INT8_PRECISIONS = ("int8", "int8-fp32")
ROUNDED_PRECISIONS = FP8_PRECISIONS + INT8_PRECISIONS
"""Those that round to 8 bits, and the dtype is that of the rest: int8 large matrices, fp8 more."""

FP8 = "float8_e4m3fn"
"""Numbers of 8 bits, as NumPy's extension types and torch call them."""


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
    source: of a table or a constant.
    scale: what its numbers are multiplied by; a power of two, and 1 but for `FP8`.
    """

    dtype: str
    shape: Shape
    kind: str
    source: Source | None = None
    scale: float = 1.0


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

    def patchify(self) -> Run:
        """The run this stands for when noise is given as an image."""
        inputs, outputs = {"image": Operand(self.image)}, {"tokens": Operand(self.target)}
        return Run(self.graph, inputs, outputs)


@dataclass(frozen=True)
class Each:
    """For each slice of an axis, one after another: all of `do` in order.

    Its runs have no `chunk` of their own: what is theirs of the axis is the slice. Its copies are
    of the slice too.
    """

    axis: str
    do: tuple[Run | Copy, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Its runs, as those that are cut along the axis."""
        return tuple(replace(part, chunk=self.axis) for part in self.do if isinstance(part, Run))

    def slice_of(self, buffer: Buffer) -> Shape:
        """The shape of a slice of a buffer, in which the axis is the slice's length."""
        return tuple(self.axis if size == CHUNK else size for size in buffer.shape)


Instruction = Run | Copy | Noise | Each


def runs_of(instruction: Instruction) -> tuple[Run, ...]:
    """What an instruction runs, or may run."""
    if isinstance(instruction, Each):
        return instruction.runs
    if isinstance(instruction, Noise):
        return (instruction.patchify(),)
    return () if isinstance(instruction, Copy) else (instruction,)


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


RULES = ("sde", "ode", "dpm++2m")
"""How a state follows from the one before; see `pid_runtime.schedule`."""

LARGEST_GUIDANCE = 100


@dataclass(frozen=True)
class FlowShift:
    """How the times of an undistilled decode depend on the image; see `shifted_times`."""

    shift: float
    size: int
    """Side in pixels of the square image that is shifted by `shift` itself."""


@dataclass(frozen=True)
class Sampler:
    """The times a decode visits, and how.

    times: the known timesteps t, one per row of the modulation table; empty when any time goes.
    schedules: by number of steps, the rows visited. steps, rule, guidance: the defaults.
    flow_shift: of a bundle that takes any times, what those of a number of steps follow from.
    """

    steps: int
    max_steps: int
    times: tuple[float, ...]
    schedules: dict[str, tuple[int, ...]]
    rule: str = RULES[0]
    guidance: float = 1.0
    flow_shift: FlowShift | None = None


@dataclass(frozen=True)
class File:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


PACKED_DCT = "packed_dct"
"""The kind of codec this version knows; see `pid_runtime.nano.block_dct`."""


@dataclass(frozen=True)
class Codec:
    """How latents are made of images, where that needs no network.

    std: of every coefficient of a block, for kind "packed_dct".
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
            raise PidRuntimeError(
                f"expected an image of at most {self.megapixels(self.most_tokens)}, the largest "
                f"bucket of this bundle, but got {self.megapixels(tokens)}; export with --buckets "
                f"large={tokens}, or decode a smaller latent"
            )
        name = min(fitting)[1]
        return name, self.buckets[name]

    @property
    def format_version(self) -> tuple[int, int]:
        """The lowest version of the format that has all this manifest uses."""
        ports = (
            port
            for graph in self.graphs.values()
            for port in (*graph.inputs.values(), *graph.outputs.values())
        )
        dtypes = {each.dtype for each in (*ports, *self.buffers.values())}
        symbols = {size for buffer in self.buffers.values() for size in buffer.shape}
        is_of_version_1 = (
            dtypes <= DTYPES_OF_VERSION_1
            and self.precision not in ROUNDED_PRECISIONS
            and CHUNK not in symbols
            and not any(isinstance(each, Each) for each in self.instructions())
            and not any(isinstance(s, dict) and "program" in s for s in self.engines.values())
        )
        return FORMAT_VERSIONS[0 if is_of_version_1 else 1]

    @property
    def most_tokens(self) -> int:
        """The largest budget of the buckets."""
        return max(bucket.max_tokens for bucket in self.buckets.values())

    def megapixels(self, tokens: int) -> str:
        """The size of an image of so many patch tokens, such as "4.19 megapixels"."""
        return f"{tokens * self.network['patch_size'] ** 2 / 1e6:.3g} megapixels"

    def instructions(self) -> Iterator[Instruction]:
        """All instructions in the order of `SECTIONS`."""
        for section in SECTIONS:
            yield from self.program.get(section, ())

    def dependent(self, section: str, name: str) -> list[Run | Copy | Each]:
        """A section's instructions whose results follow from this buffer, in order."""
        known = {name}
        found: list[Run | Copy | Each] = []
        for instruction in self.program[section]:
            if isinstance(instruction, Noise):
                continue
            sources, targets = reads_writes(instruction)
            if not known.isdisjoint(sources):
                known |= targets
                found.append(instruction)
        return found

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = asdict(self)
        fields["program"] = encode_program(self.program)
        fields["buffers"] = encode_buffers(self.buffers)
        for graph in fields["graphs"].values():
            if graph["contrib_file"] is None:
                del graph["contrib_file"]
        if self.codec is None:
            del fields["codec"]
        if self.sampler.flow_shift is None:
            del fields["sampler"]["flow_shift"]
        head = {"format": FORMAT, "format_version": self.format_version}
        return json.dumps({**head, **fields}, indent=1)


def reads_writes(instruction: Instruction) -> tuple[set[str], set[str]]:
    """The buffers whose contents from before an instruction uses, and those it writes."""
    if isinstance(instruction, Copy):
        return {instruction.source}, {instruction.target}
    if isinstance(instruction, Noise):
        return set(), {instruction.target, instruction.image}
    if isinstance(instruction, Run):
        reads = {operand.buffer for operand in instruction.inputs.values()}
        return reads, {operand.buffer for operand in instruction.outputs.values()}
    reads, writes = set[str](), set[str]()
    for part in instruction.do:
        more_reads, more_writes = reads_writes(part)
        reads |= more_reads - writes
        writes |= more_writes
    return reads, writes


def encode_program(program: Mapping[str, Sequence[Instruction]]) -> dict[str, Any]:
    """A program as JSON."""
    return {
        name: [_encode(instruction) for instruction in section] for name, section in program.items()
    }


def encode_buffers(buffers: Mapping[str, Buffer]) -> dict[str, Any]:
    """Buffers as JSON."""
    return {name: _encode_buffer(buffer) for name, buffer in buffers.items()}


def _encode_buffer(buffer: Buffer) -> dict[str, Any]:
    fields = {**asdict(buffer), "source": encode_source(buffer.source)}
    if buffer.scale == 1:
        del fields["scale"]
    return fields


def _encode(instruction: Instruction) -> dict[str, Any]:
    if isinstance(instruction, Each):
        return {"each": instruction.axis, "do": [_encode(part) for part in instruction.do]}
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
    "each": (Each, {"each": "axis"}),
}
"""By the member that tells instructions apart: its class, and fields by members of other names."""


def _read_instruction(raw: Any, where: str) -> Instruction:
    if not isinstance(raw, dict):
        raise unexpected("an instruction", raw, where)
    members: dict[str, Any] = raw
    found = [member for member in _MEMBERS if member in members]
    if len(found) != 1:
        wanted = "run, copy, noise or each"
        raise PidRuntimeError(f"expected {wanted} in {where}, but got {list(members)}")
    kind, names = _MEMBERS[found[0]]
    renamed = {names.get(key, key): value for key, value in members.items()}
    return read_object(kind, renamed, where, SPECIAL)


def _read_part(raw: Any, where: str) -> Run | Copy:
    """An instruction of an `Each`."""
    if isinstance(raw, dict) and ("each" in raw or "noise" in raw):
        raise PidRuntimeError(f"expected run or copy in {where}, but got {repr(raw)[:80]}")
    part = _read_instruction(raw, where)
    assert isinstance(part, Run | Copy)
    return part


def _read_buffers(raw: Any, where: str) -> dict[str, Buffer]:
    found: dict[str, dict[str, Any]] = read_member(dict[str, dict[str, Any]], raw, where)
    return {name: _read_buffer(name, fields, where) for name, fields in found.items()}


def _read_buffer(name: str, fields: dict[str, Any], where: str) -> Buffer:
    """What a source may be depends on the buffer's kind."""
    plain = {member: value for member, value in fields.items() if member != "source"}
    buffer: Buffer = read_object(Buffer, plain, where)
    source = read_member(dict[str, Any], fields.get("source", {}), f"{where}, source")
    return replace(buffer, source=read_source(buffer.kind, source, f"buffer {name!r}"))


def _read_operand(raw: Any, where: str) -> Operand:
    """A buffer's name stands for the whole buffer."""
    return Operand(raw) if isinstance(raw, str) else read_member(Operand, raw, where)


SPECIAL: dict[Any, Special] = {
    Instruction: _read_instruction,
    Run | Copy: _read_part,
    dict[str, Buffer]: _read_buffers,
    Operand: _read_operand,
}
"""How what has a form of its own is read; see `pid_runtime.bundle.json_reader.read_member`."""
