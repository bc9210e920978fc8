"""The C++ runtime, built once for all workers of a run.

Everything is skipped where what it is built with cannot be had.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from cpp_build import BUILD, QUICK, SANITIZED, build, get_dependencies, one_at_a_time, tool
from cpp_data import write_data


@pytest.fixture(scope="session")
def dependencies() -> Path:
    """A folder for CMAKE_PREFIX_PATH."""
    for name in ("cmake", "ninja", "c++"):
        tool(name)
    folder = BUILD / "dependencies"
    with one_at_a_time(folder):
        code, error = get_dependencies(folder, sys.executable)
    if code:
        reason = (error or f"exit code {code}").splitlines()[-1]
        pytest.skip(f"what the C++ runtime is built with cannot be had: {reason}")
    return folder


@pytest.fixture(scope="session")
def built(dependencies: Path) -> Path:
    """The build folder of the library, its tests and the command, free of warnings."""
    return build(BUILD / "quick", dependencies, {**QUICK, **everything(dependencies)})


@pytest.fixture(scope="session")
def shipped(dependencies: Path) -> Path:
    """The same as `built`, as it is shipped: file by file, so that every include is tried."""
    return build(BUILD / "release", dependencies, everything(dependencies))


def everything(dependencies: Path) -> dict[str, str]:
    return {
        "PID_WARNINGS_AS_ERRORS": "ON",
        "PID_BUILD_CLI": "ON",
        # By itself CMake does not tell an installed library of a folder inside the sources.
        "CMAKE_INSTALL_RPATH": str(dependencies / "lib"),
    }


def clang_with_libfuzzer(folder: Path) -> dict[str, str]:
    """Settings for Clang, if there is one with its sanitizers."""
    source = folder / "fuzzer.cpp"
    source.write_text(
        'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    )
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", str(source), "-o", f"{folder}/a"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return {"PID_SANITIZE": "address,undefined"}
    return {
        "PID_SANITIZE": "address,undefined,fuzzer-no-link",
        "CMAKE_C_COMPILER": "clang",
        "CMAKE_CXX_COMPILER": "clang++",
    }


@pytest.fixture(scope="session")
def sanitized(dependencies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static build with AddressSanitizer and UndefinedBehaviorSanitizer, and fuzz targets."""
    options = clang_with_libfuzzer(tmp_path_factory.mktemp("clang"))
    folder = BUILD / ("sanitized-clang" if "CMAKE_CXX_COMPILER" in options else "sanitized")
    options |= {
        **SANITIZED,
        "BUILD_SHARED_LIBS": "OFF",
        "PID_BUILD_CLI": "OFF",
        "PID_BUILD_FUZZERS": "ON",
        "PID_WARNINGS_AS_ERRORS": "ON",
    }
    tests = ("pid_unit_tests", "pid_api_tests", "pid_two_decoders")
    return build(folder, dependencies, options, *tests, "fuzz_manifest", "fuzz_safetensors")


@pytest.fixture(scope="session")
def data(
    shared_folder: Path,
    golden_bundle: Path,
    free_bundle: Path,
    export_network: Callable[..., Path],
) -> Path:
    """What runtime/cpp/tests reads, and the bundles that both runtimes decode."""
    folder = shared_folder / "cpp"
    with FileLock(shared_folder / "cpp.lock"):
        if not folder.exists():
            aside = shared_folder / "cpp.part"
            aside.mkdir()
            write_data(aside, golden_bundle, free_bundle, export_network)
            aside.rename(folder)
    return folder
