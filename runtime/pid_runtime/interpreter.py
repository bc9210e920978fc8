"""Runs a manifest's program on graphs and memory: the whole of the runtime that is not a backend.

A program is bound to one set of sizes at a time. Binding lays the buffers out in the arena,
resolves every operand to a contiguous part of it, and turns each instruction into the calls it
stands for; running is then a walk over those calls. The C++ runtime follows this module.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.graphs import Call, Graphs, PlannedCall
from pid_runtime.backends.memory import Block, Memory, Tensor
from pid_runtime.bundle.manifest import (
    Bucket,
    Copy,
    Each,
    Manifest,
    Noise,
    Operand,
    Port,
    Run,
    runs_of,
)
from pid_runtime.bundle.sizes import CHUNK, ITEM_BYTES, Shape, Sizes
from pid_runtime.bundle.source import Constant, Table
from pid_runtime.tables import compute_table

NoiseSource = Callable[["Program", Noise, int], None]
"""Fills the target of a noise instruction with draw number k; see `Program.run_step`."""


class Program:
    """A manifest's program bound to one set of sizes."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Graphs,
        memory: Memory,
        bucket: Bucket,
        sizes: Sizes,
        block: Block,
        constants: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Bind the program. `block` has at least `arena_bytes(bucket, sizes)` bytes.

        constants: values of the buffers of kind "constant", by buffer.
        """
        self.manifest, self.graphs, self.memory = manifest, graphs, memory
        self.bucket, self.sizes, self.block = bucket, sizes, block
        self._sizes = with_chunk(sizes, bucket)
        # Nothing in here refers to the program: it, and its memory, go with the last reference.
        self._calls: dict[tuple[str, int, int], list[Call | Noise]] = {}
        self._patchify: dict[int, Call] = {}
        self._refresh: dict[str, Call] = {}
        self._scratch = {
            id(instruction): bucket.scratch_offset(section, index)
            for section, instructions in manifest.program.items()
            for index, instruction in enumerate(instructions)
        }
        for name, buffer in manifest.buffers.items():
            if isinstance(buffer.source, Table):
                memory.write(self.buffer(name), compute_table(buffer.source, sizes))
            elif isinstance(buffer.source, Constant):
                memory.write(self.buffer(name), constants[name])

    @staticmethod
    def arena_bytes(bucket: Bucket, sizes: Sizes) -> int:
        """Bytes of the one allocation of a decode: the planned arena for every image."""
        return bucket.arena_bytes * sizes.value("B")

    def buffer(self, name: str) -> Tensor:
        """A whole buffer."""
        buffer = self.manifest.buffers[name]
        return self._tensor(name, 0, self._sizes.shape(buffer.shape))

    def image_part(
        self, name: str, image: int, count: int = 1, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The part `[count, ..]` of a buffer `[B, ..]` that belongs to images of the batch.

        shape: of an image, instead of the buffer's.
        """
        shape = shape or self.sizes.shape(self.manifest.buffers[name].shape)[1:]
        return self._tensor(name, image * math.prod(shape), (count, *shape))

    def run(
        self, section: str, row: int = 0, step: int = 0, noise: NoiseSource | None = None
    ) -> None:
        """Run a section of the program.

        row: row of the modulation table; step: row of the schedule. noise: called for each noise
        instruction.
        """
        key = (section, row, step)
        if key not in self._calls:
            sizes = self._sizes.extended({}, row=row, step=step)
            self._calls[key] = list(self._bind_section(section, sizes))
        for call in self._calls[key]:
            if not isinstance(call, Noise):
                call()
            elif noise is not None:
                noise(self, call, step)

    def refresh(self, name: str) -> None:
        """Run again what of the prologue depends on this input, which has new values."""
        if name not in self._refresh:
            again = self.manifest.dependent("prologue", name)
            calls = [call for each in again for call in self._bind(each, self._sizes)]
            self._refresh[name] = self.graphs.sequence("prologue", calls)
        self._refresh[name]()

    def load_noise(self, instruction: Noise, image: Tensor) -> None:
        """Fill a noise instruction's target from an image `[B, 3, H, W]` float32."""
        self.memory.write(self.buffer(instruction.image), image)
        key = id(instruction)
        if key not in self._patchify:
            scratch = self._scratch[key]
            calls = list(self._bind_run(instruction.patchify(), self._sizes, scratch))
            self._patchify[key] = self.graphs.sequence("noise", calls)
        self._patchify[key]()

    def fill_noise(self, instruction: Noise, seeds: Sequence[int], draw: int) -> None:
        """Fill a noise instruction's target with draw `draw`, each image from its own seed."""
        for image, seed in enumerate(seeds):
            self.memory.fill_normal(self.image_part(instruction.target, image), seed, draw)

    def view(self, run: Run, name: str, sizes: Sizes) -> Tensor:
        """All of what a run reads or writes under a port's name, for a batch of one image."""
        graph = self.manifest.graphs[run.graph]
        port = {**graph.inputs, **graph.outputs}[name]
        operand = {**run.inputs, **run.outputs}[name]
        sizes = with_chunk(sizes, self.bucket)
        local = sizes.extended(run.dims)
        return self._slice(operand, port.shape, sizes, local, _Slice(0, None, 0))

    def _bind_section(self, section: str, sizes: Sizes) -> Iterator[Call | Noise]:
        """A section's noise, and a sequence for all that runs between."""
        calls: list[Call] = []
        for instruction in self.manifest.program.get(section, ()):
            if not isinstance(instruction, Noise):
                calls += self._bind(instruction, sizes)
                continue
            if calls:
                yield self.graphs.sequence(section, calls)
            calls = []
            yield instruction
        if calls:
            yield self.graphs.sequence(section, calls)

    def _bind(self, instruction: Run | Copy | Each, sizes: Sizes) -> Iterator[Call]:
        if isinstance(instruction, Copy):
            source, target = self.buffer(instruction.source), self.buffer(instruction.target)
            yield functools.partial(self.memory.copy, source, target)
        elif isinstance(instruction, Each):
            yield from self._bind_each(instruction, sizes)
        else:
            yield from self.bind_run(instruction, sizes)

    def _bind_each(self, each: Each, sizes: Sizes) -> Iterator[Call]:
        scratch = self._scratch_from(self._scratch[id(each)])
        for image in range(sizes.value("B")):
            for begin, end in even_slices(sizes.value(each.axis), self.bucket.chunk_tokens):
                cut = sizes.extended({}, **{"B": 1, each.axis: end - begin})
                where = _Slice(image, each.axis, begin)
                for part in each.do:
                    if isinstance(part, Run):
                        yield self._call(part, sizes, cut.extended(part.dims), where, scratch)
                        continue
                    source, target = (
                        self._slice(Operand(name), each.slice_of(buffer), sizes, cut, where)
                        for name in (part.source, part.target)
                        for buffer in (self.manifest.buffers[name],)
                    )
                    yield functools.partial(self.memory.copy, source, target)

    def bind_run(self, run: Run, sizes: Sizes) -> Iterator[Call]:
        """One call per slice of the chunked axis, and per image where slices are not contiguous.

        Only the manifest's own instructions have planned scratch.
        """
        return self._bind_run(run, with_chunk(sizes, self.bucket), self._scratch.get(id(run)))

    def _bind_run(self, run: Run, sizes: Sizes, scratch_offset: int | None) -> Iterator[Call]:
        scratch = self._scratch_from(scratch_offset)
        local = sizes.extended(run.dims)
        slices = slices_of(run, self.bucket, local)
        graph = self.manifest.graphs[run.graph]
        operands = {**run.inputs, **run.outputs}
        ports = {**graph.inputs, **graph.outputs}
        if (
            self.graphs.whole_batches
            and len(slices) == 1
            and all(self._covers_batch(operands[name], port, local) for name, port in ports.items())
        ):
            yield self._call(run, sizes, local, _Slice(0, None, 0), scratch)
            return
        for image in range(local.value("B")):
            for begin, end in slices:
                cut = {"B": 1} if run.chunk is None else {"B": 1, run.chunk: end - begin}
                where = _Slice(image, run.chunk, begin)
                yield self._call(run, sizes, local.extended({}, **cut), where, scratch)

    def _call(
        self, run: Run, sizes: Sizes, local: Sizes, where: "_Slice", scratch: Tensor | None
    ) -> Call:
        """One call. sizes: as buffers have them; local: as the graph's ports do."""
        graph = self.manifest.graphs[run.graph]
        operands = {**run.inputs, **run.outputs}
        tensors = {
            name: self._slice(operands[name], port.shape, sizes, local, where)
            for name, port in {**graph.inputs, **graph.outputs}.items()
        }
        return self.graphs.bind(run.graph, tensors, scratch)

    def _scratch_from(self, offset: int | None) -> Tensor | None:
        """The arena from an instruction's scratch on."""
        if offset is None:
            return None
        begin = offset * self.sizes.value("B")
        size = self.arena_bytes(self.bucket, self.sizes) - begin
        return self.memory.tensor(self.block, begin, "uint8", (size,))

    def _covers_batch(self, operand: Operand, port: Port, local: Sizes) -> bool:
        """Whether the batch elements of an operand lie next to each other."""
        if "B" not in port.shape or local.value("B") == 1:
            return True
        buffer_shape = self.manifest.buffers[operand.buffer].shape
        return math.prod(local.shape(port.shape)) == math.prod(self._sizes.shape(buffer_shape))

    def _slice(
        self, operand: Operand, symbolic: Shape, sizes: Sizes, local: Sizes, where: "_Slice"
    ) -> Tensor:
        """The part of a buffer an operand of a port's shape means in one call."""
        shape = local.shape(symbolic)
        buffer_shape = self.manifest.buffers[operand.buffer].shape
        at = sizes.index(buffer_shape, operand.start)
        if "B" in symbolic:
            at += where.image * math.prod(sizes.shape(buffer_shape[1:]))
        if where.axis in symbolic and CHUNK not in buffer_shape:
            at += where.begin * math.prod(shape[symbolic.index(where.axis) + 1 :])
        return self._tensor(operand.buffer, at, shape)

    def _tensor(self, name: str, first: int, shape: Sequence[int]) -> Tensor:
        dtype = self.manifest.buffers[name].dtype
        offset = self.bucket.offsets[name] * self.sizes.value("B") + first * ITEM_BYTES[dtype]
        return self.memory.tensor(self.block, offset, dtype, tuple(shape))


@dataclass(frozen=True)
class _Slice:
    """What of its buffers a call is about."""

    image: int
    """Of the batch."""
    axis: str | None
    """What is cut."""
    begin: int
    """Where the slice begins along it."""


def with_chunk(sizes: Sizes, bucket: Bucket) -> Sizes:
    """Sizes as buffers have them in a bucket."""
    return sizes.extended({}, **{CHUNK: bucket.chunk_tokens})


def graph_calls(manifest: Manifest, bucket: Bucket, sizes: Sizes) -> Iterator[PlannedCall]:
    """Graph and sizes of every kind of call that a decode of one image of these sizes makes."""
    for run in (run for each in manifest.instructions() for run in runs_of(each)):
        local = sizes.extended(run.dims, B=1)
        for length in sorted({end - begin for begin, end in slices_of(run, bucket, local)}):
            yield (
                run.graph,
                local.values if run.chunk is None else {**local.values, run.chunk: length},
            )


def slices_of(run: Run, bucket: Bucket, local: Sizes) -> list[tuple[int, int]]:
    """How a run is cut along its chunked axis; one slice, not to be used, when it has none."""
    if run.chunk is None:
        return [(0, 0)]
    return even_slices(local.value(run.chunk), bucket.chunk_tokens)


def even_slices(count: int, largest: int) -> list[tuple[int, int]]:
    """Cut `range(count)` into as few slices as `largest` allows, as even as can be."""
    parts = -(-count // largest)
    return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
