"""Plans where each buffer lies in the arena, so that buffers never in use together share memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pid_runtime.bundle.manifest import SECTIONS, Buffer, Instruction, reads_writes
from pid_runtime.bundle.sizes import Sizes

ALIGNMENT = 256
"""Every buffer starts at a multiple of this many bytes, as CUDA allocations do."""

REPEATED = ("timestep", "step")
"""Sections that run once per step."""

WHOLE_DECODE = ("input", "schedule", "table", "constant")
"""Kinds of buffers the runtime fills before the program runs; their contents must last."""


@dataclass(frozen=True)
class Lifetime:
    """First and last instruction, counted over all sections, at which a buffer holds a value."""

    first: int
    last: int

    def overlaps(self, other: "Lifetime") -> bool:
        """Whether two buffers are ever in use together."""
        return self.first <= other.last and other.first <= self.last


def lifetimes(
    buffers: dict[str, Buffer], sections: dict[str, tuple[Instruction, ...]]
) -> dict[str, Lifetime]:
    """When each buffer is in use, from its first instruction to its last.

    What a repeated section reads, and found written when it began, lasts through its repetitions.
    """
    uses: dict[str, list[int]] = {name: [] for name in buffers}
    position = 0
    for section in SECTIONS:
        begin = position
        before = {name for name, at in uses.items() if at}
        written: set[str] = set()
        carried: set[str] = set()
        for instruction in sections.get(section, ()):
            reads, writes = reads_writes(instruction)
            for name in reads | writes:
                uses[name].append(position)
            carried |= (reads - written) | (reads & before)
            written |= writes
            position += 1
        if section in REPEATED:
            for name in carried:
                uses[name] += (begin, position - 1)
    result: dict[str, Lifetime] = {}
    for name, buffer in buffers.items():
        at = uses[name]
        if buffer.kind in WHOLE_DECODE:
            at += (0, position)
        if at:
            result[name] = Lifetime(min(at), max(at))
    return result


@dataclass(frozen=True)
class ArenaPlan:
    """Where everything lies in one allocation; offsets and sizes in bytes."""

    arena_bytes: int
    offsets: dict[str, int]
    """Of every buffer."""
    scratch: dict[str, tuple[int, ...]]
    """Of the scratch of every instruction, by section; 0 for an instruction without any."""


def plan_arena(
    buffers: dict[str, Buffer],
    sections: dict[str, tuple[Instruction, ...]],
    sizes: Sizes,
    scratch: Mapping[str, Sequence[int]] | None = None,
) -> ArenaPlan:
    """Plan the arena at the given sizes, which have C where buffers do.

    scratch: bytes that each instruction of a section works in besides its buffers; None for none.

    Greedy: buffers one by one, each at the lowest offset where nothing it lives together with
    lies. The order decides how well they fit, so several are tried.
    """
    alive: dict[_Key, Lifetime] = {**lifetimes(buffers, sections)}
    length: dict[_Key, int] = {
        name: _aligned(sizes.bytes(b.dtype, b.shape)) for name, b in buffers.items()
    }
    position = 0
    for section in SECTIONS:
        for index in range(len(sections.get(section, ()))):
            if scratch is not None and scratch[section][index] > 0:
                alive[section, index] = Lifetime(position, position)
                length[section, index] = _aligned(scratch[section][index])
            position += 1
    by_size = sorted(alive, key=lambda n: (-length[n], alive[n].first, str(n)))
    orders = (
        by_size,
        sorted(by_size, key=lambda n: alive[n].first),
        sorted(by_size, key=lambda n: alive[n].first - alive[n].last),
        sorted(by_size, key=lambda n: length[n] * (alive[n].first - alive[n].last - 1)),
    )
    offsets, arena_bytes = min(
        (_place(order, alive, length) for order in orders), key=lambda plan: plan[1]
    )
    return ArenaPlan(
        arena_bytes,
        {name: offset for name, offset in offsets.items() if isinstance(name, str)},
        {
            section: tuple(offsets.get((section, index), 0) for index in range(len(instructions)))
            for section, instructions in sections.items()
        },
    )


_Key = str | tuple[str, int]
"""A buffer, or the scratch of an instruction: its section and index there."""


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _place(
    order: list[_Key], alive: dict[_Key, Lifetime], length: dict[_Key, int]
) -> tuple[dict[_Key, int], int]:
    """Offsets of buffers placed in this order, and the end of the last one."""
    offsets: dict[_Key, int] = {}
    for name in order:
        taken = sorted(
            (offsets[other], offsets[other] + length[other])
            for other in offsets
            if alive[name].overlaps(alive[other])
        )
        offset = 0
        for begin, end in taken:
            if offset + length[name] <= begin:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return offsets, max(offsets[name] + length[name] for name in offsets)
