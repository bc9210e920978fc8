"""Runs a manifest's program on graphs and memory: the whole of the runtime that is not a backend.

A program is bound to one set of sizes at a time. Binding lays the buffers out in the arena,
resolves every operand to a contiguous part of it, and turns each instruction into the calls it
stands for; running is then a walk over those calls. The C++ runtime follows this module.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.graphs import Call, Graphs, PlannedCall
from pid_runtime.backends.memory import Block, Memory, Tensor
from pid_runtime.bundle.manifest import Bucket, Copy, Manifest, Noise, Operand, Port, Run
from pid_runtime.bundle.sizes import ITEM_BYTES, Sizes
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
        return self._tensor(name, 0, self.sizes.shape(buffer.shape))

    def image_part(self, name: str, image: int) -> Tensor:
        """The part `[1, ..]` of a buffer `[B, ..]` that belongs to one image of the batch."""
        _, *shape = self.sizes.shape(self.manifest.buffers[name].shape)
        return self._tensor(name, image * math.prod(shape), (1, *shape))

    def run(
        self, section: str, row: int = 0, step: int = 0, noise: NoiseSource | None = None
    ) -> None:
        """Run a section of the program.

        row: row of the modulation table; step: row of the schedule. noise: called for each noise
        instruction.
        """
        key = (section, row, step)
        if key not in self._calls:
            sizes = self.sizes.extended({}, row=row, step=step)
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
            calls = [call for each in again for call in self._bind(each, self.sizes)]
            self._refresh[name] = self.graphs.sequence("prologue", calls)
        self._refresh[name]()

    def load_noise(self, instruction: Noise, image: Tensor) -> None:
        """Fill a noise instruction's target from an image `[B, 3, H, W]` float32."""
        self.memory.write(self.buffer(instruction.image), image)
        key = id(instruction)
        if key not in self._patchify:
            scratch = self._scratch[key]
            calls = list(self._bind_run(instruction.patchify(), self.sizes, scratch))
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
        return self._slice(operand, port, sizes, sizes.extended(run.dims), 0, None, 0)

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

    def _bind(self, instruction: Run | Copy, sizes: Sizes) -> Iterator[Call]:
        if isinstance(instruction, Copy):
            source, target = self.buffer(instruction.source), self.buffer(instruction.target)
            yield functools.partial(self.memory.copy, source, target)
        else:
            yield from self.bind_run(instruction, sizes)

    def bind_run(self, run: Run, sizes: Sizes) -> Iterator[Call]:
        """One call per slice of the chunked axis, and per image where slices are not contiguous.

        Only the manifest's own instructions have planned scratch.
        """
        return self._bind_run(run, sizes, self._scratch.get(id(run)))

    def _bind_run(self, run: Run, sizes: Sizes, scratch_offset: int | None) -> Iterator[Call]:
        scratch: Tensor | None = None
        if scratch_offset is not None:
            begin = scratch_offset * sizes.value("B")
            size = self.arena_bytes(self.bucket, sizes) - begin
            scratch = self.memory.tensor(self.block, begin, "uint8", (size,))
        local = sizes.extended(run.dims)
        graph = self.manifest.graphs[run.graph]
        ports = {**graph.inputs, **graph.outputs}
        operands = {**run.inputs, **run.outputs}
        slices = slices_of(run, self.bucket, local)
        chunked = len(slices) > 1
        whole = (
            self.graphs.whole_batches
            and not chunked
            and all(self._covers_batch(operands[name], port, local) for name, port in ports.items())
        )
        for image in [None] if whole else range(local.value("B")):
            for begin, end in slices:
                dims = dict(local.values)
                if image is not None:
                    dims["B"] = 1
                if chunked and run.chunk is not None:
                    dims[run.chunk] = end - begin
                tensors = {
                    name: self._slice(
                        operands[name], port, sizes, Sizes(dims), image or 0, run.chunk, begin
                    )
                    for name, port in ports.items()
                }
                yield self.graphs.bind(run.graph, tensors, scratch)

    def _covers_batch(self, operand: Operand, port: Port, local: Sizes) -> bool:
        """Whether the batch elements of an operand lie next to each other."""
        if "B" not in port.shape or local.value("B") == 1:
            return True
        buffer_shape = self.manifest.buffers[operand.buffer].shape
        return math.prod(local.shape(port.shape)) == math.prod(self.sizes.shape(buffer_shape))

    def _slice(
        self,
        operand: Operand,
        port: Port,
        sizes: Sizes,
        local: Sizes,
        image: int,
        chunk: str | None,
        begin: int,
    ) -> Tensor:
        """The part of a buffer an operand means for one image of the batch and one chunk."""
        shape = local.shape(port.shape)
        buffer_shape = self.manifest.buffers[operand.buffer].shape
        at = sizes.index(buffer_shape, operand.start)
        if "B" in port.shape:
            at += image * math.prod(sizes.shape(buffer_shape[1:]))
        if chunk in port.shape:
            at += begin * math.prod(shape[port.shape.index(chunk) + 1 :])
        return self._tensor(operand.buffer, at, shape)

    def _tensor(self, name: str, first: int, shape: Sequence[int]) -> Tensor:
        dtype = self.manifest.buffers[name].dtype
        offset = self.bucket.offsets[name] * self.sizes.value("B") + first * ITEM_BYTES[dtype]
        return self.memory.tensor(self.block, offset, dtype, tuple(shape))


def graph_calls(manifest: Manifest, bucket: Bucket, sizes: Sizes) -> Iterator[PlannedCall]:
    """Graph and sizes of every kind of call that a decode of one image of these sizes makes."""
    for instruction in manifest.instructions():
        if isinstance(instruction, Copy):
            continue
        run = instruction.patchify() if isinstance(instruction, Noise) else instruction
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
