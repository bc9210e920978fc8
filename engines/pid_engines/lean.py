"""A bundle's program with fewer values in memory at a time, computed by the same graphs.

Between two attentions every token is on its own, so one slice of the tokens can be taken further
before the next one. Three things follow, for any program of per-token stages and attentions:

- The pixels between two pixel blocks, by far the widest values there are, are not kept: each slice
  of them is computed again right before it is read.
- The image's tokens give way to those after the next block slice by slice, where they lie; so does
  the sampler's state to the next one.
- Attention answers a slice of its queries at a time, and works in scratch for that slice alone.

Every value is computed of the same values by the same graphs as before.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeGuard

from pid_runtime.bundle.manifest import (
    Copy,
    Each,
    Instruction,
    Manifest,
    Operand,
    Run,
    reads_writes,
)
from pid_runtime.bundle.sizes import CHUNK

TOKENS = "L"
"""What slices are of."""


def lean_program(manifest: Manifest) -> Manifest:
    """The manifest with buffers and a program that take less memory; its buckets are as before."""
    step = _Step(manifest)
    step.compute_again()
    step.replace_in_place()
    step.copy_in_slices()
    step.slice_attention()
    program = {**manifest.program, "step": tuple(step.instructions)}
    return replace(manifest, buffers=step.buffers, program=program)


class _Step:
    """A program's step while it is changed."""

    def __init__(self, manifest: Manifest) -> None:
        self.graphs = manifest.graphs
        self.buffers = dict(manifest.buffers)
        self.instructions: list[Instruction] = list(manifest.program["step"])
        others = [
            each
            for section, instructions in manifest.program.items()
            if section != "step"
            for each in instructions
        ]
        self._elsewhere = set[str]().union(*(_names(each) for each in others))

    def compute_again(self) -> None:
        """Keep no pixels: before a slice of them is read, it is computed."""
        writers = {
            operand.buffer: index
            for index, run in enumerate(self.instructions)
            if self._is_sliced(run) and self.graphs[run.graph].stage == "pixels"
            for port, operand in run.outputs.items()
            if port in ("pixels", "next_pixels")
        }
        changed = list(self.instructions)
        for index, run in enumerate(self.instructions):
            if not self._is_sliced(run):
                continue
            again = self._again(run, index, writers)
            if again:
                changed[index] = Each(TOKENS, (*again, replace(run, chunk=None)))
        for name in writers:
            self._shorten(name)
        self.instructions = changed

    def _again(self, run: Run, index: int, writers: Mapping[str, int]) -> list[Run]:
        """The runs that compute the pixels that the run at `index` reads."""
        found: list[Run] = []
        for operand in run.inputs.values():
            if operand.buffer not in writers:
                continue
            at = writers[operand.buffer]
            writer = self.instructions[at]
            assert isinstance(writer, Run)
            written = {name for each in self.instructions[at:index] for name in _writes(each)}
            if not written.isdisjoint(o.buffer for o in writer.inputs.values()):
                raise AssertionError(f"{writer.graph} cannot be run again for {run.graph}")
            outputs = {
                port: o if o == operand else self._unread(o) for port, o in writer.outputs.items()
            }
            found += self._again(writer, at, writers)
            found.append(replace(writer, outputs=outputs, chunk=None))
        return found

    def _unread(self, operand: Operand) -> Operand:
        """Where a slice may go that nobody reads."""
        name = f"{operand.buffer}.again"
        if name not in self.buffers:
            self.buffers[name] = self.buffers[operand.buffer]
            self._shorten(name)
        return Operand(name)

    def replace_in_place(self) -> None:
        """Let tokens that are read for the last time give way to those made of them."""
        places: dict[str, str] = {}
        for index, instruction in enumerate(self.instructions):
            run = _renamed(instruction, places)
            self.instructions[index] = run
            if not self._is_sliced(run):
                continue
            copies: dict[str, Copy] = {}
            for new in run.outputs.values():
                for old in run.inputs.values():
                    if old.buffer not in copies and self._gives_way(old, new, index, places):
                        copies[old.buffer] = Copy(new.buffer, old.buffer)
                        places[new.buffer] = old.buffer
                        self._shorten(new.buffer)
                        break
            if copies:
                self.instructions[index] = Each(
                    TOKENS, (replace(run, chunk=None), *copies.values())
                )

    def _gives_way(self, old: Operand, new: Operand, index: int, places: Mapping[str, str]) -> bool:
        """Whether what the instruction at `index` writes may take the place of what it reads."""
        a, b = self.buffers[old.buffer], self.buffers[new.buffer]
        if (
            a != b
            or a.kind != "temporary"
            or a.shape[:2] != ("B", TOKENS)
            or old.start
            or new.start
        ):
            return False
        before = self.instructions[:index]
        after = [_renamed(each, places) for each in self.instructions[index + 1 :]]
        first = next((each for each in before if old.buffer in _names(each)), None)
        return (
            first is not None
            and old.buffer not in reads_writes(first)[0]
            and not any(old.buffer in _names(each) for each in after)
            and not any(new.buffer in _names(each) for each in before)
            and not any(new.buffer in _writes(each) for each in after)
            and self._elsewhere.isdisjoint((old.buffer, new.buffer))
        )

    def copy_in_slices(self) -> None:
        """Copy what a run writes and only a copy reads slice by slice, where that does no harm."""
        for copy in [each for each in self.instructions if isinstance(each, Copy)]:
            users = [each for each in self.instructions if copy.source in _names(each)]
            if len(users) != 2 or users[1] is not copy or copy.source in self._elsewhere:
                continue
            writer, index = users[0], self.instructions.index(users[0])
            between = self.instructions[index + 1 : self.instructions.index(copy)]
            if any(copy.target in _names(each) for each in between):
                continue
            if self._is_sliced(writer):
                writer = Each(TOKENS, (replace(writer, chunk=None),))
            if isinstance(writer, Each) and self._reads_slices(writer, copy.target):
                self.instructions[index] = Each(TOKENS, (*writer.do, copy))
                self.instructions.remove(copy)
                self._shorten(copy.source)

    def _reads_slices(self, each: Each, name: str) -> bool:
        """Whether a slice reads no more of a buffer than that slice of it."""
        operands = (
            (operand, self.graphs[run.graph].inputs[port].shape)
            for run in each.runs
            for port, operand in run.inputs.items()
        )
        return all(
            shape[:2] == ("B", TOKENS) and not operand.start
            for operand, shape in operands
            if operand.buffer == name
        )

    def slice_attention(self) -> None:
        """Let attentions answer slices of their queries."""
        for index, run in enumerate(self.instructions):
            if not isinstance(run, Run) or self.graphs[run.graph].stage != "attention":
                continue
            queries = self.graphs[run.graph].inputs["q"].shape[1]
            if isinstance(queries, str):
                self.instructions[index] = replace(run, chunk=queries)

    def _is_sliced(self, instruction: Instruction) -> TypeGuard[Run]:
        return isinstance(instruction, Run) and instruction.chunk == TOKENS

    def _shorten(self, name: str) -> None:
        """Let a buffer hold a slice alone."""
        buffer = self.buffers[name]
        shape = tuple(CHUNK if size == TOKENS else size for size in buffer.shape)
        self.buffers[name] = replace(buffer, shape=shape)


def _names(instruction: Instruction) -> set[str]:
    """The buffers of an instruction."""
    reads, writes = reads_writes(instruction)
    if isinstance(instruction, Each):
        reads = reads.union(*(reads_writes(part)[0] for part in instruction.do))
    return reads | writes


def _writes(instruction: Instruction) -> set[str]:
    return reads_writes(instruction)[1]


def _renamed(instruction: Instruction, places: Mapping[str, str]) -> Instruction:
    """An instruction on the buffers that those of its own lie in."""
    if isinstance(instruction, Copy):
        names = instruction.source, instruction.target
        return Copy(*(places.get(name, name) for name in names))
    if isinstance(instruction, Each):
        parts = (_renamed(part, places) for part in instruction.do)
        return replace(
            instruction, do=tuple(part for part in parts if isinstance(part, Run | Copy))
        )
    if not isinstance(instruction, Run):
        return instruction

    def renamed(operands: Mapping[str, Operand]) -> dict[str, Operand]:
        return {
            port: replace(operand, buffer=places.get(operand.buffer, operand.buffer))
            for port, operand in operands.items()
        }

    inputs, outputs = renamed(instruction.inputs), renamed(instruction.outputs)
    return replace(instruction, inputs=inputs, outputs=outputs)
