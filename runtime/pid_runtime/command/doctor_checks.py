"""What `pid-doctor` finds out about a machine: packages, GPUs, and backends that really load."""

import ctypes
import importlib
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

from packaging.requirements import Requirement

from pid_runtime import __version__
from pid_runtime.backends.choice import INSTALL_ONNXRUNTIME
from pid_runtime.backends.device import CudaDevice
from pid_runtime.bundle.flavors import FLAVORS, Flavor, flavor_for
from pid_runtime.errors import PidRuntimeError

State = Literal["ok", "missing", "wrong"]

DISTRIBUTION = "pid-trt"

PROVIDERS = ("cpu", "cuda", "nvtensorrtrtx")
"""Providers of ONNX Runtime, by short name, that an extra of ours installs."""

_GPU_COLUMNS = ("name", "driver_version", "compute_cap", "memory.free", "memory.total")
_MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    """What it is about: package, extra, gpu, backend, bundle, engines or decode."""
    name: str
    """Which one; of a backend with its device: "onnxruntime cuda"."""
    state: State
    """ok; missing, which is no fault; or wrong: it is there and does not work."""
    detail: str
    """One line: what was found, or what it lacks."""
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    """Figures for programs, by name; sizes in bytes."""


def machine() -> list[Finding]:
    """pid-trt, Python and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("machine", DISTRIBUTION, "ok", __version__),
        Finding("machine", "python", "ok", platform.python_version()),
        Finding("machine", "system", "ok", f"{platform.platform()}, {cores} cores"),
    ]


def packages() -> list[Finding]:
    """What pid-trt needs, and what every extra does, as its own metadata says."""
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        cure = "it runs from its files; pip install . in the clone"
        return [Finding("package", DISTRIBUTION, "missing", cure)]
    requirements = [Requirement(line) for line in own.requires or ()]
    extras = own.metadata.get_all("Provides-Extra") or []
    always = [each for each in requirements if _applies(each, "")]
    found = [_installed("package", "needed", always)]
    for extra in sorted({*extras} - {"dev"}):
        added = [each for each in requirements if _applies(each, extra) and each not in always]
        added += [each for one in added for each in _of_its_extras(one)]
        found.append(_installed("extra", extra, added))
    both = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    if len(both) > 1:
        cure = f"pip uninstall {' '.join(both)}, then install one extra, cpu or cuda"
        detail = f"{' and '.join(both)} overwrite each other's files; {cure}"
        found.append(Finding("package", "onnxruntime", "wrong", detail))
    return found


def gpus() -> list[Finding]:
    """NVIDIA's GPUs, as nvidia-smi sees them and as cuda-python does, or else their driver."""
    rows, complaint = _nvidia_smi()
    found = [_gpu(number, row) for number, row in enumerate(rows)]
    absent = Finding("gpu", "cuda-python", "missing", complaint)
    cuda = _load("cuda.core", absent)
    if cuda is absent:
        if not rows and (count := _count_by_driver()):
            return [Finding("gpu", "driver", "ok", f"{count} GPUs, but {complaint}")]
        return found or [replace(absent, name="0")]
    if isinstance(cuda, Finding):
        return [*found, cuda]
    try:
        device = CudaDevice(0)
        free, total = device.memory_bytes()
    except Exception as error:  # noqa: BLE001 - ours, or whatever a driver that is ill raises
        state: State = "wrong" if found else "missing"
        return [*found, replace(absent, state=state, detail=first_line(error))]
    values = {"target": device.target, "free_bytes": free, "total_bytes": total}
    detail = f"{device.name}, {device.target}, {_gigabytes(free, total)}"
    return [*found, replace(absent, state="ok", detail=detail, values=values)]


def backends(*, has_gpu: bool, target: str | None) -> list[Finding]:
    """Every way to decode: whether what runs it loads, which is more than that it is installed.

    target: the GPU's architecture, if it is known.
    """
    libraries = [_tensorrt(flavor, target) for flavor in FLAVORS.values()]
    return [*_onnxruntime(has_gpu=has_gpu), *_torch(has_gpu=has_gpu), *libraries]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _of_its_extras(requirement: Requirement) -> list[Requirement]:
    """What a package needs for the extras of its own that are asked for, if it is installed."""
    try:
        lines = metadata.requires(requirement.name) if requirement.extras else []
    except metadata.PackageNotFoundError:
        return []
    optional = [each for each in map(Requirement, lines or ()) if not _applies(each, "")]
    return [each for each in optional if any(_applies(each, e) for e in requirement.extras)]


def _installed(part: str, name: str, requirements: Iterable[Requirement]) -> Finding:
    versions: dict[str, str] = {}
    absent: list[str] = []
    old: list[str] = []
    for each in requirements:
        try:
            version = versions[each.name] = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            absent.append(each.name)
            continue
        if not each.specifier.contains(version, prereleases=True):
            old.append(f"expected {each.name}{each.specifier}, but got {version}")
    if absent:
        # Of what pid-trt itself needs nothing may be absent.
        state: State = "missing" if part == "extra" else "wrong"
        return Finding(part, name, state, f"without {', '.join(absent)}", {"versions": versions})
    if old:
        target = DISTRIBUTION if part == "package" else f"{DISTRIBUTION}[{name}]"
        detail = f"{'; '.join(old)}; pip install --upgrade '{target}'"
        return Finding(part, name, "wrong", detail, {"versions": versions})
    detail = ", ".join(f"{package} {version}" for package, version in versions.items())
    return Finding(part, name, "ok", detail, {"versions": versions})


def _nvidia_smi() -> tuple[list[list[str]], str]:
    """Of every GPU the values of `_GPU_COLUMNS`, and why there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_COLUMNS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return [], "nvidia-smi is not there"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not run: {error}"
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        return [], f"nvidia-smi says: {lines[0] if lines else f'exit code {done.returncode}'}"
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == len(_GPU_COLUMNS)], "nvidia-smi lists none"


def _count_by_driver() -> int:
    """GPUs that programs may use: containers often have the driver but not nvidia-smi."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _gpu(number: int, row: list[str]) -> Finding:
    name, driver, capability, *memory = row
    values: dict[str, Any] = {"name": name, "driver": driver, "compute_capability": capability}
    detail = f"{name}, driver {driver}, compute capability {capability}"
    if all(size.isdecimal() for size in memory):  # some GPUs share the host's and do not say
        free, total = (int(size) * _MIB for size in memory)
        values |= {"free_bytes": free, "total_bytes": total}
        detail += f", {_gigabytes(free, total)}"
    return Finding("gpu", str(number), "ok", detail, values)


def _gigabytes(free: int, total: int) -> str:
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _load(module: str, absent: Finding) -> Any:
    """A module; `absent` where it is not installed, or what to say where it does not load."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a broken package raises
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return absent
        detail = f"installed, but does not load: {first_line(error)}"
        return replace(absent, state="wrong", detail=detail)


def _onnxruntime(*, has_gpu: bool) -> list[Finding]:
    loaded = _load("onnxruntime", Finding("backend", "onnxruntime", "missing", INSTALL_ONNXRUNTIME))
    if isinstance(loaded, Finding):
        return [loaded]
    from pid_runtime.backends.onnxruntime import find_provider, is_installed

    found: list[Finding] = []
    for name in PROVIDERS:
        state: State = "ok"
        try:
            detail = f"{find_provider(name)} loads, of ONNX Runtime {loaded.__version__}"
            if name != "cpu" and not has_gpu:
                state, detail = "missing", f"{detail}, but there is no GPU"
        except PidRuntimeError as error:
            state, detail = "missing", str(error)
            if not is_installed(name):
                detail = detail.rpartition("; ")[2]
            elif has_gpu:
                state = "wrong"
        found.append(Finding("backend", f"onnxruntime {name}", state, detail))
    return found


def _torch(*, has_gpu: bool) -> list[Finding]:
    absent = Finding("backend", "torch", "missing", "pip install 'pid-trt[torch]'")
    torch = _load("torch", absent)
    if isinstance(torch, Finding):
        return [torch]
    cpu = Finding("backend", "torch cpu", "ok", f"PyTorch {torch.__version__}")
    state: State = "missing"
    if torch.cuda.is_available():
        state, detail = "ok", f"CUDA {torch.version.cuda}"
    elif torch.version.cuda is None:
        detail = f"PyTorch {torch.__version__} is a build for processors"
    else:
        state = "wrong" if has_gpu else "missing"
        detail = f"PyTorch for CUDA {torch.version.cuda} finds no GPU that it can use"
    return [cpu, Finding("backend", "torch cuda", state, detail)]


def _tensorrt(flavor: Flavor, target: str | None) -> Finding:
    absent = Finding("backend", flavor.name, "missing", flavor.install)
    for module in flavor.modules:
        loaded = _load(module, absent)
        if loaded is absent:
            continue
        if isinstance(loaded, Finding):
            return loaded
        version = str(loaded.__version__)
        builds = module == flavor.modules[0] and find_spec("polygraphy") is not None
        values = {"version": version, "builds": builds}
        detail = f"{flavor.title} {version}, {module}, "
        if target is not None and not flavor.runs_on(target):
            other = flavor_for(target, ())
            detail += f"runs no engines on this GPU, {target}; {other.title} does: {other.install}"
            return replace(absent, detail=detail, values=values)
        detail += "builds engines and runs them" if builds else "runs engines"
        if module == flavor.modules[0] and not builds:
            detail += f"; to build them, {flavor.install}"
        return replace(absent, state="ok", detail=detail, values=values)
    return absent
