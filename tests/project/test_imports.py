"""Who imports whom, and that the runtime runs where torch and onnx are not installed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import ROOT

ABSENT = ("torch", "onnx", "onnxscript", "onnx_ir", "huggingface_hub", "pid_ref", "pid_export")
"""What the runtime does without."""

BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

FOLDERS = {
    "pid_ref": ROOT / "pid_ref",
    "pid_runtime": ROOT / "runtime" / "pid_runtime",
    "pid_pipelines": ROOT / "runtime" / "pid_pipelines",
    "pid_serve": ROOT / "runtime" / "pid_serve",
    "pid_export": ROOT / "export" / "pid_export",
    "pid_engines": ROOT / "engines" / "pid_engines",
    "pid_bench": ROOT / "bench" / "pid_bench",
}
"""Every package, in an order in which each imports only earlier ones."""

ALLOWED: dict[str, set[str]] = {
    "pid_ref": set(),
    "pid_runtime": set(),
    "pid_pipelines": {"pid_ref", "pid_runtime"},
    "pid_serve": {"pid_pipelines", "pid_runtime"},
    "pid_export": {"pid_pipelines", "pid_ref", "pid_runtime"},
    "pid_engines": {"pid_export", "pid_ref", "pid_runtime"},
    "pid_bench": {"pid_engines", "pid_export", "pid_pipelines", "pid_ref", "pid_runtime"},
}

TORCH_MODULES = {
    "pid_runtime.backends.operations",
    "pid_runtime.backends.rounding",
    "pid_runtime.backends.torch",
    "pid_runtime.backends.stages",
    "pid_runtime.command.torch_files",
}
"""Modules of the runtime that only the torch backend and files of torch.save load."""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where the modules of `ABSENT` cannot be imported."""
    command = [sys.executable, "-W", "error", "-c", BLOCKER + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def imports(file: Path) -> Iterator[str]:
    """Top-level packages a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield str(node.module).partition(".")[0]


def modules(package: str) -> list[Path]:
    return sorted(FOLDERS[package].rglob("*.py"))


def runtime_modules() -> list[str]:
    return [module_name(file) for file in modules("pid_runtime") if file.stem != "__init__"]


def module_name(file: Path) -> str:
    """Of a module of the runtime: pid_runtime.bundle.manifest."""
    return ".".join(file.relative_to(ROOT / "runtime").with_suffix("").parts)


@pytest.mark.parametrize("name", ABSENT)
def test_the_blocker_blocks(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in result.stderr


def test_the_runtime_loads_without_torch_and_onnx() -> None:
    names = [name for name in runtime_modules() if name not in TORCH_MODULES]
    some = {"decoder", "command.decode_cli", "backends.onnxruntime", "interpreter"}
    assert {f"pid_runtime.{name}" for name in some} <= set(names)
    lines = "\n".join(f"import {name}" for name in ["pid_runtime", *names])
    result = python(lines)
    assert result.returncode == 0, result.stderr


def test_the_torch_backend_does_not_load_without_torch() -> None:
    """That is, the test above could fail."""
    for name in TORCH_MODULES:
        assert "No module named 'torch'" in python(f"import {name}").stderr


def test_decodes_without_torch_and_onnx(golden_bundle: Path) -> None:
    result = python(f"""
import numpy as np
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
with Decoder.open({str(golden_bundle)!r}) as pid:
    print(pid.decode(np.zeros((1, 16, 2, 3), np.float32), output="uint8").shape)
try:
    Decoder.open({str(golden_bundle)!r}, "torch")
except PidRuntimeError as error:
    print(error)
print([name for name in sys.modules if name.partition(".")[0] in {ABSENT!r}])
""")
    assert result.returncode == 0, result.stderr
    shape, refusal, loaded = result.stdout.splitlines()
    assert shape == "(1, 64, 96, 3)"
    assert "pip install 'pid-trt[torch]'" in refusal
    assert loaded == "[]"


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_one_way(package: str) -> None:
    own = FOLDERS.keys() - {package}
    for file in modules(package):
        others = own.intersection(imports(file))
        assert others <= ALLOWED[package], f"{file} imports {others}"


ROOMS = ("backends", "bundle", "command", "nano")
"""Packages of the runtime; its other modules are rooms of their own."""


def room_of(module: str) -> str:
    """The room of a module of the runtime: bundle for pid_runtime.bundle.manifest."""
    return module.split(".")[1] if "." in module else module


def own_imports(file: Path) -> set[str]:
    """Modules of the runtime that a file imports, anywhere in it."""
    known = {module_name(other) for other in modules("pid_runtime")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or ({str(node.module)} & known)
    return found - {module_name(file)}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """What imports itself by way of others; empty if nothing does."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_nothing_in_the_runtime_imports_in_a_circle() -> None:
    arrows = {module_name(file): own_imports(file) for file in modules("pid_runtime")}
    assert circle(arrows) == []
    between: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        between.setdefault(room_of(module), set()).update(map(room_of, targets))
    assert set(ROOMS) < between.keys()
    assert circle({room: targets - {room} for room, targets in between.items()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"e"}, "e": set()}) == ["a", "b", "c"]


def test_packages_that_must_exist_do() -> None:
    for package in ("pid_ref", "pid_runtime", "pid_pipelines", "pid_export", "pid_bench"):
        assert modules(package)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import a.b as c, d\ndef f():\n    from e.f import g\n    import h\n")
    assert sorted(imports(file)) == ["a", "d", "e", "h"]


def test_nothing_else_imports_torch() -> None:
    found = {module_name(file) for file in modules("pid_runtime") if "torch" in imports(file)}
    assert found == TORCH_MODULES
