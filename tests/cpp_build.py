"""Building of the C++ runtime, for tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from filelock import FileLock

from places import ROOT

BUILD = ROOT / "build" / "cpp"


def tool(name: str) -> str:
    """A program of the virtual environment or the system; the test is skipped without it."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"no {name}: pip install cmake ninja, and install a C++17 compiler")
    return found


def run(*command: object, environment: Mapping[str, str] | None = None) -> str:
    """Output of a command that must succeed, with these variables added to its environment."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def get_dependencies(folder: Path, onnxruntime: object) -> tuple[int, str]:
    """Exit code and complaints of get_dependencies.sh."""
    script = ROOT / "runtime" / "cpp" / "tools" / "get_dependencies.sh"
    command = (tool("bash"), str(script), str(folder), str(onnxruntime))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


QUICK = {
    "CMAKE_BUILD_TYPE": "Debug",
    "CMAKE_CXX_FLAGS_DEBUG": "-Og",
    "CMAKE_UNITY_BUILD": "ON",
    "CMAKE_UNITY_BUILD_BATCH_SIZE": "0",
}
"""Settings for half the time to compile: of all files at once, with few optimisations."""

SANITIZED = {"CMAKE_BUILD_TYPE": "Debug", "CMAKE_CXX_FLAGS_DEBUG": "-g1"}
"""Settings that are enough for the lines of a finding."""


def one_at_a_time(folder: Path) -> FileLock:
    """What keeps two workers, or runs, from making the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock")


def build(
    folder: Path,
    dependencies: object,
    options: Mapping[str, str],
    *targets: str,
    source: Path = ROOT,
) -> Path:
    """Configure and build in `folder`: all, or some targets."""
    settings = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_PREFIX_PATH": str(dependencies),
        **options,
    }
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    configure = (tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *defines)
    with one_at_a_time(folder):
        if subprocess.run(configure, capture_output=True, check=False).returncode:
            # Its settings may be those of an older checkout, or of one in another place.
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            run(*configure)
        chosen = ("--target", *targets) if targets else ()
        run(tool("cmake"), "--build", folder, *chosen)
    return folder


def executable(folder: Path, name: str) -> Path:
    (found,) = (p for p in folder.rglob(name) if p.is_file() and os.access(p, os.X_OK))
    return found
