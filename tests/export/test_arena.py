"""Arena plans: what a program still needs is never overwritten, and little memory is wasted."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pid_export.arena import ALIGNMENT, Lifetime, lifetimes, plan_arena
from pid_export.bundle import BUCKETS, MAX_FREE_STEPS, network_of
from pid_export.program import ProgramSpec, build_program
from pid_ref.config import PidConfig
from pid_ref.registry import CHECKPOINTS, find_checkpoint
from pid_runtime.bundle.manifest import (
    SECTIONS,
    Buffer,
    Copy,
    Each,
    Instruction,
    Noise,
    Operand,
    Run,
)
from pid_runtime.bundle.sizes import Sizes, sizes_for

Buffers = dict[str, Buffer]
Sections = dict[str, tuple[Instruction, ...]]

FILLED_ONCE = ("table", "constant")
FILLED_EVERY_TIME = ("input", "schedule")
KNOWN_TIMES = 5
SIZES = Sizes({"L": 1})


def sizes_of(buffers: Buffers, sizes: Sizes) -> dict[str, int]:
    return {name: sizes.bytes(buffer.dtype, buffer.shape) for name, buffer in buffers.items()}


def live_bytes(buffers: Buffers, sections: Sections, sizes: Sizes) -> int:
    """Bytes of the buffers in use together, at the worst instruction: no plan takes less."""
    alive, size = lifetimes(buffers, sections), sizes_of(buffers, sizes)
    now = Lifetime
    return max(
        sum(size[name] for name, life in alive.items() if life.overlaps(now(at, at)))
        for at in {life.first for life in alive.values()}
    )


class Memory:
    """Plays a program on an arena, and finds out when a value that is read was overwritten."""

    def __init__(self, offsets: dict[str, int], size: dict[str, int]) -> None:
        self.valid: set[str] = set()
        self.written: set[str] = set()
        self.others = {
            name: {
                other
                for other in offsets
                if other != name
                and offsets[other] < offsets[name] + size[name]
                and offsets[name] < offsets[other] + size[other]
            }
            for name in offsets
        }

    def write(self, name: str) -> None:
        self.valid -= self.others[name]
        self.valid.add(name)
        self.written.add(name)

    def read(self, name: str) -> None:
        assert name in self.valid or name not in self.written, f"{name} was overwritten"

    def run(self, instruction: Instruction) -> None:
        if isinstance(instruction, Copy):
            reads, writes = [instruction.source], [instruction.target]
        elif isinstance(instruction, Noise):
            reads, writes = [], [instruction.image, instruction.target]
        elif isinstance(instruction, Each):  # slices: the first reads come after the last writes
            for part in (*instruction.do, *instruction.do):
                self.run(part)
            return
        else:
            reads = [operand.buffer for operand in instruction.inputs.values()]
            writes = [operand.buffer for operand in instruction.outputs.values()]
        for name in reads:
            self.read(name)
        for name in writes:
            self.write(name)
        for name in (*reads, *writes):  # chunks: the last reads come after the first writes
            self.read(name)


def play(buffers: Buffers, sections: Sections, offsets: dict[str, int], sizes: Sizes) -> set[str]:
    """Decode twice, both ways to end: all that was written, or an AssertionError."""
    memory = Memory(offsets, sizes_of(buffers, sizes))
    kinds = {name: buffers[name].kind for name in offsets}
    for name in (name for name, kind in kinds.items() if kind in FILLED_ONCE):
        memory.write(name)
    filled, ever = set(memory.written), set[str]()
    for last in ("image", "image_bytes"):
        memory.written = set(filled)  # nothing else is left for the next decode
        for name in (name for name, kind in kinds.items() if kind in FILLED_EVERY_TIME):
            memory.write(name)
        steps = 3
        for section in ("prologue", *["timestep"] * steps, *["step"] * steps, last):
            for instruction in sections.get(section, ()):
                memory.run(instruction)
        for name, kind in kinds.items():
            if kind in FILLED_ONCE:
                memory.read(name)
        ever |= memory.written
    return ever


# Random programs


@st.composite
def programs(draw: st.DrawFn) -> tuple[Buffers, Sections]:
    kinds = st.sampled_from(["temporary"] * 6 + ["input", "schedule", "table", "constant"])
    buffers = {
        f"b{index}": Buffer("uint8", (draw(st.integers(1, 5000)),), draw(kinds))
        for index in range(draw(st.integers(1, 12)))
    }
    writable = [name for name, buffer in buffers.items() if buffer.kind == "temporary"]
    reads = st.lists(st.sampled_from(sorted(buffers)), max_size=3)
    writes = st.lists(st.sampled_from(writable), max_size=2) if writable else st.just([])

    def instruction() -> Instruction:
        kinds = ["run", "run", "run", "copy", "noise", "each"] if writable else ["run"]
        kind = draw(st.sampled_from(kinds))
        if kind == "noise":
            return Noise(draw(st.sampled_from(writable)), draw(st.sampled_from(writable)), "g")
        if kind == "each":
            return Each("L", tuple(part() for _ in range(draw(st.integers(1, 3)))))
        return part(kind)

    def part(kind: str | None = None) -> Run | Copy:
        if (kind or draw(st.sampled_from(["run", "copy"]))) == "copy":
            return Copy(draw(st.sampled_from(sorted(buffers))), draw(st.sampled_from(writable)))
        ins, outs = draw(reads), draw(writes)
        return Run(
            "g",
            {f"i{index}": Operand(name) for index, name in enumerate(ins)},
            {f"o{index}": Operand(name) for index, name in enumerate(outs)},
        )

    sections = {
        section: tuple(instruction() for _ in range(draw(st.integers(0, 6))))
        for section in SECTIONS
    }
    return buffers, sections


def some_in_use(program: tuple[Buffers, Sections]) -> bool:
    return bool(lifetimes(*program))


@settings(max_examples=300, deadline=None)
@given(program=programs().filter(some_in_use))
def test_nothing_needed_is_overwritten(program: tuple[Buffers, Sections]) -> None:
    buffers, sections = program
    plan = plan_arena(buffers, sections, SIZES)
    check_plan(buffers, sections, plan.offsets, plan.arena_bytes, SIZES)
    play(buffers, sections, plan.offsets, SIZES)


@settings(max_examples=300, deadline=None)
@given(program=programs().filter(some_in_use), data=st.data())
def test_scratch_lies_where_nothing_is_in_use(
    program: tuple[Buffers, Sections], data: st.DataObject
) -> None:
    buffers, sections = program
    scratch = {
        name: [data.draw(st.integers(0, 3000)) for _ in section]
        for name, section in sections.items()
    }
    plan = plan_arena(buffers, sections, SIZES, scratch)
    play(buffers, sections, plan.offsets, SIZES)
    alive, size = lifetimes(buffers, sections), sizes_of(buffers, SIZES)
    positions = [(name, at) for name in SECTIONS for at in range(len(sections[name]))]
    for position, (section, at) in enumerate(positions):
        begin = plan.scratch[section][at]
        end = begin + scratch[section][at]
        assert end <= plan.arena_bytes and begin % ALIGNMENT == 0
        for name, life in alive.items():
            if end > begin and life.overlaps(Lifetime(position, position)):
                apart = end <= plan.offsets[name]
                assert apart or plan.offsets[name] + size[name] <= begin


def test_scratch_takes_the_place_of_what_is_not_in_use() -> None:
    buffers = {name: Buffer("uint8", (1024,), "temporary") for name in "abc"}
    sections: Sections = {
        "prologue": (run([], ["a"]),),
        "step": (run(["a"], ["b", "c"]), run(["b", "c"], ["a"])),
    }
    without = plan_arena(buffers, sections, SIZES)
    plan = plan_arena(buffers, sections, SIZES, {"prologue": [2048], "step": [0, 1]})
    assert without.arena_bytes == 3072 and plan.arena_bytes == 3072 + ALIGNMENT
    assert plan.scratch["step"] == (0, 3072)


def check_plan(
    buffers: Buffers, sections: Sections, offsets: dict[str, int], arena: int, sizes: Sizes
) -> None:
    """Alignment, bounds, and no two buffers in one place at one time."""
    alive, size = lifetimes(buffers, sections), sizes_of(buffers, sizes)
    assert set(offsets) == set(alive)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert all(0 <= offsets[name] <= arena - size[name] for name in offsets)
    assert live_bytes(buffers, sections, sizes) <= arena
    assert arena <= sum(math.ceil(size[name] / ALIGNMENT) * ALIGNMENT for name in offsets)
    for one in offsets:
        for other in offsets:
            if one < other and alive[one].overlaps(alive[other]):
                apart = offsets[one] + size[one] <= offsets[other]
                assert apart or offsets[other] + size[other] <= offsets[one]


def run(reads: list[str], writes: list[str]) -> Run:
    return Run("g", {n: Operand(n) for n in reads}, {f"to_{n}": Operand(n) for n in writes})


def test_what_steps_carry_lasts_through_all_of_them() -> None:
    buffers = {name: Buffer("uint8", (1000,), "temporary") for name in "abcde"}
    sections: Sections = {
        "prologue": (run([], ["a"]), run([], ["b"])),
        "step": (
            run(["a"], ["c"]),  # a is last read here, but the next step reads it again
            run(["c"], ["d"]),
            run(["e"], []),  # what the last step left in e
            run(["d"], ["e"]),
            run(["b"], ["b"]),  # written before the steps, and first read after e
        ),
    }
    alive = lifetimes(buffers, sections)
    assert all(alive[name].last == 6 for name in "abe")
    assert alive["e"].first == 2
    assert (alive["c"].first, alive["c"].last) == (2, 3)
    plan = plan_arena(buffers, sections, SIZES)
    offsets, arena = plan.offsets, plan.arena_bytes
    assert len({offsets[name] for name in "abe"}) == 3
    assert arena == 5 * 1024
    play(buffers, sections, offsets, SIZES)


def test_buffers_in_use_one_after_the_other_share_memory() -> None:
    buffers = {name: Buffer("uint8", (1000,), "temporary") for name in "abcd"}
    sections: Sections = {"step": (run([], ["a"]), run(["a"], ["b"]), run(["b"], ["c"]))}
    plan = plan_arena(buffers, sections, SIZES)
    offsets, arena = plan.offsets, plan.arena_bytes
    assert offsets["a"] == offsets["c"] != offsets["b"]
    assert arena == 2048 and "d" not in offsets


def test_the_player_finds_overwritten_values() -> None:
    buffers = {name: Buffer("uint8", (1000,), "temporary") for name in "ab"}
    sections: Sections = {"step": (run([], ["a"]), run([], ["b"]), run(["a"], []))}
    play(buffers, sections, {"a": 0, "b": 1024}, SIZES)
    with pytest.raises(AssertionError, match="a was overwritten"):
        play(buffers, sections, {"a": 0, "b": 768}, SIZES)


# The released networks


def plan_bucket(
    config: PidConfig, program: ProgramSpec, tokens: int, rows: int
) -> tuple[dict[str, int], int, Sizes]:
    sizes = sizes_for(network_of(config), config.tokens_per_latent, rows, tokens)
    plan = plan_arena(program.buffers, program.sections, sizes)
    return plan.offsets, plan.arena_bytes, sizes


@pytest.mark.parametrize("arbitrary", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_and_bucket(name: str, precision: str, arbitrary: bool) -> None:
    config = CHECKPOINTS[name].config
    program = build_program(config, precision, None if arbitrary else KNOWN_TIMES)
    buffers, sections = program.buffers, program.sections
    for tokens in BUCKETS.values():
        rows = MAX_FREE_STEPS if arbitrary else KNOWN_TIMES
        offsets, arena, sizes = plan_bucket(config, program, tokens, rows)
        assert set(offsets) == set(buffers)
        check_plan(buffers, sections, offsets, arena, sizes)
        written = play(buffers, sections, offsets, sizes)
        assert written == set(buffers), "a buffer is read, or waits, that nothing fills"
        assert arena <= 1.06 * live_bytes(buffers, sections, sizes), "the plan wastes memory"


@pytest.mark.parametrize(
    ("space", "variant", "precision", "bucket", "most_gb"),
    [
        ("flux", "2k", "bf16", "2k", 0.53),
        ("flux", "2k", "bf16", "3k", 1.02),
        ("flux", "2k", "bf16", "4k", 1.80),
        ("flux", "2k", "fp16", "4k", 1.80),
        ("flux", "2k", "fp32", "2k", 0.92),
        ("flux", "2k", "fp32", "4k", 3.15),
        ("flux", "2kto4k", "bf16", "2k", 0.55),
        ("flux", "2kto4k", "bf16", "4k", 1.87),
        ("flux2", "2kto4k", "bf16", "4k", 1.87),
        ("siglip", "2k", "bf16", "4k", 1.80),
    ],
)
def test_arena_sizes(space: str, variant: str, precision: str, bucket: str, most_gb: float) -> None:
    """These, 1.85 GB of weights and the largest stage's scratch are all the memory of a decode."""
    config = find_checkpoint(space, variant).config
    program = build_program(config, precision, KNOWN_TIMES)
    _, arena, _ = plan_bucket(config, program, BUCKETS[bucket], KNOWN_TIMES)
    assert most_gb - 0.02 < arena / 1e9 <= most_gb
