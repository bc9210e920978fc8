"""Our kernels for GPUs: the host's compiler runs them, NVIDIA's compile them."""

import ctypes
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import kernels as on_host
from pid_runtime.backends.dlpack import CPU, RawTensor
from pid_runtime.backends.kernels import PTX, Kernels
from pid_runtime.backends.memory import HostMemory
from pid_runtime.noise import standard_normal
from places import GOLDEN, ROOT

VECTORS = json.loads((GOLDEN / "philox.json").read_text())
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """On a GPU that is the host."""

    def from_ptx(module: bytes) -> SimpleNamespace:
        assert all(f".entry {name}(".encode() in module for name in on_host.ARGUMENTS)
        return SimpleNamespace(get_kernel=lambda name: name)

    core = SimpleNamespace(
        ObjectCode=SimpleNamespace(from_ptx=from_ptx),
        LaunchConfig=SimpleNamespace,
        launch=lambda _, config, name, *arguments: on_host.run(
            name, config.grid, config.block, *arguments
        ),
    )
    return Kernels(core, None, lambda: None)


def tensor(values: Floats) -> RawTensor:
    return RawTensor(values.ctypes.data, "float32", values.shape, (CPU, 0), values)


def fill(kernels: Kernels, seed: int, draw: int, count: int, start: int = 0) -> Floats:
    values = np.full(count + 4, -99, np.float32)
    kernels.fill_normal(tensor(values[:count]), seed, draw, start)
    assert (values[count:] == -99).all(), "wrote past the end"
    return values[:count]


def test_words_are_exact() -> None:
    cases = [(each["counter"], each["key"], each["words"]) for each in VECTORS["known_answers"]]
    for block in VECTORS["blocks"]:
        seed, n = int(block["seed"], 16), int(block["block"], 16)
        counter = [f"{word:x}" for word in (n & 0xFFFFFFFF, n >> 32, block["draw"], 0)]
        cases.append((counter, [f"{seed & 0xFFFFFFFF:x}", f"{seed >> 32:x}"], block["words"]))
    assert len(cases) >= 9
    for counter, key, wanted in cases:
        words = (ctypes.c_uint32 * 4)(*(int(word, 16) for word in counter))
        on_host.library().philox(words, *(ctypes.c_uint32(int(word, 16)) for word in key))
        assert [f"{word:08x}" for word in words] == wanted


def test_normals_are_those_of_every_implementation(kernels: Kernels) -> None:
    seen = 0
    for case in VECTORS["normals"]:
        seed, start = int(case["seed"], 16), int(case["start"], 16)
        first = start // 4 * 4
        values = fill(kernels, seed, case["draw"], start - first + len(case["values"]), first)
        np.testing.assert_allclose(values[start - first :], case["values"], rtol=0, atol=1e-6)
        seen += 1
    assert seen >= 7


@pytest.mark.parametrize(
    ("seed", "draw", "count", "start"),
    [(0, 0, 1, 0), (7, 1, 4098, 8), (2**64 - 1, 2**32 - 1, 1023, 1 << 33), (1 << 40, 3, 777, 4)],
)
def test_normals_are_those_of_the_host(
    kernels: Kernels, seed: int, draw: int, count: int, start: int
) -> None:
    values = fill(kernels, seed, draw, count, start)
    expected = standard_normal(seed, draw, count, start=start)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


# Tiles

BATCH, ROWS, COLUMNS, PATCH, HEIGHT, WIDTH = 2, 11, 9, 4, 5, 6


def normal(seed: int, rows: int, columns: int) -> Floats:
    shape = BATCH, rows, columns, PATCH, PATCH, 3
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same_on_both(kernels: Kernels, work: Callable[[Any, Any], None], *given: Floats) -> None:
    """What work does with a blending and tensors of these values is the same, to the bit."""
    made: list[list[Floats]] = []
    for blending in (kernels, HostMemory().blending):
        values = [each.copy() for each in given]
        work(blending, [tensor(each) for each in values])
        made.append(values)
    changed = False
    for ours, theirs, before in zip(*made, given, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        changed |= not np.array_equal(ours, before)
    assert changed


def test_tiles_are_taken(kernels: Kernels) -> None:
    state, tile = normal(0, ROWS, COLUMNS), normal(1, HEIGHT, WIDTH)
    same_on_both(kernels, lambda b, t: b.take(*t, 6, 3), state, tile)


@pytest.mark.parametrize("row", [0, 4, 6])
def test_tiles_are_added_to_the_ring(kernels: Kernels, row: int) -> None:
    ring, tile = normal(0, HEIGHT, COLUMNS), normal(1, HEIGHT, WIDTH)
    rng = np.random.default_rng(2)
    down, across = (rng.random((n, PATCH), np.float32) for n in (HEIGHT, WIDTH))

    def work(blending: Any, tensors: Any) -> None:
        ring, *others = tensors
        blending.add(ring, *others, row, 3)
        others[0].owner[...] = 0  # used up

    same_on_both(kernels, work, ring, tile, down, across)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("has_before", [True, False])
@pytest.mark.parametrize("factors", [(0.3, 0.7, -0.2, 0.9), (0.3, 0.7, 0.0, 0.0)])
def test_states_are_mixed(
    kernels: Kernels, row: int, has_before: bool, factors: tuple[float, ...]
) -> None:
    state, before = normal(0, ROWS, COLUMNS), normal(2, ROWS, COLUMNS)
    ring, noise = normal(1, HEIGHT, COLUMNS), normal(3, 4, COLUMNS)
    if not factors[2]:
        before[...] = np.nan  # is not read then

    def work(blending: Any, tensors: Any) -> None:
        state, ring, before, noise = tensors
        last = before if has_before else None
        fresh = noise if factors[3] else None
        blending.mix(state, ring, last, fresh, np.array(factors, np.float32), row, 4)

    same_on_both(kernels, work, state, ring, before, noise)


# NVIDIA's compilers


def test_what_ships_is_of_this_source() -> None:
    from compile_kernels import heading

    assert PTX.read_text().startswith(heading(on_host.SOURCE)), "run tools/compile_kernels.py"


@pytest.mark.slow
def test_what_ships_is_what_the_source_gives() -> None:
    subprocess.run([sys.executable, ROOT / "tools/compile_kernels.py", "--check"], check=True)


@pytest.fixture
def core() -> Any:
    for module in ("cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"{module} is not installed")
    return importlib.import_module("cuda.core")


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_90", "sm_120"])
def test_nvrtc_compiles_it(core: Any, target: str) -> None:
    options = core.ProgramOptions(arch=target)
    try:
        code = core.Program(on_host.SOURCE.read_text(), "c++", options).compile("cubin")
    except RuntimeError as error:
        if "nvrtc" not in str(error):
            raise
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    assert code.code.startswith(b"\x7fELF")
    assert all(name.encode() in code.code for name in on_host.ARGUMENTS)


def test_broken_source_is_not_compiled(core: Any) -> None:
    """That is, the test above could fail."""
    source = on_host.SOURCE.read_text().replace("double angle", "double angel")
    program = core.Program(source, "c++", core.ProgramOptions(arch="sm_89"))
    with pytest.raises(Exception, match=r"angle|nvrtc"):
        program.compile("cubin")
