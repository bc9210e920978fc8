"""Plans where each buffer lies in the arena, so that buffers never in use together share memory."""

from dataclasses import dataclass

from pid_runtime.manifest import SECTIONS, Buffer, Copy, Instruction, Noise, Sizes

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
            reads, writes = _reads_writes(instruction)
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


def plan_arena(
    buffers: dict[str, Buffer], sections: dict[str, tuple[Instruction, ...]], sizes: Sizes
) -> tuple[dict[str, int], int]:
    """Offsets in bytes of every buffer, and the arena's size, at the given sizes.

    Greedy: buffers one by one, each at the lowest offset where nothing it lives together with
    lies. The order decides how well they fit, so several are tried.
    """
    alive = lifetimes(buffers, sections)
    length = {
        name: -(-sizes.bytes(b.dtype, b.shape) // ALIGNMENT) * ALIGNMENT
        for name, b in buffers.items()
    }
    by_size = sorted(alive, key=lambda n: (-length[n], alive[n].first, n))
    orders = (
        by_size,
        sorted(by_size, key=lambda n: alive[n].first),
        sorted(by_size, key=lambda n: alive[n].first - alive[n].last),
        sorted(by_size, key=lambda n: length[n] * (alive[n].first - alive[n].last - 1)),
    )
    plans = [_place(order, alive, length) for order in orders]
    return min(plans, key=lambda plan: plan[1])


def _place(
    order: list[str], alive: dict[str, Lifetime], length: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Offsets of buffers placed in this order, and the end of the last one."""
    offsets: dict[str, int] = {}
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


def _reads_writes(instruction: Instruction) -> tuple[set[str], set[str]]:
    if isinstance(instruction, Copy):
        return {instruction.source}, {instruction.target}
    if isinstance(instruction, Noise):
        return set(), {instruction.target, instruction.image}
    reads = {operand.buffer for operand in instruction.inputs.values()}
    return reads, {operand.buffer for operand in instruction.outputs.values()}
