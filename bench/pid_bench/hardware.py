"""What a benchmark runs on: names, versions, and how fast the device can be at best."""

import math
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pid_bench.measure import device_clock
from pid_bench.report import Environment
from pid_export.onnx_ports import OPSET
from pid_runtime.backends.stages import DTYPES
from pid_runtime.bundle.manifest import PRECISIONS
from pid_runtime.noise import core_count

DISTRIBUTIONS = (
    "pid-trt",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "diffusers",
    "numpy",
)
"""What a figure may depend on."""

MOST_SECONDS = 3.0
"""Of the calls that one ceiling on the CPU is the fastest of."""


def environment(device: str, threads: int) -> Environment:
    """This machine, without its ceilings. device: "cpu" or "cuda"; threads: used on the CPU."""
    versions = {name: found for name in DISTRIBUTIONS if (found := _version(name))}
    hardware, driver = f"{cpu_name()}, {threads} of {core_count()} cores", ""
    if device == "cuda":
        hardware, driver = torch.cuda.get_device_name(), _driver()
        versions["cuda"] = str(torch.version.cuda)
    else:
        hardware += f" ({', '.join(_vector_units())})" if _vector_units() else ""
    return Environment(
        hardware=hardware,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        driver=driver,
        versions=versions,
        commit=_commit(),
    )


def cpu_name() -> str:
    """The processor, as the system calls it."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    if names:
        return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_bytes() -> int:
    """Host memory that a program may still take; 4 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 4_000_000_000


def matmul_tflop_per_s(precision: str, device: str, threads: int) -> float:
    """The fastest of several products of large matrices, in TFLOP/s.

    On the CPU the better of torch and ONNX Runtime in float32, whose kernels differ; in other
    precisions torch. On CUDA torch, timed by events.
    """
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (1024, 1536, 4096)
    if device == "cpu" and precision != "fp32":
        rows = 128  # processors without such instructions take a hundred times as long
    dtype = DTYPES[PRECISIONS[precision]]
    torch.set_num_threads(threads)
    # Random, as GPUs are faster at ones: they draw less power.
    x = torch.randn(rows, inner, device=device).to(dtype)
    w = torch.randn(inner, columns, device=device).to(dtype)
    calls: list[Callable[[], Any]] = [lambda: torch.mm(x, w)]
    if device == "cpu" and precision == "fp32":
        calls.append(_onnxruntime_matmul(rows, inner, columns, threads))
    best = min(_fastest(call, device) for call in calls)
    return 2 * rows * inner * columns / best / 1e12


def copy_gb_per_s(device: str, threads: int) -> float:
    """The fastest of several copies of a large array, in GB/s read and written."""
    torch.set_num_threads(threads)
    count = (1 << 30) if device == "cuda" else (1 << 28)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _fastest(lambda: target.copy_(source), device) / 1e9


def _fastest(call: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Seconds of the fastest call, after one that does not count."""
    call()
    clock, most = device_clock(device), MOST_SECONDS if device == "cpu" else math.inf
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < most):
        with clock.span("call"):
            call()
        times.append(clock.read()["call"] / 1000)
    return min(times)


def _onnxruntime_matmul(rows: int, inner: int, columns: int, threads: int) -> Callable[[], Any]:
    import onnx
    import onnxruntime as ort

    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {OPSET}]> '
        f"matmul (float[{rows}, {inner}] x) => (float[{rows}, {columns}] y) {{ y = MatMul(x, w) }}"
    )
    weight = onnx.numpy_helper.from_array(np.ones((inner, columns), np.float32), "w")
    model.graph.initializer.append(weight)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = np.ones((rows, inner), np.float32)
    return lambda: session.run(None, {"x": x})


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _vector_units() -> list[str]:
    """Instruction sets that decide how fast matrix products are."""
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "").split()
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX"}
    return [name for flag, name in names.items() if flag in flags]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command).partition("\n")[0]


def _commit() -> str:
    folder = Path(__file__).parent
    if "site-packages" in folder.parts:  # a checkout around it is another project's
        return ""
    describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return _output(["git", "-C", str(folder), *describe])


def _output(command: list[str]) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
