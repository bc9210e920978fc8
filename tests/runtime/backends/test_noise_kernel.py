"""The noise kernel: the host's compiler runs it, NVRTC compiles it for GPUs."""

import importlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pid_runtime.backends import device as cuda_device
from pid_runtime.noise import standard_normal
from places import GOLDEN

KERNEL = Path(cuda_device.__file__).with_name("noise_kernel.cu")
VECTORS = json.loads((GOLDEN / "philox.json").read_text())

DRIVER = r"""
// Runs the kernel on the host. Standard input: one request per line; output: one line each.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>
struct Dim { unsigned x; };
static Dim blockIdx, blockDim, threadIdx;
#define __device__
#define __global__
using std::cos; using std::log; using std::sin; using std::sqrt;
#include KERNEL

int main() {
    char kind[8];
    while (std::scanf("%7s", kind) == 1) {
        unsigned long long a, b, c, d, e, f;
        if (!std::strcmp(kind, "words")) {
            std::scanf("%llx %llx %llx %llx %llx %llx", &a, &b, &c, &d, &e, &f);
            unsigned words[4] = {(unsigned)a, (unsigned)b, (unsigned)c, (unsigned)d};
            philox_4x32_10(words, (unsigned)e, (unsigned)f);
            std::printf("%08x %08x %08x %08x\n", words[0], words[1], words[2], words[3]);
            continue;
        }
        // fill: count seed draw threads-per-block
        std::scanf("%llx %llx %llx %llx", &a, &b, &c, &d);
        std::vector<float> out(a + 4, -99.0f);
        blockDim.x = (unsigned)d;
        for (blockIdx.x = 0; blockIdx.x < (a + 4 * d - 1) / (4 * d); ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < d; ++threadIdx.x)
                pid_standard_normal(out.data(), a, b, (unsigned)c);
        for (float value : out) std::printf("%.9g ", value);
        std::printf("\n");
    }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the kernel."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "driver.cpp").write_text(DRIVER)
    program = folder / "driver"
    define = f'-DKERNEL="{KERNEL}"'
    subprocess.run(
        [compiler, "-std=c++17", "-O1", define, "-o", program, folder / "driver.cpp"], check=True
    )
    return program


def ask(host: Path, *lines: str) -> list[list[str]]:
    """The fields of a line of output for each line of input."""
    result = subprocess.run(
        [host], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    return [line.split() for line in result.stdout.splitlines()]


def fill(host: Path, seed: int, draw: int, count: int, threads: int = 256) -> NDArray[np.float64]:
    ((*values,),) = ask(host, f"fill {count:x} {seed:x} {draw:x} {threads:x}")
    assert [float(value) for value in values[count:]] == [-99.0] * 4, "wrote past the end"
    return np.array([float(value) for value in values[:count]])


def test_words_are_exact(host: Path) -> None:
    lines = [
        " ".join(["words", *known["counter"], *known["key"]]) for known in VECTORS["known_answers"]
    ]
    wanted = [known["words"] for known in VECTORS["known_answers"]]
    for block in VECTORS["blocks"]:
        seed, n = int(block["seed"], 16), int(block["block"], 16)
        counter = (n & 0xFFFFFFFF, n >> 32, block["draw"], 0)
        key = (seed & 0xFFFFFFFF, seed >> 32)
        lines.append("words " + " ".join(f"{word:x}" for word in (*counter, *key)))
        wanted.append(block["words"])
    assert len(lines) >= 9
    assert ask(host, *lines) == wanted


def test_normals_are_those_of_every_implementation(host: Path) -> None:
    seen = 0
    for case in VECTORS["normals"]:
        seed, start = int(case["seed"], 16), int(case["start"], 16)
        if start < 1 << 21:
            values = fill(host, seed, case["draw"], start + len(case["values"]))[start:]
            np.testing.assert_allclose(values, case["values"], rtol=0, atol=1e-6)
            seen += 1
    assert seen >= 6


@pytest.mark.parametrize(
    ("seed", "draw", "count", "threads"),
    [(0, 0, 1, 256), (7, 1, 4098, 64), (2**64 - 1, 2**32 - 1, 1023, 256), (1 << 40, 3, 777, 1)],
)
def test_normals_are_those_of_the_host(
    host: Path, seed: int, draw: int, count: int, threads: int
) -> None:
    values = fill(host, seed, draw, count, threads)
    np.testing.assert_allclose(values, standard_normal(seed, draw, count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_90", "sm_120"])
def test_nvrtc_compiles_it(target: str) -> None:
    for module in ("cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"{module} is not installed")
    core: Any = importlib.import_module("cuda.core")
    options = core.ProgramOptions(arch=target)
    try:
        code = core.Program(KERNEL.read_text(), "c++", options).compile("cubin")
    except RuntimeError as error:
        if "nvrtc" not in str(error):
            raise
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    assert b"pid_standard_normal" in code.code and code.code.startswith(b"\x7fELF")


def test_broken_source_is_not_compiled() -> None:
    """That is, the test above could fail."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda.core is not installed")
    core: Any = importlib.import_module("cuda.core")
    source = KERNEL.read_text().replace("double angle", "double angel")
    program = core.Program(source, "c++", core.ProgramOptions(arch="sm_89"))
    with pytest.raises(Exception, match=r"angle|nvrtc"):
        program.compile("cubin")
