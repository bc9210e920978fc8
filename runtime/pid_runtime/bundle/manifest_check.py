"""What a manifest must keep to before anything is allocated; "checks" of docs/bundle-format.md.

A manifest that passes can be run at any shape its buckets hold: no name leads nowhere, no value
is missing, and nothing reads or writes outside the arena.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

from pid_runtime.bundle.json_reader import NAME, require
from pid_runtime.bundle.manifest import (
    FP8,
    LARGEST_GUIDANCE,
    MANIFEST_FILE,
    PACKED_DCT,
    PRECISIONS,
    RULES,
    SECTIONS,
    WEIGHTS_FILE,
    Bucket,
    Buffer,
    Copy,
    Each,
    Graph,
    Instruction,
    Manifest,
    Noise,
    Operand,
    Port,
    Run,
    Sampler,
    runs_of,
)
from pid_runtime.bundle.sizes import CHUNK, ITEM_BYTES, LARGEST_SIZE, Shape, Sizes, sizes_for
from pid_runtime.bundle.source import Constant, Table
from pid_runtime.errors import PidRuntimeError

ALIGNMENT = 256
"""Every buffer starts at a multiple of this many bytes."""

LARGEST_RANK = 8
LARGEST_STEPS = 1000
LARGEST_ARENA = 1 << 40

SIZE_SYMBOLS = frozenset(("B", "T", "h", "w", "Hs", "Ws", "H", "W", "L", "S", "N"))
BUFFER_SYMBOLS = SIZE_SYMBOLS | {CHUNK}
INDEX_SYMBOLS = frozenset(("row", "step"))
"""May start an operand, but be no size."""

WRITABLE_KINDS = ("temporary", "output")
"""Kinds of buffers that instructions write; the runtime fills the others."""

BUFFER_KINDS = ("input", "schedule", "table", "constant", *WRITABLE_KINDS)

CODEC_SIZES = {PACKED_DCT: (192, 48)}
"""Channels of the latents of every kind of codec this version knows, and how many std it has."""

Part = TypeVar("Part")

_require = partial(require, fix="export the bundle again")


def check_manifest(manifest: Manifest) -> None:
    """Raise `PidRuntimeError` when the manifest contradicts itself or promises the impossible."""
    _check_files(manifest)
    _check_network(manifest)
    _check_codec(manifest)
    _check_sampler(manifest.sampler)
    for name, graph in manifest.graphs.items():
        both = set(graph.inputs) & set(graph.outputs)
        _require(not both, f"other outputs than inputs of graph {name!r}", sorted(both))
        for port_name, port in (*graph.inputs.items(), *graph.outputs.items()):
            _check_shape(f"{port_name!r} of graph {name!r}", port.dtype, port.shape, None)
    check_program(manifest)
    _require(bool(manifest.buckets), "a bucket", "none")
    for name, bucket in manifest.buckets.items():
        check_bucket(manifest, name, bucket)


def check_program(manifest: Manifest) -> None:
    """Raise `PidRuntimeError` when buffers and instructions do not fit each other or the graphs."""
    for name, buffer in manifest.buffers.items():
        _check_buffer(name, buffer)
    _check_interface(manifest)
    _require(
        set(manifest.program) == set(SECTIONS),
        f"program sections {', '.join(SECTIONS)}",
        list(manifest.program),
    )
    for section, instructions in manifest.program.items():
        draws = sum(isinstance(instruction, Noise) for instruction in instructions)
        _require(draws <= 1, f"at most one noise in {section}", draws)
        for instruction in instructions:
            _check_instruction(manifest, section, instruction)


def _check_files(manifest: Manifest) -> None:
    _require(MANIFEST_FILE not in manifest.files, "a manifest that does not list itself", "one")
    hashes = {name: file.sha256 for name, file in manifest.files.items()}
    hashes |= {
        f"weights of {name}": graph.weights_sha256 for name, graph in manifest.graphs.items()
    }
    for name, sha256 in hashes.items():
        good = re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
        _require(good, f"a SHA-256 in hexadecimal for {name}", sha256)
    _named(manifest.files, WEIGHTS_FILE, "file")
    for graph in manifest.graphs.values():
        _named(manifest.files, graph.file, "file")
        if graph.contrib_file is not None:
            _named(manifest.files, graph.contrib_file, "file")


def _check_network(manifest: Manifest) -> None:
    _named(PRECISIONS, manifest.precision, "precision")
    for name in ("patch_size", "text_max_length", "latent_channels", "text_dim"):
        size = manifest.network.get(name)
        _require(type(size) is int and 0 < size <= LARGEST_SIZE, f"a positive {name}", size)
    _require(0 < manifest.tokens_per_latent <= 1024, "tokens_per_latent from 1 to 1024", "another")


def _check_codec(manifest: Manifest) -> None:
    """A codec of a kind this version does not know is left alone: decoding does not need it."""
    codec = manifest.codec
    if codec is None or codec.kind not in CODEC_SIZES:
        return
    wanted, count = CODEC_SIZES[codec.kind]
    channels = manifest.network["latent_channels"]
    _require(channels == wanted, f"{wanted} latent channels for {codec.kind}", channels)
    good = len(codec.std) == count and all(1e-6 <= value <= 1e9 for value in codec.std)
    _require(good, f"{count} usable std of the codec", codec.std)


def _check_sampler(sampler: Sampler) -> None:
    _require(0 < sampler.max_steps <= LARGEST_STEPS, "from 1 to 1000 steps", sampler.max_steps)
    _require(sampler.rule in RULES, f"a rule of {', '.join(RULES)}", sampler.rule)
    _require(1 <= sampler.guidance <= LARGEST_GUIDANCE, "guidance from 1 to 100", sampler.guidance)
    if sampler.flow_shift is not None:
        shift, size = sampler.flow_shift.shift, sampler.flow_shift.size
        _require(not sampler.times, "no flow_shift where times are known", shift)
        _require(1e-3 <= shift <= 1e3, "a flow_shift from 0.001 to 1000", shift)
        _require(0 < size <= LARGEST_SIZE, "a positive size of flow_shift", size)
    if not sampler.times:
        _require(not sampler.schedules, "no schedules where there are no times", "some")
        _require(0 < sampler.steps <= sampler.max_steps, "steps up to max_steps", sampler.steps)
        return
    count = len(sampler.times)
    _require(count == sampler.max_steps, "as many times as max_steps", count)
    _require(all(0 < t <= 1 for t in sampler.times), "times in (0, 1]", sampler.times)
    _named(sampler.schedules, str(sampler.steps), "schedule")
    for steps, rows in sampler.schedules.items():
        _require(steps == str(len(rows)) and len(rows) <= count, f"{steps} rows", len(rows))
        _require(len(rows) > 0 and max(rows) < count, f"rows below {count}", rows)
        visited = [sampler.times[row] for row in rows]
        descending = all(a > b for a, b in pairwise(visited))
        _require(descending, f"descending times in schedule {steps}", visited)


def _check_buffer(name: str, buffer: Buffer) -> None:
    what = f"buffer {name!r}"
    _check_shape(what, buffer.dtype, buffer.shape, BUFFER_SYMBOLS)
    _require(buffer.kind in BUFFER_KINDS, f"{what} of a known kind", buffer.kind)
    if CHUNK in buffer.shape:
        first, *others = (size for size in buffer.shape if size != "B")
        sliced = first == CHUNK and all(isinstance(size, int) for size in others)
        _require(sliced, f"{what} to have {CHUNK} first and no other size", buffer.shape)
        _require(buffer.kind == "temporary", f"{what} of a slice to be temporary", buffer.kind)
    scaled = buffer.scale == 1 if buffer.dtype != FP8 else math.frexp(buffer.scale)[0] == 0.5
    _require(scaled, f"{what} with a scale of 1, or a power of two if it is {FP8}", buffer.scale)
    if isinstance(buffer.source, Table):
        expected = ("float32", buffer.source.shape)
        _require((buffer.dtype, buffer.shape) == expected, f"{what} as its table", buffer.shape)
    elif isinstance(buffer.source, Constant):
        fixed = buffer.dtype == "float32" and all(isinstance(size, int) for size in buffer.shape)
        _require(fixed, f"{what} to be float32 and of fixed shape", buffer.shape)


def _check_interface(manifest: Manifest) -> None:
    """The buffers a runtime fills and reads by name are there, and no others wait to be filled."""
    network = manifest.network
    p = network["patch_size"]
    expected: dict[str, tuple[str, str, Shape]] = {
        "latent": ("input", "float32", ("B", network["latent_channels"], "h", "w")),
        "caption": ("input", "float32", ("B", "T", network["text_dim"])),
        "sigma": ("input", "float32", ("B",)),
        "update": ("schedule", "float32", ("N", 3)),
        "state": ("temporary", "float32", ("B", "L", 3 * p * p)),
        "image": ("output", "float32", ("B", 3, "H", "W")),
        "image_bytes": ("output", "uint8", ("B", "H", "W", 3)),
    }
    if not manifest.sampler.times:
        expected["timestep"] = ("schedule", "float32", ("N", 1))
    for name, wanted in expected.items():
        buffer = _named(manifest.buffers, name, "buffer")
        _require(
            (buffer.kind, buffer.dtype, buffer.shape) == wanted,
            f"buffer {name!r} as {wanted}",
            buffer,
        )
    for name, buffer in manifest.buffers.items():
        known = name in expected or buffer.kind not in ("input", "schedule")
        _require(known, "inputs and schedules this version fills", name)


def _check_shape(what: str, dtype: str, shape: Shape, symbols: Iterable[str] | None) -> None:
    """symbols: those that are sizes; any name when None, as the instruction decides."""
    _named(ITEM_BYTES, dtype, "dtype")
    _require(0 < len(shape) <= LARGEST_RANK, f"{what} of 1 to 8 axes", shape)
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            _require(0 < size <= LARGEST_SIZE, f"positive sizes of {what}", shape)
        else:
            _require(symbols is None or size in symbols, f"known sizes of {what}", size)
            _require(size != "B" or axis == 0, f"the batch as the first axis of {what}", shape)


def _check_instruction(manifest: Manifest, section: str, instruction: Instruction) -> None:
    """Names, and everything that does not depend on sizes."""
    if isinstance(instruction, Copy):
        source = _named(manifest.buffers, instruction.source, "buffer")
        target = _written(manifest, instruction.target)
        alike = (source.dtype, source.shape) == (target.dtype, target.shape)
        alike = alike and CHUNK not in source.shape
        _require(alike, f"a copy of {instruction.source!r} to a buffer like it", instruction.target)
        return
    if isinstance(instruction, Each):
        _check_each(manifest, instruction)
        return
    if isinstance(instruction, Noise):
        _require(section in ("prologue", "step"), "noise in prologue or step", section)
        target, image = (
            _written(manifest, instruction.target),
            _written(manifest, instruction.image),
        )
        pixels = ("float32", ("B", 3, "H", "W"))
        _require((image.dtype, image.shape) == pixels, "a noise image", instruction.image)
        state = manifest.buffers["state"]
        alike = (target.dtype, target.shape) == (state.dtype, state.shape)
        _require(alike, "noise of the state's shape", instruction.target)
    for run in runs_of(instruction):
        _check_run(manifest, run)


def _check_each(manifest: Manifest, each: Each) -> None:
    known = each.axis in SIZE_SYMBOLS - {"B"}
    _require(known, "each slice of a size", each.axis)
    _require(bool(each.do), f"something to do for each slice of {each.axis}", "nothing")
    for part in each.do:
        if isinstance(part, Run):
            _require(part.chunk is None, f"no slices of {part.graph!r} of its own", part.chunk)
            _require(each.axis not in part.dims, f"{each.axis} in {part.graph!r} as it is", "other")
            _check_run(manifest, replace(part, chunk=each.axis))
            continue
        source = _named(manifest.buffers, part.source, "buffer")
        target = _written(manifest, part.target)
        shape = each.slice_of(source)
        leading = tuple(size for size in shape if size != "B")
        alike = (source.dtype, shape) == (target.dtype, each.slice_of(target))
        sliced = leading[:1] == (each.axis,) and leading.count(each.axis) == 1
        what = f"a copy of slices of {part.source!r} to a buffer like it"
        _require(alike and sliced, what, part.target)


def _check_run(manifest: Manifest, run: Run) -> None:
    graph = _named(manifest.graphs, run.graph, "graph")
    reserved = {"B", *INDEX_SYMBOLS}
    _require(run.chunk not in reserved, f"graph {run.graph!r} cut along a size", run.chunk)
    for local, symbol in run.dims.items():
        known = symbol in SIZE_SYMBOLS - reserved and local not in reserved
        _require(known, f"sizes for graph {run.graph!r}", f"{local} = {symbol}")
    for ports, operands in ((graph.inputs, run.inputs), (graph.outputs, run.outputs)):
        same = set(ports) == set(operands)
        _require(same, f"graph {run.graph!r} run with {list(ports)}", list(operands))
        for name, port in ports.items():
            buffer = _named(manifest.buffers, operands[name].buffer, "buffer")
            what = f"{name!r} of graph {run.graph!r}"
            _require(port.dtype == buffer.dtype, f"{what} to be {port.dtype}", buffer.dtype)
            _check_shape(what, port.dtype, port.shape, SIZE_SYMBOLS | set(run.dims))
            _check_start(what, operands[name], buffer)
            if CHUNK in buffer.shape:
                sliced = run.chunk in port.shape and not operands[name].start
                _require(sliced, f"{what} to be a slice, in {operands[name].buffer!r}", port.shape)
            if run.chunk is not None and run.chunk in port.shape:
                leading = tuple(size for size in port.shape if size != "B")
                first = leading[0] == run.chunk and leading.count(run.chunk) == 1
                _require(first, f"{what} to have {run.chunk} first", port.shape)
    for operand in run.outputs.values():
        _written(manifest, operand.buffer)
    if run.chunk is not None:
        cut = all(run.chunk in port.shape for port in graph.outputs.values())
        _require(cut, f"outputs of {run.graph!r} cut along {run.chunk}", "others")


def _check_start(what: str, operand: Operand, buffer: Buffer) -> None:
    start = operand.start
    _require(len(start) in (0, len(buffer.shape)), f"{what} to start in its buffer", start)
    for at in start:
        known = isinstance(at, int) or at in SIZE_SYMBOLS - {"B"} | INDEX_SYMBOLS
        _require(known, f"{what} to start at a known index", at)


def check_bucket(manifest: Manifest, name: str, bucket: Bucket, scratch_bytes: int = 0) -> None:
    """Raise `PidRuntimeError` when a bucket's plan does not hold the manifest's buffers.

    scratch_bytes: what the arena has room for besides.
    """
    what = f"bucket {name!r}"
    least = manifest.tokens_per_latent**2
    _require(
        least <= bucket.max_tokens <= LARGEST_SIZE,
        f"{what} of {least} to {LARGEST_SIZE} tokens",
        bucket.max_tokens,
    )
    _require(
        0 < bucket.chunk_tokens <= bucket.max_tokens,
        f"chunk_tokens of {what} from 1 to max_tokens",
        bucket.chunk_tokens,
    )
    _require(bucket.arena_bytes <= LARGEST_ARENA, f"an arena of {what} of at most 1 TiB", "more")
    same = set(bucket.offsets) == set(manifest.buffers)
    _require(same, f"an offset of {what} for every buffer", "other names")
    # Byte counts are products of sizes: within the bucket they are largest at one of these two.
    column = sizes_for(
        manifest.network, manifest.tokens_per_latent, manifest.sampler.max_steps, bucket.max_tokens
    )
    column = column.extended({}, **{CHUNK: bucket.chunk_tokens})
    row = column.extended({"h": "w", "w": "h", "Hs": "Ws", "Ws": "Hs", "H": "W", "W": "H"})
    total = 0
    for buffer_name, buffer in manifest.buffers.items():
        size = max(sizes.bytes(buffer.dtype, buffer.shape) for sizes in (column, row))
        offset = bucket.offsets[buffer_name]
        inside = offset % ALIGNMENT == 0 and offset + size <= bucket.arena_bytes
        _require(inside, f"buffer {buffer_name!r} aligned in the arena of {what}", offset)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    total += scratch_bytes
    _require(bucket.arena_bytes <= total, f"an arena of {what} of {total} bytes or less", "more")
    for instructions in manifest.program.values():
        for run in (run for instruction in instructions for run in runs_of(instruction)):
            for sizes in (column, row):
                _check_extent(manifest, run, sizes)


def _check_extent(manifest: Manifest, run: Run, sizes: Sizes) -> None:
    """Every operand lies in its buffer."""
    graph: Graph = manifest.graphs[run.graph]
    local = cut = sizes.extended(run.dims)
    if run.chunk is not None:
        length = min(local.value(run.chunk), sizes.value(CHUNK))
        cut = local.extended({}, **{run.chunk: length})
    ports: dict[str, Port] = {**graph.inputs, **graph.outputs}
    for name, operand in {**run.inputs, **run.outputs}.items():
        shape = manifest.buffers[operand.buffer].shape
        seen = (cut if CHUNK in shape else local).shape(ports[name].shape)
        end = sizes.index(shape, operand.start) + math.prod(seen)
        _require(
            end <= math.prod(sizes.shape(shape)),
            f"{name!r} of graph {run.graph!r} inside buffer {operand.buffer!r}",
            f"its end at element {end}",
        )


def _written(manifest: Manifest, name: str) -> Buffer:
    """The buffer of that name, which an instruction may write."""
    buffer = _named(manifest.buffers, name, "buffer")
    _require(
        buffer.kind in WRITABLE_KINDS, f"buffer {name!r} to be one a program writes", buffer.kind
    )
    return buffer


def _named(parts: Mapping[str, Part], name: str, what: str) -> Part:
    if name not in parts or not NAME.fullmatch(name):
        raise PidRuntimeError(f"expected a {what} the manifest knows, but got {name[:80]!r}")
    return parts[name]
