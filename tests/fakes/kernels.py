"""The kernels for GPUs, compiled for the host."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pid_runtime.backends import kernels

SOURCE = kernels.PTX.with_suffix(".cu")
DRIVER = Path(__file__).with_name("host_kernels.cpp")

POINTER, LONG, WORD, FLOAT = np.uint64, np.uint64, np.uint32, np.float32

ARGUMENTS: dict[str, list[Any]] = {
    "pid_standard_normal": [POINTER, LONG, LONG, WORD, LONG],
    "pid_take_tile": [*[POINTER] * 2, *[LONG] * 5],
    "pid_add_tile": [*[POINTER] * 4, *[LONG] * 5, *[WORD] * 2],
    "pid_mix": [*[POINTER] * 4, LONG, *[FLOAT] * 4],
}
"""Of every kernel, as the driver is to get them."""

# Tests take programs out of PATH, and the first that needs the kernels may be one of them.
_ENVIRONMENT = dict(os.environ)

_C_TYPES = {POINTER: ctypes.c_uint64, WORD: ctypes.c_uint32, FLOAT: ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels; skips the test where no compiler is installed."""
    path = _ENVIRONMENT.get("PATH")
    compiler = shutil.which("g++", path=path) or shutil.which("c++", path=path)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    folder = Path(tempfile.mkdtemp(prefix="pid-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    made = folder / "kernels.so"
    command = [compiler, *flags, f'-DKERNELS="{SOURCE}"', "-o", made, DRIVER]
    subprocess.run(command, check=True, env=_ENVIRONMENT)
    return ctypes.CDLL(str(made))


def run(name: str, blocks: int, threads: int, *arguments: Any) -> None:
    """A launch. Arguments are numpy scalars, as cuda.core takes them."""
    kinds = ARGUMENTS[name]
    assert [type(argument) for argument in arguments] == kinds, name
    values = [_C_TYPES[kind](value.item()) for kind, value in zip(kinds, arguments, strict=True)]
    getattr(library(), f"run_{name}")(blocks, threads, *values)
